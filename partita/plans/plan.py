"""Plans: how one training step is split over devices.

- `Mesh`: the machine's devices as a grid of small prime axes.
- Choice: per operator, mesh axis -> factor. The axis splits that factor; an axis without a factor
  replicates the operator. Factors are named after their kind (S sample, A attribute, P parameter,
  R reduction), with a number where an operator has several of one kind. `at(i)` instead of a factor
  places the operator on slice i of the axis (`plans.pipeline`).
- `Storage`: further axes that split a variable, as ZeRO does.
- `Plan`: all of these, saved as a small JSON file (`plans.schema`).

Not here: whether a plan fits a graph (`plans.check`), shardings of tensors (`plans.layout`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from partita.files.reading import checked, read_json
from partita.files.writing import write_text
from partita.plans.schema import PLAN_FILE, SCHEDULES, SCHEMA, plan_fields
from partita.units import format_bytes, format_seconds

TIME = "time"
"""Name of the microbatch axis: level -1, no links, no devices (`plans.pipeline`)."""


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of the logical mesh."""

    name: str
    size: int
    level: int = 0
    """Index of the machine's level whose links the axis crosses, 0 outermost."""


@dataclass(frozen=True)
class Mesh:
    """The logical mesh over a machine's devices: small prime axes, slow links first.

    >>> Mesh.of((2, 2, 3)).size
    12
    """

    axes: tuple[Axis, ...]

    @staticmethod
    def of(sizes: Iterable[int], levels: Iterable[int] | None = None) -> Mesh:
        """The mesh of axes a, b, c, ... with the given sizes, on level 0 by default."""
        axis_sizes = tuple(sizes)
        axis_levels = (0,) * len(axis_sizes) if levels is None else tuple(levels)
        axes = []
        for number, (size, level) in enumerate(zip(axis_sizes, axis_levels, strict=True)):
            axes.append(Axis(_axis_name(number), size, level))
        return Mesh(tuple(axes))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Size of every axis."""
        return tuple(axis.size for axis in self.axes)

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes)

    @cached_property
    def index(self) -> dict[str, int]:
        """Number of every axis, by its name."""
        return {axis.name: number for number, axis in enumerate(self.axes)}

    @cached_property
    def _hash(self) -> int:
        return hash(self.axes)

    def __hash__(self) -> int:
        # Stored, because a search hashes the mesh once per reshard.
        return self._hash


def _axis_name(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"a{number}"


def prime_factors(number: int) -> list[int]:
    """Prime factors of a number, largest first.

    >>> prime_factors(12)
    [3, 2, 2]
    """
    factors = []
    prime = 2
    while number > 1:
        while number % prime == 0:
            factors.append(prime)
            number //= prime
        prime += 1
    return factors[::-1]


def mesh_for(level_sizes: Iterable[int]) -> Mesh:
    """The mesh over levels of the given sizes (outermost first), each split into prime axes."""
    sizes = []
    levels = []
    for level, level_size in enumerate(level_sizes):
        for prime in prime_factors(level_size):
            sizes.append(prime)
            levels.append(level)
    return Mesh.of(sizes, levels)


@dataclass(frozen=True, slots=True)
class Storage:
    """Further splits of a variable, beyond its operator's choice."""

    dim: int
    """Dim of the variable that is split."""
    axes: tuple[str, ...]
    zero: int
    """ZeRO stage. 1: the optimizer slots and the update are split; 2: also the gradient;
    3: also the variable itself."""


