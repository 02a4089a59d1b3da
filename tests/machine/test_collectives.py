"""Collective times: by hand on two devices and on two nodes, and laws for all machines."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import MachineError
from partita.machine import KINDS, Device, Engine, Level, Machine, Memory, collective_seconds, load
from partita.machine.parts import FABRICS


def machine(*levels: Level) -> Machine:
    device = Device("thing", 0.0, (Memory("main", 1000, 10.0),), (Engine("*", "*", 1.0, 1.0),))
    return Machine("small", device, levels)


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        ("all_reduce", 1 + 100 / 10),  # each sends its operand to the other and adds
        ("all_gather", 1 + 50 / 10),  # half of the result is there already
        ("reduce_scatter", 1 + 50 / 10),  # half of the operand belongs to the other
        ("all_to_all", 1 + 50 / 10),
        ("collective_permute", 1 + 100 / 10),
    ],
)
def test_two_devices_by_hand(kind, seconds):
    two = machine(Level("node", 2, "switch", latency=1.0, bandwidth=10.0))
    assert collective_seconds(two, kind, 100, ((0, 2),)) == seconds


def test_four_devices_by_hand():
    four = machine(Level("node", 4, "switch", latency=1.0, bandwidth=10.0))
    everyone = ((0, 4),)
    assert (
        collective_seconds(four, "all_reduce", 400, everyone) == 2 * 2 + 2 * 300 / 10
    )  # halve twice, double twice
    assert collective_seconds(four, "all_reduce", 4, everyone) == 2 * (
        1 + 4 / 10
    )  # short: recursive doubling
    assert collective_seconds(four, "all_gather", 400, everyone) == 2 + 300 / 10
    assert collective_seconds(four, "all_to_all", 400, everyone) == 3 + 300 / 10
    assert collective_seconds(four, "all_to_all", 4, everyone) == 2 * (1 + 2 / 10)  # short: Bruck


def test_a_ring_takes_its_steps_one_by_one():
    ring = machine(Level("ring", 4, "ring", latency=1.0, bandwidth=10.0))
    assert collective_seconds(ring, "all_gather", 400, ((0, 4),)) == 3 + 300 / 10
    assert collective_seconds(ring, "all_reduce", 400, ((0, 4),)) == 6 + 600 / 10
    # to the neighbours 1 hop, to the one opposite 2: 4 hops for every 3 quarters of the operand
    assert collective_seconds(ring, "all_to_all", 400, ((0, 4),)) == 3 + 400 / 10
    # two neighbours of a ring of four have one of two directions between them
    assert collective_seconds(ring, "collective_permute", 100, ((0, 2),)) == 1 + 100 / 5


def test_an_open_ring_has_half_the_bandwidth():
    def seconds(fabric: str) -> float:
        return collective_seconds(
            machine(Level("line", 4, fabric, 0.0, 10.0)), "all_gather", 400, ((0, 4),)
        )

    assert seconds("mesh") == 2 * seconds("ring")


def test_a_bus_is_one_link_for_all():
    def seconds(fabric: str, shared_by: int = 1) -> float:
        level = Level("node", 4, fabric, 0.0, 10.0, shared_by)
        return collective_seconds(machine(level), "all_gather", 400, ((0, 4),))

    assert seconds("bus") == 4 * seconds("switch") == seconds("switch", shared_by=4)


def test_both_dims_of_a_torus_work_at_once():
    torus = machine(Level("y", 4, "torus", 0.0, 10.0), Level("x", 4, "torus", 0.0, 10.0))
    assert collective_seconds(torus, "all_gather", 1600, ((0, 4), (1, 4))) == 1500 / 20
    assert collective_seconds(torus, "all_gather", 1600, ((1, 4),)) == pytest.approx(1200 / 10)


def nodes(latency: float = 0.0) -> Machine:
    """2 nodes of 4 devices. The 4 share one card of 10 bytes a second; links inside have 1000."""
    return machine(
        Level("nodes", 2, "switch", latency, 10.0, shared_by=4),
        Level("node", 4, "switch", latency, 1000.0),
    )


def test_one_device_per_node_gets_a_fourth_of_the_card():
    assert collective_seconds(nodes(), "all_reduce", 100, ((0, 2),)) == 100 / (10 / 4)
    assert collective_seconds(nodes(), "collective_permute", 100, ((0, 2),)) == 100 / (10 / 4)


def test_a_group_of_whole_nodes_uses_the_card_once():
    # Inside: a reduce_scatter. Between: four exchange their 200 at a fourth of the card.
    # Inside again: an all_gather.
    assert collective_seconds(nodes(), "all_reduce", 800, ((0, 2), (1, 4))) == pytest.approx(
        600 / 1000 + 200 / (10 / 4) + 600 / 1000
    )
    assert collective_seconds(nodes(), "all_gather", 800, ((0, 2), (1, 4))) == pytest.approx(
        400 / 10 + 600 / 1000  # each node's half crosses the card once, then spreads inside
    )
    # half of each operand crosses, four devices at once
    assert collective_seconds(nodes(), "all_to_all", 800, ((0, 2), (1, 4))) == pytest.approx(
        400 / (10 / 4) + 800 * 3 / 8 / 1000
    )


def test_a_short_message_takes_the_fewest_steps():
    # recursive doubling: twice inside, once outside where four devices share the card
    seconds = collective_seconds(nodes(latency=1.0), "all_reduce", 1, ((0, 2), (1, 4)))
    assert seconds == pytest.approx(3 + 2 / 1000 + 4 / 10)


def test_one_ring_through_all_nodes_uses_all_links_at_once():
    # a card for each device: four cards together keep up with the links inside
    balanced = machine(
        Level("nodes", 2, "switch", 0.0, 10.0), Level("node", 4, "switch", 0.0, 40.0)
    )
    assert collective_seconds(balanced, "all_reduce", 800, ((0, 2), (1, 4))) == pytest.approx(
        2 * 700 / 40
    )


def test_three_levels_by_hand():
    three = machine(
        Level("nodes", 2, "switch", 0.0, 10.0),
        Level("node", 2, "switch", 0.0, 20.0),
        Level("pair", 2, "switch", 0.0, 1000.0),
    )
    # Inside the pairs: a reduce_scatter and an all_gather. Between: one ring of four with 500,
    # whose slowest link is 20.
    seconds = collective_seconds(three, "all_reduce", 1000, ((0, 2), (1, 2), (2, 2)))
    assert seconds == pytest.approx(500 / 1000 + 2 * 375 / 20 + 500 / 1000)


def test_a_link_is_shared_by_existing_devices_only():
    crowded = machine(Level("node", 2, "switch", 0.0, 10.0, shared_by=8))
    assert collective_seconds(crowded, "collective_permute", 100, ((0, 2),)) == 100 / (10 / 2)


def test_zero_bytes_take_no_time():
    assert collective_seconds(nodes(1.0), "all_reduce", 0, ((0, 2), (1, 4))) == 0
    assert collective_seconds(nodes(1.0), "all_reduce", 100, ((0, 1), (1, 1))) == 0
    assert collective_seconds(nodes(1.0), "all_reduce", 100, ()) == 0


def test_an_unknown_collective_is_named():
    with pytest.raises(MachineError) as error:
        collective_seconds(nodes(), "broadcast", 1, ((0, 2),))
    assert str(error.value) == (
        "'broadcast' is not a collective: "
        "use all_reduce, all_gather, reduce_scatter, all_to_all, collective_permute."
    )


def test_64_h100_reach_the_known_bus_bandwidth():
    seconds = collective_seconds(load("h100:64"), "all_reduce", 1e9, ((0, 8), (1, 8)))
    assert 350e9 < 2 * 63 / 64 * 1e9 / seconds < 400e9


# ---- laws

levels = st.lists(
    st.builds(
        Level,
        name=st.just("level"),
        size=st.sampled_from((1, 2, 3, 4, 6, 8, 16)),
        fabric=st.sampled_from(FABRICS),
        latency=st.floats(0, 1e-3),
        bandwidth=st.floats(1e6, 1e12),
        shared_by=st.integers(1, 8),
    ),
    min_size=1,
    max_size=3,
)


@st.composite
def cases(draw):
    drawn = draw(levels)
    group = tuple((i, draw(st.integers(1, level.size))) for i, level in enumerate(drawn))
    return machine(*drawn), draw(st.sampled_from(KINDS)), group


@given(cases(), st.integers(0, 10**12), st.integers(0, 10**12))
def test_more_bytes_are_never_faster(case, one, other):
    few, many = sorted((one, other))
    example, kind, group = case
    assert collective_seconds(example, kind, few, group) <= collective_seconds(
        example, kind, many, group
    )


@given(cases(), st.integers(0, 10**12), st.integers(0, 2), st.floats(1, 100), st.floats(0, 1))
def test_faster_links_are_never_slower(case, nbytes, which, bandwidth, latency):
    example, kind, group = case
    old = list(example.levels)
    level = old[which % len(old)]
    old[which % len(old)] = replace(
        level, bandwidth=level.bandwidth * bandwidth, latency=level.latency * latency
    )
    assert collective_seconds(machine(*old), kind, nbytes, group) <= collective_seconds(
        example, kind, nbytes, group
    )


@given(cases(), st.integers(0, 10**12))
def test_sharing_a_link_is_never_faster(case, nbytes):
    example, kind, group = case
    alone = machine(*(replace(level, shared_by=1) for level in example.levels))
    assert collective_seconds(alone, kind, nbytes, group) <= collective_seconds(
        example, kind, nbytes, group
    )


@given(cases(), st.integers(0, 10**12))
def test_an_all_reduce_is_no_slower_than_its_halves(case, nbytes):
    example, _, group = case
    halves = collective_seconds(example, "reduce_scatter", nbytes, group) + collective_seconds(
        example, "all_gather", nbytes, group
    )
    assert collective_seconds(example, "all_reduce", nbytes, group) <= halves * (1 + 1e-12)


@given(cases(), st.integers(1, 10**12))
def test_no_collective_beats_its_slowest_link(case, nbytes):
    """Every byte that must enter a part of a level comes over that part's links."""
    example, _, group = case
    inside = 1
    for index, p in reversed(group):
        if p > 1:
            needed = nbytes * (p - 1) / p  # of an all_gather's result, the part does not have these
            # At most one link for each of its members at this level, and at all outer levels.
            links = inside * sum(
                example.levels[outer].bandwidth
                for outer, parts in group
                if outer <= index and parts > 1
            )
            assert collective_seconds(example, "all_gather", nbytes, group) >= needed / links * (
                1 - 1e-12
            )
        inside *= p


