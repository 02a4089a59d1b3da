"""Predicted steps beside published and measured ones, on machines that are not here.

    python benchmarks/published.py
    python benchmarks/published.py --only mpt --parts      # seconds by cause, memory by kind
    python benchmarks/published.py --further               # 22 other MPTs, some six minutes

A row is a model, a machine and the plan of its publication. Nothing in Partita is fitted to a row:
presets and cost model come from data sheets, the sources that a preset names, and compilers. Where
a publication used another attention kernel, its row has the rate that the kernel's authors state;
where it held images with channels first, the row has the transposes that cuDNN adds.
The rows of `--further` were chosen and run after the cost model was written.
The models have the published sizes; their data are shapes, so nothing large is allocated.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from keras import layers

from partita.capture.keras_models import abstract
from partita.capture.program import capture_program
from partita.cost.memory import KINDS
from partita.cost.predict import Prediction
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.baselines import BASELINES, megatron
from partita.plans.check import check
from partita.plans.plan import Mesh, Plan
from partita.search.find import capacity, mesh_of
from partita.simulation.simulate import simulated_step
from partita.units import format_bytes

LLM_FOUNDRY = "llm-foundry, scripts/train/benchmarking/README.md"
DEEP_LEARNING_EXAMPLES = (
    "NVIDIA DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md"
)
MEGATRON = "Narayanan et al. 2021 (SC'21), table 1, recalled"
FLASH_ATTENTION_2 = 0.35
"""Its part of the peak of an H100 (abstract of FlashAttention-3, arXiv 2407.08608), at most."""
FLASH_ATTENTION_TRITON = FLASH_ATTENTION_2 / math.sqrt(1.3 * 2.5)
"""The same of FlashAttention in Triton, `attn_impl` of llm-foundry's `submit_benchmarks.py` when it
published these rows (2023-10): FlashAttention-2 is 1.3 to 2.5 times as fast (section 4.1 of
FlashAttention-2, arXiv 2307.08691, recalled); the geometric mean."""
FLASH_ATTENTION_TRITON_A100 = 0.6 / math.sqrt(1.3 * 2.5)
"""The same on an A100, where FlashAttention-2 has 0.5 to 0.73 of the peak (its abstract)."""
MEASURED = "measured on one H100 80 GB HBM3, jax 0.11.2, keras 3.15.1, 2026-11-28"

Planner = Callable[[OperatorGraph, str, Mesh], Plan]


@dataclass(frozen=True)
class Row:
    """A published step."""

    name: str
    model: Callable[[], keras.Model]
    policy: str
    """Keras's dtype policy."""
    batch: int
    """Samples of a step, over all devices."""
    machine: str
    plan: Planner
    seconds: float
    source: str
    fused_attention: bool = True
    """Whether the published program computes attention in one kernel, without stored scores."""
    attention_efficiency: float | None = None
    """Part of the peak of the published program's attention kernel; None for the machine's own."""
    channels_first: bool = False
    """Whether the published program holds images with their channels first."""


class Position(layers.Layer):
    """Adds a learned vector to every position."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x):
        return x + self.table


def transformer(
    width: int, blocks: int, heads: int, length: int, vocabulary: int, bias: bool = False
) -> keras.Model:
    """A decoder with learned positions and one table for words and logits."""
    words = keras.Input((length,), dtype="int32")
    table = layers.ReversibleEmbedding(vocabulary, width, name="words")
    h = Position(name="positions")(table(words))
    for n in range(blocks):
        a = layers.LayerNormalization(name=f"norm{n}a")(h)
        attention = layers.MultiHeadAttention(
            heads, width // heads, use_bias=bias, name=f"attention{n}"
        )
        h = h + attention(a, a, use_causal_mask=True)
        b = layers.LayerNormalization(name=f"norm{n}b")(h)
        inner = layers.Dense(4 * width, "gelu", use_bias=bias, name=f"up{n}")(b)
        h = h + layers.Dense(width, use_bias=bias, name=f"down{n}")(inner)
    h = layers.LayerNormalization(name="norm")(h)
    return keras.Model(words, table(h, reverse=True), name="transformer")


MPTS = {
    "125M": (768, 12, 12),
    "350M": (1024, 24, 16),
    "760M": (1536, 24, 12),
    "1B": (2048, 24, 16),
    "3B": (2560, 32, 20),
    "7B": (4096, 32, 32),
    "13B": (5120, 40, 40),
    "30B": (7168, 48, 56),
    "70B": (8192, 80, 64),
}
"""Size of an MPT -> its width, blocks and heads, as llm-foundry configures them."""


def megatron_gpt(width: int, blocks: int, heads: int) -> Callable[[], keras.Model]:
    """A GPT of Megatron's scaling study."""
    return lambda: transformer(width, blocks, heads, 2048, 51200, bias=True)


