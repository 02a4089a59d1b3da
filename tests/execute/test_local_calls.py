"""Fourier transforms on the parts of several devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import partita
from partita.capture.program import capture_program
from partita.capture.stablehlo import context, parse
from partita.errors import CompilerError
from partita.execute.annotate import annotate
from partita.execute.steps import settled
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.plans.plan import mesh_for


def spectral_layers(x, channels, waves):
    """Two products of channels, the second one of the lowest frequencies."""
    y = jnp.einsum("nchw,cd->dnhw", x, channels)
    spectrum = jnp.fft.rfft2(y.swapaxes(0, 1))
    low = jnp.einsum("nchw,cdhw->dnhw", spectrum[:, :, :3, :3], waves[0] + 1j * waves[1])
    kept = jnp.zeros_like(spectrum).at[:, :, :3, :3].set(low.swapaxes(0, 1))
    return jnp.fft.irfft2(kept)


def train(weights, x):
    def loss_of(weights):
        return jnp.mean((spectral_layers(x, *weights) - 1) ** 2)

    loss, slopes = jax.value_and_grad(loss_of)(weights)
    return jax.tree.map(lambda w, slope: w - 0.1 * slope, weights, slopes), loss


@pytest.mark.parametrize("plan", ["dp", "tp", "fsdp"])
def test_a_fourier_transform_gathers_nothing_beyond_the_plan(plan):
    draw = np.random.default_rng(0).standard_normal
    weights = draw((4, 4)).astype("float32"), draw((2, 4, 4, 3, 3)).astype("float32")
    x = draw((8, 4, 8, 6)).astype("float32")
    lines: list[str] = []
    step = partita.parallelize(train, (weights, x), devices=4, plan=plan, say=lines.append)
    expected, loss = train(weights, x)
    result, result_loss = step(weights, x)
    assert np.isclose(result_loss, loss, rtol=1e-5)
    for value, one in zip(result, expected, strict=True):
        np.testing.assert_allclose(value, one, atol=1e-5)
    traffic = re.findall(r"(\S.*): (.+) planned, (.+) emitted", "\n".join(lines))
    assert traffic
    assert all(planned == emitted for _, planned, emitted in traffic), lines


@pytest.mark.parametrize(("target", "fixed"), [("cpu", 4), ("tpu", 0)])
def test_only_a_cpu_fixes_the_layout_of_operands(target, fixed):
    weights = np.ones((4, 4), "float32"), np.ones((2, 4, 4, 3, 3), "float32")
    args = weights, np.ones((8, 4, 8, 6), "float32")
    captured = capture_program(train, args=args, target=target)
    plan = BASELINES["data parallel"](captured.graph, "host", mesh_for((4,)))
    layout = layout_of(captured.graph, plan)
    source = annotate(captured.text.mlir_module_serialized, captured.graph, plan.mesh, layout)
    with context():
        text = str(parse(source))
    assert text.count("@LayoutConstraint") == fixed
    assert text.count("sdy.manual_computation") == 4  # all transforms, two of the backward pass


def test_a_fourier_transform_outside_a_plan_gets_one_sentence():
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "a"))
    x = jax.device_put(np.ones((4, 2, 8, 6), "float32"), split)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    waves = jax.jit(jnp.fft.fft2, out_shardings=whole)(x)
    with pytest.raises(CompilerError, match=r"on one device: set_weights"):
        settled(waves)
