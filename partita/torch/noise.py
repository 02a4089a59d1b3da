"""Random numbers with the meaning that PyTorch gives them, drawn by a key of JAX.

torchax 0.0.13 draws standard normal numbers for all means and deviations, real numbers for whole
ones, the same classes in all rows of weights, and leaves other operations out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LARGEST = 2**24
"""Bound of `random_()` without one: float32 has all whole numbers below."""


def normal(key: Any, shape: Any, mean: Any = 0.0, std: Any = 1.0) -> jax.Array:
    """Normal numbers of a mean and a standard deviation, which broadcast to `shape`."""
    return mean + std * jax.random.normal(key, shape)


def truncated(
    key: Any, shape: Any, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> jax.Array:
    """Normal numbers between a and b."""
    return mean + std * jax.random.truncated_normal(key, (a - mean) / std, (b - mean) / std, shape)


def _exponential(key: Any, shape: Any, lambd: Any = 1.0) -> jax.Array:
    return jax.random.exponential(key, shape) / lambd


def _cauchy(key: Any, shape: Any, median: Any = 0.0, sigma: Any = 1.0) -> jax.Array:
    return median + sigma * jax.random.cauchy(key, shape)


def _whole(key: Any, shape: Any, *bounds: int) -> jax.Array:
    low, high = (0, *bounds)[-2:] if bounds else (0, LARGEST)
    return jax.random.randint(key, shape, low, high)


def _bernoulli(key: Any, shape: Any, p: Any = 0.5) -> jax.Array:
    return jax.random.uniform(key, shape) < p


def choices(key: Any, weights: jax.Array, count: int, replacement: bool) -> jax.Array:
    """[..., count]: classes drawn for each row of weights [..., classes]."""
    scores = jnp.log(weights)
    if replacement:
        return jax.random.categorical(key, scores[..., None, :], shape=(*scores.shape[:-1], count))
    return jax.lax.top_k(scores + jax.random.gumbel(key, scores.shape), count)[1]


FILLS: dict[str, Callable[..., jax.Array]] = {
    "normal_": normal,
    "exponential_": _exponential,
    "cauchy_": _cauchy,
    "random_": _whole,
    "bernoulli_": _bernoulli,
}
"""Operations that fill a tensor in place -> their numbers for a key, a shape and parameters."""
