"""A table of moves is what each move costs alone, and costs do not depend on which of equal axes are used."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.cost.moves import Placement, move_seconds, move_table
from partita.cost.terms import Move
from partita.machine import load
from partita.search.find import mesh_of

MACHINE = load("dgx-h100:4")
PLACE = Placement(MACHINE, mesh_of(MACHINE))
MOVE = Move(0, 1 << 24, 0, (0, 1, 2), 1, (3, 4, 5), 2, "forward", "forward")


def sharding(draw: random.Random) -> tuple[tuple[int, ...], ...]:
    dims: list[list[int]] = [[], [], []]
    for axis in range(len(PLACE.mesh.axes)):
        where = draw.randrange(4)
        if where < 3:
            dims[where].append(axis)
    return tuple(tuple(d) for d in dims)


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_table_is_its_moves(seed: int) -> None:
    draw = random.Random(seed)
    sources, targets = ([sharding(draw) for _ in range(6)] for _ in range(2))
    table = move_table(MOVE, PLACE, sources, targets)
    alone = [[move_seconds(MOVE, PLACE, s, t) for t in targets] for s in sources]
    assert table == pytest.approx(np.array(alone), rel=1e-9)


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_equal_axes_may_be_exchanged(seed: int) -> None:
    draw = random.Random(seed)
    source, target = sharding(draw), sharding(draw)
    levels: dict[int, list[int]] = {}
    for a, axis in enumerate(PLACE.mesh.axes):
        levels.setdefault(axis.level, []).append(a)
    name = {a: b for axes in levels.values() for a, b in zip(axes, draw.sample(axes, len(axes)), strict=True)}
    renamed = [tuple(tuple(name[a] for a in d) for d in s) for s in (source, target)]
    assert move_seconds(MOVE, PLACE, *renamed) == pytest.approx(move_seconds(MOVE, PLACE, source, target), rel=1e-9)
