"""Random models under random plans in stages, microbatches and places against one device: loss,
metrics, and every updated variable.

    python benchmarks/staged_equality.py --pairs 200
    python benchmarks/staged_equality.py --pairs 30 --processes 2
    python benchmarks/staged_equality.py --pairs 40 --optimizers
    python benchmarks/staged_equality.py --nmt 8

The models are those of equality.py. One device runs the same microbatches: each from the same
weights and slots, with the moving statistics, seeds and metrics that the one before left. SGD with
momentum is linear in the gradient, so the mean of their new weights is that of the mean gradient.
A difference is relative to the largest value of its variable, and at least to a thousandth of the
largest value of all.

In several processes the devices of a plan come from the processes in turn, or half from each, so
that transfers and collectives cross between them. Every process compares with one device of its
own.

With `--optimizers`, the models and optimizers are those of random_optimizers.py. One device runs
the whole batch, for a few steps: the mean of the gradients of microbatches is the gradient of the
batch, whatever the optimizer does with it. A difference is then relative to the largest value of its
variable, and at least to 0.001.

With `--nmt`, the only pair is FlexFlow's NMT of that many steps, and its expert plan for one node of
4 devices: every recurrent layer is on a device of its own, and the attention and the dense layers
behind it are split over all of them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import socket
import subprocess
import sys
import time
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from equality import difference, random_model
from random_optimizers import random_case

from partita.bench.networks import nmt
from partita.bench.published import expert
from partita.capture.jax_functions import Captured
from partita.capture.keras_models import ModelVariables, capture_model
from partita.errors import PlanError
from partita.execute.joining import join
from partita.execute.process_arrays import whole
from partita.execute.process_group import group
from partita.execute.program import RunnableStep, runnable_step
from partita.graph.operator_graph import OperatorGraph
from partita.plans.plan import Axis, Mesh, Plan
from partita.plans.schema import SCHEDULES
from partita.search.candidates import candidates, names_of

TOLERANCE = 1e-5
FLOOR = 1e-3
"""A difference is at least relative to this, with `--optimizers`."""
LINEAR_GROUPS = (0, 2)
"""Groups of a Keras state that are linear in the gradient: weights and optimizer slots."""


def random_pipeline(graph: OperatorGraph, r: random.Random) -> Plan:
    """Stages in the order of the model, with microbatches; inside a stage, one or two devices."""
    count = len(graph.operators)
    stages = r.randint(1, min(4, count))
    ends = sorted(r.sample(range(1, count), stages - 1))
    inner = r.choice([1, 1, 2])
    mesh = Mesh.of((stages, inner))
    microbatches = r.choice([1, 2, 4, 8])
    choices = {}
    for number, operator in enumerate(graph.operators):
        choice = {"a": f"at({sum(number >= end for end in ends)})"}
        if inner > 1:
            candidate = r.choice(candidates(graph, number, Mesh.of((inner,))))
            inside = names_of(graph, Mesh.of((inner,)), candidate)
            choice.update(zip("b", inside.values(), strict=False))
        choices[operator.name] = choice
    recompute = ()
    if r.random() < 0.4:
        names = [operator.name for operator in graph.operators]
        first = r.randrange(count)
        recompute = ((names[first], names[r.randrange(first, count)]),)
    return Plan(
        graph.name,
        "host",
        mesh,
        choices,
        batch_size=graph.batch_size,
        microbatches=microbatches,
        schedule=r.choice(SCHEDULES),
        recompute=recompute,
    )


def random_placement(graph: OperatorGraph, r: random.Random) -> Plan:
    """Every operator on a random slice, or on all."""
    choices = {}
    for operator in graph.operators:
        place = r.choice([0, 1, None])
        choices[operator.name] = {} if place is None else {"a": f"at({place})"}
    return Plan(graph.name, "host", Mesh.of((2,)), choices, batch_size=graph.batch_size)


def on_one_device(part: Captured, state: tuple, batch: tuple, microbatches: int) -> tuple:
    """(logs, state) after a step in microbatches on one device."""
    step = jax.jit(part.text.call)
    size = len(batch[1]) // microbatches
    sums = None
    running = state
    logs = None
    for number in range(microbatches):
        samples = slice(number * size, (number + 1) * size)
        own = jax.tree.map(lambda values, samples=samples: values[samples], batch)
        start = tuple(
            state[group] if group in LINEAR_GROUPS else running[group] for group in range(4)
        )
        logs, running = step(start, own)
        added = jax.tree.map(lambda x: np.asarray(x, "float64"), running)
        sums = added if sums is None else jax.tree.map(np.add, sums, added)
    mean = jax.tree.map(lambda total, x: (total / microbatches).astype(x.dtype), sums, running)
    groups = [mean[g] if g in LINEAR_GROUPS else running[g] for g in range(4)]
    return logs, tuple(groups)


def pair(seed: int) -> tuple[Plan, float] | None:
    """(a random plan for a random model, the largest difference); None if the plan is refused."""
    r = random.Random(5000 + seed)
    model, batch = random_model(seed)
    captured = capture_model(model, batch)
    plan = r.choice([random_pipeline, random_pipeline, random_placement])(captured.graph, r)
    try:
        step = runnable_step(captured, plan, devices_of(plan, r))
    except PlanError as error:
        print(f"model {seed}: {error}", flush=True)
        return None
    return plan, largest_difference(model, batch, captured, step)


def optimizer_pair(seed: int) -> tuple[Plan, float] | None:
    """The same for a random optimizer, after a few steps."""
    r = random.Random(9000 + seed)
    case = random_case(seed)
    plan = r.choice([random_pipeline, random_pipeline, random_placement])(case.captured.graph, r)
    try:
        step = runnable_step(case.captured, plan, devices_of(plan, r))
    except PlanError as error:
        print(f"model {seed} ({case.name}): {error}", flush=True)
        return None
    one_device = jax.jit(case.captured.text.call)
    expected = case.state
    state = step.place_state(case.state)
    worst = 0.0
    for batch in case.batches:
        logs, expected = one_device(expected, batch)
        own_logs, state = step.step(state, step.place_batch(batch))
        ours = jax.tree.map(whole, (own_logs, state))
        worst = max(worst, _relative_difference((logs, expected), ours))
    if not worst <= TOLERANCE:
        print(f"model {seed} ({case.name})", flush=True)
    return plan, worst


def _relative_difference(expected: Any, ours: Any) -> float:
    """The largest difference of any leaf; infinite where one is not a number on one side only."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(ours), strict=True):
        a = np.asarray(a, "float64")
        b = np.asarray(b, "float64")
        if (np.isfinite(a) != np.isfinite(b)).any():
            return float("inf")
        a = np.where(np.isfinite(a), a, 0)
        b = np.where(np.isfinite(b), b, 0)
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), FLOOR)))
    return worst


