"""Rematerialized runs: the copies in the graph, and the same program as text."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partita.capture import stablehlo
from partita.capture.program import capture_program
from partita.cost.memory import memory
from partita.cost.work import local_flops
from partita.errors import PlanError
from partita.execute.program import planned_step
from partita.execute.rematerialize import rematerialized_step
from partita.graph.clones import BARRIER
from partita.graph.rematerialize import copies_of, rematerialized, useful_runs
from partita.machine import load
from partita.planning import predict_plan, resolve_machine, resolve_plan
from partita.plans.check import check
from partita.plans.layout import layout_of

SAMPLES, WIDTH, HIDDEN, BLOCKS = 1024, 16, 64, 4
ONE_PRODUCT = 2 * SAMPLES * WIDTH * HIDDEN
RUNS = tuple((f"parameters/{n}/0", f"parameters/{n}/1") for n in range(BLOCKS))


def step(parameters, x, key):
    """A residual network with dropout; its state is (parameters, key)."""

    def loss(parameters):
        h = x
        for n, (up, down) in enumerate(parameters):
            mask = jax.random.bernoulli(jax.random.fold_in(key, n), 0.9, (SAMPLES, HIDDEN))
            h = h + jnp.where(mask, jnp.tanh(h @ up), 0) @ down
        return jnp.mean(h**2)

    value, gradients = jax.value_and_grad(loss)(parameters)
    return jax.tree.map(lambda w, g: w - 0.1 * g, parameters, gradients), value


def arguments():
    keys = iter(jax.random.split(jax.random.key(0), 2 * BLOCKS + 1))
    parameters = []
    for _ in range(BLOCKS):
        up = jax.random.normal(next(keys), (WIDTH, HIDDEN)) / 4
        down = jax.random.normal(next(keys), (HIDDEN, WIDTH)) / 8
        parameters.append((up, down))
    return parameters, jax.random.normal(next(keys), (SAMPLES, WIDTH)), jax.random.PRNGKey(7)


@pytest.fixture(scope="module")
def captured():
    return capture_program(step, args=arguments(), target="cuda")


@pytest.fixture
def data_parallel(captured):
    return resolve_plan("data parallel", captured.graph, load("h100:4"))


def test_a_block_stores_its_input_and_computes_the_rest_again(captured):
    """Two products and the mask; the last product only where a later value needs it."""
    graph = captured.graph
    for copies in copies_of(graph, RUNS):
        names = [graph.instructions[index].name for index in copies.instructions]
        assert 1 <= names.count("dot_general") <= 2
        assert "tanh" in names
        sizes = sorted(graph.tensors[tensor].size for tensor in copies.inputs)
        assert sizes[-1] == SAMPLES * WIDTH
        assert SAMPLES * HIDDEN not in sizes


def test_the_text_has_the_instructions_of_the_graph(captured, data_parallel):
    plan = replace(data_parallel, recompute=RUNS)
    changed = rematerialized_step(captured, plan)
    with stablehlo.context():
        module = stablehlo.parse(changed.text.mlir_module_serialized)
        values, operations = stablehlo.numbered(stablehlo.main_block(module))
        numbers = {value: number for number, value in enumerate(values)}
        assert len(values) == len(changed.graph.tensors)
        for operation, instruction in zip(operations, changed.graph.instructions, strict=True):
            assert stablehlo.short(operation.name) == instruction.name
            assert tuple(numbers[value] for value in operation.operands) == instruction.operands
            assert tuple(numbers[value] for value in operation.results) == instruction.results


def test_copies_cost_their_work_and_free_activation_memory(captured, data_parallel):
    machine = load("h100:4")
    plan = replace(data_parallel, recompute=RUNS)
    graph = rematerialized(captured.graph, RUNS)
    added = sum(x.flops for x in graph.instructions if x.name == "dot_general")
    added -= sum(x.flops for x in captured.graph.instructions if x.name == "dot_general")
    assert added in (BLOCKS * ONE_PRODUCT, (BLOCKS + 1) * ONE_PRODUCT)
    figures = []
    for one in (captured.graph, graph):
        layout = layout_of(one, plan)
        nbytes = memory(one, plan.mesh, layout, machine.backend).activations
        figures.append((nbytes, local_flops(one, plan.mesh, layout, machine.backend)))
    assert figures[1][0] < 0.4 * figures[0][0]
    assert figures[1][1] >= figures[0][1] + added / 4
    kept = predict_plan(captured.graph, machine, data_parallel)
    dropped = predict_plan(captured.graph, machine, plan)
    assert dropped.seconds > kept.seconds
    assert dropped.memory.activations == figures[1][0]


def test_one_barrier_per_run_reaches_the_compiler(captured, data_parallel):
    machine = load("h100:4")
    from partita.execute.compilers.family import program_compiler
    from partita.execute.compilers.request import request_of

    plan = replace(data_parallel, recompute=RUNS[:2])
    program = request_of(captured, plan, program_compiler(machine).target(machine)).program
    with stablehlo.context():
        assert str(stablehlo.parse(program)).count(f"stablehlo.{BARRIER}") == 2


@pytest.mark.parametrize("name", ["tensor parallel", "ZeRO-3"])
def test_results_are_those_of_one_device(name):
    """With the same random numbers. XLA:CPU merges copies with originals, if both are equal."""
    args = arguments()
    captured = capture_program(step, args=args, target="cpu")
    plan = resolve_plan(name, captured.graph, resolve_machine(None, 4))
    planned = planned_step(captured, replace(plan, recompute=RUNS), donate=False)
    expected, loss = jax.jit(step)(*args)
    state = jax.tree.leaves(args[0])
    outputs, updated = planned.step(planned.place_state(state), planned.place_batch(list(args[1:])))
    np.testing.assert_allclose(jax.tree.leaves(outputs)[0], loss, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(updated), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ((("parameters/0/0", "blocks/9"),), "rematerializes 'blocks/9', which the model does not"),
        ((RUNS[1], RUNS[0]), "overlaps with another run or ends before it begins"),
    ],
)
def test_a_wrong_run_is_refused(captured, data_parallel, runs, sentence):
    with pytest.raises(PlanError, match=sentence):
        check(replace(data_parallel, recompute=runs), captured.graph)


def test_a_run_that_frees_nothing_is_refused():
    """The backward pass of a linear network reads the batch alone."""

    def linear(weight, x):
        gradient = jax.grad(lambda weight: jnp.sum(x @ weight))(weight)
        return weight - gradient

    args = (jnp.ones((8, 8)), jnp.ones((16, 8)))
    captured = capture_program(linear, args=args, target="cuda")
    (operator,) = captured.graph.operators
    run = (operator.name, operator.name)
    plan = resolve_plan("data parallel", captured.graph, load("h100:4"))
    assert useful_runs(captured.graph, [run]) == ()
    with pytest.raises(PlanError, match="reads none of their values: there is nothing to free"):
        check(replace(plan, recompute=(run,)), captured.graph)


def largest(values: jax.Array) -> jax.Array:
    return jnp.max(values, 0)


def largest_of_a_segment(values: jax.Array) -> jax.Array:
    return jax.ops.segment_max(values, jnp.arange(SAMPLES) % 2, 2)


@pytest.mark.parametrize(
    ("maximum", "name"), [(largest, "reduce"), (largest_of_a_segment, "scatter")]
)
def test_a_maximum_is_computed_again_with_the_values_that_are_compared_with_it(maximum, name):
    def step(parameters, x):
        def loss(parameters):
            first, second = parameters
            return jnp.mean((maximum(jnp.tanh(x @ first)) @ second) ** 2)

        return jax.tree.map(jnp.subtract, parameters, jax.grad(loss)(parameters))

    parameters = (jnp.ones((WIDTH, HIDDEN)), jnp.ones((HIDDEN, WIDTH)))
    x = jnp.ones((SAMPLES, WIDTH))
    graph = capture_program(step, args=(parameters, x), target="cuda").graph
    last = graph.operators[-2].name
    (copies,) = copies_of(graph, (("parameters/0", last),))
    copied = {graph.instructions[index].name for index in copies.instructions}
    assert "compare" in copied
    # The next product reads the maximum, so it is stored all the same.
    (first,) = (i for i in graph.instructions if i.name == name and not i.adds)
    assert first.results[0] not in copies.inputs
    assert graph.instructions.index(first) in copies.instructions
