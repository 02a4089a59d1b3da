"""A lost process that is started again, and trains with the others from a step on.

It runs the script from the top. Its first step waits until the others, who train meanwhile, stand
before a step at which they take it in. Up to there it repeats results that they have noted, and
computes nothing, so that its callbacks and its place in the data are those of the others. Then all
go on from one state.

The others write into the folder of the notice board, in memory: the number of the step, its plan,
the results of all steps before, and the state.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from partita.execute import members
from partita.files.reading import FileKind, read_json
from partita.files.schema import items, mapping, plain, table, text, whole_number
from partita.files.writing import write_text
from partita.plans.plan import Plan

PERIOD = 0.02
"""Time between two looks for the others' word, seconds."""
MOST_STEPS = 1_000_000
"""Steps whose results are noted; a longer training takes nobody in."""
KIND = FileKind("the state for a process that is back", "start the run again", by_hand=False)
SCHEMA = table(
    {
        "step": whole_number(),
        "plan": plain,
        "results": mapping(items(text(40), most=MOST_STEPS)),
    }
)


@dataclass
class Results:
    """Results of all steps of a training: numbers by name, and the metrics after each step."""

    numbers: list[dict[str, float]] = field(default_factory=list)
    metrics: list[list[np.ndarray]] = field(default_factory=list)
    is_complete: bool = True
    """False for a training that returns more than numbers."""

    def add(self, outputs: Any, metrics: Sequence[Any]) -> None:
        """Notes a step."""
        if not self.is_complete:
            return
        if not _are_numbers(outputs) or len(self.numbers) == MOST_STEPS:
            self.is_complete = False
            self.numbers, self.metrics = [], []
            return
        self.numbers.append({name: float(value) for name, value in outputs.items()})
        self.metrics.append([np.array(value) for value in metrics])


def _are_numbers(outputs: Any) -> bool:
    if not isinstance(outputs, Mapping):
        return False
    return all(np.shape(value) == () for value in outputs.values())


@dataclass(frozen=True)
class Handover:
    """The place at which a process is taken in."""

    event: int
    """Losses and returns until then."""
    step: int
    plan: Plan
    results: Results
    leaves: Sequence[np.ndarray]
    """The state before the step, as bytes."""


def write_handover(handover: Handover) -> None:
    """Written by the first process; complete when its table is there."""
    board = members.board()
    assert board is not None
    arrays: dict[str, np.ndarray] = {}
    for number, leaf in enumerate(handover.leaves):
        arrays[f"state {number}"] = np.frombuffer(np.ascontiguousarray(leaf).tobytes(), np.uint8)
    columns = zip(*handover.results.metrics, strict=True)
    for number, column in enumerate(columns):
        arrays[f"metrics {number}"] = np.stack(column)
    np.savez(board.folder / f"state-{handover.event}.npz", **arrays)  # type: ignore[arg-type]
    rows: dict[str, list[str]] = {}
    for number, row in enumerate(handover.results.numbers):
        for name, value in row.items():
            rows.setdefault(name, [""] * len(handover.results.numbers))[number] = repr(value)
    content = {"step": handover.step, "plan": handover.plan.to_json(), "results": rows}
    write_text(board.folder / f"handover-{handover.event}.json", json.dumps(content))


def wait_for_handover() -> Handover:
    """The others' word for this process, waited for."""
    board = members.board()
    assert board is not None
    known = len(board.events())
    members.note_waiting()
    while True:
        event = len(board.events())
        for number in range(known + 1, event + 1):
            path = board.folder / f"handover-{number}.json"
            if path.exists():
                return _read(number)
        time.sleep(PERIOD)


def _read(event: int) -> Handover:
    board = members.board()
    assert board is not None
    content = read_json(board.folder / f"handover-{event}.json", KIND, SCHEMA)
    with np.load(board.folder / f"state-{event}.npz", allow_pickle=False) as arrays:
        leaves = [arrays[f"state {n}"] for n in range(_count(arrays, "state"))]
        columns = [arrays[f"metrics {n}"] for n in range(_count(arrays, "metrics"))]
    numbers: list[dict[str, float]] = []
    for step in range(content["step"]):
        row = {name: values[step] for name, values in content["results"].items()}
        numbers.append({name: float(value) for name, value in row.items() if value})
    metrics = [[column[step] for column in columns] for step in range(content["step"])]
    plan = Plan.from_json(content["plan"])
    return Handover(event, content["step"], plan, Results(numbers, metrics), leaves)


def _count(arrays: Any, kind: str) -> int:
    return sum(name.startswith(f"{kind} ") for name in arrays.files)


def with_bytes(state: Any, leaves: Sequence[np.ndarray]) -> Any:
    """A state like another one, of the bytes of its leaves."""
    old, tree = jax.tree.flatten(state)
    new = []
    for leaf, content in zip(old, leaves, strict=True):
        new.append(np.frombuffer(content.tobytes(), leaf.dtype).reshape(np.shape(leaf)))
    return jax.tree.unflatten(tree, new)
