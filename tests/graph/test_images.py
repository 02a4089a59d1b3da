"""Images: tensors of one order of dims, the order that XLA:TPU gives them, and their sums."""

import keras
import pytest

from partita.capture.program import capture_program
from partita.cost.backends import compiler_of
from partita.cost.sums import LaidOutProgram
from partita.graph.images import TiledDims, images
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import mesh_of

TPU = load("tpu-v5e:4")


@pytest.fixture(scope="module")
def graph():
    """8 channels, concatenated with themselves and normalized in groups, then 64 channels."""
    image = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="few")(image)
    x = keras.layers.Concatenate(name="joined")([x, keras.layers.Activation("tanh")(x)])
    x = keras.layers.Conv2D(64, 1, name="many")(keras.layers.GroupNormalization(2)(x))
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(x))
    model.compile("sgd", "mse")
    return capture_program(model, 64, target=TPU.target).graph


def results(graph, name, path):
    """The first results of instructions of a name, in a layer."""
    chosen = (x for x in graph.instructions if x.name == name and x.path.endswith(path))
    return [x.results[0] for x in chosen]


def test_instructions_that_keep_dims_pass_an_order_on(graph):
    found = images(graph)
    (first,) = results(graph, "convolution", "few")[:1]
    (second,) = results(graph, "convolution", "many")[:1]
    (joined,) = results(graph, "concatenate", "joined")
    assert found.dims[first] == found.dims[joined] == TiledDims(0, 3)
    assert found.group[first] == found.group[joined] != found.group[second]
    assert [graph.tensors[t].shape for t in found.divided][0] == (64, 16, 16, 2, 8)
    assert found.group[next(iter(found.divided))] == found.group[first]


def test_samples_are_the_minor_dim_of_images_beside_one_of_few_channels(graph):
    """A device has 16 samples. One image of 8 channels decides for those that it is joined to."""
    mesh = mesh_of(TPU)
    layout = layout_of(graph, BASELINES["data parallel"](graph, TPU.name, mesh))
    tpu = compiler_of(TPU.backend)
    orders = tpu.orders(LaidOutProgram(graph, mesh, layout))
    (joined,) = results(graph, "concatenate", "joined")
    few, many = (results(graph, "convolution", name)[0] for name in ("few", "many"))
    assert orders[few] == orders[joined] == (0, 3)
    assert orders[many] == (3, 0)
    # 16 samples fill 128 lanes, 8 channels a tile's rows, for each of 16 x 16 pixels.
    assert tpu.stored_bytes((16, 16, 16, 8), 4, orders[few]) == 4 * 256 * 128 * 8
    arguments = {argument.tensor for argument in graph.arguments}
    assert arguments.isdisjoint(orders)


def test_a_tpu_sums_over_rows_and_samples_apart_where_a_window_moves_over_rows(graph):
    tpu, gpu = (compiler_of(load(name).backend) for name in ("tpu-v5e:4", "h100:4"))
    folds = {}
    for x in graph.instructions:
        if x.name == "convolution" and len(graph.tensors[x.results[0]].shape) == 4:
            folds[graph.tensors[x.results[0]].shape] = tpu.folds(x)
            assert gpu.folds(x)
    assert not folds[3, 3, 3, 8]
    assert folds[1, 1, 16, 64]
    assert folds[64, 16, 16, 64]
