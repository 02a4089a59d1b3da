"""The doors of the package: a plan for another model is refused, and one can be taken away as a
plain Keras layout.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers

import partita
from partita.capture.functions import call_of, capture_call
from partita.capture.program import capture_program
from partita.errors import CaptureError, MemoryBudgetError, PartitaError, PlanError
from partita.machine import host
from partita.planning import check_plan, make_planner, other_plans, resolve_plan
from partita.plans.plan import Plan, mesh_for


def made(width: int = 512) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(width, activation="relu", name="wide"),
            layers.Dense(8, name="out"),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_a_plan_of_another_model_batch_or_machine() -> None:
    graph = capture_program(made(), 32).graph
    plan = partita.plan(made(), 32, machine=host(4, 1 << 30))
    assert check_plan(plan, graph, host(4, 1 << 30)) == plan
    smaller = check_plan(plan, capture_program(made(), 2).graph, host(4, 1 << 30))
    assert smaller.batch_size == 2
    with pytest.raises(
        PlanError,
        match=r"is for 4 devices; host:2 has 2. Plan again for 2, or give the plan 4 devices",
    ):
        check_plan(plan, graph, host(2, 1 << 30))
    other = keras.Sequential([keras.Input((8,)), layers.Dense(4, name="else")])
    other.compile("sgd", "mse")
    with pytest.raises(
        PlanError,
        match="made for another model .* the model has no 'wide', 'out'; the plan has no choice for 'else'",
    ):
        check_plan(plan, capture_program(other, 16).graph, host(4, 1 << 30))


def test_a_plan_as_a_keras_layout_map() -> None:
    model = made(4096)
    plan = partita.plan(model, 32, machine=host(4, 1 << 30))
    layout_map = partita.layout_map(plan, model)
    assert plan.to_json()["operators"] == {"wide": "P:a,b", "out": "R:a,b"}
    (kernel,) = [path for path in layout_map if path.endswith("wide/kernel")]
    assert layout_map[kernel].axes == (None, "a_b")


def test_what_is_missing_is_said() -> None:
    with pytest.raises(
        CaptureError,
        match="is not compiled, so it has no loss and no optimizer. Call model.compile",
    ):
        capture_program(keras.Sequential([keras.Input((4,)), layers.Dense(2)]), 8)
    model = keras.Sequential([keras.Input((None, 4)), layers.LSTM(2)])
    model.compile("sgd", "mse")
    with pytest.raises(
        CaptureError, match="dim 1 is not fixed. Give a batch of the shapes you train on"
    ):
        capture_program(model, 8)
    frozen = made()
    frozen.trainable = False
    with pytest.raises(CaptureError, match="has no trainable variables"):
        capture_program(frozen, 8)


@pytest.mark.parametrize("size", [("x", "y"), 0, -1, 2.5, "16", True])
def test_a_batch_size_is_a_whole_number(size):
    with pytest.raises(CaptureError, match=r"batch_size is .*from 1 on\. Give .* batch=\(x, y\)"):
        partita.plan(made(), size)


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        ([], "batch has no arrays: give batch=.x, y. of arrays, or of jax.ShapeDtypeStruct"),
        (((8, 64), (8,)), "batch has the number 8 for an array: give"),
        ((np.array(["a"]), np.ones(1)), "a value of type 'ndarray' that is no array of numbers"),
        ((object(), np.ones(1)), "a value of type 'object' that is no array of numbers: give"),
        ((np.ones((0, 64)), np.ones(0)), "batch has no samples: give"),
        (
            np.ones((8, 64)),
            "The model 'unbuilt' cannot be built for the batch: ValueError: .* as in",
        ),
    ],
)
def test_a_batch_is_arrays_of_samples(batch: Any, problem: str) -> None:
    model = keras.Sequential([layers.Dense(8)], name="unbuilt")
    model.compile("sgd", "mse")
    with pytest.raises(CaptureError, match=problem):
        partita.plan(model, batch=batch, machine="h100:2")


def test_an_error_of_the_loss_is_one_sentence() -> None:
    def refuse(_: Any, __: Any) -> None:
        raise ValueError("Labels have 4 classes.")

    model = made()
    model.compile("sgd", refuse)
    with pytest.raises(CaptureError, match=r"ValueError: Labels have 4 classes\. Give batch="):
        partita.plan(model, batch=(np.ones((8, 64)), np.ones(8)), machine="h100:2")


class Refusing(layers.Layer):
    """A layer that cannot train."""

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            raise RuntimeError("The mask has two dims.\nUse four.")
        return x


def test_an_error_of_a_layer_has_its_message_and_not_that_of_keras() -> None:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), Refusing(), layers.Dense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(CaptureError, match=r"RuntimeError in Refusing: The mask has two dims\."):
        partita.plan(model, 8, machine="h100:2")


def test_arguments_that_contradict_the_program_are_named() -> None:
    batch = (np.ones((8, 64)), np.ones(8))
    with pytest.raises(CaptureError, match="batch_size is 16, and the batch has 8 samples. Give"):
        capture_program(made(), 16, batch)
    with pytest.raises(CaptureError, match="args are for a step. Give a Keras model its batch"):
        capture_program(made(), args=(1,))
    with pytest.raises(CaptureError, match="are for Keras models. Give a step args, the argum"):
        capture_program(lambda x: x, 16, args=(1,))


def test_what_a_compiler_refused_is_planned_smaller_and_a_given_plan_is_answered_with_the_nearest() -> (
    None
):
    captured = capture_program(made(1 << 14), 256)
    machine = host(4, 1 << 28)
    free = partita.plan(made(1 << 14), 256, machine=machine)
    excess = 2.0
    refused = MemoryBudgetError("The plan 'found' needs too much.", excess)
    again = make_planner(machine=machine)(captured, refused)
    assert again.predicted["peak_bytes"] <= machine.memory_bytes / excess
    with pytest.raises(
        MemoryBudgetError,
        match=r"needs too much\. The nearest plan that fits: .* a device, a step predicted at .*",
    ):
        make_planner(machine=machine, plan=free)(captured, refused)
    with pytest.raises(MemoryBudgetError, match="under no plan: the smallest needs"):
        make_planner(machine=machine)(captured, MemoryBudgetError("", 1e6))


def test_a_baseline_is_run_by_its_name() -> None:
    captured = capture_program(made(), 256)
    machine = host(4, 1 << 30)
    named = make_planner("dp", machine=machine)(captured)
    baseline = resolve_plan("data parallel", captured.graph, machine)
    claims = {"predicted": named.predicted, "why": named.why, "machine_digest": machine.digest}
    assert named == dataclasses.replace(baseline, **claims)
    assert set(named.why["operators"]) == {"wide", "out"}
    assert named.devices == 4 and named.predicted["seconds"] > 0
    searched = make_planner("found", machine=machine)(captured)
    assert searched == make_planner(machine=machine)(captured)
    with pytest.raises(PlanError, match="no plan file and no plan named 'ddp'. Give a file that"):
        make_planner("ddp", machine=machine)


def test_the_programs_of_a_script_get_the_plans_of_numbered_files(tmp_path: Path) -> None:
    captured = capture_program(made(), 256)
    machine = host(4, 1 << 30)
    parallel = resolve_plan("dp", captured.graph, machine)
    other = dataclasses.replace(parallel, graph="other", mesh=mesh_for((2, 2)))
    other.save(tmp_path / "plan.json")
    split = resolve_plan("tp", captured.graph, machine)
    split.save(tmp_path / "plan-2.json")
    parallel.save(tmp_path / "plan-3.json")
    split.save(tmp_path / "plan-5.json")
    path = str(tmp_path / "plan.json")
    assert other_plans(path) == {captured.graph.name: (tmp_path / "plan-2.json", split)}
    assert other_plans(other) == other_plans("dp") == {}
    chosen = make_planner(path, machine=machine)(captured)
    assert chosen.choices == split.choices and chosen.notes[-1] == "read from plan-2.json"
    (tmp_path / "plan-2.json").unlink()
    assert make_planner(path, machine=machine)(captured).choices == parallel.choices


def test_the_old_state_may_hold_an_array_twice_or_share_it_with_the_batch() -> None:
    def step(state, target, x):
        weights, average = state
        slope = jax.grad(lambda w: ((x @ w - x @ target) ** 2).mean())(weights)
        weights = weights - 0.1 * (slope + average)
        return (weights, 0.9 * average + 0.1 * weights), weights.sum()

    def losses(run):
        weights = jnp.ones((4, 8))
        average = target = weights
        found = []
        for number in range(4):
            if number == 2:
                average = target = weights
            (weights, average), loss = run((weights, average), target, x)
            found.append(float(loss))
        return found

    x, w = jnp.ones((8, 4)), jnp.ones((4, 8))
    plan = resolve_plan("dp", capture_program(step, args=((w, w), w, x)).graph, host(4, 1 << 30))
    split = partita.parallelize(step, ((w, w), w, x), plan=plan, say=print)
    assert losses(split) == pytest.approx(losses(jax.jit(step)))


def test_a_batch_that_looks_like_an_output_is_no_state() -> None:
    def step(weights: Any, key: Any, x: Any) -> Any:
        def loss(weights: Any) -> Any:
            rebuilt = x @ weights @ weights.T
            return jnp.mean((rebuilt - x) ** 2), rebuilt

        (value, rebuilt), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        return weights - 0.1 * gradient, value, jax.random.fold_in(key, 1), rebuilt, x

    args = jnp.ones((6, 3)) / 4, jax.random.key(0), jnp.ones((8, 6))
    call = call_of(step, args, {})
    assert capture_call(step, call).roles.state == (0, 1)
    assert capture_call(step, call).captured.graph.batch_size == 8


@pytest.mark.parametrize("transform", [jax.jit, jax.grad])
def test_a_parallel_step_inside_a_transformation_is_refused(transform: Any) -> None:
    def step(weights: Any, x: Any) -> Any:
        return weights - 0.1 * jax.grad(lambda w: jnp.mean((x @ w) ** 2))(weights)

    weights, x = jnp.ones((4, 4)), jnp.ones((8, 4))
    plan = resolve_plan("dp", capture_program(step, args=(weights, x)).graph, host(2, 1 << 30))
    split = partita.parallelize(step, (weights, x), plan=plan, say=print)
    with pytest.raises(PartitaError, match="'step' is called inside jax.jit, grad, vmap or scan"):
        transform(lambda w: jnp.sum(split(w, x)))(weights)
    assert split(weights, x).shape == (4, 4)


def test_an_approximate_selection_is_refused() -> None:
    def step(weights: Any, x: Any) -> Any:
        return weights + jax.lax.approx_max_k(x @ weights, 2)[0].mean()

    with pytest.raises(CaptureError, match=r"calls lax\.approx_max_k .*: use lax\.top_k"):
        capture_program(step, args=(jnp.ones((4, 4)), jnp.ones((8, 4))))


def test_an_option_that_a_verb_lacks_is_a_type_error_with_the_nearest_one() -> None:
    with pytest.raises(TypeError, match=r"plan\(\) has no option 'stgaes'. Did you mean 'stages'"):
        partita.plan(made(), 32, machine=host(2, 1 << 30), stgaes=True)  # pyright: ignore
    with pytest.raises(TypeError, match=r"parallelize\(\) has no option 'donates'"):
        partita.parallelize(made(), donates=True)  # pyright: ignore


def scaled(weights: Any, x: Any, power: int) -> tuple[Any, Any]:
    return weights - 0.1 * (x**power).mean(0), x.sum()


def test_static_arguments_are_given_as_for_jax_jit() -> None:
    args = (jnp.ones(8), jnp.ones((16, 8)), 2)
    expected = scaled(*args)[0]
    step = partita.parallelize(scaled, args, devices=2, plan="dp", static_argnums=2)
    assert jnp.allclose(step(*args)[0], expected)
    for wrong in (2.5, "x", {"power": 2}, True):
        with pytest.raises(PartitaError, match="are no positions of arguments: give a whole"):
            partita.parallelize(scaled, args, static_argnums=wrong)  # pyright: ignore


def test_a_callback_that_is_no_function_and_a_log_that_is_no_path_are_named() -> None:
    args = (jnp.ones(8), jnp.ones((16, 8)), 2)
    with pytest.raises(PlanError, match="say is of type 'bool', which cannot be called: give a"):
        partita.parallelize(scaled, args, say=True)  # pyright: ignore
    with pytest.raises(PlanError, match="say is of type 'str'"):
        partita.manage(made(), say="yes")  # pyright: ignore
    with pytest.raises(PlanError, match="report is of type 'int'"):
        partita.simulate(made(), 32, machine="h100:2", report=1)  # pyright: ignore
    with pytest.raises(PartitaError, match="log is of type 'int': give the path of a file"):
        partita.manage(made(), log=3)  # pyright: ignore
    plan = Plan("graph", "h100:2", mesh_for((2,)), {})
    with pytest.raises(PartitaError, match="path is of type 'int': give the path of a file"):
        plan.save(5)  # pyright: ignore
    with pytest.raises(FileNotFoundError, match="'absent/plan.json'"):
        plan.save("absent/plan.json")


def test_no_public_name_is_a_package_or_missing() -> None:
    for name in partita.__all__:
        value = getattr(partita, name)
        assert not hasattr(value, "__path__"), name


def test_packages_for_users_need_no_import_of_their_own() -> None:
    code = "import partita; print(partita.gnn.MessagePassing.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "MessagePassing\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        partita.nothing  # noqa: B018  # pyright: ignore
