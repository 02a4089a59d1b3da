"""Kernels of a graph under a layout."""

from dataclasses import replace

import keras

from partita.capture.program import capture_program
from partita.cost.backends import compiler_of
from partita.cost.laid_out_fusion import added_sums, fused_under
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import mesh_of

GPU = load("h100:4")


def test_devices_sum_the_last_addition_of_partial_gradients():
    """Of a ReLU that three convolutions read, each with a part of its input's channels."""
    x = image = keras.Input((8, 8, 16))
    for _ in range(2):
        branches = [keras.layers.Conv2D(16, 3, padding="same")(x) for _ in range(3)]
        x = keras.layers.Activation("relu")(keras.layers.Concatenate()(branches))
    model = keras.Model(image, x)
    model.compile("sgd", "mse")
    graph = capture_program(model, 64, target=GPU.target).graph
    plan = BASELINES["tensor parallel"](graph, GPU.name, mesh_of(GPU))
    layout = layout_of(graph, plan)
    (last,) = added_sums(graph, layout)
    assert graph.instructions[last].name == "add"
    rules = compiler_of(GPU.backend).fusion_rules
    for joins_sums in (True, False):
        rules = replace(rules, joins_sums=joins_sums)
        fused = fused_under(graph, layout, rules, plan.mesh)
        assert (last in fused.kernels) == joins_sums
