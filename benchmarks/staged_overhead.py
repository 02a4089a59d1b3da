"""Python's time to run a piece of a plan in stages, by the CPU time of its thread.

    python benchmarks/staged_overhead.py --blocks 4 --microbatches 8

A transformer of small layers on two devices of one process: the pieces compute in other threads. A
step with its transfers is divided by the number of runs of pieces.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import jax
import keras
import numpy as np
from keras import layers

from partita.capture.keras_models import ModelVariables, capture_model
from partita.execute.dispatch import RunAction
from partita.execute.program import runnable_step
from partita.execute.staged import StagedStep
from partita.graph.operator_graph import OperatorGraph
from partita.plans.plan import Mesh, Plan

WIDTH = 32
LENGTH = 16


def transformer(blocks: int) -> keras.Model:
    """Blocks of attention and a dense layer, with Adam."""
    inputs = keras.Input((LENGTH, WIDTH))
    x = inputs
    for _ in range(blocks):
        normal = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, WIDTH // 2)(normal, normal)
        x = x + layers.Dense(WIDTH, activation="gelu")(layers.LayerNormalization()(x))
    model = keras.Model(inputs, layers.Dense(WIDTH)(x))
    model.compile("adam", "mse")
    return model


def in_halves(graph: OperatorGraph, microbatches: int) -> Plan:
    """The first half of the operators on one device, the others on the other."""
    choices = {}
    for number, operator in enumerate(graph.operators):
        choices[operator.name] = {"a": f"at({int(2 * number >= len(graph.operators))})"}
    return Plan(
        graph.name,
        "host:2",
        Mesh.of((2,)),
        choices,
        batch_size=graph.batch_size,
        microbatches=microbatches,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    model = transformer(arguments.blocks)
    x = np.ones((2 * arguments.microbatches, LENGTH, WIDTH), "float32")
    captured = capture_model(model, (x, x))
    step = runnable_step(captured, in_halves(captured.graph, arguments.microbatches))
    assert isinstance(step, StagedStep)
    groups = ModelVariables.of(model).groups()
    values = [np.array(variable.value) for group in groups for variable in group]
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
