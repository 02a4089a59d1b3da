"""Tables of vertices in tiles, the tensors of a memory plan.

A tile has a range of the rows and a range of the columns of a table. Over several devices, each has
a table of its vertices, and the arrays of tiles have a leading dim of devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TileCuts = tuple[tuple[slice, ...], tuple[slice, ...]]
"""Rows and columns of tiles within a table."""

EVERYTHING = (slice(None),)


@dataclass(frozen=True)
class Table:
    """A table and the ranges of rows and of columns of its tiles."""

    shape: tuple[int, ...]
    dtype: Any
    rows: tuple[slice, ...]
    columns: tuple[slice, ...]

    def tiles(self, by: str, k: int) -> list[tuple[int, int]]:
        """(row, column) of the tiles of the k-th range of 'rows' or of 'columns'.

        Of all tiles for 'whole'.
        """
        rows = [k] if by == "rows" else range(len(self.rows))
        columns = [k] if by == "columns" else range(len(self.columns))
        return [(row, column) for row in rows for column in columns]

    def part(self, by: str, k: int) -> jax.ShapeDtypeStruct:
        """Shape and type of these tiles together."""
        if len(self.rows) == len(self.columns) == 1:
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        height = _length(self.rows[k]) if by == "rows" else self.shape[0]
        width = _length(self.columns[k]) if by == "columns" else self.shape[1]
        return jax.ShapeDtypeStruct((height, width), self.dtype)

    def cuts(self, by: str) -> TileCuts:
        """The ranges of tiles within a range of rows or of columns."""
        rows = EVERYTHING if by == "rows" else self.rows
        columns = EVERYTHING if by == "columns" else self.columns
        return rows, columns

    def tile_bytes(self, row: int, column: int) -> int:
        whole = array_bytes(self.part("whole", 0))
        return (
            array_bytes(self.part("rows", row)) * array_bytes(self.part("columns", column)) // whole
        )


def ranges(size: int, step: int) -> tuple[slice, ...]:
    """Consecutive ranges of `step` numbers, the last one of fewer."""
    return tuple(slice(begin, min(begin + step, size)) for begin in range(0, size, step))


def array_bytes(array: Any) -> int:
    """Bytes of an array or of its shape and type."""
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def is_tiled(cuts: TileCuts) -> bool:
    """Whether there is more than one tile."""
    rows, columns = cuts
    return len(rows) * len(columns) > 1


def joined(cuts: Sequence[TileCuts], tiles: Sequence[Any]) -> list[Any]:
    """The tables with these cuts, of the tiles of all of them."""
    tables = []
    start = 0
    for rows, columns in cuts:
        count = len(rows) * len(columns)
        table_tiles = list(tiles[start : start + count])
        start += count
        tables.append(_concatenated(len(columns), table_tiles) if count > 1 else table_tiles[0])
    return tables


def split(cuts: Sequence[TileCuts], tables: Sequence[Any]) -> list[Any]:
    """The tiles of tables with these cuts."""
    tiles = []
    for table_cuts, table in zip(cuts, tables, strict=True):
        if is_tiled(table_cuts):
            rows, columns = table_cuts
            tiles += _cut(_bounds(rows), _bounds(columns), table)
        else:
            tiles.append(table)
    return tiles


def _length(part: slice) -> int:
    return part.stop - part.start


def _bounds(parts: Sequence[slice]) -> tuple[tuple[int | None, int | None], ...]:
    """Ranges that can be hashed."""
    return tuple((part.start, part.stop) for part in parts)


@partial(jax.jit, static_argnums=0)
def _concatenated(columns: int, tiles: list[Any]) -> Any:
    rows = [jnp.concatenate(tiles[i : i + columns], -1) for i in range(0, len(tiles), columns)]
    return jnp.concatenate(rows, -2)


@partial(jax.jit, static_argnums=(0, 1))
def _cut(rows: Any, columns: Any, table: Any) -> list[Any]:
    return [table[..., slice(*row), slice(*column)] for row in rows for column in columns]
