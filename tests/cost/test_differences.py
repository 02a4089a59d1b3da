"""Differences from a mean over a batch, which XLA:GPU writes or computes again."""

import keras
import pytest

from partita.capture.program import capture_program
from partita.cost.backends import compiler_of
from partita.cost.differences import is_slower_fused
from partita.cost.laid_out_fusion import fused_under
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import mesh_of

GPU = load("h100:4")


@pytest.mark.parametrize(
    ("rows", "columns", "is_written"),
    [
        (32, 1024, False),
        (64, 512, False),
        (128, 512, False),
        (256, 1024, True),
        (512, 64, True),
        (1024, 512, True),
        (2048, 64, True),
        (3136, 2048, True),
        (4096, 256, True),
    ],
)
def test_short_sums_over_many_rows_read_differences_from_memory(rows, columns, is_written):
    """As in ResNet50s of 64 x 64 and 224 x 224 compiled for H100s."""
    assert is_slower_fused(rows, columns, itemsize=4) == is_written


@pytest.mark.parametrize(("samples", "written"), [(4, 0), (64, 1), (1024, 0)])
def test_differences_are_written_by_the_rows_of_a_device(samples, written):
    """Devices have 64, 1,024 and 16,384 rows; the last sum is split into two."""
    layers = [
        keras.layers.Conv2D(128, 1),
        keras.layers.BatchNormalization(),
        keras.layers.Conv2D(8, 1),
    ]
    model = keras.Sequential([keras.Input((8, 8, 16)), *layers])
    model.compile("sgd", "mse")
    graph = capture_program(model, samples, target="cuda").graph
    plan = BASELINES["data parallel"](graph, GPU.name, mesh_of(GPU))
    rules = compiler_of(GPU.backend).fusion_rules
    fused = fused_under(graph, layout_of(graph, plan), rules, plan.mesh)
    kernels = [graph.instructions[root] for root in fused.kernels]
    differences = [x for x in kernels if x.name == "subtract" and x.phase == "forward"]
    shapes = [graph.tensors[x.results[0]].shape for x in differences]
    assert shapes.count((samples, 8, 8, 128)) == written


def test_a_sum_of_two_values_is_computed_by_two_readers():
    """A residual sum by its ReLU and by the gradient of that: four reads, and no write."""
    image = keras.Input((16, 16, 16))
    convolutions = [keras.layers.Conv2D(16, 3, padding="same", use_bias=False) for _ in range(3)]
    one, other, last = convolutions
    y = last(keras.ops.relu(keras.layers.Add(name="residual")([one(image), other(image)])))
    model = keras.Model(image, y)
    model.compile("sgd", "mse")
    graph = capture_program(model, 64, target="cuda").graph
    plan = BASELINES["one device"](graph, GPU.name, mesh_of(GPU))
    rules = compiler_of(GPU.backend).fusion_rules
    fused = fused_under(graph, layout_of(graph, plan), rules, plan.mesh)
    (total,) = (
        i for i, x in enumerate(graph.instructions) if x.name == "add" and x.path == "residual"
    )
    assert total not in fused.kernels
    assert len(fused.computed_in[total]) == 2
