"""A piece of a step as a function, with the sums over microbatches around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from partita.execute.dispatch import PieceRole


def piece_function(
    call: Callable[..., Any],
    count: int,
    role: PieceRole,
    scale: float,
) -> Callable[..., Any]:
    """A piece as a function (donated arguments, other arguments, sums) -> (values, new sums).

    `call` takes the list of all `count` arguments. Sums over microbatches among them are multiplied
    by `scale`.
    """
    averaged = set(role.averaged)
    others = [n for n in range(count) if n not in role.donated]

    def run(donated: Any, other: Any, sums: Any) -> tuple[list[Any], list[Any]]:
        arguments: list[Any] = [None] * count
        for position, x in zip((*role.donated, *others), (*donated, *other), strict=True):
            is_sum = position in averaged
            arguments[position] = x * jnp.asarray(scale, x.dtype) if is_sum else x
        results = call(arguments)
        totals = [total + results[n] for n, total in zip(role.sums, sums, strict=True)]
        return [results[n] for n in role.raw], totals

    return run
