"""Kernels that XLA:GPU delays: reductions of gradients, and repeated forward values."""

from dataclasses import replace

import jax
import keras
import pytest

from partita.capture.jax_functions import Leaf, capture_step
from partita.capture.program import capture_program
from partita.cost.backends import compiler_of
from partita.cost.delayed import delayed_reductions, joined_repetitions
from partita.cost.fusion import fused_under
from partita.cost.memory import memory
from partita.graph.operator_graph import constant_tensors
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import mesh_of

GPU = load("h100:4")


@pytest.fixture(scope="module")
def graph():
    """A convolution, group normalization of its 32 x 32 x 16 images, and a softmax."""
    image = keras.Input((32, 32, 4))
    x = keras.layers.Conv2D(16, 3, padding="same")(image)
    x = keras.layers.GroupNormalization(4, name="groups")(x)
    x = keras.layers.Activation("relu")(x)
    x = keras.layers.Conv2D(8, 1, activation="softmax", name="classes")(x)
    model = keras.Model(image, x)
    model.compile("sgd", "mse")
    return capture_program(model, 16, target=GPU.target).graph


def delayed(graph, baseline):
    plan = BASELINES[baseline](graph, GPU.name, mesh_of(GPU))
    layout = layout_of(graph, plan)
    fused = fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules)
    return delayed_reductions(graph, layout, fused)


def test_a_reduction_of_a_reduction_reads_the_whole_operand(graph):
    shapes = {
        graph.instructions[root].path.split("/")[-1]: {graph.tensors[t].shape for t in tensors}
        for root, tensors in delayed(graph, "one device").items()
    }
    assert (16, 32, 32, 4, 4) in shapes["groups"]
    assert (16, 32, 32, 8) in shapes["classes"]


def test_a_reduction_that_devices_sum_is_not_delayed(graph):
    assert not delayed(graph, "data parallel")


def test_values_wait_for_delayed_reductions(graph, monkeypatch):
    plan = BASELINES["one device"](graph, GPU.name, mesh_of(GPU))
    layout = layout_of(graph, plan)
    course = memory(graph, plan.mesh, layout, GPU.backend).course
    monkeypatch.setattr("partita.cost.lifetimes.delayed_reductions", lambda *_: {})
    in_program_order = memory(graph, plan.mesh, replace(layout), GPU.backend).course
    assert (course >= in_program_order).all()
    images = 4 * 16 * 32 * 32 * 16
    assert (course - in_program_order).max() >= images


@pytest.mark.parametrize("has_gradients", [True, False])
def test_a_repeated_value_waits_for_the_gradient_that_reads_its_operand(has_gradients):
    def step(state, x):
        incoming = x @ (state[0] + jax.numpy.arange(128.0))
        repeated = x * x
        gradient = incoming * x
        return {}, (state[0] + jax.numpy.einsum("bi,bj->ij", repeated, gradient),)

    shape = jax.ShapeDtypeStruct
    arrays = (shape((128, 128), "float32"),), shape((256, 128), "float32")
    graph = capture_step(step, *arrays, [Leaf("w", "parameter")], batch_size=256).graph
    of = {x.operands: n for n, x in enumerate(graph.instructions) if x.name == "multiply"}
    repeated, gradient = sorted(of.values(), key=lambda n: len(set(graph.instructions[n].operands)))
    constants = constant_tensors(graph)
    phases = []
    for n, instruction in enumerate(graph.instructions):
        is_constant = constants.issuperset(instruction.results)
        is_backward = n != repeated and (has_gradients or is_constant)
        phases.append("backward" if is_backward else "forward")
    instructions = [
        replace(instruction, phase=phase)
        for instruction, phase in zip(graph.instructions, phases, strict=True)
    ]
    graph = replace(graph, instructions=tuple(instructions))
    fused = fused_under(
        graph,
        layout_of(graph, BASELINES["one device"](graph, GPU.name, mesh_of(GPU))),
        compiler_of(GPU.backend).fusion_rules,
    )
    assert repeated < gradient
    ends = {graph.instructions[repeated].results[0]: gradient} if has_gradients else {}
    assert joined_repetitions(graph, fused) == ends, "a constant begins no backward pass"
