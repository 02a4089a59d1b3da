"""A trace as the format asks for it (Trace Event Format, Google), and as Perfetto reads it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.report.trace import trace
from partita.search.find import mesh_of
from partita.simulation.simulate import simulate
from partita.simulation.timeline import Timeline

DATA = Path(__file__).parents[1] / "data"
KEYS = {
    "X": {"name", "cat", "ts", "dur", "pid", "tid", "args"},
    "C": {"name", "ts", "pid", "tid", "args"},
    "M": {"name", "pid", "tid", "args"},
}
"""Per type of event that is written, what the format asks for: complete, counter, metadata."""
METADATA = {
    "process_name": ("name", str),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}


def timeline(name: str, plan: str, machine: str) -> Timeline:
    graph, where = OperatorGraph.load(DATA / f"{name}.graph.json"), load(machine)
    return simulate(graph, where, BASELINES[plan](graph, where.name, mesh_of(where)))


def read(made: Timeline) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The trace as a reader of the file has it, and its events by type."""
    value = json.loads(json.dumps(trace(made), allow_nan=False))
    events = defaultdict(list)
    for event in value["traceEvents"]:
        events[event["ph"]].append(event)
    return value, events


@pytest.mark.parametrize("plan", ["data parallel", "ZeRO-3", "tensor parallel", "one device"])
@pytest.mark.parametrize(
    ("name", "machine"), [("transformer", "h100:4"), ("cnn", "k80-cluster:2"), ("mlp", "host:4")]
)
def test_a_trace_keeps_to_the_format(name: str, machine: str, plan: str) -> None:
    made = timeline(name, plan, machine)
    value, events = read(made)
    assert set(events) <= set(KEYS) and value["displayTimeUnit"] in ("ms", "ns")
    for kind, keys in KEYS.items():
        for e in events[kind]:
            assert e.keys() == keys | {"ph"}, e
            assert isinstance(e["name"], str) and type(e["pid"]) is int and type(e["tid"]) is int
            assert all(math.isfinite(e[k]) and e[k] >= 0 for k in ("ts", "dur") if k in e), e
    for e in events["M"]:
        key, kind = METADATA[e["name"]]
        assert e["args"].keys() == {key} and isinstance(e["args"][key], kind)

    rows = defaultdict(list)
    for e in events["X"]:
        begin = int(e["ts"] * 1000)  # Perfetto keeps whole nanoseconds, and cuts what is less
        rows[e["pid"], e["tid"]].append((begin, begin + int(e["dur"] * 1000)))
    named = {(e["pid"], e["tid"]) for e in events["M"] if e["name"] == "thread_name"}
    assert set(rows) == named, "every row has its name"
    for spans in rows.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False)), (
            "events of one row do not overlap"
        )


def test_a_trace_holds_the_whole_timeline() -> None:
    made = timeline("transformer", "data parallel", "h100:4")
    value, events = read(made)
    assert [e["name"] for e in events["X"]] == [s.name for s in made.spans]
    assert [e["args"]["critical"] for e in events["X"]] == [s.critical for s in made.spans]
    for e, s in zip(events["X"], made.spans, strict=True):
        assert e["ts"] == pytest.approx(s.start * 1e6, abs=1e-3) and e["dur"] == pytest.approx(
            s.seconds * 1e6, abs=2e-3
        )
    assert max(e["ts"] + e["dur"] for e in events["X"]) == pytest.approx(
        made.seconds * 1e6, abs=2e-3
    )
    assert {e["name"] for e in events["C"]} == {"memory"} and len(events["C"]) == len(made.memory)
    assert max(e["args"]["bytes"] for e in events["C"]) == made.peak_bytes
    assert [e["ts"] for e in events["C"]] == sorted(e["ts"] for e in events["C"])
    assert [e["args"]["name"] for e in events["M"] if e["name"] == "thread_name"] == [
        "kernels",
        "links",
    ]
    assert float(value["otherData"]["seconds"]) == made.seconds
