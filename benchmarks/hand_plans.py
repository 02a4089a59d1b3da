"""Plans that experts would write beside the found plan, by the same simulator.

    python benchmarks/hand_plans.py
    python benchmarks/hand_plans.py --only llama --stages

Forty plans a case: tensor parallelism with sequence parallelism over 1 to 8 devices of a node,
ZeRO, pipeline stages with 1F1B, recomputation of every block. Forty more for experts, tables of
words and volumes, whose experts, words or planes are divided over 8 or all devices, and samples
elsewhere. A plan counts if it fits in memory.
The found plan should be as fast as all of them, and none may be below the lower bound.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from keras import layers

import partita
from partita.capture.program import capture_program
from partita.errors import PlanError
from partita.graph.normalizations import NORMALIZATION
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.baselines import choice_by_kinds, megatron, storage_for
from partita.plans.check import check, illegal_reason
from partita.plans.plan import Mesh, Plan
from partita.search.find import capacity, find, mesh_of
from partita.search.staged_bound import StagedBound
from partita.simulation.simulate import simulated_step


def gpt(width: int, blocks: int, positions: int, words: int = 32_000) -> keras.Model:
    tokens = keras.Input((positions,), dtype="int32")
    x = layers.Embedding(words, width, name="words")(tokens)
    for i in range(blocks):
        a = layers.LayerNormalization(name=f"b{i}_first")(x)
        attention = layers.MultiHeadAttention(width // 128, 128, name=f"b{i}_attention")
        x = x + attention(a, a, use_causal_mask=True)
        b = layers.LayerNormalization(name=f"b{i}_second")(x)
        up = layers.Dense(4 * width, "gelu", name=f"b{i}_up")(b)
        x = x + layers.Dense(width, name=f"b{i}_down")(up)
    x = layers.LayerNormalization(name="last")(x)
    return keras.Model(tokens, layers.Dense(words, use_bias=False, name="logits")(x), name="gpt")


def llama(width: int, blocks: int, positions: int, words: int = 32_000) -> keras.Model:
    """Grouped attention with a quarter of the heads for keys and values, and gated layers."""
    tokens = keras.Input((positions,), dtype="int32")
    x = layers.Embedding(words, width, name="words")(tokens)
    heads = width // 128
    dense = partial(layers.Dense, use_bias=False)
    for i in range(blocks):
        a = layers.RMSNormalization(name=f"b{i}_first")(x)
        attention = layers.GroupQueryAttention(
            128, heads, max(1, heads // 4), use_bias=False, name=f"b{i}_attention"
        )
        x = x + attention(a, a, use_causal_mask=True)
        b = layers.RMSNormalization(name=f"b{i}_second")(x)
        gate = dense(8 * width // 3 // 256 * 256, activation="silu", name=f"b{i}_gate")(b)
        up = dense(8 * width // 3 // 256 * 256, name=f"b{i}_up")(b)
        x = x + dense(width, name=f"b{i}_down")(gate * up)
    x = layers.RMSNormalization(name="last")(x)
    return keras.Model(tokens, dense(words, name="logits")(x), name="llama")


class Experts(layers.Layer):
    """Experts of two dense layers, each for an equal share of the tokens of a sample.

    Positions are dealt to experts in order, as by a router without collisions.
    """

    def __init__(self, experts: int, hidden: int, name: str) -> None:
        super().__init__(name=name)
        self.experts = experts
        self.hidden = hidden

    def build(self, shape: tuple[int, ...]) -> None:
        width = shape[-1]
        self.up = self.add_weight(shape=(self.experts, width, self.hidden), name="up")
        self.down = self.add_weight(shape=(self.experts, self.hidden, width), name="down")

    def call(self, x):
        width = x.shape[-1]
        dealt = keras.ops.reshape(x, (-1, self.experts, x.shape[1] // self.experts, width))
        hidden = keras.ops.gelu(keras.ops.einsum("btcd,tdh->btch", dealt, self.up))
        back = keras.ops.einsum("btch,thd->btcd", hidden, self.down)
        return keras.ops.reshape(back, (-1, x.shape[1], width))


def experts(width: int, blocks: int, positions: int, number: int) -> keras.Model:
    """Blocks of experts between norms, without attention."""
    x = inputs = keras.Input((positions, width))
    for i in range(blocks):
        normal = layers.RMSNormalization(name=f"b{i}_norm")(x)
        x = x + Experts(number, 4 * width, name=f"b{i}_experts")(normal)
        x = x + layers.Dense(width, name=f"b{i}_mix")(layers.RMSNormalization(name=f"b{i}_n")(x))
    return keras.Model(inputs, layers.Dense(1000, name="logits")(x), name="experts")


def tables(words: int, width: int, number: int, hidden: int) -> keras.Model:
    """A recommender: tables of embeddings, their concatenation, dense layers."""
    tokens = [keras.Input((8,), dtype="int32") for _ in range(number)]
    rows = []
    for i, one in enumerate(tokens):
        row = layers.Embedding(words, width, name=f"b{i}_table")(one)
        rows.append(layers.GlobalAveragePooling1D(name=f"b{i}_mean")(row))
    x = layers.Concatenate(name="joined")(rows)
    for i in range(3):
        x = layers.Dense(hidden, "relu", name=f"b{number}_dense{i}")(x)
    return keras.Model(tokens, layers.Dense(2, name="logits")(x), name="tables")


def volumes(filters: int, blocks: int, side: int) -> keras.Model:
    """Convolutions of volumes, then a sum over all planes."""
    x = inputs = keras.Input((side, side, side, 2))
    for i in range(blocks):
        x = layers.Conv3D(filters, 3, padding="same", activation="relu", name=f"b{i}_conv")(x)
    x = layers.GlobalAveragePooling3D(name="mean")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name="volumes")


@dataclass(frozen=True)
class Case:
    """A network on a machine. `batch` is that of all devices."""

    model: Callable[[], keras.Model]
    name: str
    blocks: int
    machine: str
    batch: int
    divides: tuple[str, ...] = ()
    """Factors that plans may divide instead of Megatron's; operators without them are split by
    sample. None for transformers."""
    memory: float = 1.0
    """Share of the memory of a device that there is."""


CASES = (
    Case(partial(gpt, 2048, 4, 1024), "gpt, width 2048", 4, "dgx-h100:1", 32),
    Case(partial(gpt, 4096, 4, 1024), "gpt, width 4096", 4, "dgx-h100:1", 8),
    Case(partial(gpt, 8192, 4, 1024), "gpt, width 8192", 4, "dgx-h100:8", 64),
    Case(partial(llama, 4096, 4, 2048), "llama, width 4096", 4, "dgx-h100:1", 8),
    Case(partial(llama, 4096, 8, 4096), "llama, width 4096", 8, "dgx-h100:8", 64),
    Case(partial(llama, 8192, 4, 2048), "llama, width 8192", 4, "dgx-a100:16", 128),
    Case(partial(gpt, 4096, 4, 512), "gpt, width 4096", 4, "dgx-h100:32", 256),
    Case(partial(gpt, 4096, 4, 512), "gpt, width 4096", 4, "dgx-h100:512", 4096),
    Case(
        partial(experts, 2048, 4, 1024, 8),
        "experts, 8 of width 2048",
        4,
        "dgx-h100:1",
        32,
        ("P1", "A"),
    ),
    Case(
        partial(experts, 4096, 4, 1024, 64),
        "experts, 64 of width 4096",
        4,
        "dgx-h100:8",
        64,
        ("P1", "A"),
    ),
    Case(
        partial(tables, 1 << 20, 128, 16, 1024),
        "tables of 1 M words",
        17,
        "dgx-h100:1",
        8192,
        ("R", "P"),
    ),
    Case(
        partial(tables, 1 << 22, 128, 16, 1024),
        "tables of 4 M words",
        17,
        "dgx-h100:8",
        65536,
        ("R", "P"),
    ),
    Case(partial(volumes, 32, 4, 128), "volumes of side 128", 4, "dgx-h100:1", 8, ("A1", "A2")),
    Case(partial(volumes, 32, 4, 256), "volumes of side 256", 4, "dgx-h100:8", 8, ("A1", "A2")),
    Case(partial(gpt, 2048, 4, 1024), "gpt, less memory", 4, "dgx-h100:1", 512, memory=0.3),
    Case(partial(gpt, 2048, 4, 1024), "gpt, less memory", 4, "dgx-h100:1", 512, memory=0.2),
    Case(partial(llama, 4096, 4, 2048), "llama, less memory", 4, "dgx-h100:1", 128, memory=0.2),
)
SMALL = Case(partial(gpt, 256, 1, 64, 512), "gpt, width 256", 1, "dgx-h100:1", 32)


@dataclass(frozen=True)
class Hand:
    """The parts of an expert's plan: numbers of ways, ZeRO stage, recomputation of blocks."""

    tensor: int
    stages: int
    zero: int
    recompute: bool
    divides: str = ""
    """The factor that the inner devices divide instead of Megatron's."""

    def __str__(self) -> str:
        name = f"{self.divides} over" if self.divides else "TP"
        text = f"{name} {self.tensor}, PP {self.stages}, ZeRO-{self.zero}"
        return f"{text}, recomputed" if self.recompute else text


