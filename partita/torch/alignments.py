"""Connectionist temporal classification, which torchax 0.0.13 lacks, on JAX's arrays.

Graves et al., "Connectionist Temporal Classification", ICML 2006, section 4.1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_NOTHING = -1e30
"""Logarithm of a probability of 0; the derivative at minus infinity is not a number."""


def alignment_losses(
    logarithms: jax.Array,
    targets: jax.Array,
    input_lengths: jax.Array,
    target_lengths: jax.Array,
    blank: int,
) -> jax.Array:
    """[samples]: negative logarithms of the probability of all alignments.

    Args:
        logarithms: [times, samples, classes], of probabilities.
        targets: [samples, labels], or the labels of all samples in a row.
        input_lengths: [samples], times of each.
        target_lengths: [samples], labels of each.
        blank: The class between labels.
    """
    if targets.ndim == 1:
        starts = jnp.cumsum(target_lengths) - target_lengths
        targets = targets[(starts[:, None] + jnp.arange(len(targets))) % len(targets)]
    samples, labels = targets.shape
    states = jnp.full((samples, 2 * labels + 1), blank).at[:, 1::2].set(targets)
    is_padding = jnp.arange(2 * labels + 1) > 2 * target_lengths[:, None]
    states = jnp.where(is_padding, blank, states)
    is_jump = (states != blank) & (states != jnp.roll(states, 2, axis=1))
    is_jump = is_jump.at[:, :2].set(False)

    def behind(values: jax.Array, distance: int) -> jax.Array:
        padded = jnp.pad(values, ((0, 0), (distance, 0)), constant_values=_NOTHING)
        return padded[:, : values.shape[1]]

    def advance(values: jax.Array, moment: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        time, now = moment
        reached = jnp.logaddexp(values, behind(values, 1))
        reached = jnp.logaddexp(reached, jnp.where(is_jump, behind(values, 2), _NOTHING))
        reached = reached + jnp.take_along_axis(now, states, axis=1)
        return jnp.where((time < input_lengths)[:, None], reached, values), None

    first = jnp.take_along_axis(logarithms[0], states, axis=1)
    first = jnp.where(jnp.arange(states.shape[1]) < 2, first, _NOTHING)
    times = jnp.arange(1, len(logarithms))
    last, _ = jax.lax.scan(advance, first, (times, logarithms[1:]))
    ends = 2 * target_lengths[:, None] - jnp.arange(2)
    found = jnp.take_along_axis(last, jnp.maximum(ends, 0), axis=1)
    found = jnp.where(ends >= 0, found, _NOTHING)
    losses = -jnp.logaddexp(found[:, 0], found[:, 1])
    # PyTorch's gradient is that of scores of which `logarithms` is the log_softmax.
    shares = jnp.exp(logarithms) * (jnp.arange(len(logarithms))[:, None] < input_lengths)[..., None]
    total = shares.sum((0, 2))
    losses = losses + total - jax.lax.stop_gradient(total)
    return jnp.where(losses < -_NOTHING / 2, losses, jnp.inf)
