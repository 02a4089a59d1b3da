"""One GPU in eight minutes: start, overhead of a step, predicted against measured, memory, GNN layers.

    python benchmarks/gpu.py --json gpu.json                       # eight minutes on one GPU
    python benchmarks/gpu.py --json gpu.json --parts models --continue
    python benchmarks/gpu.py --device cpu --small                  # a minute, to try the script

Every row comes from a process of its own, so no row sees memory of another. Rows are written as they
come; after an interruption `--continue` measures the missing ones. Rows that would start after
`--minutes` are left out and listed.

- start: seconds to the end of the first batch, plain Keras and `partita run`, taking turns
- step: a step of `fit`, plain Keras and `partita run`, median of epochs
- machine: `partita machine measure`, its seconds and figures; the predictions use them
- models: predicted and measured seconds of a step; predicted and allocated peak of memory
- gnn: a GCN layer with its gradients, Partita and PyTorch Geometric (where it is installed)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from overhead import SCRIPT

PARTS = ("start", "machine", "models", "gnn")
ROUNDS = 2
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The device of all rows and their sizes."""

    device: str
    """"gpu" or "cpu"."""
    is_small: bool
    seconds: float
    """Time limit of one row."""
    cache: str
    """Partita's cache folder: figures of the machine that the first rows measured."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a process."""
        platforms = {"cpu": "cpu", "gpu": "cuda"}
        return os.environ | {
            "JAX_PLATFORMS": platforms[self.device],
            "PARTITA_CACHE": self.cache,
            # Memory is allocated as it is needed, so that a peak is that of the step.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }


# ---- models


def mlp(small: bool) -> tuple[Any, int]:
    """Four dense layers, float32."""
    from keras import Input, Sequential, layers

    width = 64 if small else 4096
    hidden = [layers.Dense(width, activation="relu") for _ in range(4)]
    return Sequential([Input((width,)), *hidden]), 16 if small else 1024


def transformer(small: bool, causal: bool = True) -> tuple[Any, int]:
    """A GPT of 12 blocks, or an encoder."""
    import keras
    from keras import layers

    blocks, width, heads, words, length = (2, 32, 2, 64, 16) if small else (12, 768, 12, 32768, 512)
    tokens = keras.Input((length,), dtype="int32")
    x = layers.Embedding(words, width)(tokens)
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=causal)
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(y))
    return keras.Model(tokens, layers.Dense(words)(x)), 2 if small else 16


def encoder(small: bool) -> tuple[Any, int]:
    """Transformer blocks without a causal mask."""
    return transformer(small, causal=False)


def lstm(small: bool) -> tuple[Any, int]:
    """Two LSTM layers behind an embedding."""
    import keras
    from keras import layers

    width, length, words = (16, 8, 64) if small else (1024, 128, 8192)
    tokens = keras.Input((length,), dtype="int32")
    x = layers.LSTM(width, return_sequences=True)(layers.Embedding(words, width)(tokens))
    return keras.Model(tokens, layers.Dense(16)(layers.LSTM(width)(x))), 4 if small else 128


def recommender(small: bool) -> tuple[Any, int]:
    """Sixteen embeddings and three dense layers."""
    import keras
    from keras import layers

    rows, width = (100, 16) if small else (500_000, 1024)
    columns = [keras.Input((), dtype="int32", name=f"column{n}") for n in range(16)]
    x = layers.Concatenate()([layers.Embedding(rows, 64)(column) for column in columns])
    for _ in range(3):
        x = layers.Dense(width, activation="relu")(x)
    return keras.Model(columns, layers.Dense(2)(x)), 8 if small else 8192


def application(name: str, side: int, batch: int) -> Callable[[bool], tuple[Any, int]]:
    """A model of keras.applications."""

    def make(small: bool) -> tuple[Any, int]:
        import keras

        shape = (32, 32, 3) if small else (side, side, 3)
        network = getattr(keras.applications, name)
        return network(weights=None, input_shape=shape, classes=16), 2 if small else batch

    return make


MODELS: dict[str, tuple[Callable[[bool], tuple[Any, int]], str]] = {
    "MLP": (mlp, "float32"),
    "ResNet50": (application("ResNet50", 224, 64), "float32"),
    "GPT, bfloat16": (transformer, "mixed_bfloat16"),
    "LSTM": (lstm, "float32"),
    "MLP, bfloat16": (mlp, "mixed_bfloat16"),
    "ResNet50, bfloat16": (application("ResNet50", 224, 128), "mixed_bfloat16"),
    "encoder, bfloat16": (encoder, "mixed_bfloat16"),
    "recommender": (recommender, "float32"),
    "GPT": (transformer, "float32"),
    "EfficientNetB0, bfloat16": (application("EfficientNetB0", 224, 128), "mixed_bfloat16"),
}
"""Name -> (model and batch size, dtype policy), the most telling ones first."""
SMALL_MODELS = ("MLP", "GPT, bfloat16")


