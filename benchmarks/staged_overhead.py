"""Python's time to run a piece of a plan in stages, by the CPU time of its thread.

    python benchmarks/staged_overhead.py --blocks 4 --microbatches 8
    python benchmarks/staged_overhead.py --plain --width 256 --samples 32

A transformer of small layers on two devices of one process: the pieces compute in other threads. A
step with its transfers is divided by the number of runs of pieces.

With `--plain`, a plan of one stage and one microbatch is compared with the jitted step: as the one
program that it is, and cut into pieces all the same. Processor time of all threads, in turns.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import jax
import keras
import numpy as np
from keras import layers

from partita.capture.jax_functions import Captured
from partita.capture.keras_models import ModelVariables, capture_model
from partita.execute.dispatch import RunAction
from partita.execute.program import RunnableStep, runnable_step
from partita.execute.staged import StagedStep, staged_step
from partita.graph.operator_graph import OperatorGraph
from partita.plans.plan import Mesh, Plan

LENGTH = 16


def transformer(blocks: int, width: int) -> keras.Model:
    """Blocks of attention and a dense layer, with Adam."""
    inputs = keras.Input((LENGTH, width))
    x = inputs
    for _ in range(blocks):
        normal = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, width // 2)(normal, normal)
        x = x + layers.Dense(width, activation="gelu")(layers.LayerNormalization()(x))
    model = keras.Model(inputs, layers.Dense(width)(x))
    model.compile("adam", "mse")
    return model


def in_runs(graph: OperatorGraph, stages: int, microbatches: int) -> Plan:
    """The operators in equal runs on the devices."""
    count = len(graph.operators)
    choices = {}
    for number, operator in enumerate(graph.operators):
        choices[operator.name] = {"a": f"at({stages * number // count})"}
    return Plan(
        graph.name,
        f"host:{stages}",
        Mesh.of((stages,)),
        choices,
        batch_size=graph.batch_size,
        microbatches=microbatches,
    )


def seconds_per_step(step: RunnableStep, state: Any, batch: Any, steps: int) -> tuple[float, Any]:
    """(processor time of all threads for a step, the state after all steps)."""
    start = time.process_time()
    for _ in range(steps):
        _, state = step.step(state, batch)
    jax.block_until_ready(state)
    return (time.process_time() - start) / steps, state


class PlainStep(NamedTuple):
    """The jitted step, with the methods of a planned one."""

    step: Callable[[Any, Any], Any]
    place_state: Callable[[Any], Any] = jax.device_put
    place_batch: Callable[[Any], Any] = jax.device_put


def compare_with_plain(
    captured: Captured, values: list[np.ndarray], batch: Any, rounds: int, steps: int
) -> None:
    """Prints the processor time of a step in one stage and one microbatch, of the same step in
    pieces, and the ratios to the plain step.

    The first round compiles.
    """
    plan = in_runs(captured.graph, 1, 1)
    programs: dict[str, Any] = {
        "plain": PlainStep(jax.jit(captured.text.call, donate_argnums=0)),
        "one stage": runnable_step(captured, plan),
        "in pieces": staged_step(captured, plan),
    }
    state = jax.tree.unflatten(jax.tree.structure(captured.state), values)
    states = {name: step.place_state(state) for name, step in programs.items()}
    batches = {name: step.place_batch(batch) for name, step in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, step in programs.items():
            spent, states[name] = seconds_per_step(step, states[name], batches[name], steps)
            seconds[name].append(spent)
    plain = np.array(seconds["plain"][1:])
    for name, spent in seconds.items():
        ratio = np.median(np.array(spent[1:]) / plain)
        print(f"{name}: {1e3 * np.median(spent[1:]):.2f} ms, {ratio:.3f} of the plain step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2, help="samples of a microbatch")
    parser.add_argument("--plain", action="store_true", help="compare with the plain step")
    arguments = parser.parse_args()
    model = transformer(arguments.blocks, arguments.width)
    count = arguments.samples * (1 if arguments.plain else arguments.microbatches)
    x = np.ones((count, LENGTH, arguments.width), "float32")
    captured = capture_model(model, (x, x))
    groups = ModelVariables.of(model).groups()
    values = [np.array(variable.value) for group in groups for variable in group]
    if arguments.plain:
        compare_with_plain(captured, values, (x, x), arguments.rounds, arguments.steps)
        return
    step = runnable_step(captured, in_runs(captured.graph, 2, arguments.microbatches))
    assert isinstance(step, StagedStep)
    state = step.place_state(jax.tree.unflatten(jax.tree.structure(captured.state), values))
    runs = [action for action in step.dispatch.actions if isinstance(action, RunAction)]
    arrays = sum(len(run.reads) + len(run.gives) + len(run.sums) for run in runs) / len(runs)
    print(f"{len(runs)} runs of {len(step.cut.pieces)} pieces a step, {arrays:.0f} arrays each")
    batch = step.place_batch((x, x))
    for _ in range(arguments.rounds):
        start = time.thread_time()
        for _ in range(arguments.steps):
            _, state = step.step(state, batch)
        seconds = time.thread_time() - start
        jax.block_until_ready(state)
        print(f"{1e3 * seconds / arguments.steps / len(runs):.3f} ms a run")


if __name__ == "__main__":
    main()
