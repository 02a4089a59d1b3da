"""The compiler's word against ours: collectives, peak memory and FLOPs of models under plans, on 8
devices that need not be here.

    python benchmarks/compiler.py --models resnet50,gpt --plans "data parallel,found"
    python benchmarks/compiler.py --target h100 --plans "ZeRO-3,ZeRO-3 rematerialized,ZeRO-1 offloaded"
    python benchmarks/compiler.py --target h100 --json rows.json --texts folder --continue
    python benchmarks/compiler.py --target v5e --models gpt,mixer --times 128    # gigabytes a device

Ratios are planned / compiled: a line per pair as it is done, then medians and worst cases. The
programs are cached, so a second run after a change of the cost model compiles nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import keras
import numpy as np
from keras import layers, ops

from partita.capture.keras_models import capture_model
from partita.capture.targets import CaptureTarget
from partita.cost.collectives import collectives
from partita.cost.memory import memory
from partita.cost.predict import predict
from partita.cost.terms import cost_terms
from partita.cost.work import local_flops
from partita.errors import PartitaError
from partita.execute.compiled_work import work_of
from partita.execute.compilers.family import program_compiler
from partita.execute.compilers.request import request_of
from partita.execute.compilers.run import compile_program
from partita.execute.emitted import collectives_of
from partita.execute.hlo import HloModule
from partita.execute.verification import compared_traffic
from partita.graph.rematerialize import rematerialized
from partita.machine import Machine, host, load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import find, mesh_of
from partita.search.rematerialization import groupings

IMAGES = (np.zeros((16, 64, 64, 3), "float32"), np.zeros(16, "int32"))
MACHINES = {
    "cpu": lambda: host(8, 8 << 30),
    "h100": lambda: load("h100:8"),
    "v5e": lambda: load("tpu-v5e:8"),
}


def application(name: str):
    return lambda: (
        getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=16),
        IMAGES,
    )


def lstm():
    tokens = keras.Input((32,), dtype="int32")
    x = layers.LSTM(64)(layers.Embedding(1024, 64)(tokens))
    return keras.Model(tokens, layers.Dense(16, activation="softmax")(x)), (
        np.zeros((32, 32), "int32"),
        np.zeros(32, "int32"),
    )


def gpt():
    tokens = keras.Input((64,), dtype="int32")
    x = layers.Embedding(512, 128)(tokens)
    for _ in range(3):
        a = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(8, 16)(a, a, use_causal_mask=True)
        b = layers.LayerNormalization()(x)
        x = x + layers.Dense(128)(layers.Dense(512, activation="gelu")(b))
    return keras.Model(tokens, layers.Dense(512, activation="softmax")(x)), (
        np.zeros((16, 64), "int32"),
    ) * 2


def towers():
    user, item = keras.Input((), dtype="int32"), keras.Input((8,), dtype="int32")
    a = layers.Dense(64)(layers.Dense(128, activation="relu")(layers.Embedding(4096, 64)(user)))
    b = layers.Dense(64)(layers.GlobalAveragePooling1D()(layers.Embedding(8192, 64)(item)))
    x = layers.Concatenate()([a, b, layers.Dot(-1)([a, b])])
    data = ([np.zeros(64, "int32"), np.zeros((64, 8), "int32")], np.zeros(64, "int32"))
    return keras.Model([user, item], layers.Dense(16, activation="softmax")(x)), data


def mixed_gpt(width: int, blocks: int, words: int, positions: int, samples: int):
    """A transformer wide enough for fused attention, in mixed precision."""

    def made():
        keras.config.set_dtype_policy("mixed_bfloat16")
        tokens = keras.Input((positions,), dtype="int32")
        x = layers.Embedding(words, width)(tokens)
        for _ in range(blocks):
            a = layers.LayerNormalization()(x)
            x = x + layers.MultiHeadAttention(width // 64, 64)(a, a, use_causal_mask=True)
            b = layers.LayerNormalization()(x)
            x = x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(b))
        logits = layers.Dense(words, activation="softmax", dtype="float32")(x)
        keras.config.set_dtype_policy("float32")
        return keras.Model(tokens, logits), (np.zeros((samples, positions), "int32"),) * 2

    return made


def gpt_fused():
    """`gpt_bfloat16` with one product for query, key and value, and one for gate and up, with biases."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    tokens = keras.Input((512,), dtype="int32")
    x = layers.Embedding(8192, 512)(tokens)
    for _ in range(2):
        a = layers.Dense(1536)(layers.LayerNormalization()(x))
        heads = [ops.reshape(one, (-1, 512, 8, 64)) for one in ops.split(a, 3, -1)]
        attended = ops.dot_product_attention(*heads, is_causal=True)
        x = x + layers.Dense(512)(ops.reshape(attended, (-1, 512, 512)))
        gate, up = ops.split(layers.Dense(4096)(layers.LayerNormalization()(x)), 2, -1)
        x = x + layers.Dense(512)(ops.silu(gate) * up)
    logits = layers.Dense(8192, activation="softmax", dtype="float32")(x)
    keras.config.set_dtype_policy("float32")
    return keras.Model(tokens, logits), (np.zeros((16, 512), "int32"),) * 2


