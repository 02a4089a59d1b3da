"""Damaged files of every kind: tracebacks, hangs, files that read as something else, lost files.

    python benchmarks/damaged_files.py                      # 3,000 files, seed 0
    python benchmarks/damaged_files.py --files 200 --seed 7 --kinds plan,npz
    python benchmarks/damaged_files.py --files 200 --kinds "checkpoint of two processes"

A file is written, damaged (cut, bits flipped, bytes replaced, tokens inserted, values exchanged),
and read. The reader must raise a PartitaError of one line, or return a right value. Kinds with a
checksum have one right value, the written one. Kinds without (people edit them) have the value that
another reader gives, written here with the standard library alone. Parquet files are read with
pyarrow, and checkpoints with Orbax, if these are installed.

Then every writer is stopped by a full disk at a random byte; the old file must be as it was.
"""

from __future__ import annotations

import argparse
import atexit
import gzip
import importlib.util
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import partita
from partita import gnn
from partita.capture.program import capture_program
from partita.cli.files import save_page, save_text
from partita.errors import PartitaError
from partita.execute import calibrate, operators
from partita.execute.devices import at_hand
from partita.files.checksums import with_checksum
from partita.graph.operator_graph import Instruction, OperatorGraph, Rule
from partita.machine import load
from partita.planning import best_plan, resolve_plan
from partita.plans.plan import Plan
from partita.report.trace import trace
from partita.simulation.simulate import simulate

CPU_SECONDS = 20
"""CPU time after which reading one file counts as a hang."""
PAIR_SECONDS = 120
"""Time after which two processes that restore one checkpoint count as hanging."""
LONGEST = 600
"""Characters of the longest message that counts as one sentence."""
TOKENS = (
    b"null", b"-1", b"1e999", b"9" * 5000, b"[", b"{}", b'"x"', b"true", b"[[[]]]", b"\xff", b"NaN",
    b"\xef\xbb\xbf", b"+", b"\x00", b"\r", b"0x1", b"1_0", "\u0661".encode(), b"\\ud800", b"-0",
    b"#", b"1e-400", b"[" * 5000, b"18446744073709551616", b" ", b"\n", b",", b"'",
)  # fmt: skip
BACKEND = {
    "reduce_scatter": True,
    "overlap": {"value": 0.0, "source": "set in code", "status": "assumed"},
    "promotes_16_bit_all_reduce": False,
    "float32_products": "float32",
    "dense_grouped_gradients": False,
    "recomputes": False,
    "transposed_copies": False,
    "platform": "",
    "compute_capability": "",
    "combines": True,
}
"""The defaults of the keys of a machine file's `[backend]`."""
VALUES = (None, True, -1, 0, 2**63, 1e308, "", "x", [], {}, [[]], "\ud800", 0.5, "a" * 200)
"""Values that replace one of a JSON file."""

Files = dict[str, bytes]
"""Content by path in a folder; the first path is the one that is opened."""


class Hang(BaseException):
    """Reading has taken CPU_SECONDS."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: an example, its reader, and the right value of a damaged one."""

    files: Files
    read: Callable[[Path], Any]
    """The plain value of a file, to be compared."""
    right: Callable[[Files], Any] | None = None
    """The value by another reader, None for an invalid file; without it, the written value."""


# ------------------------------------------------------------------------------- kinds of files


@cache
def _graph() -> OperatorGraph:
    layers = keras.layers
    model = keras.Sequential([keras.Input((8,)), layers.Dense(16, name="a"), layers.Dense(4)])
    model.compile("adam", "mse")
    return capture_program(model, 8).graph


