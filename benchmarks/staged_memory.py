"""Peak memory of pipeline stages: planned by the simulator, and by the compiler of a machine.

    python benchmarks/staged_memory.py
    python benchmarks/staged_memory.py --stages 4 --microbatches 8 --only gpt,lstm
    python benchmarks/staged_memory.py --machine h100:16 --stages 4 --only gpt12
    python benchmarks/staged_memory.py --machine h100:8 --only gpt12 --rematerialize

Models with Adam, their operators in equal runs on the stages; the devices of a stage split samples.
The rules of the simulator were found with dense, gpt and cnn; residual and lstm were not looked at.
The machine need not be here, but its compiler (`partita[compile-gpu]`) must be. gpt12 is compiled
only if it is named.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from keras import layers

from partita.capture.keras_models import capture_model
from partita.capture.targets import CaptureTarget
from partita.execute.compilers.compiled_plan import compile_captured
from partita.graph.operator_graph import Operator, OperatorGraph
from partita.machine import Machine, host, load
from partita.plans.check import check
from partita.plans.pipeline import operator_stages
from partita.plans.plan import Mesh, Plan
from partita.search.find import mesh_of

BATCH = 64
CLASSES = 16
WORDS = 512
LENGTH = 64
WIDTH = 128


def dense() -> keras.Model:
    """Eight dense layers."""
    inputs = x = keras.Input((256,))
    for _ in range(8):
        x = layers.Dense(256, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def transformer(blocks: int, words: int, length: int, width: int, heads: int) -> keras.Model:
    """Blocks of attention and a dense layer on token numbers."""
    tokens = keras.Input((length,), dtype="int32")
    x = layers.Embedding(words, width)(tokens)
    for _ in range(blocks):
        normal = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(heads, width // heads)
        x = x + attention(normal, normal, use_causal_mask=True)
        wide = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(width)(wide)
    return keras.Model(tokens, layers.Dense(words)(x))


def gpt() -> keras.Model:
    """Four blocks."""
    return transformer(4, WORDS, LENGTH, WIDTH, 4)


def gpt12() -> keras.Model:
    """Twelve blocks of width 768."""
    return transformer(12, 8192, 1024, 768, 8)


def cnn() -> keras.Model:
    """Three convolutions with batch normalization."""
    inputs = x = keras.Input((32, 32, 3))
    for channels in (32, 64, 64):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = layers.Activation("relu")(layers.BatchNormalization()(x))
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(128, activation="relu")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def residual() -> keras.Model:
    """Six residual blocks of two dense layers with dropout."""
    inputs = keras.Input((256,))
    x = layers.Dense(512)(inputs)
    for _ in range(6):
        y = layers.Dense(1024, activation="swish")(layers.LayerNormalization()(x))
        x = x + layers.Dropout(0.1)(layers.Dense(512)(y))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def lstm() -> keras.Model:
    """Two recurrent layers over words."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(WORDS, WIDTH)(tokens)
    x = layers.LSTM(WIDTH, return_sequences=True)(x)
    return keras.Model(tokens, layers.Dense(CLASSES)(layers.LSTM(WIDTH)(x)))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "dense": dense,
    "gpt": gpt,
    "cnn": cnn,
    "residual": residual,
    "lstm": lstm,
    "gpt12": gpt12,
}


def pipeline(graph: OperatorGraph, machine: Machine, stages: int, microbatches: int) -> Plan:
    """The operators in equal runs on the stages, over the first axes of the machine."""
    count = len(graph.operators)
    mesh = mesh_of(machine)
    choices = {}
    for number, operator in enumerate(graph.operators):
        choices[operator.name] = choice(
            graph, operator, mesh, stages, number * stages // count, microbatches
        )
    return Plan(
        graph.name,
        machine.name,
        mesh,
        choices,
        batch_size=graph.batch_size,
        microbatches=microbatches,
        target=graph.target,
    )


def rematerialized(plan: Plan, graph: OperatorGraph) -> Plan:
    """The plan with every block of a transformer computed again: a run from the norm in front of
    an attention to the next one, or to the end of its stage."""
    names = [operator.name for operator in graph.operators]
    stages = operator_stages(graph, plan)
    attentions = [n for n, name in enumerate(names) if re.search(r"attention\w*/query$", name)]
    starts = [max(0, first - 1) for first in attentions]
    runs = []
    for first, end in itertools.pairwise([*starts, len(names) - 1]):
        for _, part in itertools.groupby(range(first, end), key=stages.__getitem__):
            numbers = list(part)
            runs.append((names[numbers[0]], names[numbers[-1]]))
    return replace(plan, recompute=tuple(runs))


def choice(
    graph: OperatorGraph,
    operator: Operator,
    mesh: Mesh,
    stages: int,
    stage: int,
    microbatches: int,
) -> Mapping[str, str]:
    """An operator on a stage, its samples over the other axes if they divide."""
    uses: dict[str, str] = {}
    inner = mesh.size // stages
    samples = [
        graph.factors[f].name
        for f in operator.factors
        if graph.factors[f].kind == "S" and graph.factors[f].size % (inner * microbatches) == 0
    ]
    for axis in mesh.axes:
        if stages > 1:
            assert stages % axis.size == 0, "stages take whole axes"
            stages //= axis.size
            uses[axis.name] = f"at({stage // stages})"
            stage %= stages
        elif samples:
            uses[axis.name] = samples[0]
    return uses


def peaks(
    name: str, machine: Machine, stages: int, microbatches: int, again: bool
) -> list[tuple[float, int]]:
    """(planned, compiled) bytes of a device of every stage of a model, its blocks computed again
    if `again`."""
    model = MODELS[name]()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    inputs = np.zeros((BATCH, *model.input_shape[1:]), model.inputs[0].dtype)
    targets = np.zeros((BATCH, *model.output_shape[1:-1]), "int32")
    captured = capture_model(model, (inputs, targets), CaptureTarget.of(machine.target))
    plan = pipeline(captured.graph, machine, stages, microbatches)
    if again:
        plan = check(rematerialized(plan, captured.graph), captured.graph)
    groups = compile_captured(captured, plan, machine).groups
    return [(planned, compiled) for planned, compiled in groups if planned is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description="Planned and compiled memory of stages.")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--machine", help="by default a host with a device per stage")
    parser.add_argument(
        "--rematerialize", action="store_true", help="compute the blocks of transformers again"
    )
    parser.add_argument("--only", help="names of models, separated by commas; by default all small")
    arguments = parser.parse_args()
    machine = host(arguments.stages, 8 << 30)
    if arguments.machine:
        machine = load(arguments.machine)
    names = arguments.only.split(",") if arguments.only else [n for n in MODELS if n != "gpt12"]
    print(f"{arguments.stages} stages, {arguments.microbatches} microbatches of {BATCH} samples")
    for name in names:
        rows = peaks(
            name,
            machine,
            arguments.stages,
            arguments.microbatches,
            arguments.rematerialize,
        )
        for stage, (planned, compiled) in enumerate(rows):
            ratio = planned / compiled
            megabytes = f"{planned / 1e6:8.3f} {compiled / 1e6:8.3f}"
            print(f"{name:10s} stage {stage}: {megabytes} MB, {ratio:.3f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
