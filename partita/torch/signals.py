"""The inverse of the short-time Fourier transform, which torchax 0.0.13 lacks, on JAX's arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def centered(window: jax.Array, size: int) -> jax.Array:
    """A window with as many zeros on both sides as make it `size` long."""
    before = (size - window.shape[0]) // 2
    return jnp.pad(window, (before, size - window.shape[0] - before))


def waves(
    spectra: jax.Array,
    window: jax.Array,
    hop: int,
    center: bool,
    norm: str,
    onesided: bool,
    is_complex: bool,
    length: int | None,
) -> jax.Array:
    """[..., time]: the signals of spectra [..., frequencies, frames], not a number where no window
    reaches.

    Args:
        window: A value per place of a frame.
        hop: Distance of frames.
        center: Whether the first frame is centered at time 0.
        norm: The normalization, by its name in JAX.
        onesided: Whether negative frequencies are left out.
        length: Number of values; None for those that the frames cover.
    """
    size = window.shape[0]
    inverse = jnp.fft.irfft if onesided else jnp.fft.ifft
    frames = jnp.matrix_transpose(inverse(spectra, size, axis=-2, norm=norm))
    frames = (frames if is_complex else frames.real) * window
    starts = hop * np.arange(frames.shape[-2])
    places = starts[:, None] + np.arange(size)
    end = int(starts[-1]) + size
    total = jnp.zeros((*frames.shape[:-2], end), frames.dtype).at[..., places].add(frames)
    squares = jnp.broadcast_to(window * window, places.shape)
    weights = jnp.zeros(end, squares.dtype).at[places].add(squares)
    first = size // 2 if center else 0
    last = end - first if length is None else min(end, first + length)
    weights = weights[first:last]
    signals = total[..., first:last] / jnp.where(weights > 1e-11, weights, jnp.nan)
    missing = 0 if length is None else length - signals.shape[-1]
    return jnp.pad(signals, [(0, 0)] * (signals.ndim - 1) + [(0, missing)])
