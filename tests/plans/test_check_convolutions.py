"""Splits of convolutions that XLA's partitioner computes wrong are refused."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from partita.capture.keras_models import capture_model
from partita.capture.program import capture_program
from partita.graph.operator_graph import OperatorGraph
from partita.plans.check import illegal_reason
from partita.plans.plan import mesh_for

MESH = mesh_for((2, 2))


@pytest.fixture(scope="module")
def graph() -> OperatorGraph:
    """Convolutions, the first with weights by height and width behind it, the second grouped."""
    image = keras.Input((6, 6, 4))
    x = keras.layers.Conv2D(8, 3, padding="same", name="normalized")(image)
    x = keras.layers.LayerNormalization(axis=(1, 2, 3))(x)
    x = keras.layers.Conv2D(8, 3, padding="same", groups=2, name="grouped")(x)
    model = keras.Model(image, keras.layers.Dense(4)(keras.layers.Flatten()(x)))
    model.compile("sgd", "mse")
    return capture_model(model, (np.zeros((8, 6, 6, 4)), np.zeros((8, 4)))).graph


@pytest.mark.parametrize(
    ("layer", "choice", "problem"),
    [
        ("normalized", {"a": "S"}, ""),
        ("normalized", {"a": "S", "b": "P1"}, ""),
        ("normalized", {"a": "P2", "b": "P1"}, ""),
        ("normalized", {"a": "P3"}, ""),
        ("normalized", {"a": "P1"}, "split in space"),
        ("normalized", {"a": "P3", "b": "P1"}, "split in space"),
        ("normalized", {"a": "R", "b": "P2"}, "split in space"),
        ("grouped", {"a": "S", "b": "S"}, ""),
        ("grouped", {"a": "S"}, "grouped"),
    ],
)
def test_a_convolution_is_split_over_all_axes_where_xla_sums_over_all(
    graph: OperatorGraph, layer: str, choice: dict[str, str], problem: str
) -> None:
    number = [operator.name for operator in graph.operators].index(layer)
    names = {graph.factors[f].name for f in graph.operators[number].factors}
    assert set(choice.values()) <= names
    reason = illegal_reason(graph, number, choice, MESH)
    assert (reason is None) == (not problem) and problem in (reason or "")


@pytest.mark.parametrize("choice", [{"a": "R1"}, {"a": "S", "b": "R1"}, {"a": "R1", "b": "P"}])
def test_a_dim_shorter_than_its_window_is_not_split(choice: dict[str, str]) -> None:
    """XLA sums the gradient of such an image over devices that do not share the sum."""
    inputs = keras.Input((2, 2, 8))
    image = keras.layers.Conv2D(8, 1)(inputs)
    conv = keras.layers.Conv2D(8, 3, padding="same", activation="silu", name="small")(image)
    x = keras.layers.Flatten()(keras.layers.Add()([image, conv]))
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    model.compile("sgd", "mse")
    graph = capture_program(model, 16).graph
    number = [operator.name for operator in graph.operators].index("small")
    assert "shorter than its window" in (illegal_reason(graph, number, choice, MESH) or "")
    assert illegal_reason(graph, number, {"a": "S", "b": "R3"}, MESH) is None


@pytest.mark.parametrize("layer", [keras.layers.Conv2D, keras.layers.Conv3D])
def test_patches_are_split_in_space_over_all_axes(layer: type[keras.layers.Layer]) -> None:
    """Windows as wide as their steps, with weights by position behind them."""
    dims = layer(1, 1).rank
    image = keras.Input((4,) * dims + (2,))
    patches = layer(4, 2, strides=2, name="patches")(image)
    positions = tuple(range(1, dims + 1))
    x = keras.layers.LayerNormalization(axis=(*positions, -1))(patches)
    model = keras.Model(image, x)
    model.compile("sgd", "mse")
    graph = capture_program(model, 8).graph
    number = [operator.name for operator in graph.operators].index("patches")
    assert illegal_reason(graph, number, {"a": "S"}, MESH) is None
    for position in positions:
        name = f"P{position}"
        assert name in {graph.factors[f].name for f in graph.operators[number].factors}
        assert "split in space" in (illegal_reason(graph, number, {"a": name}, MESH) or "")
        assert illegal_reason(graph, number, {"a": "S", "b": name}, MESH) is None


@pytest.mark.parametrize(
    ("choice", "problem"),
    [({"a": "S"}, ""), ({"a": "A1"}, "split in space"), ({"a": "S", "b": "A1"}, "")],
)
def test_a_convolution_of_a_loop_is_split_in_space_over_all_axes(
    choice: dict[str, str], problem: str
) -> None:
    rows = keras.Input((4, 6, 2))
    x = keras.layers.ConvLSTM1D(4, 3, padding="same", name="loop")(rows)
    model = keras.Model(rows, keras.layers.Dense(4)(keras.layers.Flatten()(x)))
    model.compile("sgd", "mse")
    graph = capture_model(model, (np.zeros((8, 4, 6, 2)), np.zeros((8, 4)))).graph
    number = [operator.name for operator in graph.operators].index("loop")
    names = {graph.factors[f].name for f in graph.operators[number].factors}
    assert set(choice.values()) <= names
    reason = illegal_reason(graph, number, choice, MESH)
    assert (reason is None) == (not problem) and problem in (reason or "")


def test_samples_of_a_convolution_with_groups_of_samples_are_not_split() -> None:
    """XLA aborts the process."""

    def step(kernel, images):
        def loss(kernel):
            result = jax.lax.conv_general_dilated(images, kernel, (1,), "SAME", batch_group_count=2)
            return jnp.mean(result**2)

        return kernel - jax.grad(loss)(kernel)

    graph = capture_program(step, args=(jnp.ones((8, 4, 3)), jnp.ones((16, 4, 9)))).graph
    rule = next(i.rule for i in graph.instructions if i.name == "convolution")
    assert rule is not None and set(rule.results[0][0]) <= set(rule.gathered)
