"""The bound on all choices: below every plan, close to the best, and exact where work is done."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.cost.evaluate import PARTS, operator_cost
from partita.cost.moves import Placement, move_seconds
from partita.cost.operator_terms import Move
from partita.cost.reshard import Axes
from partita.cost.storage import storage_rules
from partita.cost.terms import cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.plans.layout import Sharding
from partita.search import relaxation
from partita.search.bound import lower_bound_seconds
from partita.search.candidates import REPLICATE, assignment_of, candidates
from partita.search.degrees import (
    AxisKinds,
    DegreeCounts,
    Shardings,
    least_move_table,
    least_operator_seconds,
)
from partita.search.elimination import eliminate
from partita.search.find import mesh_of
from partita.search.network import build
from partita.search.relaxation import least_step_seconds
from partita.search.simulated import relaxed

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}
MACHINES = ("dgx-h100:2", "k80-cluster", "tpu-v5e:16")


def placement_on(name: str) -> Placement:
    machine = load(name)
    return Placement(machine, mesh_of(machine))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_bound_is_below_the_best_candidates_and_near_them(name: str) -> None:
    machine = load("dgx-h100:1").with_devices(4)
    graph = GRAPHS[name]
    network = build(graph, machine, mesh_of(machine))
    best = eliminate(relaxed(network)).seconds
    bound = least_step_seconds(graph, network.placement, network.terms)
    assert 0.8 * best <= bound <= best * (1 + 1e-9)


def test_shardings_in_classes_keep_the_largest_degrees_apart_and_lower_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placement = placement_on("dgx-h100:16")
    kinds = AxisKinds.of(placement)
    degrees = np.array([[[n, 0]] for n in range(5)])
    views = Shardings.of(degrees, kinds, 2)
    assert views.classes.tolist() == [0, 1, 1, 2, 3]
    assert views.least[:, 0, 0].tolist() == [0, 1, 3, 4]
    assert views.most[:, 0, 0].tolist() == [0, 2, 3, 4]
    graph = GRAPHS["transformer"]
    terms = cost_terms(graph, placement.machine.backend)
    bounds = []
    for entries in (80_000_000, 10_000, 1):
        monkeypatch.setattr(relaxation, "MAX_ENTRIES", entries)
        bounds.append(least_step_seconds(graph, placement, terms))
    kernels = lower_bound_seconds(terms, placement.machine, 128)
    assert bounds[0] >= bounds[1] >= bounds[2] >= kernels * (1 - 1e-6)


@pytest.mark.parametrize("name", GRAPHS)
def test_no_choice_and_storage_costs_an_operator_less(name: str) -> None:
    graph = GRAPHS[name]
    placement = placement_on("dgx-h100:2")
    kinds = AxisKinds.of(placement)
    weights = np.array([1.0 if kind == "compute" else 0.5 for kind, _ in PARTS])
    terms = cost_terms(graph, placement.machine.backend)
    for number, operator in enumerate(terms.operators):
        choices = candidates(graph, number, placement.mesh)[::29]
        assignments = [assignment_of(choice) for choice in choices]
        degrees = []
        for assignment in assignments:
            split = [assignment.get(factor, ()) for factor in operator.factors]
            degrees.append(degrees_of(split, kinds))
        counts = DegreeCounts(kinds, operator.factors, np.array(degrees))
        least = least_operator_seconds(operator, counts, weights)
        plain = np.inf
        for rule in storage_rules(placement.mesh, within_nodes=True):
            seconds = weights @ operator_cost(operator, placement, assignments, rule).parts()
            plain = np.minimum(plain, seconds)
        inside = sum(move.nbytes for move in operator.moves)
        assert (least <= plain * (1 + 1e-9)).all(), operator.name
        if not operator.stored and not inside:
            assert least == pytest.approx(plain, rel=1e-9)


def test_all_degrees_are_the_ways_to_divide_factors() -> None:
    kinds = AxisKinds.of(placement_on("dgx-h100:2"))
    sizes = (4, 3, 2)
    expected = set()
    for choice in itertools.product((0, 1, 2, REPLICATE), repeat=4):
        rows = degrees_of([tuple(a for a in range(4) if choice[a] == f) for f in range(3)], kinds)
        if not any(size % parts for size, parts in zip(sizes, kinds.shards(rows), strict=True)):
            expected.add(rows.tobytes())
    degrees = kinds.all_degrees(sizes)
    assert len(degrees) == len(expected)
    assert {rows.tobytes() for rows in degrees} == expected


def test_a_factor_of_another_operator_is_not_split() -> None:
    """A mask that several blocks read has the factors of the operator that makes it."""
    kinds = AxisKinds.of(placement_on("dgx-h100:2"))
    factors = (0, 1)
    counts = DegreeCounts(kinds, factors, kinds.all_degrees((8, 8)))
    other = max(factors) + 1
    assert counts.shards((other,)).tolist() == [1.0] * counts.count


def test_an_operator_without_factors_has_one_choice() -> None:
    kinds = AxisKinds.of(placement_on("dgx-h100:2"))
    assert kinds.all_degrees([]).shape == (1, 0, len(kinds.sizes))


def degrees_of(split: Sequence[Axes], kinds: AxisKinds) -> np.ndarray:
    """Numbers of axes of each kind, [entry of the split, kind]."""
    rows = [[sum(axis in entry for axis in axes) for axes in kinds.axes] for entry in split]
    return np.array(rows, np.int64).reshape(-1, len(kinds.axes))


@st.composite
def shardings(draw: st.DrawFn, axes: int, entries: int) -> Sharding:
    """Any sharding over some of the axes, their digits in any order."""
    order = draw(st.permutations(range(axes)))
    homes = draw(st.lists(st.integers(0, entries), min_size=axes, max_size=axes))
    return tuple(tuple(a for a in order if homes[a] == entry) for entry in range(entries))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_no_reshard_is_faster_than_its_least_seconds(data: st.DataObject) -> None:
    placement = placement_on(data.draw(st.sampled_from(MACHINES)))
    kinds = AxisKinds.of(placement)
    sums = data.draw(st.integers(0, 1))
    share = data.draw(st.sampled_from([1, 3]))
    scatters = data.draw(st.booleans())
    label = (0, 1, 2)
    move = Move(0, 1 << 28, 0, label, 1, label, 1, "forward", "forward", sums, scatters, -1, share)
    axes = len(placement.mesh.axes)
    source = data.draw(shardings(axes, 3))
    target = data.draw(shardings(axes, 3))
    seconds = move_seconds(move, placement, source, target)
    degrees = [degrees_of(sharding, kinds)[None] for sharding in (source, target)]
    for apart in (None, 2, 1):
        views = [Shardings.of(each, kinds, apart) for each in degrees]
        assert least_move_table(move, kinds, *views)[0, 0] <= seconds * (1 + 1e-6)


def test_a_gather_inside_a_node_has_its_own_seconds_without_latency() -> None:
    placement = placement_on("dgx-h100:2")
    kinds = AxisKinds.of(placement)
    move = Move(0, 1 << 30, 0, (0, 1), 1, (0, 1), 1, "forward", "forward")
    source, target = np.zeros((2, 1, 2, 2), np.int64)
    source[0, 0] = (1, 3)
    target[0, 0] = (1, 0)
    views = [Shardings.of(degrees, kinds) for degrees in (source, target)]
    least = least_move_table(move, kinds, *views)[0, 0]
    seconds = move_seconds(move, placement, ((0, 1, 2, 3), ()), ((0,), ()))
    assert 0.9 * seconds < least <= seconds