@given(cases(), st.lists(st.integers(0, 10**12), min_size=1, max_size=5))
def test_arrays_cost_what_their_elements_cost(case, sizes):
    example, kind, group = case
    times = collective_seconds(example, kind, np.array(sizes), group)
    assert isinstance(times, np.ndarray)
    assert times.tolist() == [collective_seconds(example, kind, size, group) for size in sizes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fabric", ["torus", "mesh"])
def test_the_dims_of_a_torus_have_no_order(kind, fabric):
    fast = Level("fast", 8, fabric, latency=1.0, bandwidth=10.0)
    slow = Level("slow", 2, fabric, latency=2.0, bandwidth=5.0)
    for nbytes in (1, 100, 10**6):
        one = collective_seconds(machine(fast, slow), kind, nbytes, ((0, 8), (1, 2)))
        other = collective_seconds(machine(slow, fast), kind, nbytes, ((0, 2), (1, 8)))
        assert one == pytest.approx(other)


def test_all_to_all_on_a_torus_by_hand():
    torus = machine(Level("y", 2, "torus", 1.0, 10.0), Level("x", 8, "torus", 1.0, 10.0))
    # Along x a byte crosses 2 links on average (0, 1, 1, 2, 2, 3, 3, 4 to the eight places). Along
    # y it crosses half a link, at the same time.
    seconds = collective_seconds(torus, "all_to_all", 1600, ((0, 2), (1, 8)))
    assert seconds == 1 + 7 + 2 * 1600 / 10