def _of_written(value: Any, ending: str, read: Callable[[Path], Any], right: Any = None) -> Kind:
    """The kind of a value with a method `save`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{ending}"
        value.save(path)
        return Kind({path.name: path.read_bytes()}, read, right)


def _plan() -> Kind:
    plan = best_plan(_graph(), load("h100:4"))
    fsdp = resolve_plan("fsdp", _graph(), load("h100:4"))
    storage = replace(plan, mesh=fsdp.mesh, choices=fsdp.choices, storage=fsdp.storage)
    return _of_written(storage, ".json", _read_plan, _right_plan)


def _read_plan(path: Path) -> Any:
    plan = Plan.load(path)
    with_reasons = json.dumps(plan.to_json(), sort_keys=True)
    resolve_plan(plan, _graph(), load("h100:4"))
    return _without_defaults(json.loads(with_reasons))


def _right_plan(files: Files) -> Any:
    return _without_defaults(_parsed_json(files))


def _parsed_json(files: Files) -> Any:
    """The value of a JSON file by the standard library; None for another file."""
    (content,) = files.values()
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _without_defaults(value: Any) -> Any:
    """A plan's plain value without the fields that say nothing, choices as mappings."""
    if type(value) is not dict:
        return value
    plan = {name: item for name, item in value.items() if item not in ("", 0, [], {}, ())}
    if plan.get("microbatches") == 1:
        del plan["microbatches"]
    plan.pop("schedule", None)
    if type(plan.get("operators")) is dict:
        plan["operators"] = {
            name: sorted(_axes_of(choice)) for name, choice in plan["operators"].items()
        }
    if type(plan.get("mesh")) is dict:
        plan["mesh"] = {name: {"level": 0, **axis} for name, axis in plan["mesh"].items()}
    return plan


def _axes_of(choice: str) -> Iterator[tuple[str, str]]:
    """(axis, factor) pairs of a choice."""
    for part in choice.split():
        factor, _, axes = part.partition(":")
        yield from ((axis, factor) for axis in axes.split(",") if axis)


def _operator_graph() -> Kind:
    return _of_written(_graph(), ".json", lambda path: OperatorGraph.load(path).to_json())


def _old_operator_graph() -> Kind:
    """A graph without checksum, as older versions wrote it."""
    content = json.dumps(_graph().to_json()).encode()

    def read(path: Path) -> Any:
        graph = OperatorGraph.load(path)
        best_plan(graph, load("h100:2"))
        return graph.to_json()

    return Kind({"old.json": content}, read, _right_graph)


def _right_graph(files: Files) -> Any:
    value = _parsed_json(files)
    if type(value) is not dict or type(value.get("graph")) is not list:
        return value
    # Fields with a default may be missing at the end.
    graph = _completed(value["graph"], OperatorGraph)
    number = [field.name for field in fields(OperatorGraph)].index("instructions")
    graph[number] = [_completed_instruction(values) for values in graph[number]]
    return {**value, "graph": graph}


def _completed_instruction(values: list[Any]) -> list[Any]:
    """The fields of a saved instruction, those of its rule too."""
    instruction = _completed(values, Instruction)
    number = [field.name for field in fields(Instruction)].index("rule")
    if instruction[number] is not None:
        instruction[number] = _completed(instruction[number], Rule)
    return instruction


def _completed(values: list[Any], cls: Any) -> list[Any]:
    """The fields of a saved dataclass with the defaults of those that are missing."""
    missing = fields(cls)[len(values) :]
    return [*values, *(field.default for field in missing)]


def _machine() -> Kind:
    content = load("h100:4").to_toml().encode()
    return Kind({"file.toml": content}, _read_machine, _right_machine)


def _read_machine(path: Path) -> Any:
    machine = load(path)
    again = tomllib.loads(machine.to_toml())
    best_plan(_graph(), machine)
    return _quantities(again)


def _right_machine(files: Files) -> Any:
    (content,) = files.values()
    try:
        value = tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    backend = value.get("backend", {})
    if type(backend) is dict:
        value["backend"] = {**BACKEND, **backend}
    for domain in value.get("domain", {}).values():
        domain.setdefault("members", "")
    return _quantities(value)


def _quantities(value: Any) -> Any:
    """A machine's plain value with quantities as numbers of base units, to 5 digits."""
    if type(value) is dict:
        return {name: _quantities(item) for name, item in sorted(value.items())}
    if type(value) is list:
        return [_quantities(item) for item in value]
    if type(value) in (int, float):
        return f"{value:.5g}"
    if type(value) is str and (parts := re.fullmatch(r"\s*([\d.eE+-]+)\s*(\S+)\s*", value)):
        return _quantity(*parts.groups())
    return value


