"""Rematerialization as a state of operators: the sum of a plan, its bound, and its runs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partita.capture.program import capture_program
from partita.cost.evaluate import PARTS
from partita.graph.rematerialize import copies_of, useful_runs
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.search.base import Problem
from partita.search.elimination import eliminate
from partita.search.find import mesh_of
from partita.search.network import CostNetwork, build
from partita.search.recomputation import least_with_recomputation, with_recomputation
from partita.search.reduce import reduce
from partita.search.rematerialization import OperatorRuns, with_runs
from partita.search.simulated import relaxed, simulated
from partita.search.together import corrected
from partita.simulation.simulate import predicted

SAMPLES, WIDTH = 1 << 14, 1024
FORWARD = [phase == "forward" and kind in ("compute", "exchange") for kind, phase in PARTS]


def step(weights, x):
    def loss(weights):
        h = x
        for weight in weights:
            h = jnp.tanh(h @ weight)
        return jnp.mean(h**2)

    value, gradients = jax.value_and_grad(loss)(weights)
    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients), value


@pytest.fixture(scope="module")
def network():
    """Three products. A narrow cut is behind the second, whose result crosses it."""
    shapes = ((WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH), (WIDTH, WIDTH))
    weights = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    batch = jax.ShapeDtypeStruct((SAMPLES, WIDTH), "float32")
    graph = capture_program(step, args=(weights, batch), target="cuda").graph
    machine = load("h100:2")
    mesh = mesh_of(machine)
    plan = BASELINES["data parallel"](graph, machine.name, mesh)
    return build(graph, machine, mesh, [plan])


def randomized(network: CostNetwork, seed: int) -> CostNetwork:
    """The network with random seconds and bytes."""
    generator = np.random.default_rng(seed)
    activations = [b * generator.uniform(1, 4, len(b)) for b in network.activations]
    problem = replace(
        network.problem,
        seconds=[generator.uniform(0, 1e-4, len(s)) for s in network.problem.seconds],
        nbytes=[a + generator.uniform(0, 1e7, len(a)) for a in activations],
    )
    parts = [generator.uniform(0, 2e-5, part.shape) for part in network.parts]
    return replace(network, problem=problem, activations=activations, parts=parts)


def all_plans(network: CostNetwork, stored) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and bytes of all states of three operators, the first two computed again or not.

    `stored`: per operator, by state, bytes that stay in memory where it is computed again.
    """
    again = [np.repeat(flags, len(network.states[o])) for o, flags in enumerate(([0, 1],) * 2)]
    again.append(np.zeros(len(network.states[2])))
    states = [np.tile(np.arange(len(network.states[o])), 2) for o in (0, 1)]
    states.append(np.arange(len(network.states[2])))
    grid = np.meshgrid(*map(lambda s: np.arange(len(s)), states), indexing="ij")
    state = [states[o][grid[o]] for o in range(3)]
    flag = [again[o][grid[o]] for o in range(3)]
    seconds, nbytes = np.zeros(grid[0].shape), np.zeros(grid[0].shape)
    for o in range(3):
        added = np.array(FORWARD, float) @ network.parts[o]
        freed = np.maximum(network.activations[o] - stored[o], 0)
        seconds += network.problem.seconds[o][state[o]] + flag[o] * added[state[o]]
        nbytes += network.problem.nbytes[o][state[o]] - flag[o] * freed[state[o]]
    for (u, v), table in network.problem.tables.items():
        seconds += table[state[u], state[v]]
    for (home, reader, *phases), table in network.moves.items():
        if phases == ["forward", "forward"]:
            seconds += flag[reader] * table[state[home], state[reader]]
    return seconds, nbytes


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_is_that_of_all_states_and_flags(network, seed):
    border = [np.zeros(len(network.states[0])), network.activations[1], np.zeros(0)]
    border[2] = network.activations[2]
    changed = randomized(network, seed)
    seconds, nbytes = all_plans(changed, border)
    space = with_recomputation(changed)
    reduced = reduce(space.problem)
    price = 1e-12 * seed
    priced = [
        s + price * b for s, b in zip(reduced.problem.seconds, reduced.problem.nbytes, strict=True)
    ]
    result = eliminate(replace(reduced.problem, seconds=priced, kinds=range(3)))
    assert result.seconds == pytest.approx((seconds + price * nbytes).min(), rel=1e-9)
    budget = float(np.quantile(nbytes, 0.02))
    best = seconds[nbytes <= budget].min()
    result = eliminate(reduced.problem, budget)
    assert result.bound <= best * (1 + 1e-9)
    assert best <= result.seconds * (1 + 1e-9)
    states = space.lift(reduced.lift(result.states))
    assert changed.problem.memory_bytes(states) >= result.nbytes


def test_a_split_that_is_only_good_together_is_found(network):
    """One split is fast and stores much, the other slow and stores little."""
    fast, slow = 0, 1
    stored = np.array([4.0, 1.0])

    def two_states(values):
        return [np.array(values), *[np.zeros(1)] * 2]

    small = replace(
        network,
        states=[states[:2] if o == 0 else states[:1] for o, states in enumerate(network.states)],
        problem=Problem.of(two_states([1.0, 2.0]), two_states(stored * SAMPLES)),
        parts=[np.zeros((len(PARTS), 2)), *[np.zeros((len(PARTS), 1))] * 2],
        activations=two_states(stored * SAMPLES),
        moves={},
        move_kinds={},
    )
    small.parts[0][PARTS.index(("compute", "forward"))] = 0.25
    budget = 2.0 * SAMPLES
    assert eliminate(small.problem, budget).states[0] == slow
    space = with_recomputation(small)
    result = eliminate(space.problem, budget)
    assert space.lift(result.states)[0] == fast
    assert space.recomputed(result.states) == (0,)
    assert result.seconds == 1.25