def hands(divides: tuple[str, ...], devices: int) -> Iterator[Hand]:
    """Forty of them, and as many again for factors that they divide."""
    for way in ("", *divides):
        numbers = (8, devices) if way else (1, 2, 4, 8)
        for tensor, recompute in itertools.product(numbers, (False, True)):
            for zero in (0, 1, 3):
                yield Hand(tensor, 1, zero, recompute, way)
            for stages in (2, 4):
                yield Hand(tensor, stages, 0, recompute, way)


def axes_of(mesh: Mesh, ways: int, numbers: Sequence[int]) -> list[int]:
    """The first of some axes that split `ways` ways together."""
    taken: list[int] = []
    for number in numbers:
        if ways == 1:
            break
        if ways % mesh.sizes[number]:
            raise PlanError(f"no axes split {ways} ways")
        taken.append(number)
        ways //= mesh.sizes[number]
    if ways > 1:
        raise PlanError("the machine has too few devices")
    return taken


def block_of(name: str) -> int | None:
    match = re.match(r"b(\d+)_", name)
    return int(match[1]) if match else None


def stage_of(graph: OperatorGraph, blocks: int, stages: int) -> list[int]:
    """Per operator its stage: equal numbers of blocks, the words first and the logits last."""
    result = []
    latest = 0
    for operator in graph.operators:
        block = block_of(operator.name)
        if block is not None:
            latest = block * stages // blocks
        result.append(latest)
    return result