def largest_difference(
    model: keras.Model, batch: tuple, captured: Captured, step: RunnableStep
) -> float:
    """The largest difference between a step and one device after one step."""
    plan = step.plan
    state = tuple(
        [np.asarray(v.value) for v in group] for group in ModelVariables.of(model).groups()
    )
    part = captured
    if plan.microbatches > 1:
        assert captured.at_batch_size is not None
        part = captured.at_batch_size(captured.graph.batch_size // plan.microbatches)
    expected = on_one_device(part, state, batch, plan.microbatches)
    ours = step.step(step.place_state(state), step.place_batch(batch))
    ours = jax.block_until_ready(ours)
    return difference(expected, jax.tree.map(whole, ours), "float32")


def expert_nmt(steps: int) -> tuple[Plan, float]:
    """(the expert plan of a narrow NMT on 4 devices, the largest difference)."""
    keras.utils.set_random_seed(0)
    model = nmt(width=16, steps=steps, words=48)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
    source, target = np.random.default_rng(0).integers(0, 48, (2, 8, steps)).astype("int32")
    batch = ([source, target], np.roll(target, -1, 1))
    captured = capture_model(model, batch)
    node = Mesh((Axis("a", 2, 1), Axis("b", 2, 1)))
    plan = expert(captured.graph, "node", node, "recurrent")
    step = runnable_step(captured, plan, devices_of(plan, random.Random(0)))
    return plan, largest_difference(model, batch, captured, step)


def devices_of(plan: Plan, r: random.Random) -> list:
    """Devices of all processes: in turn, or one process after the other."""
    processes = jax.process_count()
    local = [d for d in jax.devices() if d.process_index == 0]
    share = max(1, plan.devices // processes)
    others = [jax.devices()[n * len(local) :][:share] for n in range(1, processes)]
    halves = [*local[: plan.devices - share * (processes - 1)], *itertools.chain(*others)]
    in_turn = sorted(jax.devices(), key=lambda d: (d.id % len(local), d.process_index))
    return r.choice([halves, in_turn])[: plan.devices]


def run_processes(count: int, arguments: list[str]) -> int:
    """This script in several processes; the exit code of the first that fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    jobs = []
    for number in range(count):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(number),
        }
        stdout = None if number == 0 else subprocess.DEVNULL
        command = [sys.executable, __file__, *arguments]
        jobs.append(subprocess.Popen(command, env=environment, stdout=stdout, stderr=stdout))
    return max(job.wait() for job in jobs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--nmt", type=int, metavar="STEPS", help="the expert plan of an NMT")
    parser.add_argument("--optimizers", action="store_true", help="random optimizers")
    arguments = parser.parse_args()
    membership = group()
    if arguments.processes > 1 and membership is None:
        return run_processes(arguments.processes, sys.argv[1:])
    if membership is not None:
        join(membership, print)
    if arguments.nmt:
        plan, error = expert_nmt(arguments.nmt)
        print(f"{plan}\nlargest difference {error:.3g}; {jax.process_count()} processes")
        return int(not error <= TOLERANCE)
    start = time.time()
    worst = 0.0
    failed = 0
    refused = 0
    count = 0
    seed = arguments.first
    compare = optimizer_pair if arguments.optimizers else pair
    while count < arguments.pairs:
        result = compare(seed)
        if result is None:
            refused += 1
        else:
            plan, error = result
            count += 1
            worst = max(worst, error)
            print(f"{count}: model {seed}, {error:.2g}", file=sys.stderr, flush=True)
            if not error <= TOLERANCE:
                failed += 1
                print(f"model {seed}: differs by {error:.3g}\n{plan}", flush=True)
        seed += 1
    print(
        f"{count} pairs, {failed} differ by more than {TOLERANCE:g}, largest {worst:.3g}; "
        f"{refused} plans refused; {jax.process_count()} processes; {time.time() - start:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
