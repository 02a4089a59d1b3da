"""The rows of a plan's table, and fewer rows for long ones: repeated blocks become one block, the
smallest layers one row.

Figures of a row that stands for several layers are sums.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_ROWS = 30
"""Rows of a table, about."""
FOLDED_FROM = 20
"""Rows from which on repeated blocks are folded."""


@dataclass(frozen=True)
class LayerRow:
    """One layer, or several of the same split."""

    names: tuple[str, ...]
    split: str
    figures: dict[str, float] = field(default_factory=dict)
    """Sums by column, in seconds and bytes; empty for a plan without reasons."""
    label: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Equal for layers at the same place of repeated blocks: the name without its numbers,
        and the split. Keras numbers `dense`, `dense_1`, `dense_2`."""
        return re.sub(r"_?\d+", "", self.names[0]), self.split

    @property
    def text(self) -> str:
        return self.label or layers_label(self.names)


def folded(rows: Sequence[LayerRow], limit: int = MAX_ROWS) -> list[LayerRow]:
    """At most `limit` rows, in order; a short table stays as it is."""
    if len(rows) <= min(limit, FOLDED_FROM):
        return list(rows)
    blocks = _fold_blocks(rows)
    if len(blocks) <= limit:
        return blocks
    return _fold_smallest(blocks, limit)


def _fold_blocks(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """The rows with each run of equal blocks as one block."""
    keys = [row.key for row in rows]
    result: list[LayerRow] = []
    start = 0
    while start < len(rows):
        size, count = _longest_repetition(keys, start)
        for offset in range(size):
            members = [rows[start + block * size + offset] for block in range(count)]
            result.append(_sum(members))
        start += size * count
    return result


def _longest_repetition(keys: Sequence[tuple[str, str]], start: int) -> tuple[int, int]:
    """(rows of a block, number of blocks) of the repetition at `start` that saves most rows; (1,
    1) for none."""
    best = (1, 1)
    best_saving = 0
    for size in range(1, (len(keys) - start) // 2 + 1):
        if keys[start] != keys[start + size]:
            continue
        block = keys[start : start + size]
        count = 1
        while keys[start + count * size : start + (count + 1) * size] == block:
            count += 1
        saving = (count - 1) * size
        if saving > best_saving:
            best = (size, count)
            best_saving = saving
    return best


def _fold_smallest(rows: Sequence[LayerRow], limit: int) -> list[LayerRow]:
    """The largest rows by seconds, then bytes, in order, and one row for all others."""
    by_size = sorted(
        range(len(rows)),
        key=lambda index: _size(rows[index]),
        reverse=True,
    )
    large = set(by_size[: limit - 1])
    small = [row for index, row in enumerate(rows) if index not in large]
    result = [row for index, row in enumerate(rows) if index in large]
    total = _sum(small)
    label = f"{len(total.names)} smaller layers"
    return [*result, LayerRow(total.names, "", total.figures, label)]


def _size(row: LayerRow) -> tuple[float, float]:
    seconds = row.figures.get("compute", 0.0) + row.figures.get("exchange", 0.0)
    return seconds, row.figures.get("memory", 0.0)


def _sum(rows: Sequence[LayerRow]) -> LayerRow:
    """One row for several: all names, and the sums of the figures."""
    if len(rows) == 1:
        return rows[0]
    names = [name for row in rows for name in row.names]
    figures: dict[str, float] = {}
    for row in rows:
        for column, value in row.figures.items():
            figures[column] = figures.get(column, 0.0) + value
    return LayerRow(tuple(names), rows[0].split, figures)


def layers_label(names: Sequence[str]) -> str:
    """The first and the last of several names, and their number; the part below a repeated block is
    written once.

    >>> layers_label(["out"]), layers_label(["dense_1", "dense_2", "dense_3"])
    ('out', 'dense_1 ... dense_3 (3)')
    >>> layers_label(["block_0/query", "block_1/query"])
    'block_0 ... block_1 (2): query'
    """
    if len(names) == 1:
        return names[0]
    first, last = names[0], names[-1]
    first_block, _, first_rest = first.partition("/")
    last_block, _, last_rest = last.partition("/")
    if first_rest and first_rest == last_rest:
        return f"{first_block} ... {last_block} ({len(names)}): {first_rest}"
    return f"{first} ... {last} ({len(names)})"
