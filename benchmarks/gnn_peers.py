"""A GCN layer, forward and backward, against PyTorch Geometric by edge_index and by CSR, and against DGL, in turns on one machine.

    python -m venv peers && peers/bin/pip install torch torch_geometric numpy scipy networkx requests tqdm psutil pandas pydantic pyyaml packaging
    peers/bin/pip install --no-deps dgl==2.1.0
    partita gnn generate rmat --scale 19 --edges 10523921 -o graph.lux
    python benchmarks/gnn_peers.py graph.lux --python peers/bin/python --features 64 128

Every library runs in a process of its own and waits for its turn. A turn: the layer's result and the gradients in its input and its weight, with
normalisation known beforehand and an edge to every vertex itself. Medians; all cores each. DGL is left out where it is not installed; its
graphbolt, which loads data and goes with old versions of torch only, is not used.
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
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("graph", nargs="?")
parser.add_argument("--python", help="the interpreter that has the peers")
parser.add_argument("--features", type=int, nargs="+", default=[64, 128])
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument(
    "--way", choices=["partita", "relabelled", "edge_index", "csr", "dgl"], help=argparse.SUPPRESS
)
parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
arguments = parser.parse_args()
WAYS = {
    "partita": "Partita",
    "relabelled": "Partita, vertices by degree",
    "edge_index": "PyG, edge_index",
    "csr": "PyG, CSR",
    "dgl": "DGL",
}
OURS = ("partita", "relabelled")


def serve(turn) -> None:  # noqa: ANN001
    """Takes a turn for every line that comes, and says what it took and what came out."""
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        total = turn()
        print(json.dumps([time.perf_counter() - began, total]), flush=True)


def ours(folder: Path, features: int, relabelled: bool) -> None:
    """Partita's layer, compiled; `relabelled`: the vertices most read first, their features too, which is done beforehand as for `fit(order="degree")`."""
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import jax.numpy as jnp
    import numpy as np

    import partita.gnn as gnn
    from partita.execute.devices import keep_freed_memory
    from partita.gnn.kernels.bridge import step_options
    from partita.gnn.nn.block import block_of
    from partita.gnn.nn.layers import GCNConv

    keep_freed_memory()
    graph = gnn.Graph(np.load(folder / "offsets.npy"), np.load(folder / "sources.npy"))
    x, w = (np.load(folder / name) for name in ("x.npy", "w.npy"))
    if relabelled:
        order = gnn.order.by_degree(graph)
        graph, x = graph.relabelled(order), x[order]
    x, w = jax.device_put((x, w))
    layer = GCNConv(features, use_bias=False)
    layer.build((None, features))
    block = jax.device_put(block_of(graph))
    loss = lambda w, x, block: jnp.sum(layer.stateless_call([w], [], x, graph=block)[0] ** 2)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=step_options())
    serve(lambda: float(jax.block_until_ready(step(w, x, block))[0]))


def theirs(folder: Path, features: int, way: str) -> None:
    """A layer of PyG or DGL, its normalisation cached."""
    import numpy as np
    import torch
    from torch_geometric.nn import GCNConv
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    offsets, sources = (
        np.load(folder / "offsets.npy"),
        np.load(folder / "sources.npy").astype(np.int64),
    )
    targets = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    edges = torch.from_numpy(np.stack([sources, targets]))
    layer = GCNConv(features, features, bias=False, normalize=False)
    x, w = (
        torch.from_numpy(np.load(folder / name)).requires_grad_() for name in ("x.npy", "w.npy")
    )
    layer.lin.weight = torch.nn.Parameter(w.detach().T.contiguous())
    edges, weight = gcn_norm(edges, None, len(offsets) - 1, add_self_loops=True)
    if way == "dgl":
        convolution, scale = (
            dgls(edges, features),
            torch.bincount(edges[1]).clamp(min=1).rsqrt()[:, None],
        )
        run = lambda: convolution(x * scale, layer.lin.weight.T) * scale
    elif way == "csr":
        adjacency = torch.sparse_coo_tensor(
            edges.flip(0), weight, (len(offsets) - 1,) * 2
        ).to_sparse_csr()
        run = lambda: layer(x, adjacency)
    else:
        run = lambda: layer(x, edges, weight)

    def turn() -> float:
        x.grad = layer.lin.weight.grad = None
        loss = (run() ** 2).sum()
        loss.backward()
        return float(loss.detach())

    serve(turn)


def dgls(edges, features: int):  # noqa: ANN001, ANN201
    """DGL's layer without normalisation over these edges, as a function of rows and the matrix."""
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
    graph, layer = (
        dgl.graph((edges[0], edges[1])),
        GraphConv(features, features, norm="none", weight=False, bias=False),
    )
    return lambda x, weight: layer(graph, x, weight=weight)


def main() -> int:
    if arguments.way:
        features = arguments.features[0]
        if arguments.way in OURS:
            ours(arguments.folder, features, arguments.way == "relabelled")
        else:
            theirs(arguments.folder, features, arguments.way)
        return 0
    import numpy as np

    import partita.gnn as gnn

    graph = gnn.open(arguments.graph)
    print(f"{graph}, {os.cpu_count()} cores")
    for features in arguments.features:
        with tempfile.TemporaryDirectory() as name:
            folder, random = Path(name), np.random.default_rng(0)
            np.save(folder / "offsets.npy", graph.offsets)
            np.save(folder / "sources.npy", graph.sources)
            np.save(
                folder / "x.npy",
                random.standard_normal((graph.vertices, features), dtype=np.float32),
            )
            np.save(
                folder / "w.npy",
                random.standard_normal((features, features), dtype=np.float32) / features,
            )
            running = {
                way: subprocess.Popen(
                    [
                        sys.executable if way in OURS else arguments.python,
                        __file__,
                        "--way",
                        way,
                        "--folder",
                        name,
                        "--features",
                        str(features),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={k: v for k, v in os.environ.items() if way in OURS or k != "PYTHONPATH"},
                )
                for way in WAYS
            }
            for way, job in list(running.items()):
                said = next(
                    (line.strip() for line in job.stdout if line.strip() in ("ready", "missing")),
                    "",
                )
                if said == "missing":
                    print(f"{WAYS[way]} is not installed there")
                    del running[way]
                elif said != "ready":
                    sys.exit(f"{WAYS[way]} did not start.")
            seconds: dict[str, list[float]] = {way: [] for way in running}
            losses: dict[str, float] = {}
            for _ in range(arguments.rounds + 1):
                for way, job in running.items():
                    job.stdin.write("go\n")
                    job.stdin.flush()
                    took, losses[way] = json.loads(job.stdout.readline())
                    seconds[way].append(took)
            for job in running.values():
                job.stdin.close()
                job.wait()
        medians = {way: statistics.median(took[1:]) for way, took in seconds.items()}
        for way in medians:
            label = WAYS[way]
            ratio = (
                ""
                if way == "partita"
                else f", {medians[way] / medians['partita']:.1f} times Partita's"
            )
            print(
                f"{features} features, {label:27} {medians[way] * 1e3:8.1f} ms{ratio}; loss {losses[way]:.6g}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
