"""Layers as pieces that can be cut, so that a device need not hold a table of all vertices.

Dense products are cut by rows, aggregations by columns. A layer's `call` runs its pieces whole, in
order. A memory plan runs some rows, or some columns, at a time. The numbers are the same, since no
piece mixes the rows or columns that it is cut by. Tables are named within the layer: "x" is the
input, "y" the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockPiece:
    """Tables from tables: `function(graph, column, *tables)` returns one for each of `writes`.

    by          'rows': a row of the results depends on the same row of the tables alone
                'columns': a column depends on the same column alone, `grain` columns together
                'whole': everything depends on everything
    reads       names of the tables that it reads
    writes      names of the tables that it writes
    function    its `column` is the number of the first column that is given, 0 for all columns
    linear      whether the gradient is independent of the tables' values
    """

    by: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    function: Callable[..., tuple[Any, ...]]
    linear: bool = False
    grain: int = 1


def by_rows(reads: str, writes: str, function: Callable[..., Any]) -> BlockPiece:
    """A piece cut by rows. Names are words of a string.

    `function(*tables)` returns a table, or a tuple of tables if several are written.
    """
    names = tuple(writes.split())

    def rows(graph: Any, column: Any, *tables: Any) -> tuple[Any, ...]:
        results = function(*tables)
        return results if len(names) > 1 else (results,)

    return BlockPiece("rows", tuple(reads.split()), names, rows)


def by_columns(
    reads: str, writes: str, function: Callable[..., Any], linear: bool = True, grain: int = 1
) -> BlockPiece:
    """A piece cut by columns that writes one table: `function(graph, column, *tables)`."""

    def columns(graph: Any, column: Any, *tables: Any) -> tuple[Any, ...]:
        return (function(graph, column, *tables),)

    return BlockPiece("columns", tuple(reads.split()), (writes,), columns, linear, grain)


def run(pieces: Sequence[BlockPiece], graph: Any, tables: dict[str, Any]) -> Any:
    """The table that the last piece writes, from tables by name."""
    tables = dict(tables)
    for piece in pieces:
        inputs = [tables[name] for name in piece.reads]
        results = piece.function(graph, 0, *inputs)
        tables.update(zip(piece.writes, results, strict=True))
    return tables[pieces[-1].writes[-1]]
