"""The sum over in-edges, and a GCN layer forward and backward, against JAX's own operations.

    partita gnn generate rmat --scale 19 --edges 10523921 -o graph.lux
    python benchmarks/gnn_aggregation.py graph.lux --features 64

Programs take turns; times are medians. "of copy" is the bandwidth of a sum (a row and a number per
edge, and the result) divided by the bandwidth of a copy by all cores, reads and writes.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCSR

import partita.gnn as gnn
from partita.execute.devices import keep_freed_memory
from partita.gnn.nn.block import Block, block_of

Sum = Callable[[Block, Any, Any], Any]
"""The sum over in-edges: (block, targets of the edges, rows) -> rows."""

COPY_NUMBERS = 2**26
"""float32 numbers that each core copies."""


def by_kernel(block: Block, to: Any, x: Any) -> Any:
    return block.sum(x)


def by_bcsr(block: Block, to: Any, x: Any) -> Any:
    edges = block.aggregations[0].edges
    ones = jnp.ones(edges.ids.shape, jnp.float32)
    return BCSR((ones, edges.ids, edges.offsets), shape=(len(x), len(x))) @ x


def by_segment_sum(block: Block, to: Any, x: Any) -> Any:
    rows = x[block.aggregations[0].edges.ids]
    return jax.ops.segment_sum(rows, to, len(x), indices_are_sorted=True)


KERNEL_BY_DEGREE = "compiled kernel, vertices by degree"

SUMS: dict[str, Sum] = {
    "compiled kernel": by_kernel,
    KERNEL_BY_DEGREE: by_kernel,
    "JAX BCSR @ dense": by_bcsr,
    "jax.ops.segment_sum": by_segment_sum,
}


def layer_of(sum_edges: Sum, w: Any) -> Sum:
    """Gradients of a layer's loss in its weights and its input.

    The loss is not linear, or XLA would fold the backward pass away.
    """

    def gradients(block: Block, to: Any, x: Any) -> Any:
        def loss(w: Any, x: Any) -> Any:
            return jnp.sum(jax.nn.relu(sum_edges(block, to, x @ w)) ** 2)

        return jax.grad(loss, argnums=(0, 1))(w, x)

    return gradients


def copy_bandwidth(cores: int) -> float:
    """Bytes per second, read and written, of a copy by all cores: the best of 5."""
    source = np.ones((cores, COPY_NUMBERS), np.float32)
    target = np.ones((cores, COPY_NUMBERS), np.float32)

    def copy(core: int) -> None:
        np.copyto(target[core], source[core])

    bandwidths = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(copy, range(cores)))
            bandwidths.append(2 * source.nbytes / (time.perf_counter() - began))
    return max(bandwidths)


def median_seconds(programs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of programs that take turns, without the first round, which compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Aggregations against JAX's own.")
    parser.add_argument("graph")
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    keep_freed_memory()  # otherwise every result is cleared page by page
    graph = gnn.open(arguments.graph)
    features = arguments.features
    cores = os.cpu_count() or 1
    print(f"{graph}, {features} features, {cores} cores")

    block = jax.device_put(block_of(graph))
    by_degree = jax.device_put(block_of(graph.relabelled(gnn.order.by_degree(graph))))
    random = np.random.default_rng(0)
    x = jax.device_put(random.standard_normal((graph.vertices, features), dtype=np.float32))
    w = jax.device_put(random.standard_normal((features, features), dtype=np.float32) / features)
    vertices = np.arange(graph.vertices, dtype=np.int32)
    to = jax.device_put(np.repeat(vertices, graph.in_degrees()))

    def program_of(name: str, function: Sum) -> Callable[[], Any]:
        compiled = jax.jit(function)
        given_block = by_degree if name == KERNEL_BY_DEGREE else block
        return lambda: compiled(given_block, to, x)

    copied = copy_bandwidth(cores)
    moved = graph.edges * (4 + 4 * features) + 4 * graph.vertices * features
    forward = {name: program_of(name, function) for name, function in SUMS.items()}
    for name, seconds in median_seconds(forward, arguments.rounds).items():
        share = moved / seconds / copied
        print(f"forward: {name}: {seconds * 1e3:.0f} ms, {share:.2f} of copy", flush=True)
    layers = {name: program_of(name, layer_of(function, w)) for name, function in SUMS.items()}
    for name, seconds in median_seconds(layers, arguments.rounds).items():
        print(f"layer, forward and backward: {name}: {seconds * 1e3:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
