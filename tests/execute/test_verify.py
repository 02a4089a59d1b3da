"""The compiler's account of a planned step, and the planned step against one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import partita
from partita.capture.jax_functions import Leaf, capture_step
from partita.capture.program import capture_program
from partita.cost.collectives import collectives
from partita.errors import MemoryBudgetError
from partita.execute.program import planned_step
from partita.execute.verification import Traffic
from partita.execute.verify import check_and_compare, compare_steps, verify
from partita.plans.adapt import fit_plan
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.plan import Storage, mesh_for


def captured(batch=16):
    """A dense layer with its gradient step: 8 x 6 weights."""

    def step(state, data):
        (weights,) = state
        loss, slope = jax.value_and_grad(lambda w: ((data @ w) ** 2).mean())(weights)
        return {"loss": loss}, (weights - slope,)

    shape = jax.ShapeDtypeStruct
    return capture_step(
        step,
        (shape((8, 6), "float32"),),
        shape((batch, 8), "float32"),
        [Leaf("w", "parameter")],
        batch_size=batch,
    )


def planned(name, batch=16, ways=4):
    found = captured(batch)
    return planned_step(found, BASELINES[name](found.graph, "host", mesh_for((ways,))))


@pytest.fixture(scope="module")
def data_parallel():
    step = planned("data parallel")
    return step, step.lower().compile()


def expected(step):
    return collectives(step.captured.graph, step.plan.mesh, step.layout)


def test_the_compiler_agrees_with_the_plan(data_parallel):
    step, compiled = data_parallel
    found = verify(step, compiled, expected(step), 1 << 20, 400.0)
    (traffic,) = found.traffic
    assert found.ok
    assert (traffic.kind, traffic.planned) == ("all_reduce", 8 * 6 * 4 + 4)
    assert 16 * 8 * 4 / 4 + 8 * 6 * 4 <= found.peak_bytes < 2000
    text = str(found).splitlines()
    assert text[0].endswith("of 1.0 MiB")
    assert text[1] == "all_reduce: 196 B planned, 196 B emitted"
    assert text[2].startswith("work per device: 400 FLOP planned, ")


def test_a_difference_names_its_layer(data_parallel):
    step, compiled = data_parallel
    found = verify(step, compiled, [c for c in expected(step) if c.nbytes > 4], None, None)
    assert not verify(step, compiled, [], None, None).ok
    (traffic,) = found.traffic
    assert traffic.planned == 192
    assert sum(emitted - planned for _, planned, emitted in traffic.layers) == 4
    assert found.ok is False
    assert "\n  (no layer): 192 B planned" in str(found)


def test_a_step_that_exceeds_memory_is_refused_with_both_figures(data_parallel):
    step, compiled = data_parallel
    with pytest.raises(
        MemoryBudgetError,
        match=r"'data parallel' for step needs .* B of memory on every device .* has 100 B\. Use a",
    ):
        verify(step, compiled, expected(step), 100, None)


@pytest.mark.parametrize("name", ["data parallel", "tensor parallel", "ZeRO-3"])
def test_the_planned_step_equals_the_one_on_one_device(name):
    step = planned(name, ways=2)
    rng = np.random.RandomState(0)
    state, batch = (rng.rand(8, 6).astype("float32"),), rng.rand(16, 8).astype("float32")
    before = state[0].copy()
    differences = compare_steps(step.captured, step, state, batch)
    assert [d.name for d in differences] == ["loss", "w"]
    assert max(d.relative for d in differences) < 1e-6
    np.testing.assert_array_equal(before, state[0])


@pytest.mark.parametrize("indices", [[5], [5, 2]])
def test_rows_written_at_one_index_are_not_split(indices):
    """XLA's partitioner writes them wrongly; capture keeps the written dim whole, and the split
    step equals the plain one.
    """

    def step(state, data):
        (weights,) = state
        written = (weights * 2).at[np.array(indices)].set(data.sum(0))
        return {}, (written @ jnp.ones((6, 6)),)

    shape = jax.ShapeDtypeStruct
    found = capture_step(
        step,
        (shape((8, 6), "float32"),),
        shape((4, 6), "float32"),
        [Leaf("w", "parameter")],
        batch_size=4,
    )
    state, batch = (np.arange(48, dtype="float32").reshape(8, 6),), np.ones((4, 6), "float32")
    mesh = mesh_for((2,))
    for o in found.graph.operators:
        for f in o.factors:
            plan = BASELINES["one device"](found.graph, "host", mesh)
            split = dataclasses.replace(
                plan, choices={**plan.choices, o.name: {"a": found.graph.factors[f].name}}
            )
            differences = compare_steps(found, planned_step(found, split), state, batch)
            assert max(d.relative for d in differences) < 1e-6


def test_a_wrong_step_is_detected():
    """The planned step of other weights than the plain one's is not the same step."""
    step, other = planned("data parallel"), captured()
    wrong = jax.jit(lambda state, batch: ({"loss": batch.sum()}, (state[0] * 2,)))
    state, batch = (np.ones((8, 6), "float32"),), np.ones((16, 8), "float32")
    differences = compare_steps(other, dataclasses.replace(step, step=wrong), state, batch)
    assert {d.name: d.relative > 0.1 for d in differences} == {"loss": True, "w": True}


