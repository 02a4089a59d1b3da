r"""A GCN layer, forward and backward, against PyTorch Geometric (edge_index and CSR) and DGL.

    python -m venv peers
    peers/bin/pip install torch torch_geometric numpy scipy networkx requests tqdm psutil \
        pandas pydantic pyyaml packaging
    peers/bin/pip install --no-deps dgl==2.1.0
    partita gnn generate rmat --scale 19 --edges 10523921 -o graph.lux
    python benchmarks/gnn_peers.py graph.lux --python peers/bin/python --features 64 128

Every library runs in a process of its own with all cores, and they take turns. A turn computes the
layer's result and the gradients in its input and its weight. Normalization is computed beforehand,
with a self edge at every vertex. Times are medians. DGL is left out if it is not installed; its
graphbolt, which loads data and needs old versions of torch, is not used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBRARIES = {
    "partita": "Partita",
    "relabelled": "Partita, vertices by degree",
    "edge_index": "PyG, edge_index",
    "csr": "PyG, CSR",
    "dgl": "DGL",
}
PARTITA = ("partita", "relabelled")


# ------------------------------------------------------------------------- in the library's process


def serve(turn: Callable[[], float]) -> None:
    """Takes a turn for every line of input; prints its seconds and its loss."""
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = turn()
        print(json.dumps([time.perf_counter() - began, loss]), flush=True)


def serve_partita(folder: Path, features: int, relabelled: bool) -> None:
    """Partita's layer, compiled.

    `relabelled`: the most read vertices first, and their features, as `fit(order="degree")` does
    beforehand.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import partita.gnn as gnn
    from partita.execute.devices import keep_freed_memory
    from partita.gnn.kernels.bridge import step_options
    from partita.gnn.nn.block import block_of

    keep_freed_memory()
    graph = gnn.Graph(np.load(folder / "offsets.npy"), np.load(folder / "sources.npy"))
    x = np.load(folder / "x.npy")
    if relabelled:
        order = gnn.order.by_degree(graph)
        graph = graph.relabelled(order)
        x = x[order]
    x, w = jax.device_put((x, np.load(folder / "w.npy")))
    layer = gnn.GCNConv(features, use_bias=False)
    layer.build((None, features))
    block = jax.device_put(block_of(graph))

    def loss(w: Any, x: Any, block: Any) -> Any:
        return jnp.sum(layer.stateless_call([w], [], x, graph=block)[0] ** 2)

    gradients = jax.value_and_grad(loss, argnums=(0, 1))
    step = jax.jit(gradients, compiler_options=step_options())
    serve(lambda: float(jax.block_until_ready(step(w, x, block))[0]))


def serve_peer(folder: Path, features: int, library: str) -> None:
    """A layer of PyG or DGL, its normalization computed beforehand."""
    import numpy as np
    import torch
    from torch_geometric.nn import GCNConv
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    offsets = np.load(folder / "offsets.npy")
    sources = np.load(folder / "sources.npy").astype(np.int64)
    vertices = len(offsets) - 1
    targets = np.repeat(np.arange(vertices), np.diff(offsets))
    edges = torch.from_numpy(np.stack([sources, targets]))
    x = torch.from_numpy(np.load(folder / "x.npy")).requires_grad_()
    w = torch.from_numpy(np.load(folder / "w.npy"))
    layer = GCNConv(features, features, bias=False, normalize=False)
    layer.lin.weight = torch.nn.Parameter(w.T.contiguous())
    edges, weight = gcn_norm(edges, None, vertices, add_self_loops=True)
    if library == "dgl":
        convolution = dgl_convolution(edges, features)
        scale = torch.bincount(edges[1]).clamp(min=1).rsqrt()[:, None]
        run = lambda: convolution(x * scale, layer.lin.weight.T) * scale
    elif library == "csr":
        entries = torch.sparse_coo_tensor(edges.flip(0), weight, (vertices, vertices))
        adjacency = entries.to_sparse_csr()
        run = lambda: layer(x, adjacency)
    else:
        run = lambda: layer(x, edges, weight)

    def turn() -> float:
        x.grad = None
        layer.lin.weight.grad = None
        loss = (run() ** 2).sum()
        loss.backward()
        return float(loss.detach())

    serve(turn)


