"""Every script in `benchmarks/` runs: a small case of each, as a process of its own."""

import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from partita import gnn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "absent": ["--blocks", "1", "--width", "64", "--tokens", "32", "--batch", "16"],
    "compiler": ["--models", "lstm", "--plans", "ZeRO-3"],
    "data_parallel": ["--rounds", "1", "--samples", "64"],
    "damaged_files": ["--files", "64", "--writes", "8"],
    "equality": ["--layers", "--models", "1", "--plans", "1", "--first", "4", "--rematerialize"],
    "gnn_exact": ["--parts", "2", "--partitioners", "edges", "--models", "gcn"],
    "gnn_memory": ["--models", "gcn", "--scale", "8", "--epochs", "3", "--layers", "2"],
    "hand_plans": ["--small"],
    "published": ["--only", "dense layers"],
    "gpu": ["--device", "cpu", "--small", "--parts", "models", "--only", "MLP"],
    "staged_equality": ["--optimizers", "--pairs", "2", "--first", "1"],
    "manage_costs": ["--graphs", "mlp", "--draws", "1", "--plans", "8"],
    "staged_memory": ["--only", "dense"],
    "staged_overhead": ["--blocks", "2", "--rounds", "1", "--steps", "1"],
    "manage_grid": ["--rounds", "1"],
    "manage_memories": ["--sizes", "1024"],
    "manage_programs": ["--only", "embedding"],
    "manage_trace": ["--traces", "1"],
    "targets": ["--groups", "layers", "--only", "groupquery", "--targets", "cuda"],
    "overhead": [
        "--rounds",
        "1",
        "--epochs",
        "1",
        "--steps",
        "4",
        "--sizes",
        "1",
        "--devices",
        "1",
    ],
    "actions": ["--models", "mlp", "--seeds", "1", "--actions", "8"],
}
"""Script -> arguments of a small case, for scripts that need no file."""
OF_A_GRAPH = {
    "gnn_accuracy": ["--seeds", "1"],
    "gnn_aggregation": ["--features", "8", "--rounds", "1"],
    "gnn_links": ["--seeds", "1", "--epochs", "2"],
    "gnn_large": ["--hidden", "8", "--processes", "1", "--epochs", "2"],
}
"""The same for scripts whose first argument is a graph file."""
HELP = (
    "attention",
    "feeds",
    "gnn_attention",
    "gnn_parity",
    "gnn_partitioner",
    "gnn_peers",
    "gnn_start",
    "links",
    "manage_power",
    "processes",
    "restarts",
    "shares",
    "staged_processes",
    "survive",
)
"""Scripts that need root, compilers or other frameworks: only their help is printed."""
ELSEWHERE = {"applications", "children", "papers_chart", "proof", "search", "simulator", "stages"}
ELSEWHERE |= {"hub_models", "layer_models", "limits", "random_optimizers", "torch_equality"}
ELSEWHERE |= {"within", "zoo"}
"""Modules of scripts, and scripts with tests of their own: here, in `test_benchmark_search.py`, in
`tests/test_zoo.py` and in `tests/pytorch`.
"""


PRELOADED = ["jax", "keras", "numba", "partita.keras", "partita.gnn"]
"""Imported once, by the process that the scripts are forked from."""


def _as_main(script: str, arguments: list[str], folder: Path) -> None:
    """Runs a benchmark script in this process, its output in `out` and `err` of a folder."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ["PARTITA_CACHE"] = str(folder / "cache")
    path = BENCHMARKS / f"{script}.py"
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(BENCHMARKS))
    os.chdir(folder)
    runpy.run_path(str(path), run_name="__main__")


def run(script: str, arguments: list[str], folder: Path) -> str:
    """Standard output of a benchmark script, which must end with exit code 0."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    process = processes.Process(target=_as_main, args=(script, arguments, folder))
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("JAX_NUM_CPU_DEVICES", raising=False)
        process.start()
    process.join(timeout=300)
    process.kill()
    assert process.exitcode == 0, (folder / "err").read_text()[-3000:]
    return (folder / "out").read_text()