def hand_plan(graph: OperatorGraph, machine: Machine, case: Case, hand: Hand) -> Plan:
    """PlanError where a model or machine has no such plan."""
    mesh = mesh_of(machine)
    count = len(mesh.axes)
    inner = axes_of(mesh, hand.tensor, range(count - 1, -1, -1))
    outer = [number for number in range(count) if number not in inner]
    stage_axes = axes_of(mesh, hand.stages, outer)
    samples = [number for number in outer if number not in stage_axes]
    part = Mesh(tuple(mesh.axes[n] for n in (*samples, *sorted(inner))))
    plan = megatron(graph, machine.name, part, "hand", len(samples))
    choices = dict(plan.choices)
    positions = range(len(samples), len(part.axes))
    for operator in graph.operators if hand.divides else ():
        choice = choice_by_kinds(graph, operator, part, [("S", range(len(samples)))])
        choice |= {part.axes[n].name: hand.divides for n in positions}
        names = {graph.factors[f].name: graph.factors[f].operator for f in operator.factors}
        index = names.get(hand.divides)
        if index is None or illegal_reason(graph, index, choice, part) is not None:
            choice = choice_by_kinds(graph, operator, part, [("S", range(len(part.axes)))])
        choices[operator.name] = choice
    for operator in graph.operators:
        if operator.kind == NORMALIZATION and not hand.divides:
            split = [("S", range(len(samples))), ("A", positions)]
            choices[operator.name] = choice_by_kinds(graph, operator, part, split)
    for operator, stage in zip(
        graph.operators, stage_of(graph, case.blocks, hand.stages), strict=True
    ):
        slices = {}
        for number in reversed(stage_axes):
            slices[mesh.axes[number].name] = f"at({stage % mesh.sizes[number]})"
            stage //= mesh.sizes[number]
        choices[operator.name] = {**slices, **choices[operator.name]}
    runs: dict[int, list[str]] = {}
    for operator in graph.operators:
        block = block_of(operator.name)
        if block is not None and hand.recompute:
            runs.setdefault(block, []).append(operator.name)
    plan = replace(
        plan,
        mesh=mesh,
        choices=choices,
        microbatches=1 if hand.stages == 1 else 4 * hand.stages,
        recompute=tuple((names[0], names[-1]) for names in runs.values()),
    )
    if hand.zero:
        plan = replace(plan, storage=storage_for(graph, plan, hand.zero))
    return check(plan, graph)


def compared(case: Case, stages: bool) -> str:
    """A line: the found plan, the fastest one by hand, and plans below the bound."""
    with partita.abstract():
        model = case.model()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    machine = load(case.machine)
    if case.memory < 1:
        nbytes = int(machine.memory_bytes * case.memory)
        figures = {"device.memory.hbm.capacity": nbytes}
        machine = machine.revised(figures, source="the benchmark", status="assumed")
    graph = capture_program(model, case.batch, target=machine.target).graph
    start = time.process_time()
    result = find(graph, machine, stages=stages)
    search_seconds = time.process_time() - start
    bound = result.bound_seconds
    network = result.network
    staged_bound = StagedBound(graph, network.placement, network.terms).seconds(bound)
    fastest: tuple[float, str] = (float("inf"), "none fits")
    fitting = 0
    below = 0
    for hand in hands(case.divides, machine.devices):
        try:
            step = simulated_step(graph, machine, hand_plan(graph, machine, case, hand))
            seconds, peak = step.seconds, step.peak_bytes
        except PlanError:
            continue
        below += seconds < (bound if hand.stages == 1 else staged_bound) * (1 - 1e-9)
        if peak <= capacity(machine):
            fitting += 1
            fastest = min(fastest, (seconds, str(hand)))
    found = result.prediction.seconds
    return (
        f"{case.name}, {case.blocks} blocks, {machine.devices} {machine.name}: "
        f"found {found * 1e3:.2f} ms ({search_seconds:.1f} s of CPU time), "
        f"by hand {fastest[0] * 1e3:.2f} ms ({fastest[1]}; {fitting} fit), "
        f"hand / found {fastest[0] / found:.3f}, bound {bound * 1e3:.2f} ms "
        f"({staged_bound * 1e3:.2f} ms with stages), {below} below it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--stages", action="store_true", help="search stages, too")
    parser.add_argument("--small", action="store_true", help="one small case")
    options = parser.parse_args()
    keras.config.set_dtype_policy("mixed_bfloat16")
    for case in (SMALL,) if options.small else CASES:
        if options.only in f"{case.name} {case.machine}":
            print(compared(case, options.stages), flush=True)


if __name__ == "__main__":
    main()