class Experts(layers.Layer):
    """Eight dense layers, of which a token takes the one with the highest weight."""

    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate = self.add_weight((width, experts), name="gate")
        self.up = self.add_weight((experts, width, inner), name="up")
        self.down = self.add_weight((experts, inner, width), name="down")
        self.experts = experts

    def call(self, x):
        weights = ops.softmax(x @ self.gate)
        chosen = ops.one_hot(ops.argmax(weights, -1), self.experts)
        room = 2 * x.shape[1] // self.experts
        position = ops.cumsum(chosen, 1) * chosen
        slots = ops.one_hot(ops.cast(position, "int32") - 1, room) * chosen[..., None]
        sent = ops.einsum("bte,btes,btd->ebsd", chosen, slots, x)
        hidden = ops.gelu(ops.einsum("ebsd,edf->ebsf", sent, self.up))
        received = ops.einsum("ebsf,efd->ebsd", hidden, self.down)
        return ops.einsum("bte,btes,ebsd->btd", weights, slots, received)


def mixture():
    tokens = keras.Input((64,), dtype="int32")
    x = layers.Embedding(512, 128)(tokens)
    for _ in range(2):
        a = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(8, 16)(a, a, use_causal_mask=True)
        x = x + Experts(8, 128, 256)(layers.LayerNormalization()(x))
    return keras.Model(tokens, layers.Dense(512, activation="softmax")(x)), (
        np.zeros((16, 64), "int32"),
    ) * 2


def unet():
    """Images to images: strided and transposed convolutions, joined by their channels."""
    image = keras.Input((64, 64, 3))
    x, joined = image, []
    for width in (32, 64, 128):
        x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
        joined.append(x)
        x = layers.Conv2D(width, 3, strides=2, padding="same", activation="swish")(x)
    for width in (128, 64, 32):
        x = layers.Conv2DTranspose(width, 3, strides=2, padding="same")(x)
        x = layers.GroupNormalization(8)(layers.Concatenate()([x, joined.pop()]))
        x = layers.Activation("relu")(x)
    labels = layers.Conv2D(16, 1, activation="softmax")(x)
    return keras.Model(image, labels), (IMAGES[0], np.zeros((16, 64, 64), "int32"))


def vit():
    """Patches of images, tanh in place of the error function, attention with dropout."""
    image = keras.Input((64, 64, 3))
    x = layers.Reshape((64, 192))(layers.Conv2D(192, 8, strides=8)(image))
    for _ in range(4):
        a = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(6, 32, dropout=0.1)(a, a)
        b = layers.Dense(768)(layers.LayerNormalization()(x))
        x = x + layers.Dense(192)(layers.Lambda(lambda v: ops.gelu(v, approximate=True))(b))
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(image, layers.Dense(16, activation="softmax")(x)), IMAGES


def mixer():
    """Products over positions and over channels in turn, RMS normalization, gated units."""
    tokens = keras.Input((64,), dtype="int32")
    x = layers.Embedding(2048, 256)(tokens)
    for _ in range(3):
        a = layers.Permute((2, 1))(layers.RMSNormalization()(x))
        a = layers.Dense(64)(layers.Dense(256, activation="silu")(a))
        x = x + layers.Permute((2, 1))(a)
        b = layers.RMSNormalization()(x)
        gated = layers.Dense(512)(b) * layers.Dense(512, activation="sigmoid")(b)
        x = x + layers.Dense(256)(gated)
    x = layers.Dense(32, activation="softmax")(layers.GlobalMaxPooling1D()(x))
    return keras.Model(tokens, x), (np.zeros((32, 64), "int32"), np.zeros(32, "int32"))


