"""Seconds of capture and of search alone.

ResNet50 and a transformer of 12 blocks, planned for 8, 64 and 512 devices.

Example: python benchmarks/search.py
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from keras import layers

import partita
from partita.capture.program import capture_program
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.plans.baselines import baselines_of
from partita.search.elimination import eliminate
from partita.search.find import mesh_of
from partita.search.network import build
from partita.search.reduce import reduce

MACHINES = ("dgx-h100:1", "dgx-h100:8", "dgx-h100:64")


def transformer(
    blocks: int = 12,
    heads: int = 12,
    words: int = 32_000,
    positions: int = 512,
) -> keras.Model:
    width = 64 * heads
    tokens = keras.Input((positions,), dtype="int32")
    x = layers.Embedding(words, width)(tokens)
    for _ in range(blocks):
        normal = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(heads, 64)(normal, normal, use_causal_mask=True)
        normal = layers.LayerNormalization()(x)
        inner = layers.Dense(4 * width, activation="gelu")(normal)
        x = x + layers.Dense(width)(inner)
    return keras.Model(tokens, layers.Dense(words)(x), name="transformer")


def resnet() -> keras.Model:
    return keras.applications.ResNet50(weights=None)


def small_transformer() -> keras.Model:
    return transformer(blocks=1, heads=2, words=1000, positions=64)


CASES = ((resnet, 256), (transformer, 64))
SMALL_CASES = ((small_transformer, 64),)


def search(graph: OperatorGraph, machine_name: str) -> str:
    """Seconds of one search, its step and its gap."""
    machine = load(machine_name)
    begin = time.perf_counter()
    mesh = mesh_of(machine)
    plans = [make(graph, machine.name, mesh) for make in baselines_of(graph).values()]
    network = build(graph, machine, mesh, plans)
    reduced = reduce(network.problem)
    result = eliminate(reduced.problem, float(machine.memory_bytes))
    seconds = time.perf_counter() - begin
    return (
        f"  {machine.devices:4} devices: {seconds:5.2f} s, "
        f"step {result.seconds * 1e3:.2f} ms, gap to the bound {result.gap:.2%}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="one block on 8 devices")
    options = parser.parse_args(arguments)
    machines = MACHINES[:1] if options.small else MACHINES
    for make, batch in SMALL_CASES if options.small else CASES:
        begin = time.perf_counter()
        with partita.abstract():
            model = make()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss)
        built = time.perf_counter()
        graph = capture_program(model, batch).graph
        captured = time.perf_counter()
        print(
            f"{model.name}: built in {built - begin:.1f} s, captured in {captured - built:.1f} s, "
            f"{len(graph.operators)} operators"
        )
        for name in machines:
            print(search(graph, name), flush=True)


if __name__ == "__main__":
    main()
