"""Seconds of capture and of search alone: ResNet50 and a 12-block transformer, planned for 8, 64 and 512 devices.

python benchmarks/search.py
"""

from __future__ import annotations

import os
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from keras import layers

import partita
from partita.capture.program import capture_program
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.search.elimination import eliminate
from partita.search.find import mesh_of
from partita.search.network import build
from partita.search.reduce import reduce


def transformer() -> keras.Model:
    tokens = keras.Input((512,), dtype="int32")
    x = layers.Embedding(32000, 768)(tokens)
    for _ in range(12):
        a = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(12, 64)(a, a, use_causal_mask=True)
        b = layers.LayerNormalization()(x)
        x = x + layers.Dense(768)(layers.Dense(3072, activation="gelu")(b))
    return keras.Model(tokens, layers.Dense(32000)(x), name="transformer")


def resnet() -> keras.Model:
    return keras.applications.ResNet50(weights=None)


for make, batch in ((resnet, 256), (transformer, 64)):
    start = time.time()
    with partita.abstract():
        model = make()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    built = time.time()
    graph = capture_program(model, batch).graph
    print(
        f"{model.name}: built in {built - start:.1f} s, captured in {time.time() - built:.1f} s, {len(graph.operators)} operators"
    )
    for machine in (load("dgx-h100:1"), load("dgx-h100:8"), load("dgx-h100:64")):
        start, mesh = time.time(), mesh_of(machine)
        plans = [f(graph, machine.name, mesh) for f in BASELINES.values()]
        network = build(graph, machine, mesh, plans)
        reduced = reduce(network.problem)
        result = eliminate(reduced.problem, float(machine.memory_bytes))
        gap = f"{result.gap:.2%}"
        print(
            f"  {machine.devices:4} devices: {time.time() - start:5.2f} s, step {result.seconds * 1e3:.2f} ms, gap to the bound {gap}",
            flush=True,
        )