def resnet50() -> keras.Model:
    return keras.applications.ResNet50(weights=None)  # pyright: ignore[reportArgumentType]


def dense_layers() -> keras.Model:
    model = keras.Sequential([keras.Input((4096,))])
    for _ in range(4):
        model.add(layers.Dense(4096, activation="relu"))
    return model


LOSSES = {
    "transformer": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "resnet50": "sparse_categorical_crossentropy",
}
"""Name of a model -> its loss; the mean squared error for others."""
OPTIMIZERS = {"resnet50": partial(keras.optimizers.SGD, 0.1, momentum=0.9)}
"""Name of a model -> its optimizer; AdamW for others."""


def fsdp(microbatches: int = 1, checkpoints: bool = False) -> Planner:
    """Parameters, gradients and slots in slices over all devices. With `checkpoints`, every block
    is computed again in the backward pass."""

    def plan(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
        plan = BASELINES["ZeRO-3"](graph, machine, mesh)
        runs = tuple(blocks_of(graph)) if checkpoints else ()
        return replace(plan, microbatches=microbatches, recompute=runs)

    return plan


def recomputed(tensor_axes: int, microbatches: int) -> Planner:
    """Megatron's plan over the inner `tensor_axes`, every block computed again in the backward
    pass."""

    def plan(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
        plan = megatron(graph, machine, mesh, "Megatron", len(mesh.axes) - tensor_axes)
        runs = tuple(blocks_of(graph))
        return replace(plan, microbatches=microbatches, recompute=runs)

    return plan


def blocks_of(graph: OperatorGraph) -> list[tuple[str, str]]:
    """First and last operator of every block of a transformer."""
    operators: dict[str, list[str]] = {}
    for operator in graph.operators:
        layer = re.match(r"(?:norm|attention|up|down)(\d+)", operator.name)
        if layer:
            operators.setdefault(layer[1], []).append(operator.name)
    return [(names[0], names[-1]) for names in operators.values()]


DATA_PARALLEL = BASELINES["data parallel"]
ONE_DEVICE = BASELINES["one device"]


def mpt(
    size: str,
    length: int,
    batch: int,
    machine: str,
    tokens_per_second: float,
    microbatches: int = 1,
    checkpoints: bool = False,
) -> Row:
    """A row of llm-foundry's tables: an MPT under FSDP, in mixed bfloat16."""
    width, blocks, heads = MPTS[size]
    details = f", {microbatches} microbatches" if microbatches > 1 else ""
    details += ", checkpoints" if checkpoints else ""
    is_a100 = "a100" in machine
    return Row(
        f"MPT-{size}, {length} tokens, FSDP{details}",
        lambda: transformer(width, blocks, heads, length, 50368),
        "mixed_bfloat16",
        batch,
        machine,
        fsdp(microbatches, checkpoints),
        batch * length / tokens_per_second,
        LLM_FOUNDRY,
        attention_efficiency=FLASH_ATTENTION_TRITON_A100 if is_a100 else FLASH_ATTENTION_TRITON,
    )


ROWS = (
    mpt("1B", 2048, 112, "h100:8", 363645),
    mpt("7B", 2048, 48, "h100:8", 85144),
    mpt("3B", 8192, 144, "h100:8", 132626, microbatches=6),
    Row(
        "GPT 1.7B, recomputed",
        megatron_gpt(2304, 24, 24),
        "mixed_bfloat16",
        512,
        "a100:32",
        recomputed(0, 1),
        3.53,
        MEGATRON,
        fused_attention=False,
    ),
    Row(
        "GPT 18.4B, tensor 8, recomputed",
        megatron_gpt(6144, 40, 48),
        "mixed_bfloat16",
        1024,
        "a100:256",
        recomputed(3, 8),
        9.40,
        MEGATRON,
        fused_attention=False,
    ),
    Row(
        "ResNet-50, mixed precision",
        resnet50,
        "mixed_bfloat16",
        256,
        "a100:1",
        ONE_DEVICE,
        256 / 2470,
        DEEP_LEARNING_EXAMPLES,
    ),
    Row(
        "ResNet-50, mixed precision",
        resnet50,
        "mixed_bfloat16",
        2048,
        "a100:8",
        DATA_PARALLEL,
        2048 / 16621,
        DEEP_LEARNING_EXAMPLES,
    ),
    Row(
        "ResNet-50, TF32",
        resnet50,
        "float32",
        2048,
        "a100:8",
        DATA_PARALLEL,
        2048 / 7248,
        DEEP_LEARNING_EXAMPLES,
        channels_first=True,
    ),
    Row(
        "four dense layers of 4096",
        dense_layers,
        "float32",
        1024,
        "h100:1",
        ONE_DEVICE,
        1.82e-3,
        MEASURED,
    ),
    Row("ResNet50, TF32", resnet50, "float32", 64, "h100:1", ONE_DEVICE, 25.9e-3, MEASURED),
    Row(
        "GPT, 12 blocks of 768, 512 tokens",
        lambda: transformer(768, 12, 12, 512, 50304, bias=True),
        "mixed_bfloat16",
        16,
        "h100:1",
        ONE_DEVICE,
        22.3e-3,
        MEASURED + ", its vocabulary not stated",
    ),
)

FURTHER_ROWS = (
    mpt("760M", 2048, 384, "h100:8", 505177, microbatches=2),
    mpt("760M", 8192, 96, "h100:8", 334602, microbatches=2),
    mpt("1B", 512, 1792, "h100:8", 418201, microbatches=4),
    mpt("1B", 2048, 1280, "dgx-h100:8", 2841754),
    mpt("3B", 2048, 480, "dgx-h100:2", 386285, microbatches=3),
    mpt("7B", 4096, 256, "h100:8", 68893, microbatches=2, checkpoints=True),
    mpt("7B", 32768, 32, "h100:8", 26550, microbatches=2, checkpoints=True),
    mpt("13B", 2048, 16, "h100:8", 38336),
    mpt("13B", 2048, 128, "dgx-h100:8", 307209),
    mpt("13B", 16384, 72, "h100:8", 23881, microbatches=3, checkpoints=True),
    mpt("30B", 2048, 480, "dgx-h100:2", 36209, microbatches=3, checkpoints=True),
    mpt("70B", 2048, 1024, "dgx-h100:16", 135490, checkpoints=True),
    mpt("125M", 2048, 512, "a100:8", 1133901, microbatches=2),
    mpt("350M", 2048, 512, "a100:8", 470263, microbatches=2),
    mpt("350M", 8192, 128, "a100:8", 292559, microbatches=2),
    mpt("760M", 2048, 384, "a100:8", 259472, microbatches=2),
    mpt("1B", 2048, 448, "a100:8", 164109, microbatches=4),
    mpt("1B", 8192, 96, "a100:8", 110516, microbatches=4),
    mpt("3B", 2048, 160, "a100:8", 86491, microbatches=2),
    mpt("7B", 2048, 96, "a100:8", 37130, microbatches=2),
    mpt("7B", 4096, 256, "a100:8", 29472, microbatches=2, checkpoints=True),
    mpt("13B", 2048, 48, "a100:8", 18097, microbatches=3),
)
"""Rows that were chosen and run after the cost model was written."""


def prediction(row: Row) -> tuple[Machine, Prediction, float]:
    """The predicted step of a row, and its seconds in the published program."""
    keras.config.set_dtype_policy(row.policy)
    if row.fused_attention:
        keras.config.enable_flash_attention()
    else:
        keras.config.disable_flash_attention()
    with abstract():
        model = row.model()
    optimizer = OPTIMIZERS.get(model.name, keras.optimizers.AdamW)
    model.compile(optimizer(), LOSSES.get(model.name, "mse"))
    machine = load(row.machine)
    if row.attention_efficiency is not None:
        figures = {"device.engine.attention.bfloat16.efficiency": row.attention_efficiency}
        machine = machine.revised(figures, "the published program's attention kernel")
    graph = capture_program(model, row.batch, target=machine.target or None).graph
    plan = check(row.plan(graph, machine.name, mesh_of(machine)), graph)
    predicted = simulated_step(graph, machine, plan).prediction()
    seconds = predicted.seconds
    if row.channels_first:
        seconds += transpose_seconds(graph, machine)
    return machine, predicted, seconds


def transpose_seconds(graph: OperatorGraph, machine: Machine) -> float:
    """Seconds in which cuDNN brings operands and results of convolutions from channels first to
    channels last and back, split by sample.

    Its tensor core kernels take channels last (NVIDIA, Convolutional Layers User's Guide, tensor
    layouts in memory). A transpose reads and writes its array once.
    """
    nbytes = 0
    for instruction in graph.instructions:
        if instruction.name == "convolution":
            tensors = (*instruction.operands, *instruction.results)
            nbytes += sum(graph.tensors[tensor].nbytes for tensor in tensors)
    return 2 * nbytes / machine.devices / machine.memory_bandwidth


def line(row: Row, machine: Machine, predicted: Prediction, seconds: float) -> str:
    """A row of the table."""
    fits = predicted.peak_bytes <= capacity(machine)
    return (
        f"| {row.name}, {row.machine} | {row.seconds:.4g} | {seconds:.4g} | "
        f"{seconds / row.seconds:.2f} | {format_bytes(predicted.peak_bytes)} | "
        f"{'yes' if fits else 'NO'} |"
    )


def parts(predicted: Prediction) -> str:
    """Seconds by cause and memory by kind."""
    seconds = {cause: round(value, 5) for cause, value in predicted.by_cause().items()}
    memory = {kind: format_bytes(getattr(predicted.memory, kind)) for kind in KINDS}
    traffic = {kind: format_bytes(value) for kind, value in predicted.traffic.items()}
    return f"    {seconds}\n    {memory}\n    {traffic}, {predicted.flops / 1e12:.1f} TFLOP"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--further", action="store_true", help="more MPTs instead of these rows")
    parser.add_argument("--parts", action="store_true", help="also print causes and kinds")
    options = parser.parse_args(arguments)
    errors = []
    print("| row | published s | predicted s | ratio | peak | fits |\n|---|---|---|---|---|---|")
    for row in FURTHER_ROWS if options.further else ROWS:
        if options.only.lower() not in f"{row.name}, {row.machine}".lower():
            continue
        machine, predicted, seconds = prediction(row)
        errors.append(abs(seconds / row.seconds - 1))
        print(line(row, machine, predicted, seconds), flush=True)
        if options.parts:
            print(parts(predicted), flush=True)
    if errors:
        print(
            f"{len(errors)} rows: median {statistics.median(errors):.0%}, worst {max(errors):.0%}"
        )


if __name__ == "__main__":
    main()
