"""What is computed: a training step as instructions on tensors, grouped into operators with factors.

An OperatorGraph is a frozen value. Tensors and instructions are numbered in program order, and that numbering is the contract
with the program text: tensor 17 here is the 17th value of the captured module, so a plan for the graph is a plan for
the text. Operators own instructions; every dim of a tensor is labelled with the factors of its operator, so that a
choice (mesh axes on factors) fixes the sharding of every value in the operator at once.

Not here: how instructions are grouped (`grouping`), what a split costs (`cost`), how a program is read (`capture`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from partita.errors import PartitaError

SCHEMA = 1

Phase = Literal["forward", "backward", "update"]
FactorKind = Literal["S", "A", "P", "R"]
DimFactors = tuple[tuple[int, ...], ...]
"""Per dim of a tensor, the factors of a rule (major to minor) that index it."""
Label = tuple[int, ...]
"""Per dim of a tensor, the factor of the graph that may split it (the major one where several index it), -1 for none."""

ITEMSIZE = {
    "bool": 1,
    "int4": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "float8": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    "token": 0,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value of the program: its global shape and dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * ITEMSIZE.get(self.dtype, 4)


@dataclass(frozen=True, slots=True)
class Rule:
    """Shardy's sharding rule of one instruction: its iteration space, and which dims it indexes.

    `operands` and `results` give, per tensor and dim, the factors (indices into `sizes`, major to minor).
    `reduction` factors are summed away, `halo` factors need neighbouring elements, `gathered` ones must not be split.
    """

    sizes: tuple[int, ...]
    operands: tuple[DimFactors, ...]
    results: tuple[DimFactors, ...]
    reduction: tuple[int, ...] = ()
    halo: tuple[int, ...] = ()
    gathered: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Window:
    """What positions 0..count-1 of a windowed dim read: position p reads elements (p*step - low + [0, reach)) / base.

    Split over devices, each holds an even part of the positions and of the elements, and asks its neighbours for the rest.

    >>> Window(32, 32, 1, 1, 3, 1).halo_elements(4), Window(16, 8, 2, 2, 7, 1).halo_elements(4)
    ((1, 1), (2, 3))
    """

    size: int
    """Elements of the dim of operand 0 that is read through the window."""
    count: int
    step: int
    low: int
    reach: int
    base: int

    def halo_elements(self, parts: int) -> tuple[int, int]:
        """Elements that a device needs from those before and from those after it, at most, when split into `parts`."""
        positions, elements = -(-self.count // parts), -(-self.size // parts)
        before, after = 0, 0
        for i in range(parts):
            first = -((self.low - i * positions * self.step) // self.base)
            last = (((i + 1) * positions - 1) * self.step - self.low + self.reach - 1) // self.base
            if first > last:
                continue  # between two elements of a dilated dim
            before = max(before, i * elements - first if i else 0)
            after = max(after, last + 1 - (i + 1) * elements if i < parts - 1 else 0)
        return before, after

    def padding_ratio(self) -> float:
        """Elements that all positions read where the dim is split, over those where it is whole: halos make padding explicit."""
        inside = 0
        for p in range(self.count):
            first = -((self.low - p * self.step) // self.base)
            last = (p * self.step - self.low + self.reach - 1) // self.base
            inside += max(0, min(last, self.size - 1) - max(first, 0) + 1)
        return self.count * self.reach / self.base / inside if inside else 1.0


@dataclass(frozen=True, slots=True)
class Instruction:
    """One StableHLO operation. `flops` counts its global work once; `trips` is how often a loop around it runs."""

    name: str
    path: str
    phase: Phase
    operands: tuple[int, ...]
    results: tuple[int, ...]
    rule: Rule | None
    flops: float = 0.0
    trips: int = 1
    windows: tuple[tuple[int, Window], ...] = ()
    """Per factor of the rule that moves a window over a dim of operand 0: how it moves."""
    batch_groups: int = 1
    """Groups in the batch of a convolution: more than 1 for the weight gradient of a grouped one."""
    adds: bool = True
    """Whether elements that meet in a result are added: not where a reduce or a scatter takes, say, the largest."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A `while`: per carried value the tensors (before, in the body, yielded by the body, after) that are one value."""

    instruction: int
    carried: tuple[tuple[int, int, int, int], ...]
    body: tuple[int, int]
    """First and one past last instruction of its condition and body."""
    trips: int


@dataclass(frozen=True, slots=True)
class Argument:
    """An input of the step. `result` is the tensor that replaces it after the step, None for batch data."""

    path: str
    role: Literal["parameter", "optimizer", "state", "batch"]
    tensor: int
    result: int | None = None
    parameter: str | None = None
    """For an optimizer slot, the path of the parameter that it belongs to."""


@dataclass(frozen=True, slots=True)
class Factor:
    """An independent iteration dimension of an operator that may be split over mesh axes."""

    name: str
    size: int
    kind: FactorKind
    operator: int


