"""How a step is split: a mesh, a choice per operator, a storage per variable. A Plan is a small text file.

A choice says, for each mesh axis, which factor of the operator it splits; an axis that is not named replicates the operator.
Factors are called by their kind (S sample, A attribute, P parameter, R reduction), numbered where an operator has several. `at(i)` in the
place of a factor pins the operator to slice i of the axis: `plan.stages`.
A storage says over which further axes a variable's optimizer slots (ZeRO 1), its gradient (2) and the variable itself (3)
are kept split.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from partita.errors import PlanError
from partita.units import format_bytes, format_seconds

SCHEMA = 1
TIME = "time"
"""The axis along which microbatches follow each other: it has level -1, no links and no devices (`plan.stages`)."""
SCHEDULES = ("1f1b", "gpipe")


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of the logical mesh: `level` is the index of the machine's level whose links it crosses (0 outermost)."""

    name: str
    size: int
    level: int = 0


@dataclass(frozen=True)
class Mesh:
    """The logical mesh over a machine's devices: small prime axes, ordered from slow links to fast.

    >>> Mesh.of((2, 2, 3)).size
    12
    """

    axes: tuple[Axis, ...]

    @staticmethod
    def of(sizes: Iterable[int], levels: Iterable[int] | None = None) -> Mesh:
        sizes = tuple(sizes)
        levels = tuple(levels) if levels is not None else (0,) * len(sizes)
        names = [chr(97 + i) if i < 26 else f"a{i}" for i in range(len(sizes))]
        return Mesh(tuple(Axis(*a) for a in zip(names, sizes, levels, strict=True)))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(a.size for a in self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.sizes)

    @cached_property
    def _hash(self) -> int:
        return hash(self.axes)

    def __hash__(self) -> int:
        return self._hash  # asked for once per reshard of a search

    @cached_property
    def index(self) -> dict[str, int]:
        return {a.name: i for i, a in enumerate(self.axes)}


def prime_factors(n: int) -> list[int]:
    """Prime factors of n, largest first.

    >>> prime_factors(12)
    [3, 2, 2]
    """
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found[::-1]


def mesh_for(level_sizes: Iterable[int]) -> Mesh:
    """The mesh over levels of the given sizes (outer and slow first): every level split into prime axes."""
    sizes, levels = [], []
    for level, size in enumerate(level_sizes):
        for p in prime_factors(size):
            sizes.append(p)
            levels.append(level)
    return Mesh.of(sizes, levels)


@dataclass(frozen=True, slots=True)
class Storage:
    """How a variable is kept beyond its operator's choice: dim `dim` split over `axes` too.

    `zero` 1: the optimizer slots and the update; 2: the gradient also; 3: the variable itself also.
    """

    dim: int
    axes: tuple[str, ...]
    zero: int