def test_the_bound_holds_for_rematerialized_plans(network):
    """At its own peak, no plan is faster than the bound, which rises as memory shrinks."""
    graph, machine = network.graph, network.placement.machine
    least = reduce(least_with_recomputation(network).problem).problem
    generator = np.random.default_rng(0)
    names = [operator.name for operator in graph.operators]
    runs = [(), ((names[0], names[0]),), ((names[0], names[1]),), ((names[0], names[2]),)]
    for _ in range(6):
        states = [int(generator.integers(len(states))) for states in network.states]
        for run in runs:
            plan = replace(network.plan(states), recompute=useful_runs(graph, run))
            prediction = predicted(graph, machine, plan)
            bound = eliminate(least, prediction.peak_bytes).bound
            assert bound <= prediction.seconds
    free = eliminate(least)
    assert eliminate(least, free.nbytes / 2).bound > free.bound * 1.001


def test_a_bound_pays_no_more_than_a_run(network):
    """The products of a run take at least the seconds that the bound adds for them."""
    graph, machine = network.graph, network.placement.machine
    least, once = least_with_recomputation(network), relaxed(network)
    names = [operator.name for operator in graph.operators]
    generator = np.random.default_rng(1)
    paid = 0.0
    for last in (1, 2, 1, 2):
        states = [int(generator.integers(len(states))) for states in network.states]
        runs = useful_runs(graph, ((names[0], names[last]),))
        copied = [i for one in copies_of(graph, runs) for i in one.instructions]
        products = {graph.owner[i] for i in copied if graph.instructions[i].name == "dot_general"}
        added = 0.0
        for o in products:
            copy = np.flatnonzero(least.again[o] & (least.origin[o] == states[o]))
            seconds = least.problem.seconds[o][copy] - once.seconds[o][states[o]]
            added += float(seconds.sum())
        plan = network.plan(states)
        before = predicted(graph, machine, plan).by_cause()["compute"]
        after = predicted(graph, machine, replace(plan, recompute=runs)).by_cause()["compute"]
        assert added <= after - before
        paid = max(paid, added / (after - before))
    assert paid > 0.5


def test_runs_contain_what_is_computed_again(network):
    graph = network.graph
    names = [operator.name for operator in graph.operators]
    runs = OperatorRuns(graph, network.terms)
    assert runs.of({0}) == ((names[0], names[1]),)
    assert runs.of({0, 1}) == ((names[0], names[1]),)
    assert runs.of(()) == ()


def test_a_walk_simulates_what_is_computed_again(network):
    """The step of states is that of their plan; rematerialization adds what its runs add."""
    graph, machine = network.graph, network.placement.machine
    space = with_recomputation(network)
    walked, plain = simulated(network, space), simulated(network)
    runs = OperatorRuns(graph, network.terms)
    generator = np.random.default_rng(0)
    counts = [0, 0]
    for _ in range(12):
        states = tuple(int(generator.integers(count)) for count in walked.states)
        origin = space.lift(states)
        added = walked.seconds(states) - plain.seconds(origin)
        operators = space.recomputed(states)
        counts[bool(operators)] += 1
        plan = network.plan(origin)
        recomputed = replace(plan, recompute=runs.of(operators))
        expected = predicted(graph, machine, recomputed).seconds
        expected -= predicted(graph, machine, plan).seconds
        # A run begins with more operators than are to be computed again, and needs fewer moves.
        assert 0.65 * expected <= added <= 1.4 * expected
    assert min(counts) >= 3


def test_bytes_are_those_at_the_peak_of_a_plan(network):
    graph, machine = network.graph, network.placement.machine
    space = with_recomputation(network)
    states = tuple(int(again.argmax()) for again in space.again)
    assert space.recomputed(states) == (0,)
    runs = OperatorRuns(graph, network.terms).of((0,))
    memory = with_runs(graph, machine, network.plan(space.lift(states)), runs).memory
    assert 0 < memory.by_operator.sum() <= memory.peak
    before = space.problem.nbytes
    after = corrected(network, space, states, memory).problem.nbytes
    for o, state in enumerate(states):
        variables = network.problem.nbytes[o] - network.activations[o]
        least = variables[space.origin[o][state]]
        expected = before[o][state]
        if expected > least:
            expected = max(least, memory.by_operator[o])
        assert after[o][state] == pytest.approx(expected)
    stored = np.flatnonzero(~space.again[0])
    assert (after[0][stored] == before[0][stored]).all(), "the plan says nothing about these"
    assert after[1] != pytest.approx(before[1])


def test_the_same_operators_are_computed_again_with_other_splits(network):
    space = with_recomputation(network)
    states = tuple(int(again.argmax()) for again in space.again)
    assert space.with_origin(states, space.lift(states)) == states
    last = tuple(len(origin) - 1 for origin in space.origin)
    changed = space.with_origin(states, space.lift(last))
    assert changed is not None
    assert space.lift(changed) == space.lift(last)
    assert space.recomputed(changed) == space.recomputed(states)
    assert space.with_origin(states, (10**6,) * len(states)) is None
