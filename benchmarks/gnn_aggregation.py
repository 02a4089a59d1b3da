"""The sum over in-edges, and a GCN layer forward and backward, against JAX's own ways and this machine's copy bandwidth; interleaved medians.

    partita gnn generate rmat --scale 19 --edges 10523921 -o graph.lux
    python benchmarks/gnn_aggregation.py graph.lux --features 64

"of copy": the bytes that it moves (a row and a number for every edge, and the result) a second, over those of a copy by all cores, read and written.
"""

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCSR

import partita.gnn as gnn
from partita.execute.devices import keep_freed_memory
from partita.gnn.nn.block import block_of

parser = argparse.ArgumentParser(description="Aggregations against JAX's own.")
parser.add_argument("graph")
parser.add_argument("--features", type=int, default=64)
parser.add_argument("--rounds", type=int, default=7)
arguments = parser.parse_args()

keep_freed_memory()  # or every result is cleared page by page
graph = gnn.open(arguments.graph)
vertices, features = graph.vertices, arguments.features
block = jax.device_put(block_of(graph))
near = jax.device_put(block_of(graph.relabelled(gnn.order.by_degree(graph))))
x = jax.device_put(np.random.default_rng(0).standard_normal((vertices, features), dtype=np.float32))
w = jax.device_put(
    np.random.default_rng(1).standard_normal((features, features), dtype=np.float32) / features
)
to = jax.device_put(np.repeat(np.arange(vertices, dtype=np.int32), graph.in_degrees()))
ones = jnp.ones(graph.edges, jnp.float32)


def by_bcsr(b, to, x):  # noqa: ANN001, ANN201
    return (
        BCSR(
            (ones, b.aggregations[0].edges.ids, b.aggregations[0].edges.offsets),
            shape=(vertices, vertices),
        )
        @ x
    )


WAYS = {
    "compiled kernel": lambda b, to, x: b.sum(x),
    "the same, vertices by degree": lambda b, to, x: b.sum(x),
    "JAX BCSR @ dense": by_bcsr,
    "jax.ops.segment_sum": lambda b, to, x: jax.ops.segment_sum(
        x[b.aggregations[0].edges.ids], to, vertices, indices_are_sorted=True
    ),
}


def layer(way):  # noqa: ANN001, ANN201
    """Gradients of a layer's loss in its weights and its input; not linear, or XLA would fold the backward pass away."""
    return lambda b, to, x: jax.grad(
        lambda w, x: jnp.sum(jax.nn.relu(way(b, to, x @ w)) ** 2), argnums=(0, 1)
    )(w, x)


print(f"{graph}, {features} features, {os.cpu_count()} cores")
cores = os.cpu_count() or 1
source, target = np.ones((cores, 2**26), np.float32), np.ones((cores, 2**26), np.float32)
copies = []
with ThreadPoolExecutor(cores) as pool:
    for _ in range(5):
        start = time.perf_counter()
        list(pool.map(lambda i: np.copyto(target[i], source[i]), range(cores)))
        copies.append(2 * source.nbytes / (time.perf_counter() - start))
moved = graph.edges * (4 + 4 * features) + 4 * vertices * features
for what, programs in (
    ("forward", {name: jax.jit(way) for name, way in WAYS.items()}),
    ("layer, forward and backward", {name: jax.jit(layer(way)) for name, way in WAYS.items()}),
):
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(arguments.rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(near if "by degree" in name else block, to, x))
            seconds[name].append(time.perf_counter() - start)
    for name, took in seconds.items():
        median = statistics.median(took[1:])
        of_copy = f", {moved / median / max(copies):.2f} of copy" if what == "forward" else ""
        print(f"{what}: {name}: {median * 1e3:.0f} ms{of_copy}", flush=True)
