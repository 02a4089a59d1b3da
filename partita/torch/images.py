"""Operations on images that torchax 0.0.13 fails on, on JAX's arrays: antialiased resizing, as ATen
weights the pixels (`_compute_weights_aa`), and the sum of patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _triangle(distances: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(distances), 0)


def _cubic(distances: np.ndarray) -> np.ndarray:
    """The convolution kernel of Keys with a = -0.5."""
    x = np.abs(distances)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_cubic, 2),
}
"""Filters with their radius in pixels, by mode of `torch.nn.functional.interpolate`."""


def _weights(mode: str, before: int, after: int, scale: float) -> np.ndarray:
    """[after, before]: shares of the pixels of a line, `scale` of them per new pixel."""
    weigh, radius = FILTERS[mode]
    stretch = max(scale, 1.0)
    centers = scale * (np.arange(after) + 0.5)[:, None]
    pixels = np.arange(before)[None]
    first = np.maximum(np.floor(centers - radius * stretch + 0.5), 0)
    end = np.floor(centers + radius * stretch + 0.5)
    weights = weigh((pixels - centers + 0.5) / stretch) * ((pixels >= first) & (pixels < end))
    return weights / weights.sum(axis=1, keepdims=True)


def antialiased(
    mode: str,
    values: jax.Array,
    size: Sequence[int],
    align_corners: bool,
    factors: Sequence[float | None],
) -> jax.Array:
    """Images [..., height, width] of another size; `factors` are those that the user gave."""
    for axis, after, factor in zip((-2, -1), size, factors, strict=True):
        before = values.shape[axis]
        scale = 1 / factor if factor else before / after
        if align_corners:
            scale = (before - 1) / (after - 1) if after > 1 else 0.0
        weights = jnp.asarray(_weights(mode, before, after, scale), values.dtype)
        values = jnp.moveaxis(jnp.tensordot(values, weights, ((axis,), (1,))), -1, axis)
    return values


def folded(
    columns: jax.Array,
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> jax.Array:
    """[N, channels, *size]: patches [N, channels * kernel, places] added where they belong."""
    counts = [
        (size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    ]
    if columns.shape[1] % math.prod(kernel) or columns.shape[2] != math.prod(counts):
        raise ValueError(
            f"patches of {list(columns.shape)} do not fit images of {list(size)}, which have "
            f"{math.prod(counts)} places for patches of {list(kernel)}"
        )
    patches = columns.reshape(columns.shape[0], -1, *kernel, *counts)
    shape = [size[d] + 2 * padding[d] for d in (0, 1)]
    result = jnp.zeros((*patches.shape[:2], *shape), columns.dtype)
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            begins = (row * dilation[0], column * dilation[1])
            places: Any = [
                slice(begins[d], begins[d] + counts[d] * stride[d], stride[d]) for d in (0, 1)
            ]
            result = result.at[:, :, *places].add(patches[:, :, row, column])
    return result[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]


def adaptive_maximum(values: jax.Array, output_size: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """`adaptive_max_pool2d` and its like: the maximum of each window of the last dims, with the
    gradient of its first element, and its place among all."""
    sizes = values.shape[-len(output_size) :]
    outer = values.shape[: -len(output_size)]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    maxima = []
    places = []
    for corner in np.ndindex(*output_size):
        spans = zip(corner, sizes, output_size, strict=True)
        window = tuple(slice(i * n // m, -(-(i + 1) * n // m)) for i, n, m in spans)
        elements = values[(..., *window)].reshape(*outer, -1)
        first = jnp.argmax(elements, axis=-1)
        maxima.append(jnp.take_along_axis(elements, first[..., None], axis=-1)[..., 0])
        places.append(jnp.asarray(numbers[window].ravel())[first])
    shape = (*outer, *output_size)
    return jnp.stack(maxima, -1).reshape(shape), jnp.stack(places, -1).reshape(shape)