@dataclass(frozen=True)
class Plan:
    """The choice of every operator, and the storage of variables."""

    graph: str
    """Name of the graph."""
    machine: str
    """Name of the machine."""
    mesh: Mesh
    choices: Mapping[str, Mapping[str, str]]
    """Operator -> axis -> factor."""
    storage: Mapping[str, Storage] = field(default_factory=dict)
    """Path of a variable -> its storage."""
    name: str = "found"
    batch_size: int = 0
    predicted: Mapping[str, Any] = field(default_factory=dict)
    """Predicted figures of the plan ("seconds", "peak_bytes"), with their origin."""
    notes: tuple[str, ...] = ()
    why: Mapping[str, Any] = field(default_factory=dict)
    """Predicted cost of every operator and of its alternatives, shown by `partita explain`."""
    microbatches: int = 1
    """Number of equal parts of the batch that run one after the other; gradients are summed."""
    schedule: str = SCHEDULES[0]
    """Order of the microbatches in a pipeline, one of SCHEDULES."""
    recompute: tuple[tuple[str, str], ...] = ()
    """Rematerialized runs of operators (first, last; in model order): their forward values are not
    stored, the backward pass computes them again."""
    offload: tuple[str, ...] = ()
    """Paths of variables whose optimizer slots are in the memory of the host."""
    target: str = ""
    """The platform of the graph ("cpu", "cuda", "tpu"), "" in files that do not say."""
    machine_digest: str = ""
    """The digest of the machine whose numbers `predicted` is for, "" if that is unknown."""

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.mesh.size

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def to_json(self) -> dict[str, Any]:
        """A plain JSON value; `from_json` of it equals this plan."""
        mesh = {axis.name: {"size": axis.size, "level": axis.level} for axis in self.mesh.axes}
        operators = {}
        for operator, choice in self.choices.items():
            operators[operator] = choice_text(choice, self.mesh)
        storage = {}
        for path, stored in self.storage.items():
            storage[path] = {"dim": stored.dim, "axes": list(stored.axes), "zero": stored.zero}
        value = {
            "schema": SCHEMA,
            "name": self.name,
            "graph": self.graph,
            "machine": self.machine,
            "batch_size": self.batch_size,
            "mesh": mesh,
            "operators": operators,
            "storage": storage,
            "predicted": dict(self.predicted),
            "notes": list(self.notes),
            "why": dict(self.why),
        }
        if self.target:
            value["target"] = self.target
        if self.machine_digest:
            value["machine_digest"] = self.machine_digest
        # Most plans have no microbatches, rematerialization and offload: their files stay short.
        if self.microbatches > 1:
            value["microbatches"] = self.microbatches
            value["schedule"] = self.schedule
        if self.recompute:
            value["recompute"] = [list(run) for run in self.recompute]
        if self.offload:
            value["offload"] = list(self.offload)
        return value

    @staticmethod
    def from_json(value: Any, where: str = "The plan") -> Plan:
        """The plan of a JSON value. PlanError names the wrong field and its fix."""
        return _plan_of(checked(value, plan_fields, where, PLAN_FILE))

    @property
    def is_split(self) -> bool:
        """Whether operators or variables are split, or optimizer slots are in host memory."""
        return any(self.choices.values()) or bool(self.storage or self.offload)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """The plan in a JSON file. PlanError names the problem of a file that holds no plan."""
        return _plan_of(read_json(path, PLAN_FILE, plan_fields))


def numbered_path(path: Path, number: int) -> Path:
    """The file for the first, second, ... program of a script.

    >>> numbered_path(Path("plan.json"), 1).name, numbered_path(Path("plan.json"), 2).name
    ('plan.json', 'plan-2.json')
    """
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _plan_of(fields: Mapping[str, Any]) -> Plan:
    """The plan of checked fields."""
    axes = []
    for name, entry in fields["mesh"].items():
        axes.append(Axis(name, entry["size"], entry.get("level", 0)))
    storage = {path: Storage(**entry) for path, entry in fields.get("storage", {}).items()}
    others = (
        "name",
        "batch_size",
        "predicted",
        "notes",
        "why",
        "microbatches",
        "schedule",
        "target",
        "machine_digest",
    )
    return Plan(
        graph=fields["graph"],
        machine=fields["machine"],
        mesh=Mesh(tuple(axes)),
        choices=fields["operators"],
        storage=storage,
        recompute=fields.get("recompute", ()),
        offload=tuple(fields.get("offload", ())),
        **{name: fields[name] for name in others if name in fields},
    )