def vit_large():
    """The base size of a vision transformer, in mixed precision."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    image = keras.Input((224, 224, 3))
    x = layers.Reshape((196, 768))(layers.Conv2D(768, 16, strides=16)(image))
    for _ in range(12):
        a = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(12, 64, dropout=0.1)(a, a)
        b = layers.Dense(3072, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(768)(b)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    classes = layers.Dense(1000, activation="softmax", dtype="float32")(x)
    keras.config.set_dtype_policy("float32")
    return keras.Model(image, classes), photographs(512)


def photographs(count: int):
    """Images of the size of ImageNet's, with labels."""
    return np.zeros((count, 224, 224, 3), "float32"), np.zeros(count, "int32")


def large_application(name: str):
    """A network of keras.applications with 64 of ImageNet's images a device."""
    return lambda: (getattr(keras.applications, name)(weights=None), photographs(512))


MODELS = {
    "lstm": lstm,
    "gpt": gpt,
    "towers": towers,
    "gpt_bfloat16": mixed_gpt(512, 2, 8192, 512, 16),
    "gpt_fused": gpt_fused,
    "mixture": mixture,
    "resnet50": application("ResNet50"),
    "mobilenetv3small": application("MobileNetV3Small"),
    "efficientnetb0": application("EfficientNetB0"),
    "convnexttiny": application("ConvNeXtTiny"),
    "densenet121": application("DenseNet121"),
    "unet": unet,
    "vit": vit,
    "mixer": mixer,
}
LARGE_MODELS = {
    "gpt_large": mixed_gpt(1024, 4, 32768, 1024, 64),
    "vit_large": vit_large,
    "resnet50_large": large_application("ResNet50"),
    "mobilenetv3small_large": large_application("MobileNetV3Small"),
    "efficientnetb0_large": large_application("EfficientNetB0"),
}
"""Models with gigabytes a device, compiled if `--models` names them."""
UNSEEN = {"unet", "vit", "mixer"}
"""Models from whose programs no rule of the cost model was made."""
REMATERIALIZED = " rematerialized"
"""End of the name of a plan whose runs, all of the longest ones, are rematerialized."""
OFFLOADED = " offloaded"
"""End of the name of a plan whose optimizer slots are in host memory."""
PLANS = ["data parallel", "ZeRO-3", "tensor parallel", "spatial", "found"]


@dataclass(frozen=True)
class Row:
    """A model under a plan, planned and compiled; bytes and FLOPs of one device and step."""

    target: str
    model: str
    plan: str
    planned_bytes: float = 0
    emitted_bytes: float = 0
    planned_kinds: dict[str, float] | None = None
    emitted_kinds: dict[str, float] | None = None
    planned_peak: float = 0
    compiled_peak: float = 0
    planned_flops: float = 0
    compiled_flops: float = 0
    product_flops: float = 0
    planned_kernel_seconds: float = 0
    estimated_seconds: float | None = None
    compile_seconds: float = 0
    compiler: str = ""
    error: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.target, self.model, self.plan

    def ratios(self) -> dict[str, float]:
        """Planned / compiled; kernel seconds / seconds of the cycles that XLA:TPU estimates."""
        ratios = {
            "traffic": ratio(self.planned_bytes, self.emitted_bytes),
            "memory": ratio(self.planned_peak, self.compiled_peak),
            "flops": ratio(self.planned_flops, self.compiled_flops),
        }
        if self.estimated_seconds:
            ratios["seconds"] = ratio(self.planned_kernel_seconds, self.estimated_seconds)
        return ratios


def ratio(planned: float, compiled: float) -> float:
    if compiled:
        return planned / compiled
    return 1.0 if not planned else float("inf")


