"""Gathers over devices, which make the gathered dim the major one on GPUs (XLA:GPU)."""

from dataclasses import replace

import keras
import pytest

from partita.capture.program import capture_program
from partita.cost.backends import compiler_of
from partita.cost.delayed import delayed_kernels
from partita.cost.fusion import kernel_reads
from partita.cost.laid_out_fusion import fused_under
from partita.cost.lifetimes import lifetimes_under
from partita.graph.flat import readers_of
from partita.graph.operator_graph import IdentityKey, producers
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import Read, layout_of
from partita.search.find import mesh_of

GPU = load("h100:4")
layers = keras.layers


def pooled(samples):
    """Two convolutions with biases, ReLUs and average pooling."""
    x = image = keras.Input((8, 8, 4))
    for name in ("first", "last"):
        x = layers.Conv2D(8, 3, padding="same", activation="relu", name=name)(x)
        x = layers.AveragePooling2D(2, 1, padding="same")(x)
    return captured(keras.Model(image, x), samples)


def captured(model, samples):
    model.compile("sgd", "mse")
    return capture_program(model, samples, target=GPU.target).graph


def laid_out(graph, baseline):
    """(plan, layout, kernels) of a baseline."""
    plan = BASELINES[baseline](graph, GPU.name, mesh_of(GPU))
    layout = layout_of(graph, plan)
    return (
        plan,
        layout,
        fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules, plan.mesh),
    )


def bias_gradient(graph):
    """The sum for the bias of `last`."""
    (root,) = (
        i
        for i, x in enumerate(graph.instructions)
        if x.name == "reduce" and x.phase == "backward" and x.path == "last"
    )
    return root


def test_a_sum_reads_a_gathered_gradient_and_masks_it_again():
    graph = pooled(64)
    plan, layout, fused = laid_out(graph, "tensor parallel")
    root = bias_gradient(graph)
    read = kernel_reads(graph, fused)[root]
    gathered = [tensor for tensor, readers in read.items() if layout.targets.get(readers[0])]
    assert "select" in {graph.instructions[i].name for i in fused.kernels[root]}
    assert [graph.tensors[tensor].shape for tensor in gathered] == [(64, 8, 8, 8)]
    delay = delayed_kernels(graph, layout, plan.mesh, fused)[root]
    assert delay.reads.issuperset(gathered)
    times = lifetimes_under(IdentityKey(graph), IdentityKey(layout), plan.mesh, GPU.backend)
    (reader,) = {i for i, _ in read[gathered[0]]}
    assert times.last_kernel[reader] == delay.time


def test_a_sum_reads_the_masked_gradient_where_nothing_is_gathered():
    graph = pooled(64)
    _, _, fused = laid_out(graph, "one device")
    names = [graph.instructions[i].name for i in fused.kernels[bias_gradient(graph)]]
    assert "select" not in names


def test_a_sum_of_a_slice_reads_the_masked_gradient():
    graph = pooled(64)
    plan, layout, _ = laid_out(graph, "tensor parallel")
    root = bias_gradient(graph)
    masked = graph.instructions[root].operands[0]
    channels = ((), (), (), (0, 1))
    sliced = Read(masked, graph.owner[root], channels, ((root, 0),))
    layout = replace(layout, reads=(*layout.reads, sliced))
    fused = fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules, plan.mesh)
    assert "select" not in {graph.instructions[i].name for i in fused.kernels[root]}


@pytest.mark.parametrize(("samples", "is_written"), [(4096, False), (16384, True)])
def test_a_mask_is_written_where_that_saves_time(samples, is_written):
    """Two kernels read 8 or 34 MB, or a quarter, which one more writes in at least 1 us."""
    graph = pooled(samples)
    _, _, fused = laid_out(graph, "tensor parallel")
    kernels = {graph.instructions[root].name for root in fused.kernels}
    assert ("compare" in kernels) == is_written


@pytest.fixture(scope="module")
def concatenated():
    """A normalization of two joined tensors, which a convolution reads: 1,024 rows, 128 columns."""
    image = keras.Input((8, 8, 16))
    one = layers.Conv2D(64, 1, name="one")(image)
    x = layers.Concatenate()([one, layers.Conv2D(64, 1)(one)])
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    return captured(keras.Model(image, layers.Conv2D(32, 1)(x)), 16)


@pytest.mark.parametrize(("baseline", "written"), [("one device", 1), ("tensor parallel", 0)])
def test_no_difference_is_written_for_a_sum_over_a_gathered_batch(concatenated, baseline, written):
    graph = concatenated
    _, _, fused = laid_out(graph, baseline)
    kernels = [graph.instructions[root] for root in fused.kernels]
    differences = [x for x in kernels if x.name == "subtract" and x.phase == "forward"]
    shapes = [graph.tensors[x.results[0]].shape for x in differences]
    assert shapes.count((16, 8, 8, 128)) == written


def test_operands_of_a_slice_stay_until_its_elementwise_reader(concatenated):
    graph = concatenated
    plan, layout, fused = laid_out(graph, "tensor parallel")
    times = lifetimes_under(IdentityKey(graph), IdentityKey(layout), plan.mesh, GPU.backend)
    (gradient,) = (tensor for tensor in times.sliced if graph.tensors[tensor].size >= 65536)
    root = producers(graph)[gradient]
    ((reader, position),) = readers_of(graph)[gradient]
    assert graph.instructions[reader].name == "add"
    assert layout.targets[reader, position] != layout.shardings[gradient]
    large = [t for t in kernel_reads(graph, fused)[root] if len(graph.tensors[t].shape) == 4]
    assert large
    assert all(times.dies[tensor] >= reader for tensor in large)