@dataclass(frozen=True, slots=True)
class Use:
    """A tensor as one operator reads it: `label` is in the reader's factors. Equal labels share one reshard."""

    tensor: int
    operator: int
    label: Label
    instructions: tuple[tuple[int, int], ...]
    """(instruction, operand position) pairs that read it so."""


@dataclass(frozen=True, slots=True)
class Operator:
    """The unit of choice: a heavy instruction, the light ones fused around it, its backward and update parts."""

    name: str
    path: str
    kind: str
    heavy: int
    instructions: tuple[int, ...]
    factors: tuple[int, ...]
    """Factors that a choice may split (a subset of those in labels)."""


@dataclass(frozen=True)
class OperatorGraph:
    """A captured training step.

    `owner[i]` is the operator of instruction i (-1: none, e.g. a scalar of the step). `labels[t]` is the label of
    tensor t in the factors of `home[t]`, the operator that produces it. `uses` lists every read whose label differs from
    the tensor's own, within an operator or between two.
    """

    name: str
    tensors: tuple[Tensor, ...]
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]
    arguments: tuple[Argument, ...]
    outputs: tuple[int, ...]
    operators: tuple[Operator, ...]
    factors: tuple[Factor, ...]
    owner: tuple[int, ...]
    home: tuple[int, ...]
    labels: tuple[Label, ...]
    uses: tuple[Use, ...]
    batch_size: int = 0
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """FLOPs of one step, global."""
        return sum(i.flops * i.trips for i in self.instructions)

    @property
    def parameter_count(self) -> int:
        return sum(self.tensors[a.tensor].size for a in self.arguments if a.role == "parameter")

    def bytes_of(self, *roles: str) -> int:
        """Bytes of all arguments in the given roles, global."""
        return sum(self.tensors[a.tensor].nbytes for a in self.arguments if a.role in roles)

    def factor(self, operator: int, name: str) -> int | None:
        """The factor of an operator by its name, None when it has no such factor."""
        return next(
            (f for f in self.operators[operator].factors if self.factors[f].name == name), None
        )

    def __str__(self) -> str:
        return "\n".join(lines(self))

    def to_json(self) -> dict[str, Any]:
        """A plain JSON value; `from_json` of it equals this graph."""
        return {"schema": SCHEMA, "graph": _plain(self)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> OperatorGraph:
        if value.get("schema") != SCHEMA:
            raise PartitaError(
                f"The graph has schema {value.get('schema')!r}; this version reads {SCHEMA}. Capture it again."
            )
        g = value["graph"]
        rule = lambda r: None if r is None else Rule(*map(_tuple, r))  # noqa: E731
        return OperatorGraph(
            g[0],
            tuple(Tensor(tuple(s), d) for s, d in g[1]),
            tuple(
                Instruction(
                    n,
                    p,
                    ph,
                    tuple(o),
                    tuple(r),
                    rule(ru),
                    f,
                    t,
                    tuple((i, Window(*w)) for i, w in ws),
                    *rest,
                )
                for n, p, ph, o, r, ru, f, t, ws, *rest in g[2]
            ),
            tuple(Loop(i, _tuple(c), (b[0], b[1]), t) for i, c, b, t in g[3]),
            tuple(Argument(*a) for a in g[4]),
            tuple(g[5]),
            tuple(Operator(n, p, k, h, tuple(i), tuple(f)) for n, p, k, h, i, f in g[6]),
            tuple(Factor(*f) for f in g[7]),
            tuple(g[8]),
            tuple(g[9]),
            _tuple(g[10]),
            tuple(Use(t, o, _tuple(la), _tuple(i)) for t, o, la, i in g[11]),
            g[12],
            tuple(g[13]),
        )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json(), separators=(",", ":")))

    @staticmethod
    def load(path: str | Path) -> OperatorGraph:
        try:
            value = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise PartitaError(f"There is no graph file {str(path)!r}.") from None
        except json.JSONDecodeError as error:
            raise PartitaError(
                f"{str(path)!r} is not a graph file: {error.msg} in line {error.lineno}."
            ) from None
        if not isinstance(value, dict) or "graph" not in value:
            raise PartitaError(
                f"{str(path)!r} is JSON but not a graph: it needs the keys 'schema' and 'graph'."
            )
        return OperatorGraph.from_json(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return [_plain(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value


def lines(graph: OperatorGraph) -> Iterable[str]:
    """The graph as text: a line per operator with its factors, instruction counts per phase, FLOPs and parameters."""
    owned = operator_arguments(graph)
    yield (
        f"{graph.name}: {len(graph.operators)} operators, {len(graph.instructions)} instructions, "
        f"{graph.parameter_count:,} parameters, {graph.flops / 1e9:.3g} GFLOP a step"
    )
    width = max((len(o.name) for o in graph.operators), default=0)
    for index, operator in enumerate(graph.operators):
        factors = " ".join(
            f"{graph.factors[f].name}={graph.factors[f].size}" for f in operator.factors
        )
        phases = "/".join(
            str(sum(graph.instructions[i].phase == p for i in operator.instructions))
            for p in ("forward", "backward", "update")
        )
        flops = sum(
            graph.instructions[i].flops * graph.instructions[i].trips for i in operator.instructions
        )
        count = sum(graph.tensors[a.tensor].size for a in owned[index] if a.role == "parameter")
        yield f"  {operator.name:{width}}  {operator.kind:8} {factors:32} {phases:>12}  {flops / 1e6:10.3f} MFLOP  {count:>10,} parameters"


T = TypeVar("T")
U = TypeVar("U")


class IdentityKey(Generic[T]):
    """A value by identity, for a cache: hashing it by what it holds would take longer than the work that is kept."""

    def __init__(self, value: T) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdentityKey) and other.value is self.value


def per_graph(of: Callable[[OperatorGraph], U]) -> Callable[[OperatorGraph], U]:
    """A function of a graph that is computed once for each of the last few graphs. What it returns must not be changed."""
    known = lru_cache(maxsize=8)(lambda key: of(key.value))
    return wraps(of)(lambda graph: known(IdentityKey(graph)))


@per_graph
def constant_tensors(graph: OperatorGraph) -> frozenset[int]:
    """Tensors that depend on no argument (broadcast constants, iotas, a causal mask): every device makes its own part."""
    carried = {t for loop in graph.loops for values in loop.carried for t in values}
    found: set[int] = set()
    for x in graph.instructions:
        if all(t in found for t in x.operands) and not carried & set(x.results):
            found.update(x.results)
    scalars = {
        t
        for x in graph.instructions
        if not any(graph.tensors[o].shape for o in x.operands)
        for t in x.results
    }
    return frozenset(found | scalars)


def operator_arguments(graph: OperatorGraph) -> list[list[Argument]]:
    """Per operator, the arguments that live with it (an argument's home is the operator that reads it first)."""
    owned: list[list[Argument]] = [[] for _ in graph.operators]
    for argument in graph.arguments:
        if graph.home[argument.tensor] >= 0:
            owned[graph.home[argument.tensor]].append(argument)
    return owned


def check(graph: OperatorGraph) -> OperatorGraph:
    """The graph itself, if later stages may rely on it; AssertionError with the reason otherwise.

    Every instruction has one owner or none; labels have the tensor's rank, use factors of the tensor's home only, use no
    factor twice, and their sizes multiply to the dim; every read of another operator's tensor is a Use.
    """
    count = len(graph.tensors)
    assert len(graph.labels) == len(graph.home) == count, "a label and a home per tensor"
    assert len(graph.owner) == len(graph.instructions), "an owner per instruction"
    known = {f for o in graph.operators for f in o.factors}
    assert known == set(range(len(graph.factors))), "every factor may be split by its operator"
    names = [o.name for o in graph.operators]
    assert len(set(names)) == len(names), "operator names are unique"
    for index, operator in enumerate(graph.operators):
        assert graph.owner[operator.heavy] == index, f"{operator.name} owns its heavy instruction"
        assert all(graph.owner[i] == index for i in operator.instructions), (
            f"{operator.name} owns its instructions"
        )
        assert all(graph.factors[f].operator == index for f in operator.factors), (
            f"{operator.name} owns its factors"
        )
    for t, label in enumerate(graph.labels):
        _check_label(graph, t, label, graph.home[t])
    read = {(i, p) for u in graph.uses for i, p in u.instructions}
    for use in graph.uses:
        _check_label(graph, use.tensor, use.label, use.operator)
    for i, instruction in enumerate(graph.instructions):
        assert all(0 <= t < count for t in instruction.operands + instruction.results), (
            f"instruction {i} names tensors"
        )
        for position, t in enumerate(instruction.operands):
            if 0 <= graph.owner[i] != graph.home[t] and max(graph.labels[t], default=-1) >= 0:
                assert (i, position) in read, (
                    f"instruction {i} ({instruction.name}) reads tensor {t} of another operator without a Use"
                )
    return graph


def _check_label(graph: OperatorGraph, t: int, label: Label, operator: int) -> None:
    tensor = graph.tensors[t]
    assert len(label) == len(tensor.shape), (
        f"tensor {t} has {len(tensor.shape)} dims, its label {len(label)}"
    )
    used = [f for f in label if f >= 0]
    assert len(set(used)) == len(used), f"tensor {t} uses a factor twice: {label}"
    for f, size in zip(label, tensor.shape, strict=True):
        if f >= 0:
            assert graph.factors[f].operator == operator, (
                f"tensor {t} is labelled with a factor of another operator"
            )
            assert size % graph.factors[f].size == 0, (
                f"tensor {t} {tensor.shape} has factor {graph.factors[f]} in label {label}"
            )