@dataclass(frozen=True)
class Plan:
    """What each operator's mesh axes do, and how variables are stored.

    `choices` maps operator name -> {axis name: factor name}; `storage` maps variable path -> Storage.
    `predicted` holds what the plan was predicted to cost, each figure with where it came from.
    """

    graph: str
    machine: str
    mesh: Mesh
    choices: Mapping[str, Mapping[str, str]]
    storage: Mapping[str, Storage] = field(default_factory=dict)
    name: str = "found"
    batch_size: int = 0
    predicted: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    why: Mapping[str, Any] = field(default_factory=dict)
    """Per operator, its predicted cost and what its alternatives would cost: what `partita explain` shows."""
    microbatches: int = 1
    """Even parts of the batch that go through the step one after the other, their gradients added up."""
    schedule: str = "1f1b"
    """The order of microbatches where there are stages: one of SCHEDULES."""
    recompute: tuple[tuple[str, str], ...] = ()
    """Runs of operators (first, last, in the order of the model) whose forward values are computed again in the backward pass, and not kept."""

    @property
    def devices(self) -> int:
        return self.mesh.size

    def __str__(self) -> str:
        return "\n".join(lines(self))

    def to_json(self) -> dict[str, Any]:
        levels = {a.name: {"size": a.size, "level": a.level} for a in self.mesh.axes}
        operators = {}
        for operator, choice in self.choices.items():
            operators[operator] = choice_text(choice, self.mesh)
        return {
            "schema": SCHEMA,
            "name": self.name,
            "graph": self.graph,
            "machine": self.machine,
            "batch_size": self.batch_size,
            "mesh": levels,
            "operators": operators,
            "storage": {
                p: {"dim": s.dim, "axes": list(s.axes), "zero": s.zero}
                for p, s in self.storage.items()
            },
            "predicted": dict(self.predicted),
            "notes": list(self.notes),
            "why": dict(self.why),
        } | (  # what most plans do not have is not in their files
            (
                {"microbatches": self.microbatches, "schedule": self.schedule}
                if self.microbatches > 1
                else {}
            )
            | ({"recompute": [list(run) for run in self.recompute]} if self.recompute else {})
        )

    @staticmethod
    def from_json(value: Any, where: str = "The plan") -> Plan:
        """The plan of a JSON value; PlanError names the key that is wrong and what is allowed."""
        if not isinstance(value, dict):
            raise PlanError(f"{where} is not a JSON object: a plan starts with '{{'.")
        allowed = {
            "schema",
            "name",
            "graph",
            "machine",
            "batch_size",
            "mesh",
            "operators",
            "storage",
            "predicted",
            "notes",
            "why",
            "microbatches",
            "schedule",
            "recompute",
        }
        for key in value:
            if key not in allowed:
                raise PlanError(
                    f"{where} has an unknown key {key!r}. Allowed: {', '.join(sorted(allowed))}."
                )
        for key in ("schema", "graph", "machine", "mesh", "operators"):
            if key not in value:
                raise PlanError(f"{where} lacks the key {key!r}.")
        if value["schema"] != SCHEMA:
            raise PlanError(
                f"{where} has schema {value['schema']!r}; this version of Partita reads {SCHEMA}. Plan again."
            )
        kinds = {
            "graph": str,
            "machine": str,
            "mesh": dict,
            "operators": dict,
            "name": str,
            "batch_size": int,
            "storage": dict,
        }
        kinds |= {
            "predicted": dict,
            "notes": list,
            "why": dict,
            "microbatches": int,
            "schedule": str,
            "recompute": list,
        }
        words = {str: "a text", dict: "an object", int: "a whole number", list: "a list"}
        for key, kind in kinds.items():
            if key in value and not isinstance(value[key], kind):
                raise PlanError(
                    f"{where}, {key}: needs {words[kind]}, not {value[key]!r}. Plan again."
                )
        for key in ("seconds", "peak_bytes"):
            if not isinstance(value.get("predicted", {}).get(key, 0), (int, float)):
                raise PlanError(
                    f"{where}, predicted.{key}: needs a number, not {value['predicted'][key]!r}. Plan again."
                )
        _check_why(value.get("why", {}), f"{where}, why")
        if value.get("microbatches", 1) < 1:
            raise PlanError(
                f"{where}, microbatches: needs a number from 1 on, not {value['microbatches']}."
            )
        if value.get("schedule", SCHEDULES[0]) not in SCHEDULES:
            raise PlanError(
                f"{where}, schedule: needs {' or '.join(map(repr, SCHEDULES))}, not {value['schedule']!r}."
            )
        for run in value.get("recompute", ()):
            if (
                not isinstance(run, list)
                or len(run) != 2
                or not all(isinstance(name, str) for name in run)
            ):
                raise PlanError(
                    f'{where}, recompute: needs pairs of operators ["first", "last"], not {run!r}.'
                )
        axes = []
        for name, entry in value["mesh"].items():
            if (
                not isinstance(entry, dict)
                or not all(isinstance(entry.get(k, 0), int) for k in ("size", "level"))
                or entry.get("size", 0) < 2
            ):
                raise PlanError(
                    f'{where}, mesh.{name}: needs {{"size": at least 2, "level": number}}, not {entry!r}.'
                )
            axes.append(Axis(name, entry["size"], entry.get("level", 0)))
        mesh = Mesh(tuple(axes))
        choices = {}
        for operator, text in value["operators"].items():
            choices[operator] = _parse_choice(text, mesh, f"{where}, operators.{operator}")
        storage = {}
        for path, entry in value.get("storage", {}).items():
            if (
                not isinstance(entry, dict)
                or set(entry) != {"dim", "axes", "zero"}
                or entry["zero"] not in (1, 2, 3)
                or not isinstance(entry["dim"], int)
            ):
                raise PlanError(
                    f'{where}, storage.{path}: needs {{"dim", "axes", "zero": 1, 2 or 3}}, not {entry!r}.'
                )
            for axis in entry["axes"]:
                if axis not in mesh.index:
                    raise PlanError(
                        f"{where}, storage.{path}: there is no axis {axis!r}; the mesh has {', '.join(mesh.index)}."
                    )
            storage[path] = Storage(entry["dim"], tuple(entry["axes"]), entry["zero"])
        return Plan(
            value["graph"],
            value["machine"],
            mesh,
            choices,
            storage,
            value.get("name", "found"),
            value.get("batch_size", 0),
            value.get("predicted", {}),
            tuple(value.get("notes", ())),
            value.get("why", {}),
            value.get("microbatches", 1),
            value.get("schedule", SCHEDULES[0]),
            tuple((run[0], run[1]) for run in value.get("recompute", ())),
        )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        try:
            text = Path(path).read_text()
        except FileNotFoundError:
            raise PlanError(f"There is no plan file {str(path)!r}.") from None
        except OSError as error:
            raise PlanError(
                f"The plan file {str(path)!r} cannot be read: {error.strerror}. Give a file that 'partita plan --save-plan' wrote."
            ) from None
        except UnicodeDecodeError:
            raise PlanError(
                f"{str(path)!r} is not a plan: it is not text. Give a file that 'partita plan --save-plan' wrote."
            ) from None
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(
                f"{str(path)!r} is not a plan: {error.msg} in line {error.lineno}, column {error.colno}."
            ) from None
        return Plan.from_json(value, f"The plan {str(path)!r}")