@pytest.fixture(scope="module")
def graph_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of 60 vertices with features, labels and masks."""
    generator = np.random.default_rng(0)
    edges = generator.integers(0, 60, (2, 400))
    masks = np.arange(60) % 3
    graph = gnn.Graph.from_edges(
        edges[0],
        edges[1],
        vertices=60,
        features=generator.random((60, 8), dtype="float32"),
        labels=np.arange(60) % 3,
        train=masks == 0,
        validation=masks == 1,
        test=masks == 2,
    )
    path = tmp_path_factory.mktemp("graph") / "small.lux"
    gnn.save(graph, path)
    return path


@pytest.mark.parametrize("script", SMALL)
def test_a_script_runs_on_a_small_case(script: str, tmp_path: Path) -> None:
    assert run(script, SMALL[script], tmp_path).strip()


@pytest.mark.parametrize("script", OF_A_GRAPH)
def test_a_script_runs_on_a_small_graph(script: str, graph_file: Path, tmp_path: Path) -> None:
    assert run(script, [str(graph_file), *OF_A_GRAPH[script]], tmp_path).strip()


@pytest.mark.parametrize("script", HELP)
def test_a_script_prints_its_help(script: str, tmp_path: Path) -> None:
    assert "usage:" in run(script, ["--help"], tmp_path)


def test_the_chart_of_the_papers_is_drawn_from_rows(tmp_path: Path) -> None:
    rows = []
    for network in ("alexnet", "nmt"):
        for devices in (4, 8):
            case = {
                "paper": "FlexFlow",
                "network": network,
                "machine": "k80-cluster",
                "devices": devices,
                "batch": 64,
            }
            plans = {"data parallel": {"seconds": 2.0}, "found": {"seconds": 1.0}}
            rows.append({"case": case, "plans": plans})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    drawn = tmp_path / "chart.svg"
    run("papers_chart", [str(tmp_path / "rows.json"), "--output", str(drawn)], tmp_path)
    assert "alexnet" in drawn.read_text().lower()


def test_every_script_has_a_small_case() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert scripts == {*SMALL, *OF_A_GRAPH, *HELP} | ELSEWHERE


@pytest.mark.parametrize(
    ("difference", "is_rounding"), [(9e-6, True), (2e-5, False), (np.nan, False)]
)
def test_parity_with_pyg_fails_beyond_rounding(
    difference: float, is_rounding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = runpy.run_path(str(BENCHMARKS / "gnn_parity.py"))
    main = script["main"]
    case = script["Case"]("GCNConv", lambda: None, lambda: None)
    replaced = {
        "layer_cases": lambda: [case],
        "model_cases": list,
        "largest_differences": lambda case, seed: (difference, 0.0),
        "request_cpu_devices": lambda count: None,
        "importlib": SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: True)),
    }
    for name, value in replaced.items():
        monkeypatch.setitem(main.__globals__, name, value)
    monkeypatch.setattr(sys, "argv", ["gnn_parity.py"])
    if is_rounding:
        main()
        return
    with pytest.raises(SystemExit, match="Beyond 1e-05 of PyG: GCNConv"):
        main()


def test_a_value_that_is_not_a_number_differs_from_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    difference = runpy.run_path(str(BENCHMARKS / "equality.py"))["difference"]
    broken = [np.float32([1, np.nan, np.inf])]
    assert difference(broken, broken, "float32") == 0
    for value in ([1, 0, np.inf], [1, np.nan, -np.inf], [1, np.nan, 2]):
        other = [np.float32(value)]
        assert difference(broken, other, "float32") == float("inf")
        assert difference(other, broken, "float32") == float("inf")
    assert difference([np.float32([1, np.nan])], [np.float32([1.5, np.nan])], "float32") == 0.5


def test_a_step_that_rounding_decides_is_unstable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    is_unstable = runpy.run_path(str(BENCHMARKS / "equality.py"))["is_unstable"]
    weights = np.linspace(1, 2, 32, dtype="float32")
    state = ([weights, np.int32(3)],)

    def gradient_of_maximum(state, recomputed):
        """The gradient of `max(weights)`, whose location is found by comparison."""
        found = state[0][0] == recomputed.max()
        return [found.astype("float32") / np.float32(32), state[0][1]]

    assert is_unstable(gradient_of_maximum, state, weights, "float32")
    assert not is_unstable(lambda state, batch: [state[0][0] * 3, state[0][1]], state, 0, "float32")
    broken = [np.float32([1, np.nan])]
    assert is_unstable(lambda state, batch: broken, state, 0, "float32")
