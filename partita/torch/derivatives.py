"""Functions with PyTorch's derivative where they are not smooth, on JAX's arrays.

torchax 0.0.13 computes PyTorch's values, and JAX differentiates its formulas: the gradient of |x|
at 0 is 1 and not 0, of a bounded value at its bound a half, of a deviation of equal values and of a
large softplus not a number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def absolute(x: jax.Array) -> jax.Array:
    """Absolute values, whose gradient is 0 at 0."""
    is_real = jnp.issubdtype(x.dtype, jnp.floating)
    return x * jnp.sign(x) if is_real else jnp.abs(x)


def _bounded(x: jax.Array, min: Any = None, max: Any = None) -> jax.Array:
    """The gradient is that of x at a bound, too."""
    if min is not None:
        x = jnp.where(x < min, min, x)
    return x if max is None else jnp.where(x > max, max, x)


def _bounded_above(x: jax.Array, max: Any) -> jax.Array:
    return _bounded(x, None, max)


def _between(x: jax.Array, low: Any = -1, high: Any = 1) -> jax.Array:
    """`hardtanh`, with no gradient at a bound."""
    outside = jnp.clip(jax.lax.stop_gradient(x), low, high)
    return jnp.where((x > low) & (x < high), x, outside)


def _hard_sigmoid(x: jax.Array) -> jax.Array:
    return _between(x + 3, 0, 6) / 6


def _hard_swish(x: jax.Array) -> jax.Array:
    return jnp.where(x <= -3, 0, jnp.where(x < 3, x * (x / 6 + 0.5), x))


def _leaky(x: jax.Array, negative_slope: float = 0.01) -> jax.Array:
    return jnp.where(x > 0, x, x * negative_slope)


def _soft_plus(x: jax.Array, beta: float = 1, threshold: float = 20) -> jax.Array:
    is_large = x * beta > threshold
    return jnp.where(is_large, x, jnp.log1p(jnp.exp(jnp.where(is_large, 0, x * beta))) / beta)


def _larger(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where((x >= y) | jnp.isnan(y), x, y)


def _smaller(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where((x <= y) | jnp.isnan(y), x, y)


def _angle_of(y: jax.Array, x: jax.Array) -> jax.Array:
    """`atan2`, with no gradient at the origin."""
    is_origin = (x == 0) & (y == 0)
    constant = jnp.arctan2(jax.lax.stop_gradient(y), jax.lax.stop_gradient(x))
    return jnp.where(is_origin, constant, jnp.arctan2(y, jnp.where(is_origin, 1, x)))


def _angle(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return _angle_of(x.imag, x.real)
    return jnp.where(x < 0, jnp.pi, 0 * jax.lax.stop_gradient(x))


def _x_log_y(x: jax.Array, y: Any) -> jax.Array:
    is_nothing = (x == 0) & ~jnp.isnan(y)
    return jnp.where(is_nothing & (y <= 0), 0, x * jnp.log(jnp.where(is_nothing & (y <= 0), 1, y)))


def _x_log1p_y(x: jax.Array, y: Any) -> jax.Array:
    is_nothing = (x == 0) & (y <= -1)
    return jnp.where(is_nothing, 0, x * jnp.log1p(jnp.where(is_nothing, 0, y)))


def _with_sign(x: jax.Array, y: Any) -> jax.Array:
    """`copysign`, with no gradient at 0."""
    return jnp.where(x == 0, jnp.copysign(jax.lax.stop_gradient(x), y), jnp.copysign(x, y))


def _dims(dim: Any) -> tuple[int, ...] | None:
    """Dims for JAX; None for all."""
    return None if dim is None or dim == [] else tuple(np.atleast_1d(dim).tolist())


def _deviation(
    x: jax.Array, dim: Any = None, *, correction: Any = 1, keepdim: bool = False
) -> jax.Array:
    """`std`, with no gradient for equal values."""
    dims = _dims(dim)
    variance = jnp.var(x, dims, ddof=1 if correction is None else correction, keepdims=keepdim)
    is_zero = variance == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, variance)))


def _deviation_and_mean(
    x: jax.Array, dim: Any = None, *, correction: Any = 1, keepdim: bool = False
) -> tuple[jax.Array, jax.Array]:
    deviation = _deviation(x, dim, correction=correction, keepdim=keepdim)
    return deviation, jnp.mean(x, _dims(dim), keepdims=keepdim)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def largest(values: jax.Array, dim: int, is_shared: bool) -> jax.Array:
    """The maximum along a dim, with the gradient of the first element that has it, or shared among
    all that have it.

    JAX's own compares elements with the maximum alone. XLA may compute them again in another order,
    and then the gradient is lost.
    """
    return jnp.max(values, dim)


@largest.defjvp
def _largest_jvp(
    dim: int, is_shared: bool, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    (values,), (tangent,) = primals, tangents
    place = jnp.argmax(values, dim, keepdims=True)
    is_there = jax.lax.broadcasted_iota(place.dtype, values.shape, dim) == place
    if is_shared:
        is_there |= values == jnp.max(values, dim, keepdims=True)
        tangent = tangent / is_there.sum(dim, keepdims=True, dtype=values.dtype)
    return largest(values, dim, is_shared), jnp.where(is_there, tangent, 0).sum(dim)


def _greatest(x: jax.Array, dim: Any = None, keepdim: bool = False) -> jax.Array:
    """`amax`."""
    dims = _dims(dim)
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.size or not x.ndim:
        return jnp.max(x, dims, keepdims=keepdim)
    dims = tuple(range(x.ndim)) if dims is None else tuple(d % x.ndim for d in dims)
    others = [d for d in range(x.ndim) if d not in dims]
    rows = x.transpose(*others, *dims).reshape(*(x.shape[d] for d in others), -1)
    found = largest(rows, len(others), True)
    return jnp.expand_dims(found, dims) if keepdim else found


def _least(x: jax.Array, dim: Any = None, keepdim: bool = False) -> jax.Array:
    """`amin`."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.min(x, _dims(dim), keepdims=keepdim)
    return -_greatest(-x, dim, keepdim)


DERIVATIVES: dict[str, Callable[..., Any]] = {
    "abs": absolute,
    "clamp": _bounded,
    "clamp_min": _bounded,
    "clamp_max": _bounded_above,
    "hardtanh": _between,
    "relu6": lambda x: _between(x, 0, 6),
    "hardsigmoid": _hard_sigmoid,
    "hardswish": _hard_swish,
    "leaky_relu": _leaky,
    "softplus": _soft_plus,
    "fmax": _larger,
    "fmin": _smaller,
    "atan2": _angle_of,
    "angle": _angle,
    "xlogy": _x_log_y,
    "special_xlog1py": _x_log1p_y,
    "copysign": _with_sign,
    "sinc": jnp.sinc,
    "amax": _greatest,
    "amin": _least,
    "std": _deviation,
    "std_mean": _deviation_and_mean,
}
"""Name of an operation -> its function of arrays, which gives an array or a tuple of them."""


def power_base(x: Any, y: Any) -> Any:
    """A base of x ** y without a gradient where both are 0."""
    if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return jnp.where((x == 0) & (jnp.asarray(y) == 0), 1, x)