# ---- rows, each in a process of its own


def model_row(name: str, small: bool) -> Row:
    """Predicted and measured figures of a model's step on one device."""
    import jax
    import keras

    import partita
    from partita.execute.devices import at_hand, detect
    from partita.execute.measure import step_seconds
    from partita.planning import predict_plan, resolve_plan

    make, policy = MODELS[name]
    keras.config.set_dtype_policy(policy)
    with partita.abstract():
        model, batch_size = make(small)
    model.compile("adam", "mse")
    began = time.perf_counter()
    captured = partita.capture_program(model, batch_size)
    capture_seconds = time.perf_counter() - began
    plan = resolve_plan("one", captured.graph, at_hand(1))
    predicted = predict_plan(captured.graph, at_hand(1), plan)
    measured_figures = predict_plan(captured.graph, detect(1), plan)
    seconds = step_seconds(captured, {"one": plan}, rounds=3 if small else 15)["one"]
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "capture_s": capture_seconds,
        "measured_s": seconds,
        "predicted_s": predicted.seconds,
        "predicted_by_measured_figures_s": measured_figures.seconds,
        "predicted_peak_bytes": predicted.memory.peak,
        "allocated_peak_bytes": memory.get("peak_bytes_in_use"),
    }


def machine_row(name: str, small: bool) -> Row:
    """Figures of `partita machine measure`."""
    from partita.execute.calibrate import calibrate, file_of
    from partita.execute.devices import at_hand

    del name, small
    began = time.perf_counter()
    calibration = calibrate(at_hand(1), lambda subject: None)
    seconds = time.perf_counter() - began
    file_of(calibration.key).write_text(calibration.to_toml(), encoding="utf-8")
    return {"seconds": seconds, "error": calibration.error, "values": calibration.values}


def gnn_row(name: str, small: bool) -> Row:
    """Seconds of a GCN layer with its gradients in a library, and the memory it allocated."""
    library, features = name.split()
    return (
        gcn_partita(int(features), small) if library == "Partita" else gcn_pyg(int(features), small)
    )


def random_graph(small: bool) -> tuple[int, Any, Any]:
    """Vertices, sources and targets of random edges."""
    import numpy as np

    vertices, edges = (256, 2048) if small else (1 << 19, 10_485_760)
    ends = np.random.default_rng(0).integers(0, vertices, (2, edges))
    return vertices, ends[0], ends[1]


def gcn_partita(features: int, small: bool) -> Row:
    """Partita's layer."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from partita import gnn
    from partita.gnn.kernels.bridge import step_options
    from partita.gnn.nn.block import block_of

    vertices, sources, targets = random_graph(small)
    graph = gnn.Graph.from_edges(sources, targets, vertices=vertices)
    layer = gnn.GCNConv(features, use_bias=False)
    layer.build((None, features))
    block = jax.device_put(block_of(graph))
    rows = np.random.default_rng(0).standard_normal((vertices, features), dtype=np.float32)

    def loss(weight: Any, rows: Any, block: Any) -> Any:
        return jnp.sum(layer.stateless_call([weight], [], rows, graph=block)[0] ** 2)

    options = step_options()
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=options)
    weight = jnp.ones((features, features)) / features
    x = jnp.asarray(rows)
    seconds = median_seconds(lambda: jax.block_until_ready(step(weight, x, block)))
    memory = jax.devices()[0].memory_stats() or {}
    return {"seconds": seconds, "allocated_peak_bytes": memory.get("peak_bytes_in_use")}


def gcn_pyg(features: int, small: bool) -> Row:
    """PyTorch Geometric's layer over sorted edges, normalized beforehand."""
    import torch
    from torch_geometric.nn import GCNConv
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    device = "cuda" if os.environ["JAX_PLATFORMS"] == "cuda" else "cpu"
    vertices, sources, targets = random_graph(small)
    edges = torch.stack([torch.from_numpy(sources), torch.from_numpy(targets)]).to(device)
    edges, weights = gcn_norm(edges, None, vertices, add_self_loops=True)
    entries = torch.sparse_coo_tensor(edges.flip(0), weights, (vertices, vertices))
    adjacency = entries.coalesce().to_sparse_csr()
    layer = GCNConv(features, features, bias=False, normalize=False).to(device)
    x = torch.randn(vertices, features, device=device, requires_grad=True)

    def turn() -> None:
        x.grad = None
        (layer(x, adjacency) ** 2).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = median_seconds(turn)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"seconds": seconds, "allocated_peak_bytes": peak}


def median_seconds(turn: Callable[[], Any], rounds: int = 11) -> float:
    """Median seconds of a call, after two calls to warm up."""
    times = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        turn()
        times.append(time.perf_counter() - began)
    return median(times[2:])


ROWS: dict[str, Callable[[str, bool], Row]] = {
    "machine": machine_row,
    "models": model_row,
    "gnn": gnn_row,
}


# ---- the main process


