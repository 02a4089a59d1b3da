"""Operations on matrices that torchax 0.0.13 lacks or computes otherwise, on JAX's arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def determinant(matrices: jax.Array) -> tuple[jax.Array, ...]:
    """`_linalg_det`: determinants, and the LU decomposition with its pivots."""
    factors, pivots, _ = jax.lax.linalg.lu(matrices)
    return jnp.linalg.det(matrices), factors, pivots + 1


def sign_and_logarithm(matrices: jax.Array) -> tuple[jax.Array, ...]:
    """`_linalg_slogdet`: signs and logarithms of determinants, and the LU decomposition with its
    pivots. PyTorch's own code reads all four and crashes on fewer."""
    sign, logarithm = jnp.linalg.slogdet(matrices)
    factors, pivots, _ = jax.lax.linalg.lu(matrices)
    return sign, logarithm, factors, pivots + 1


def log_determinant(matrices: jax.Array) -> jax.Array:
    """`torch.logdet`: not a number for a negative determinant, of which torchax takes the size."""
    sign, logarithm = jnp.linalg.slogdet(matrices)
    return jnp.where(sign == -1, jnp.nan, logarithm)


def reflections(vectors: jax.Array, factors: jax.Array) -> jax.Array:
    """`torch.linalg.householder_product`, which JAX cannot differentiate.

    Args:
        vectors: [..., m, n], Householder vectors below the diagonal.
        factors: [..., k], their factors.
    """
    unit = jnp.eye(*vectors.shape[-2:], dtype=vectors.dtype)
    columns = jnp.moveaxis(jnp.tril(vectors, -1) + unit, -1, 0)[: factors.shape[-1]]

    def reflect(product: jax.Array, reflection: tuple[jax.Array, jax.Array]) -> Any:
        column, factor = reflection
        shares = jnp.einsum("...i,...ij->...j", column.conj(), product)
        return product - (factor[..., None] * column)[..., None] * shares[..., None, :], None

    start = jnp.broadcast_to(unit, vectors.shape)
    return jax.lax.scan(reflect, start, (columns, jnp.moveaxis(factors, -1, 0)), reverse=True)[0]


def covariance(
    values: jax.Array, *, correction: int = 1, fweights: Any = None, aweights: Any = None
) -> jax.Array:
    """`torch.cov`, which looks at the values of its weights."""
    return jnp.cov(values, ddof=correction, fweights=fweights, aweights=aweights)