def _quantity(digits: str, unit: str) -> str:
    """A number with its unit's prefix multiplied in: ("2", "GB/s") -> "2e+09 B/s"."""
    prefixes = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "m": 1e-3, "u": 1e-6}
    prefixes |= {"n": 1e-9, "p": 1e-12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
    match = re.fullmatch(
        r"(Ki|Mi|Gi|Ti|[kMGTPmunp])?(B|B/s|s|FLOP/s|FLOPs|W|Hz|J|pJ/bit|J/bit)", unit
    )
    try:
        number = float(digits)
    except ValueError:
        return f"{digits} {unit}"
    if match is None:
        return f"{number:.5g} {unit}"
    return f"{number * prefixes.get(match[1] or '', 1.0):.5g} {match[2]}"


def _calibration() -> Kind:
    machine = at_hand(1)
    values = {path: 1e9 for path in machine.provenance() if path.endswith(".peak")}
    measured = (calibrate.Measured("dot", "16 x 16", 1e-3, 1e9),)
    content = calibrate.Calibration(calibrate.key_of(1), values, measured, 0.1).to_toml()
    name = calibrate.file_of(calibrate.key_of(1)).name

    def read(path: Path) -> Any:
        with _cache(path.parent):
            return calibrate.calibrated(machine, 1).to_toml()

    return Kind({name: content.encode()}, read)


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    before = os.environ.get("PARTITA_CACHE")
    os.environ["PARTITA_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PARTITA_CACHE"]
        else:
            os.environ["PARTITA_CACHE"] = before


def _operator_times() -> Kind:
    key = {"host": "a", "devices": 2}
    record = {"model": "m", "operator": "a", "digest": "d", "seconds": 0.5, "features": {"f": 1.0}}
    times = {"key": key, "operators": {"d": record, "e": {**record, "seconds": 0.25}}}
    content = json.dumps(with_checksum(times)).encode()
    return Kind({"operators.json": content}, lambda path: operators.load(path, key))


def _example_graph(weighted: bool = True, masks: bool = True) -> gnn.Graph:
    generator = np.random.default_rng(0)
    options: dict[str, Any] = {}
    if weighted:
        options["weights"] = generator.random(60, dtype="float32")
    if masks:
        options |= {"train": np.arange(20) < 9, "test": np.arange(20) > 12}
    return gnn.Graph.from_edges(
        *generator.integers(0, 20, (2, 60)),
        20,
        features=generator.random((20, 3), dtype="float32"),
        labels=np.arange(20) % 3,
        **options,
    )


def _read_graph(path: Path) -> Any:
    """The arrays of a graph; the name is that of the file."""
    graph = gnn.open(path)
    names = ("offsets", "sources", "features", "labels", "train", "validation", "test", "weights")
    arrays = {name: getattr(graph, name) for name in names}
    return {name: array.tolist() for name, array in arrays.items() if array is not None}


def _npz() -> Kind:
    return _graph_kind(_example_graph(), "file.npz")


def _graph_kind(graph: gnn.Graph, name: str, right: Any = None) -> Kind:
    with tempfile.TemporaryDirectory() as folder:
        gnn.save(graph, Path(folder) / name)
        files = {name: (Path(folder) / name).read_bytes()}
        files |= {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        return Kind(files, _read_graph, right)


def _planetoid() -> Kind:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.npz"
        edges = np.array([0, 1, 2, 3, 3]), np.array([1, 2, 0, 0, 1])
        tables = {"label": np.array([0, 1, 0, 1]), "train": np.array([0, 2])}
        np.savez_compressed(path, source=edges[0], target=edges[1], **tables)
        return Kind({path.name: path.read_bytes()}, _read_graph)


def _lux() -> Kind:
    return _graph_kind(_example_graph(), "file.lux", _right_lux)


def _right_lux(files: Files) -> Any:
    """The arrays of a .lux file and its companions, by their layout."""
    content = files["file.lux"]
    vertices = int.from_bytes(content[:4], "little")
    if len(content) < 12 + 8 * vertices:
        return None
    offsets = [0, *np.frombuffer(content, "<i8", vertices, 12).tolist()]
    value: Any = {
        "offsets": offsets,
        "sources": np.frombuffer(content, "<i4", -1, 12 + 8 * vertices),
    }
    types = {"feats": "<f4", "label": "<i4", "train": "?", "validation": "?", "test": "?"}
    names = {"feats": "features", "label": "labels"}
    for stem, dtype in {**types, "weights": "<f4"}.items():
        data = files.get(f"file.{stem}.bin")
        if data is not None:
            value[names.get(stem, stem)] = np.frombuffer(data, dtype)
    value["features"] = value["features"].reshape(vertices, -1)
    return {name: np.asarray(array).tolist() for name, array in value.items()}


TEXT = b"# edges\n0 1 0.5\n1\t2\t1\n+2,0,3e-1\n3 ; 1 ; 2.\n\n// end\n4 0 -1\n"


def _text() -> Kind:
    return Kind({"file.txt": TEXT}, _read_edges, _right_edges)


def _header() -> Kind:
    marked = b"\xef\xbb\xbfsource,target\r\n0,1\r\n1,2\r\n+12,0\r\n7,7\r\n"
    return Kind({"file.csv": marked}, _read_edges, _right_edges)


def _text_gz() -> Kind:
    return Kind({"file.txt.gz": gzip.compress(TEXT, mtime=0)}, _read_edges)


def _read_edges(path: Path) -> Any:
    graph = gnn.open(path)
    targets = np.repeat(np.arange(graph.vertices), np.diff(graph.offsets))
    weights = np.ones(graph.edges) if graph.weights is None else graph.weights
    edges = zip(graph.sources.tolist(), targets.tolist(), weights.tolist(), strict=True)
    return sorted((source, target, f"{weight:.5g}") for source, target, weight in edges)


def _right_edges(files: Files) -> Any:
    """The edges of a text, read line by line; None for a line that is no edge."""
    (content,) = files.values()
    edges = []
    for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        words = re.sub(rb"[ \t\r,;]+", b" ", line).split(b" ")
        words = [word for word in words if word]
        if not words or re.match(rb"#|%|//", words[0]):
            continue
        if not edges and re.match(rb"[A-Za-z_\"']", words[0]):
            continue
        if not 2 <= len(words) <= 3 or not all(re.fullmatch(rb"\+?\d+", w) for w in words[:2]):
            return None
        try:
            weight = float(words[2]) if len(words) > 2 else 1.0
        except ValueError:
            return None
        edges.append((int(words[0]), int(words[1]), f"{np.float32(weight):.5g}"))
    return sorted(edges)


def _ogb() -> Kind:
    lines = {
        "raw/edge.csv.gz": b"0,1\n1,2\n2,0\n3,1\n",
        "raw/num-node-list.csv.gz": b"4\n",
        "raw/node-feat.csv.gz": b"0.5,1\n1,2\n3,4\n5,6.25\n",
        "raw/node-label.csv.gz": b"0\n1\n0\n1\n",
        "split/time/train.csv.gz": b"0\n1\n",
        "split/time/valid.csv.gz": b"2\n",
        "split/time/test.csv.gz": b"3\n",
    }
    files = {path: gzip.compress(content, mtime=0) for path, content in lines.items()}
    return Kind(files, lambda path: _read_graph(path.parent.parent))


def _ogb_npz() -> Kind:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        label = Path(folder) / "node-label.npz"
        edges = np.array([[0, 1, 2, 3], [1, 2, 0, 1]])
        features = np.ones((4, 2), "float32")
        np.savez(data, edge_index=edges, num_nodes_list=np.array([4]), node_feat=features)
        np.savez(label, node_label=np.array([[0], [1], [0], [1]]))
        files = {f"raw/{path.name}": path.read_bytes() for path in (data, label)}
    return Kind(files, lambda path: _read_graph(path.parent.parent))


def _parquet() -> Kind:
    import pyarrow
    import pyarrow.parquet

    columns = {"source": list(range(50)), "target": [0, 3] * 25, "weight": [0.5, 1.5] * 25}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.parquet"
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, path, write_page_checksum=True)
        return Kind({path.name: path.read_bytes()}, _read_edges)


def _checkpoint() -> Kind:
    """The checkpoint after two epochs, read by a callback of a model with other weights."""
    with tempfile.TemporaryDirectory() as folder:
        model = _small_model()
        x = np.random.default_rng(0).random((8, 8), dtype="float32")
        checkpoint = partita.Checkpoint(Path(folder) / "run", keep=1)
        model.fit(x, x[:, :2], epochs=1, verbose=0, callbacks=[checkpoint])
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    first = next(name for name in files if "/state/" in name)
    return Kind({first: files.pop(first), **files}, _read_checkpoint)


@cache
def _small_model() -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def _read_checkpoint(path: Path) -> Any:
    model = _small_model()
    variables = [*model.variables, *model.optimizer.variables]
    for variable in variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    folder = next(parent for parent in path.parents if parent.name == "run")
    checkpoint = partita.Checkpoint(folder)
    checkpoint.set_model(model)
    checkpoint.on_train_begin()
    values = [np.asarray(variable.value).tolist() for variable in variables]
    return [values, checkpoint._order_seed if model._initial_epoch else 0]


def _pair_checkpoint() -> Kind:
    """The checkpoint that two processes write, each its parts; two processes restore it."""
    pair = _pair()
    folder = pair.folder / "written"
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    first = next(name for name in files if "/state/" in name)
    return Kind({first: files.pop(first), **files}, _read_by_pair)


@dataclass
class _Pair:
    """Two processes of `partita run` that restore checkpoints on request."""

    folder: Path
    """Requests and answers, numbered, and the checkpoint that the pair wrote at first."""
    job: subprocess.Popen[bytes]
    requests: int = 0

    def answers(self, path: Path) -> list[Any]:
        """The answer of each process to a checkpoint; Hang if they are silent."""
        number = self.requests
        self.requests += 1
        save_text(json.dumps(str(path)), self.folder / f"{number}.request", "request")
        places = [self.folder / f"{number}.{process}" for process in range(2)]
        end = time.monotonic() + PAIR_SECONDS
        while not all(place.exists() for place in places):
            if time.monotonic() > end or self.job.poll() is not None:
                _pair.cache_clear()
                self.job.terminate()
                raise Hang
            time.sleep(0.01)
        return [json.loads(place.read_text()) for place in places]


@cache
def _pair() -> _Pair:
    """A pair of processes; its answer to request 0 says that its own checkpoint is written."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "partita", "run", "--processes", "2", "--devices", "2"]
    command += ["--quiet", "--plan", "zero-3", __file__, "--serve", str(folder)]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(job.terminate)
    pair = _Pair(folder, job)
    pair.answers(folder / "written" / "run" / "0")
    return pair


def _read_by_pair(path: Path) -> Any:
    """The value that both processes restore, or the error that both raise."""
    first, second = _pair().answers(path)
    if first.keys() != second.keys():
        raise AssertionError(f"process 0: {first}, process 1: {second}")
    if "refused" in first:
        raise PartitaError(max(first["refused"], second["refused"], key=len))
    if "error" in first:
        raise AssertionError(first["error"])
    return [first["value"], second["value"]]


def serve(folder: Path) -> None:
    """One of a pair: trains an epoch with a checkpoint, then restores those that are requested."""
    me = os.environ["JAX_PROCESS_ID"]
    x = np.random.default_rng(0).random((8, 8), dtype="float32")
    checkpoint = partita.Checkpoint(folder / "written" / "run", keep=1)
    _small_model().fit(x, x[:, :2], epochs=1, verbose=0, callbacks=[checkpoint])
    for number in itertools.count():
        request = folder / f"{number}.request"
        while not request.exists():
            time.sleep(0.01)
        try:
            answer = {"value": _read_checkpoint(Path(json.loads(request.read_text())))}
        except PartitaError as error:
            answer = {"refused": str(error)}
        except Exception as error:  # any other error is the finding
            answer = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        save_text(json.dumps(answer), folder / f"{number}.{me}", "answer")


KINDS: dict[str, Callable[[], Kind]] = {
    "plan": _plan,
    "machine": _machine,
    "operator graph": _operator_graph,
    "old operator graph": _old_operator_graph,
    "calibration": _calibration,
    "operator times": _operator_times,
    "npz": _npz,
    "planetoid": _planetoid,
    "lux": _lux,
    "text": _text,
    "text with header": _header,
    "text.gz": _text_gz,
    "ogb": _ogb,
    "ogb npz": _ogb_npz,
    "parquet": _parquet,
    "checkpoint": _checkpoint,
    "checkpoint of two processes": _pair_checkpoint,
}
NEEDS = {"parquet": "pyarrow", "checkpoint": "orbax", "checkpoint of two processes": "orbax"}
"""Kinds that need a package that may be absent."""
ON_REQUEST = ("checkpoint of two processes",)
"""Kinds that are examined only if they are named: they start processes."""


# -------------------------------------------------------------------------------------- damage


def damaged(files: Files, generator: random.Random) -> Files:
    """The files with one of them damaged in 1 to 5 places, or replaced, or missing."""
    name = generator.choice(list(files))
    content = files[name]
    if generator.random() < 0.3 and (exchanged := _exchanged(content, generator)) is not None:
        return {**files, name: exchanged}
    for _ in range(generator.choice([1, 1, 1, 2, 5])):
        content = _damaged_once(content, generator)
    return {**files, name: content}


def _damaged_once(content: bytes, generator: random.Random) -> bytes:
    position = generator.randrange(len(content) + 1)
    length = generator.choice([1, 2, 4, 8, 64])
    kind = generator.choice(["cut", "flip", "flip", "token", "token", "remove", "repeat", "zero"])
    if kind == "cut":
        return content[:position]
    if kind == "flip" and position < len(content):
        flipped = content[position] ^ 1 << generator.randrange(8)
        return content[:position] + bytes([flipped]) + content[position + 1 :]
    if kind == "token":
        end = position + generator.randrange(8)
        return content[:position] + generator.choice(TOKENS) + content[end:]
    if kind == "remove":
        return content[:position] + content[position + length :]
    if kind == "repeat":
        return content[: position + length] + content[position:]
    return content[:position] + bytes(length) + content[position + length :]


def _exchanged(content: bytes, generator: random.Random) -> bytes | None:
    """A JSON file with one value exchanged, removed or nested; None for another file."""
    try:
        value = json.loads(content)
    except ValueError:
        return None
    places = list(_places(value))
    if not places:
        return None
    holder, key = generator.choice(places)
    kind = generator.choice(["value", "value", "remove", "nest", "swap"])
    if kind == "remove":
        del holder[key]
    elif kind == "nest":
        holder[key] = [holder[key]]
    elif kind == "swap":
        other, other_key = generator.choice(places)
        holder[key] = json.loads(json.dumps(other[other_key]))
    else:
        holder[key] = generator.choice(VALUES)
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    if type(value) is not dict and type(value) is not list:
        return
    items = value.items() if type(value) is dict else enumerate(value)
    for key, item in list(items):
        yield value, key
        yield from _places(item)


# ----------------------------------------------------------------------------------- judgement


@contextmanager
def _limited() -> Iterator[None]:
    """Inside, Hang is raised after CPU_SECONDS."""

    def stop(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def written(files: Files, folder: Path) -> Path:
    """Writes files into an empty folder; returns the path of the first."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / next(iter(files))


def judged(kind: Kind, files: Files, expected: Any, folder: Path) -> tuple[str, str]:
    """("refused", "right", "wrong", "hang", "traceback" or "unclear", detail) of damaged files."""
    path = written(files, folder)
    try:
        with _limited():
            value = kind.read(path)
    except PartitaError as error:
        sentence = str(error)
        clear = "\n" not in sentence and len(sentence) < LONGEST + len(str(path))
        return ("refused" if clear else "unclear"), sentence
    except Hang:
        return "hang", ""
    except BaseException as error:  # any other error is the finding
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [line.strip() for line in traceback.format_exc().splitlines() if "File" in line]
        return "traceback", f"{type(error).__name__}: {str(error)[:100]} {frames[-1][-90:]}"
    right = expected if kind.right is None else kind.right(files)
    is_right = repr(_plain(value)) == repr(_plain(right))
    return ("right" if is_right else "wrong"), _first_difference(_plain(value), _plain(right))


def _plain(value: Any) -> Any:
    """A value after a round trip through JSON, so that tuples and lists are equal."""
    try:
        return json.loads(json.dumps(value, sort_keys=True))
    except (TypeError, ValueError):
        return repr(value)


def _first_difference(value: Any, right: Any) -> str:
    left, other = repr(value), repr(right)
    start = next((i for i, (a, b) in enumerate(zip(left, other, strict=False)) if a != b), 0)
    return f"{left[max(0, start - 40) : start + 40]!r} and not {other[start : start + 40]!r}"


# ------------------------------------------------------------------------------------ full disk


def _writers() -> dict[str, Callable[[Path], None]]:
    """Writers of every kind of file that Partita writes over an old one."""
    graph = _example_graph()
    machine = load("h100:4")
    plan = best_plan(_graph(), machine)
    timeline = simulate(_graph(), machine, plan)
    events = json.dumps(trace(timeline))
    key = {"host": "a"}
    records = {"d": {"model": "m", "operator": "a", "digest": "d", "seconds": 0.5, "features": {}}}
    return {
        "plan.json": plan.save,
        "graph.json": _graph().save,
        "graph.npz": lambda path: gnn.save(graph, path),
        "graph.lux": lambda path: gnn.save(graph, path),
        "page.html": lambda path: save_page(path, plan, timeline),
        "trace.json": lambda path: save_text(events, path, "trace"),
        "machine.toml": lambda path: save_text(machine.to_toml(), path, "machine"),
        "times.json": lambda path: operators.save(path, key, records),
    }


def lost_files(count: int, generator: random.Random, folder: Path) -> tuple[int, list[str]]:
    """(writes that a full disk stopped, findings): old files that changed, drafts that stayed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writers = _writers()
    stopped = 0
    findings = []
    for number in range(count):
        name, write = generator.choice(list(writers.items()))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / name
        write(path)
        before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
        limit = generator.randrange(len(before[name]))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            write(path)
        except (PartitaError, OSError):
            stopped += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        after = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
        if after != before or any(entry.is_dir() for entry in folder.iterdir()):
            findings.append(f"{name}: write {number}, stopped at byte {limit:,}")
    return stopped, findings


# --------------------------------------------------------------------------------------- main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=3000, help="damaged files in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help="names, separated by commas")
    parser.add_argument("--writes", type=int, default=200, help="writes to a full disk")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
    names = [name for name in KINDS if name not in ON_REQUEST]
    if arguments.kinds:
        names = arguments.kinds.split(",")
    absent = [n for n in names if n in NEEDS and importlib.util.find_spec(NEEDS[n]) is None]
    for name in absent:
        print(f"{name}: left out, because {NEEDS[name]} is not installed")
    names = [name for name in names if name not in absent]
    findings = 0
    with tempfile.TemporaryDirectory() as temporary:
        for number, name in enumerate(names):
            share = arguments.files // len(names) + (number < arguments.files % len(names))
            generator = random.Random(f"{arguments.seed} {name}")
            findings += _examined(name, share, generator, Path(temporary) / "read")
        generator = random.Random(arguments.seed)
        stopped, lost = lost_files(arguments.writes, generator, Path(temporary) / "written")
    for finding in lost:
        print(f"lost: {finding}")
    print(f"{stopped} writes stopped by a full disk, {len(lost)} old files lost")
    print(f"{arguments.files} damaged files, {findings} findings")
    return 1 if findings or lost else 0


def _examined(name: str, count: int, generator: random.Random, folder: Path) -> int:
    """The number of findings among damaged files of a kind; prints the counts and findings."""
    kind = KINDS[name]()
    expected = kind.read(written(kind.files, folder))
    counts: Counter[str] = Counter()
    findings: Counter[str] = Counter()
    for _ in range(count):
        verdict, detail = judged(kind, damaged(kind.files, generator), expected, folder)
        counts[verdict] += 1
        if verdict not in ("right", "refused"):
            findings[f"  {verdict}: {detail}"] += 1
    print(f"{name}: {count} files, " + ", ".join(f"{n} {v}" for v, n in counts.items()), flush=True)
    for finding, times in findings.most_common(20):
        print(f"{finding} ({times} times)", flush=True)
    return findings.total()


if __name__ == "__main__":
    sys.exit(main())