def names_of(part: str, small: bool) -> list[str]:
    """The rows of a part."""
    if part == "start":
        return [f"{way} {turn}" for turn in range(1 if small else ROUNDS) for way in WAYS]
    if part == "machine":
        return ["measure"]
    if part == "models":
        return list(SMALL_MODELS if small else MODELS)
    widths = (16,) if small else (64, 128)
    return [f"{library} {features}" for features in widths for library in ("Partita", "PyG")]


WAYS = ("keras", "partita")


def start_row(name: str, setting: Setting) -> Row:
    """Seconds to the end of the first batch and of a step, by plain Keras or `partita run`."""
    script = Path(setting.cache) / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    # Epochs, steps, units, batch.
    sizes = ("2", "4", "16", "8") if setting.is_small else ("6", "100", "1024", "512")
    command = [sys.executable, str(script), "plain", *sizes]
    if name.startswith("partita"):
        run = [sys.executable, "-m", "partita", "run", "--quiet"]
        command = [*run, str(script), "--", "plain", *sizes]
    began = time.time()
    row = last_line(command, setting)
    if "error" not in row:
        row["start_s"] = row.pop("first") - began
        row["step_s"] = row.pop("step")
    return row


def last_line(command: list[str], setting: Setting) -> Row:
    """The row that a process prints last, or the reason why it did not."""
    try:
        done = subprocess.run(
            command,
            env=setting.environment,
            capture_output=True,
            text=True,
            timeout=setting.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {setting.seconds:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"error": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def row_of(part: str, name: str, setting: Setting) -> Row:
    """A row, measured in a process of its own."""
    if part == "start":
        return start_row(name, setting)
    command = [sys.executable, __file__, "--row", part, name]
    if setting.is_small:
        command.append("--small")
    return last_line(command, setting)


def text_of(row: Row) -> str:
    """A row for people."""
    parts = []
    for key, value in row.items():
        if isinstance(value, dict):
            parts += [
                f"{path.removeprefix('device.')} {number:.4g}" for path, number in value.items()
            ]
        elif isinstance(value, (int, float)) and key.endswith("bytes"):
            parts.append(f"{key} {value / 2**30:.2f} GiB")
        elif isinstance(value, float):
            parts.append(f"{key} {value:.4g}")
        else:
            parts.append(f"{key} {value}")
    return ", ".join(parts)


def summary(rows: dict[str, Row]) -> Iterator[str]:
    """Sentences about all rows."""
    for figure, title in (("start_s", "seconds to the first batch"), ("step_s", "step")):
        medians = []
        for way in WAYS:
            values = [
                r[figure] for n, r in rows.items() if n.startswith(f"start/{way}") and figure in r
            ]
            if values:
                medians.append(median(values))
        if len(medians) == 2:
            keras_value, partita_value = medians
            yield f"{title}: plain Keras {keras_value:.4g} s, Partita {partita_value:.4g} s"
    models = [
        row for name, row in rows.items() if name.startswith("models/") and "error" not in row
    ]
    for key in ("predicted_s", "predicted_by_measured_figures_s"):
        errors = [abs(row[key] / row["measured_s"] - 1) for row in models]
        if errors:
            yield f"{key}: median error {median(errors):.0%}, worst {max(errors):.0%}"
    ratios = [
        row["predicted_peak_bytes"] / row["allocated_peak_bytes"]
        for row in models
        if row["allocated_peak_bytes"]
    ]
    if ratios:
        yield (
            f"predicted / allocated peak: median {median(ratios):.2f}, "
            f"lowest {min(ratios):.2f}, highest {max(ratios):.2f}"
        )


def save(path: Path | None, rows: dict[str, Row]) -> None:
    """Writes all rows beside the file and moves them into place."""
    if path is None:
        return
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    os.replace(beside, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny sizes, two models")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--only", default="", help="rows that have this in their names")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--continue", action="store_true", dest="goes_on", help="keep its rows")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        part, name = given.row
        print(json.dumps(ROWS[part](name, given.small)))
        return 0
    rows: dict[str, Row] = {}
    if given.goes_on and given.json and given.json.is_file():
        rows = json.loads(given.json.read_text(encoding="utf-8"))
    wanted = []
    for part in given.parts.split(","):
        wanted += [(part, name) for name in names_of(part, given.small) if given.only in name]
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as cache, contextlib.suppress(KeyboardInterrupt):
        for part, name in wanted:
            key = f"{part}/{name}"
            if key in rows and "error" not in rows[key]:
                continue
            left = end - time.monotonic()
            if left <= 0:
                print(f"{key}: left out, {given.minutes:g} minutes are over")
                continue
            setting = Setting(given.device, given.small, left, cache)
            rows[key] = row_of(part, name, setting)
            save(given.json, rows)
            print(f"{key:32} {text_of(rows[key])}", flush=True)
    for sentence in summary(rows):
        print(sentence)
    # PyTorch Geometric need not be installed.
    failed = [key for key, row in rows.items() if "error" in row and "/PyG" not in key]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
