"""Copies of values between places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from partita.execute.dispatch import Value


class HasSharding(Protocol):
    """A place that knows how it stores a tensor."""

    def sharding(self, tensor: int) -> Any: ...


class Local:
    """Copies between devices of one process, asynchronous."""

    def __init__(self, places: Sequence[HasSharding]) -> None:
        self.places = places

    def move(self, array: Any, target: Value) -> Any:
        """The array as the place of `target` stores it."""
        return jax.device_put(array, self.places[target.place].sharding(target.tensor))