@cache
def placed_slice(use: str) -> int | None:
    """The slice of an axis on which a choice places an operator, None where it splits a factor.

    >>> placed_slice("at(3)"), placed_slice("S")
    (3, None)
    """
    match = re.fullmatch(r"at\((\d+)\)", use)
    return int(match[1]) if match else None


def choice_text(choice: Mapping[str, str], mesh: Mesh) -> str:
    """A choice as text, the axes of a factor together.

    >>> choice_text({"a": "S", "b": "S", "c": "P"}, Mesh.of((2, 2, 2)))
    'S:a,b P:c'
    """
    axes_of: dict[str, list[str]] = {}
    for axis in mesh.axes:
        if axis.name in choice:
            axes_of.setdefault(choice[axis.name], []).append(axis.name)
    texts = [f"{factor}:{','.join(axes)}" for factor, axes in axes_of.items()]
    return " ".join(texts) or "replicate"


def is_accelerator(target: str) -> bool:
    """Whether a platform is a GPU or a TPU.

    >>> is_accelerator("cuda:8.0"), is_accelerator("cpu")
    (True, False)
    """
    return target.partition(":")[0] in ("cuda", "tpu")


def is_gpu(target: str) -> bool:
    """Whether a platform is a GPU.

    >>> is_gpu("cuda:8.0"), is_gpu("tpu")
    (True, False)
    """
    return target.partition(":")[0] == "cuda"


def mesh_text(mesh: Mesh) -> str:
    """A mesh as text ("a=2 x b=4")."""
    return " x ".join(f"{axis.name}={axis.size}" for axis in mesh.axes) or "one device"


def runs_text(runs: Sequence[tuple[str, str]]) -> str:
    """Runs of operators as text."""
    return ", ".join(f"{first} ... {last}" for first, last in runs) or "nothing"


def _lines(plan: Plan) -> Iterator[str]:
    """The plan as text, one line per run of operators with equal choices."""
    mesh = mesh_text(plan.mesh)
    yield f"plan '{plan.name}' for {plan.graph} on {plan.machine}: {mesh}"
    texts = [(name, choice_text(choice, plan.mesh)) for name, choice in plan.choices.items()]
    for text, group in groupby(texts, key=lambda entry: entry[1]):
        names = [name for name, _ in group]
        run = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)})"
        yield f"  {run}: {text}"
    for text in storage_texts(plan):
        yield f"  {text}"
    if plan.offload:
        yield f"  {offload_text(plan.offload)}"
    if plan.microbatches > 1:
        yield f"  {plan.microbatches} microbatches, {plan.schedule}"
    if plan.recompute:
        yield f"  rematerialized in the backward pass: {runs_text(plan.recompute)}"
    if "seconds" in plan.predicted:
        yield f"  predicted step {format_seconds(plan.predicted['seconds'])}"
    if "peak_bytes" in plan.predicted:
        yield f"  predicted peak {format_bytes(plan.predicted['peak_bytes'])} a device"
    for note in plan.notes:
        yield f"  note: {note}"


def storage_texts(plan: Plan) -> Iterator[str]:
    """Variables that are stored in parts as text, one line per ZeRO stage and axes."""
    counts: dict[str, int] = {}
    for storage in plan.storage.values():
        text = f"ZeRO-{storage.zero} over {','.join(storage.axes)}"
        counts[text] = counts.get(text, 0) + 1
    for text, count in counts.items():
        yield f"{_variables(count)} stored {text}"


def _variables(count: int) -> str:
    return f"{count} variable" if count == 1 else f"{count} variables"


def offload_text(offload: Sequence[str]) -> str:
    """Offloaded optimizer slots as text.

    >>> offload_text(["dense/kernel"])
    'optimizer slots of 1 variable in host memory'
    """
    return f"optimizer slots of {_variables(len(offload))} in host memory"