def dgl_convolution(edges: Any, features: int) -> Callable[[Any, Any], Any]:
    """DGL's layer without normalization over these edges: a function of rows and the matrix."""
    import types

    class Unused(types.ModuleType):
        def __getattr__(self, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return object

    sys.modules["dgl.graphbolt"] = Unused("dgl.graphbolt")
    try:
        import dgl
        from dgl.nn.pytorch import GraphConv
    except ImportError:
        print("missing", flush=True)
        sys.exit()
    graph = dgl.graph((edges[0], edges[1]))
    layer = GraphConv(features, features, norm="none", weight=False, bias=False)
    return lambda x, weight: layer(graph, x, weight=weight)


# ------------------------------------------------------------------------- in the main process


class Library:
    """A library that waits in its own process for turns."""

    def __init__(self, name: str, python: str, folder: Path, features: int) -> None:
        self.title = LIBRARIES[name]
        self.seconds: list[float] = []
        self.loss = 0.0
        options = ["--library", name, "--folder", str(folder), "--features", str(features)]
        environment = dict(os.environ)
        if name not in PARTITA:
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [sys.executable if name in PARTITA else python, __file__, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def is_ready(self) -> bool:
        """Waits until the library has started; False if it is not installed."""
        for line in self.process.stdout:
            if line.strip() in ("ready", "missing"):
                return line.strip() == "ready"
        sys.exit(f"{self.title} did not start.")

    def take_turn(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        seconds, self.loss = json.loads(self.process.stdout.readline())
        self.seconds.append(seconds)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    @property
    def median(self) -> float:
        """Median seconds, without the first turn."""
        return statistics.median(self.seconds[1:])


def save_arrays(graph: Any, features: int, folder: Path) -> None:
    """Writes the graph, rows and a matrix for all libraries."""
    import numpy as np

    random = np.random.default_rng(0)
    x = random.standard_normal((graph.vertices, features), dtype=np.float32)
    w = random.standard_normal((features, features), dtype=np.float32) / features
    arrays = {"offsets": graph.offsets, "sources": graph.sources, "x": x, "w": w}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def compare(graph: Any, features: int, python: str, rounds: int) -> None:
    """Prints the median time of every library for layers of some features."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_arrays(graph, features, folder)
        libraries = []
        for library in [Library(name, python, folder, features) for name in LIBRARIES]:
            if library.is_ready():
                libraries.append(library)
            else:
                print(f"{library.title} is not installed there")
        for _ in range(rounds + 1):
            for library in libraries:
                library.take_turn()
        for library in libraries:
            library.close()
    for library in libraries:
        ratio = library.median / libraries[0].median
        note = "" if library is libraries[0] else f", {ratio:.1f} times Partita's"
        time_text = f"{library.median * 1e3:8.1f} ms{note}"
        print(
            f"{features} features, {library.title:27} {time_text}; loss {library.loss:.6g}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graph", nargs="?")
    parser.add_argument("--python", help="the interpreter that has the peers")
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--library", choices=list(LIBRARIES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.library in PARTITA:
        relabelled = arguments.library == "relabelled"
        serve_partita(arguments.folder, arguments.features[0], relabelled)
    elif arguments.library:
        serve_peer(arguments.folder, arguments.features[0], arguments.library)
    else:
        import partita.gnn as gnn

        graph = gnn.open(arguments.graph)
        print(f"{graph}, {os.cpu_count()} cores")
        for features in arguments.features:
            compare(graph, features, arguments.python, arguments.rounds)


if __name__ == "__main__":
    main()