def test_the_standard_check_reports_lines(data_parallel):
    step, compiled = data_parallel
    lines = str(
        check_and_compare(
            step, compiled, (np.ones((8, 6), "float32"),), np.ones((16, 8), "float32")
        )
    ).splitlines()
    assert (
        lines[-3] == "one step as planned and on one device: 2 values compared, largest differences"
    )
    assert lines[-1].endswith("of its largest value")


def test_a_plan_fitted_to_a_smaller_batch_keeps_even_splits():
    plan = planned("data parallel", ways=4).plan
    small = captured(6).graph
    (name,) = plan.choices
    fitted = check(fit_plan(plan, small), small)
    assert fitted.choices[name] == {"a": "S"}
    assert fitted.batch_size == 6
    assert fitted.notes == (
        f"at batch size 6 split fewer ways, because sizes do not divide: {name!r}",
    )
    assert fit_plan(plan, captured(16).graph).choices == plan.choices
    odd = captured(5).graph
    assert check(fit_plan(plan, odd), odd).choices[name] == {}


def test_an_unknown_operator_is_not_split_and_a_variable_that_does_not_divide_is_not_stored_apart():
    step = planned("ZeRO-3")
    plan, graph = step.plan, step.captured.graph
    assert fit_plan(plan, graph).storage == plan.storage
    unknown = dataclasses.replace(
        plan, choices={}, storage={"w": Storage(1, ("a", "b"), 3), "gone": Storage(0, ("a",), 3)}
    )
    fitted = check(fit_plan(unknown, graph), graph)
    assert [dict(c) for c in fitted.choices.values()] == [{}]
    assert fitted.storage == {}
    assert fitted.notes[-1] == "storage not split: 'w', 'gone'"
    assert Traffic("all_reduce", 1, 1).layers == ()


def test_reductions_that_devices_cannot_combine_are_computed_whole():
    """XLA has no all-reduce of integers' bits nor of a computation of the user's own."""

    def step(weights, rows, words):
        smooth_maximum = jax.lax.reduce(rows @ weights, -jnp.inf, jnp.logaddexp, (0,))
        parity = jax.lax.reduce(words, np.uint32(0), jax.lax.bitwise_xor, (0,))
        return weights - smooth_maximum.mean(), parity

    values = np.random.default_rng(0)
    rows = values.normal(size=(16, 8)).astype("float32")
    words = values.integers(0, 2**32, (16, 3), "uint32")
    arguments = (np.ones((8, 6), "float32"), rows, words)
    graph = capture_program(step, args=arguments).graph
    plan = BASELINES["data parallel"](graph, "host", mesh_for((4,)))
    split = partita.parallelize(step, arguments, plan=plan)(*arguments)
    whole = jax.jit(step)(*arguments)
    np.testing.assert_allclose(split[0], whole[0], rtol=1e-5)
    np.testing.assert_array_equal(split[1], whole[1])
