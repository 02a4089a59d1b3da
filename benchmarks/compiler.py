"""The compiler's word against ours: collectives, peak memory and FLOPs of models under plans, on 8
virtual CPU devices.

    python benchmarks/compiler.py --models resnet50,gpt --plans "data parallel,found"

Ratios are planned / emitted; a line per pair as it is done, then medians and worst cases.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

from partita.capture.keras_models import capture_model
from partita.cost.collectives import collectives
from partita.cost.memory import memory
from partita.cost.work import local_flops
from partita.execute.emitted import emitted, peak_bytes
from partita.execute.program import planned_step
from partita.machine import host
from partita.plans.baselines import BASELINES
from partita.search.find import find, mesh_of

IMAGES = (np.zeros((16, 64, 64, 3), "float32"), np.zeros(16, "int32"))


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


MODELS = {
    "lstm": lstm,
    "gpt": gpt,
    "towers": towers,
    "resnet50": application("ResNet50"),
    "mobilenetv3small": application("MobileNetV3Small"),
    "efficientnetb0": application("EfficientNetB0"),
    "convnexttiny": application("ConvNeXtTiny"),
    "densenet121": application("DenseNet121"),
}
PLANS = ["data parallel", "ZeRO-3", "tensor parallel", "spatial", "found"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--plans", default=",".join(PLANS))
    arguments = parser.parse_args()
    machine, ratios = host(8, 8 << 30), {"traffic": [], "memory": [], "flops": []}
    for name in arguments.models.split(","):
        model, batch = MODELS[name]()
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        start = time.time()
        captured = capture_model(model, batch)
        seconds = time.time() - start
        graph = captured.graph
        print(
            f"{name}: captured in {seconds:.1f} s, {len(graph.instructions)} instructions",
            flush=True,
        )
        for plan_name in arguments.plans.split(","):
            mesh = mesh_of(machine)
            plan = (
                find(graph, machine).plan
                if plan_name == "found"
                else BASELINES[plan_name](graph, machine.name, mesh)
            )
            step = planned_step(captured, plan)
            compiled = step.lower().compile()
            mine = sum(c.total for c in collectives(graph, plan.mesh, step.layout, machine.backend))
            theirs = sum(e.nbytes * e.trips for e in emitted(compiled.as_text()))
            cost = compiled.cost_analysis()
            flops = (cost[0] if isinstance(cost, list) else cost)["flops"]
            row = {
                "traffic": mine / theirs if theirs else 1.0 if not mine else float("inf"),
                "memory": memory(graph, plan.mesh, step.layout, machine.backend).peak
                / peak_bytes(compiled),
                "flops": local_flops(
                    graph, plan.mesh, step.layout, machine.backend, loops_once=True
                )
                / flops,
            }
            for key, value in row.items():
                ratios[key].append(value)
            text = "  ".join(f"{key} {value:.3f}" for key, value in row.items())
            print(f"  {plan_name:16} {text}  ({theirs / 2**20:.2f} MiB emitted)", flush=True)
    print("planned / emitted, median and worst:")
    for key, values in ratios.items():
        worst = max(values, key=lambda v: abs(v - 1))
        print(
            f"  {key:8} median {statistics.median(values):.3f}  lowest {min(values):.3f}  highest {max(values):.3f}  worst {worst:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