def compared(captured, machine: Machine, target: str, model: str, plan_name: str, texts) -> Row:
    """The row of a plan; with an error if it cannot be planned or compiled."""
    graph = captured.graph
    try:
        if plan_name == "found":
            plan = find(graph, machine).plan
        else:
            baseline = plan_name.removesuffix(REMATERIALIZED).removesuffix(OFFLOADED)
            plan = BASELINES[baseline](graph, machine.name, mesh_of(machine))
        if plan_name.endswith(REMATERIALIZED):
            runs = groupings(graph, cost_terms(graph, machine.backend))[-1]
            plan = replace(plan, recompute=runs)
        if plan_name.endswith(OFFLOADED):
            with_slots = dict.fromkeys(a.parameter for a in graph.arguments if a.parameter)
            plan = replace(plan, offload=tuple(with_slots))
        request = request_of(captured, plan, program_compiler(machine).target(machine))
        program = compile_program(request)
    except PartitaError as error:
        return Row(target, model, plan_name, error=str(error))
    if texts is not None:
        name = f"{target}-{model}-{plan_name}.hlo.gz".replace(" ", "-")
        (texts / name).write_bytes(gzip.compress(program.text.encode(), mtime=0))
    graph = rematerialized(graph, plan.recompute)
    layout = layout_of(graph, plan)
    module = HloModule.of(program.text)
    work = work_of(module)
    planned = compared_traffic(
        collectives(graph, plan.mesh, layout, machine.backend), collectives_of(module)
    )
    planned_kinds = {traffic.kind: traffic.planned for traffic in planned}
    emitted_kinds = {traffic.kind: traffic.emitted for traffic in planned}
    return Row(
        target,
        model,
        plan_name,
        planned_bytes=sum(planned_kinds.values()),
        emitted_bytes=sum(emitted_kinds.values()),
        planned_kinds=planned_kinds,
        emitted_kinds=emitted_kinds,
        planned_peak=memory(
            graph, plan.mesh, layout, machine.backend, device_bytes=machine.memory_bytes
        ).peak,
        compiled_peak=program.memory.peak,
        planned_flops=local_flops(graph, plan.mesh, layout, machine.backend),
        compiled_flops=work.flops,
        product_flops=work.product_flops,
        planned_kernel_seconds=predict(graph, machine, plan, None, layout).by_cause()["compute"],
        estimated_seconds=program_compiler(machine).seconds_of(work.cycles, machine),
        compile_seconds=program.seconds,
        compiler=f"{program.compiler}, {program.version}",
    )


def multiplied(batch, times: int):
    """A batch with `times` as many samples."""
    return jax.tree.map(lambda array: np.repeat(array, times, axis=0), batch)


def read_rows(path: Path | None) -> dict[tuple[str, str, str], Row]:
    if path is None or not path.exists():
        return {}
    rows = [Row(**values) for values in json.loads(path.read_text())]
    return {row.key: row for row in rows}


def write_rows(path: Path | None, rows: dict[tuple[str, str, str], Row]) -> None:
    if path is not None:
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps([asdict(row) for row in rows.values()], indent=1))
        os.replace(beside, path)


def print_summary(rows: list[Row]) -> None:
    print("planned / compiled, median and worst:")
    ratios: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.ratios().items():
            ratios.setdefault(key, []).append(value)
    for key, values in ratios.items():
        worst = max(values, key=lambda value: abs(value - 1))
        print(
            f"  {key:8} median {statistics.median(values):.3f}  lowest {min(values):.3f}  "
            f"highest {max(values):.3f}  worst {worst:.3f}  of {len(values)} pairs"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--target", default="cpu", choices=MACHINES)
    parser.add_argument("--times", type=int, default=1, help="multiply the samples of a step")
    parser.add_argument("--json", type=Path, help="rows are added to this file")
    parser.add_argument("--texts", type=Path, help="compiled programs are written to this folder")
    parser.add_argument(
        "--continue", action="store_true", dest="resume", help="skip rows of --json"
    )
    arguments = parser.parse_args()
    if arguments.texts is not None:
        arguments.texts.mkdir(parents=True, exist_ok=True)
    machine = MACHINES[arguments.target]()
    rows = read_rows(arguments.json)
    shown: list[Row] = []
    for name in arguments.models.split(","):
        plan_names = arguments.plans.split(",")
        row_name = name if arguments.times == 1 else f"{name} x {arguments.times}"
        if arguments.resume:
            done = {
                plan
                for target, model, plan in rows
                if (target, model) == (arguments.target, row_name)
            }
            plan_names = [plan for plan in plan_names if plan not in done]
        if not plan_names:
            continue
        model, batch = (MODELS | LARGE_MODELS)[name]()
        batch = multiplied(batch, arguments.times)
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        start = time.time()
        captured = capture_model(model, batch, CaptureTarget.of(machine.target))
        print(
            f"{row_name}: captured in {time.time() - start:.1f} s, "
            f"{len(captured.graph.instructions)} instructions",
            flush=True,
        )
        for plan_name in plan_names:
            row = compared(
                captured, machine, arguments.target, row_name, plan_name, arguments.texts
            )
            rows[row.key] = row
            write_rows(arguments.json, rows)
            if row.error:
                print(f"  {plan_name:16} {row.error}", flush=True)
                continue
            shown.append(row)
            text = "  ".join(f"{key} {value:.3f}" for key, value in row.ratios().items())
            emitted_mib = row.emitted_bytes / 2**20
            print(f"  {plan_name:16} {text}  ({emitted_mib:.2f} MiB emitted)", flush=True)
    if shown:
        print_summary(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
