"""A table of moves equals its single moves, and equal axes are interchangeable."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.cost.moves import Placement, move_seconds, move_table
from partita.cost.operator_terms import Move
from partita.machine import load
from partita.plans.plan import TIME, Axis, Mesh
from partita.search.find import mesh_of

MACHINE = load("dgx-h100:4")
PLACE = Placement(MACHINE, mesh_of(MACHINE))
MOVE = Move(0, 1 << 24, 0, (0, 1, 2), 1, (3, 4, 5), 2, "forward", "forward")

ADDED = replace(MOVE, sums=1)
"""The move of a partial sum over the last entry of its labels."""

SCATTERED = replace(ADDED, scatters=True, joined=0, share=3)
"""The same for a compiler that joins three of them, and makes reduce-scatters of slices."""


def sliced(source: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """The slices of a partial sum, over the axes of the sum."""
    return ((*source[0], *source[2]), source[1], ())


def test_slices_of_a_partial_sum_are_a_reduce_scatter_that_three_share() -> None:
    partial = ((), (), (2, 3))
    group = PLACE.group((2, 3))
    scattered = 2 * PLACE.seconds("reduce_scatter", MOVE.nbytes, group)
    summed = 2 * PLACE.seconds("all_reduce", MOVE.nbytes, group)
    assert move_seconds(SCATTERED, PLACE, partial, sliced(partial)) == pytest.approx(scattered / 3)
    assert move_seconds(SCATTERED, PLACE, partial, ((), (), ())) == pytest.approx(summed / 3)
    assert move_seconds(ADDED, PLACE, partial, sliced(partial)) == pytest.approx(summed)


def sharding(draw: random.Random) -> tuple[tuple[int, ...], ...]:
    dims: list[list[int]] = [[], [], []]
    for axis in range(len(PLACE.mesh.axes)):
        where = draw.randrange(4)
        if where < 3:
            dims[where].append(axis)
    return tuple(tuple(d) for d in dims)


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_table_equals_its_single_moves(seed: int) -> None:
    draw = random.Random(seed)
    sources, targets = ([sharding(draw) for _ in range(6)] for _ in range(2))
    targets += [sources[0], sliced(sources[0]), (*sources[0][:2], ())]
    for move in (MOVE, ADDED, SCATTERED):
        table = move_table(move, PLACE, sources, targets)
        alone = [[move_seconds(move, PLACE, s, t) for t in targets] for s in sources]
        assert table == pytest.approx(np.array(alone), rel=1e-9)


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_partial_sum_is_reduced_before_its_move_unless_the_reader_sums_it(seed: int) -> None:
    draw = random.Random(seed)
    source, target = sharding(draw), sharding(draw)
    plain = replace(ADDED, sums=0, source=ADDED.source[:-1], target=ADDED.target[:-1])
    part = ADDED.nbytes / PLACE.shard_count([a for dim in source[:-1] for a in dim])
    summed = (
        ADDED.trips * PLACE.seconds("all_reduce", part, PLACE.group(source[-1]))
        if source[-1]
        else 0.0
    )
    moved = move_seconds(plain, PLACE, source[:-1], target[:-1])
    assert move_seconds(ADDED, PLACE, source, source) == 0.0
    assert move_seconds(ADDED, PLACE, source, target) == pytest.approx(
        0.0 if source == target else summed + moved
    )


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_equal_axes_may_be_exchanged(seed: int) -> None:
    draw = random.Random(seed)
    source, target = sharding(draw), sharding(draw)
    levels: dict[int, list[int]] = {}
    for a, axis in enumerate(PLACE.mesh.axes):
        levels.setdefault(axis.level, []).append(a)
    name = {
        a: b
        for axes in levels.values()
        for a, b in zip(axes, draw.sample(axes, len(axes)), strict=True)
    }
    renamed = [tuple(tuple(name[a] for a in d) for d in s) for s in (source, target)]
    assert move_seconds(MOVE, PLACE, *renamed) == pytest.approx(
        move_seconds(MOVE, PLACE, source, target), rel=1e-9
    )


@given(st.integers(0, 2**32), st.sampled_from([2, 6, 16]))
@settings(max_examples=30, deadline=None)
def test_nothing_is_sent_along_the_axis_of_microbatches(seed: int, microbatches: int) -> None:
    """A reshard is that of one microbatch over devices, whichever dims microbatches split."""
    draw = random.Random(seed)
    timed = Placement(MACHINE, Mesh((Axis(TIME, microbatches, -1), *PLACE.mesh.axes)))

    def with_time(sharding: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        dim = draw.randrange(4)
        return tuple(
            ((0,) if d == dim else ()) + tuple(a + 1 for a in axes)
            for d, axes in enumerate(sharding)
        )

    plain = [[sharding(draw) for _ in range(6)] for _ in range(2)]
    sources, targets = ([with_time(s) for s in side] for side in plain)
    table = move_table(MOVE, timed, sources, targets)
    alone = [[move_seconds(MOVE, timed, s, t) for t in targets] for s in sources]
    assert table == pytest.approx(np.array(alone), rel=1e-9)
    for i, (source, timed_source) in enumerate(zip(plain[0], sources, strict=True)):
        for j, (target, timed_target) in enumerate(zip(plain[1], targets, strict=True)):
            split = any(0 in axes for axes in (*timed_source, *timed_target))
            move = replace(MOVE, nbytes=MOVE.nbytes / microbatches) if split else MOVE
            assert table[i, j] == pytest.approx(move_seconds(move, PLACE, source, target))
