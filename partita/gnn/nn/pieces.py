"""A layer as pieces that can be cut, so that a device need not hold a table of all vertices: dense products by rows, aggregations by columns.

A layer's `call` runs its pieces whole, one after the other. A memory plan runs a few rows, or a few columns, at a time: the numbers are
the same, since no piece mixes what it can be cut by. Tables are named within the layer: "x" comes in, "y" goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Piece:
    """Tables from tables: `function(graph, column, *tables)` gives one for each of `writes`.

    by          'rows': a row of the results depends on that row of the tables alone; 'columns': so it is of columns, the same ones of
                all tables, `grain` of them together; 'whole': on all
    column      the number of the first column that is given, 0 where all are
    linear      the gradient does not depend on the tables' values
    """

    by: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    function: Callable[..., tuple[Any, ...]]
    linear: bool = False
    grain: int = 1


def by_rows(reads: str, writes: str, function: Callable[..., Any]) -> Piece:
    """A piece cut by rows; `function(*tables)` gives a table, or a tuple of as many as are written. Names are words."""
    names = tuple(writes.split())

    def rows(graph: Any, column: Any, *tables: Any) -> tuple[Any, ...]:
        found = function(*tables)
        return found if len(names) > 1 else (found,)

    return Piece("rows", tuple(reads.split()), names, rows)


def by_columns(
    reads: str, writes: str, function: Callable[..., Any], linear: bool = True, grain: int = 1
) -> Piece:
    """A piece cut by columns, which writes one table: `function(graph, column, *tables)`."""
    return Piece(
        "columns",
        tuple(reads.split()),
        (writes,),
        lambda graph, column, *tables: (function(graph, column, *tables),),
        linear,
        grain,
    )


def run(pieces: Sequence[Piece], graph: Any, x: Any) -> Any:
    """The last piece's table, from x as "x"."""
    tables = {"x": x}
    for piece in pieces:
        tables.update(
            zip(
                piece.writes,
                piece.function(graph, 0, *(tables[t] for t in piece.reads)),
                strict=True,
            )
        )
    return tables[pieces[-1].writes[-1]]
