"""Instructions without a layer's name are split like the values that they read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from partita.capture.jax_functions import Captured, Leaf, capture_step
from partita.capture.targets import CaptureTarget
from partita.cost.collectives import collectives
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import mesh_of

F32 = "float32"


def penalized(weights: Any, x: Any) -> jax.Array:
    """Two layers, with the squares of their weights added to the loss."""
    loss = jnp.mean(jnp.tanh(x @ weights[0]) @ weights[1])
    return loss + 0.01 * sum(jnp.sum(w**2) for w in weights)


def spectral(weights: Any, x: Any) -> jax.Array:
    """A product of low frequencies beside one of all positions."""
    mix, local = weights
    wave = jnp.fft.rfft(x, axis=1)
    low = jnp.einsum("bfc,cd->bfd", wave[:, :4], mix)
    wave = jnp.zeros_like(wave).at[:, :4].set(low)
    return jnp.mean(jnp.tanh(jnp.fft.irfft(wave, n=x.shape[1], axis=1) + jnp.tanh(x @ local)) ** 2)


def captured(loss: Callable[..., Any], state: Any, batch: tuple[int, ...]) -> Captured:
    def step(weights: Any, x: Any) -> Any:
        value, slopes = jax.value_and_grad(loss)(weights, x)
        return value, [w - s for w, s in zip(weights, slopes, strict=True)]

    leaves = [Leaf(f"w{number}", "parameter") for number in range(len(state))]
    x = jax.ShapeDtypeStruct(batch, F32)
    return capture_step(
        step, state, x, leaves, batch_size=batch[0], target=CaptureTarget.of("cuda")
    )


def shapes(*dims: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(one, F32) for one in dims]


@pytest.mark.parametrize(
    ("loss", "state", "batch", "plan"),
    [
        (penalized, shapes((16, 64), (64, 32)), (8, 16), "tensor parallel"),
        (spectral, shapes((8, 8), (8, 8)), (8, 16, 8), "data parallel"),
    ],
)
def test_nothing_is_gathered(loss: Any, state: Any, batch: Any, plan: str) -> None:
    graph = captured(loss, state, batch).graph
    machine = load("h100:4")
    mesh = mesh_of(machine)
    layout = layout_of(graph, BASELINES[plan](graph, machine.name, mesh))
    kinds = {one.kind for one in collectives(graph, mesh, layout, machine.backend)}
    assert kinds == {"all_reduce"}