@cache
def placed_slice(use: str) -> int | None:
    """The slice that an axis pins an operator to, None where it splits a factor.

    >>> placed_slice("at(3)"), placed_slice("S")
    (3, None)
    """
    found = re.fullmatch(r"at\((\d+)\)", use)
    return int(found[1]) if found else None


def choice_text(choice: Mapping[str, str], mesh: Mesh) -> str:
    """A choice as people read it.

    >>> choice_text({"a": "S", "b": "S", "c": "P"}, Mesh.of((2, 2, 2)))
    'S:a,b P:c'
    """
    by_factor: dict[str, list[str]] = {}
    for axis in mesh.axes:
        if axis.name in choice:
            by_factor.setdefault(choice[axis.name], []).append(axis.name)
    return " ".join(f"{f}:{','.join(axes)}" for f, axes in by_factor.items()) or "replicate"


def _check_why(why: Mapping[str, Any], where: str) -> None:
    """PlanError if the reasons of a plan are not those that a search writes."""
    numbers = lambda entry, *keys: (
        isinstance(entry, dict) and all(isinstance(entry.get(k), (int, float)) for k in keys)
    )  # noqa: E731
    for kind in ("operators", "baselines"):
        if not isinstance(why.get(kind, {}), dict):
            raise PlanError(f"{where}.{kind}: needs an object, not {why[kind]!r}. Plan again.")
    for name, entry in why.get("baselines", {}).items():
        if not numbers(entry, "seconds"):
            raise PlanError(
                f"{where}.baselines.{name}: needs the number of seconds, not {entry!r}. Plan again."
            )
    for name, entry in why.get("operators", {}).items():
        whole = numbers(
            entry, "compute", "activations", "gradients", "moves", "bytes"
        ) and isinstance(entry.get("alternatives"), list)
        if not whole or not all(
            numbers(a, "seconds", "bytes") and isinstance(a.get("choice"), str)
            for a in entry["alternatives"]
        ):
            raise PlanError(
                f"{where}.operators.{name}: is not what a search writes. Plan again, or delete 'why' from the plan: it runs without."
            )


def _parse_choice(text: Any, mesh: Mesh, where: str) -> dict[str, str]:
    if not isinstance(text, str):
        raise PlanError(f'{where}: needs a text like "S:a,b P:c" or "replicate", not {text!r}.')
    choice: dict[str, str] = {}
    for part in [] if text == "replicate" else text.split():
        factor, colon, axes = part.partition(":")
        if not colon or not axes:
            raise PlanError(f'{where}: {part!r} is not factor:axes, e.g. "S:a,b".')
        for axis in axes.split(","):
            if axis not in mesh.index:
                raise PlanError(
                    f"{where}: there is no axis {axis!r}; the mesh has {', '.join(mesh.index)}."
                )
            if axis in choice:
                raise PlanError(
                    f"{where}: axis {axis!r} is used twice, for {choice[axis]} and {factor}."
                )
            choice[axis] = factor
    return choice


def runs_text(value: Any) -> Any:
    return (
        ", ".join(f"{first} ... {last}" for first, last in value) or "nothing"
        if isinstance(value, tuple)
        else value
    )


def storage_text(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else f"ZeRO-{value['zero']} dim {value['dim']} over {','.join(value['axes'])}"
    )


def mesh_text(mesh: Mesh) -> str:
    return " x ".join(f"{a.name}={a.size}" for a in mesh.axes) or "one device"


def lines(plan: Plan) -> Iterable[str]:
    """The plan as text: runs of operators with the same choice on one line."""
    yield f"plan '{plan.name}' for {plan.graph} on {plan.machine}: {mesh_text(plan.mesh)}"
    text = plan.to_json()["operators"]
    previous, first, last, count = None, "", "", 0
    for name, choice in [*text.items(), ("", None)]:
        if choice != previous:
            if previous is not None:
                yield f"  {first if count == 1 else f'{first} ... {last} ({count})'}: {previous}"
            previous, first, count = choice, name, 0
        last, count = name, count + 1
    kinds: dict[str, int] = {}
    for s in plan.storage.values():
        key = f"ZeRO-{s.zero} over {','.join(s.axes)}"
        kinds[key] = kinds.get(key, 0) + 1
    for key, n in kinds.items():
        yield f"  {n} variables stored {key}"
    if plan.microbatches > 1:
        yield f"  {plan.microbatches} microbatches, {plan.schedule}"
    if plan.recompute:
        yield f"  recomputed in the backward pass: {runs_text(plan.recompute)}"
    if "seconds" in plan.predicted:
        yield f"  predicted step {format_seconds(plan.predicted['seconds'])}"
    if "peak_bytes" in plan.predicted:
        yield f"  predicted peak {format_bytes(plan.predicted['peak_bytes'])} a device"
    for note in plan.notes:
        yield f"  note: {note}"
