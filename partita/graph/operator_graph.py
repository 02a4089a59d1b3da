"""The operator graph: a training step as instructions on tensors, grouped into operators with
factors.

An OperatorGraph is a frozen value. Tensors and instructions are numbered in program order, and that
numbering is the contract with the program text: tensor 17 is the 17th value of the captured module,
so a plan for the graph is a plan for the text. Operators own instructions. Every dim of a tensor
has the label of one of its operator's factors, so a choice (mesh axes -> factors) fixes the
sharding of all values of the operator at once.

Not here: grouping of instructions (`grouping`), costs of a split (`cost`), capture of programs
(`capture`), checks (`graph.check`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from partita.files.checksums import sealed, with_checksum
from partita.files.reading import FileKind, checked, read_json
from partita.files.schema import FieldError, Range, record, table, version
from partita.files.writing import write_text
from partita.graph.check import check

SCHEMA = 1

Count = Annotated[int, Range(0, 2**48)]
Size = Annotated[int, Range(1, 2**48)]
Phase = Literal["forward", "backward", "update"]
FactorKind = Literal["S", "A", "P", "R"]
"""Sample, attribute, parameter, reduction."""
DimFactors = tuple[tuple[int, ...], ...]
"""Per dim of a tensor, the factors of a rule (major to minor) that index it."""
Label = tuple[int, ...]
"""Per dim of a tensor, the factor of the graph that may split it, -1 for none. Where several
factors index a dim, its major one."""

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
"""Bytes of one element, by dtype."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value of the program: its global shape and dtype."""

    shape: tuple[Count, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * ITEMSIZE.get(self.dtype, 4)

    @property
    def is_floating(self) -> bool:
        """Whether its elements are floating-point numbers."""
        return self.dtype.startswith(("float", "bfloat"))


@dataclass(frozen=True, slots=True)
class Rule:
    """Shardy's sharding rule of one instruction: iteration space and the dims that it indexes."""

    sizes: tuple[Count, ...]
    """Size of every factor of the iteration space. All other fields name factors by index."""
    operands: tuple[DimFactors, ...]
    results: tuple[DimFactors, ...]
    reduction: tuple[int, ...] = ()
    """Factors that are summed."""
    halo: tuple[int, ...] = ()
    """Factors that need neighbouring elements."""
    gathered: tuple[int, ...] = ()
    """Factors that must not be split."""


@dataclass(frozen=True, slots=True)
class Window:
    """The elements that each position of a windowed dim reads.

    Position p in 0..count-1 reads elements (p * step - low + [0, reach)) / base. Split over
    devices, each device has an even part of the positions and of the elements, and reads the others
    from its neighbours.

    >>> Window(32, 32, 1, 1, 3, 1).halo_elements(4), Window(16, 8, 2, 2, 7, 1).halo_elements(4)
    ((1, 1), (2, 3))
    """

    size: Size
    """Elements of the dim of operand 0 that is read through the window."""
    count: Size
    """Positions of the window."""
    step: Count
    low: int
    """Elements of padding before the first element."""
    reach: Size
    """Elements that one position covers, in the dilated dim."""
    base: Size
    """Dilation of the dim."""

    @property
    def is_pointwise(self) -> bool:
        """Whether position p reads element p alone."""
        return self.step == self.reach == self.base == 1

    @property
    def is_padded_evenly(self) -> bool:
        """Whether the padding after the last element may be as large as that before the first.

        Elements that a step leaves unread may hide a part of it.
        """
        dilated = (self.size - 1) * self.base + 1
        high = (self.count - 1) * self.step + self.reach - self.low - dilated
        return high <= self.low < high + self.step

    def transposed(self) -> Window:
        """The positions that read each element, as a window over positions.

        >>> Window(32, 64, 1, 2, 3, 2).transposed()
        Window(size=64, count=32, step=2, low=0, reach=3, base=1)
        """
        low = self.reach - 1 - self.low
        return Window(self.count, self.size, self.base, low, self.reach, self.step)

    def halo_elements(self, parts: int) -> tuple[int, int]:
        """The largest halo of a device when the dim is split into `parts`.

        The number of elements from devices before it, and from devices after it.
        """
        positions = -(-self.count // parts)
        elements = -(-self.size // parts)
        before = 0
        after = 0
        for part in range(parts):
            first, last = self._elements(part * positions, (part + 1) * positions - 1)
            if first > last:
                # The device's positions fall between two elements of a dilated dim.
                continue
            if part > 0:
                before = max(before, part * elements - first)
            if part < parts - 1:
                after = max(after, last + 1 - (part + 1) * elements)
        return before, after

    def padding_ratio(self) -> float:
        """Elements that all positions read where the dim is split, over those where it is whole.

        A split dim reads its padding too, because halos make padding explicit.
        """
        inside = 0
        for position in range(self.count):
            first, last = self._elements(position, position)
            inside += max(0, min(last, self.size - 1) - max(first, 0) + 1)
        return self.count * self.reach / self.base / inside if inside else 1.0

    def filled_ratio(self, parts: int = 1) -> float:
        """Elements of a part of the dilated dim with zeros in its holes, over those without."""
        elements = -(-self.size // parts)
        return ((elements - 1) * self.base + 1) / elements

    def _elements(self, first_position: int, last_position: int) -> tuple[int, int]:
        """First and last element that a range of positions reads, with padding outside the dim."""
        first = -((self.low - first_position * self.step) // self.base)
        last = (last_position * self.step - self.low + self.reach - 1) // self.base
        return first, last


@dataclass(frozen=True, slots=True)
class Instruction:
    """One StableHLO operation."""

    name: str
    path: str
    """Path of the layer."""
    phase: Phase
    operands: tuple[int, ...]
    results: tuple[int, ...]
    rule: Rule | None
    flops: Annotated[float, Range(0)] = 0.0
    """FLOPs of one execution, global."""
    trips: Count = 1
    """Number of executions by the loops around it."""
    windows: tuple[tuple[int, Window], ...] = ()
    """Pairs of a factor of the rule and the window that it moves over a dim of operand 0."""
    batch_groups: Size = 1
    """Groups in the batch of a convolution; several for the weight gradient of a grouped one."""
    adds: bool = True
    """Whether elements that meet in a result are added; not so for a reduce by maximum."""
    full_precision: bool = False
    """Whether a product of float32 runs in float32 on every platform. With the usual precision, a
    GPU runs it in TF32 and a TPU in bfloat16."""

    @property
    def whole_factors(self) -> set[int]:
        """The factors of the rule that are gathered rather than split.

        Only a window exchanges a halo. Slicing, padding or reversing a split dim moves nearly all
        of it.
        """
        if self.rule is None:
            return set()
        windowed = {factor for factor, _ in self.windows}
        return set(self.rule.gathered) | (set(self.rule.halo) - windowed)

    @property
    def is_grouped(self) -> bool:
        """Whether it is a convolution with groups: some factor of a size above 1 indexes its input,
        kernel and result."""
        if self.name != "convolution" or self.rule is None:
            return False
        dims = (*self.rule.operands, *self.rule.results)
        first, *others = ({factor for dim in mapping for factor in dim} for mapping in dims)
        return any(self.rule.sizes[factor] > 1 for factor in first.intersection(*others))


CONDITIONALS = ("case", "if")
"""Instructions with branches, of which one runs. A graph has a `Loop` of one trip for each."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A `while`, or a conditional."""

    instruction: int
    carried: tuple[tuple[int, int, int, int], ...]
    """Per carried variable its tensors: before the loop, in the body, yielded, after the loop."""
    body: tuple[int, int]
    """First instruction of its condition and body, and one past the last."""
    trips: Count


@dataclass(frozen=True, slots=True)
class Argument:
    """An input of the step."""

    path: str
    role: Literal["parameter", "optimizer", "state", "batch"]
    tensor: int
    result: int | None = None
    """The tensor that replaces it after the step, None for batch data."""
    parameter: str | None = None
    """For an optimizer slot, the path of its parameter."""


@dataclass(frozen=True, slots=True)
class Factor:
    """An independent iteration dimension of an operator, which mesh axes may split."""

    name: str
    size: Size
    kind: FactorKind
    operator: int


@dataclass(frozen=True, slots=True)
class Use:
    """A read of a tensor under another label than its own. Equal labels share one reshard."""

    tensor: int
    operator: int
    label: Label
    """In the reader's factors."""
    instructions: tuple[tuple[int, int], ...]
    """(instruction, operand position) pairs of the readers."""


@dataclass(frozen=True, slots=True)
class Operator:
    """The unit of choice: a heavy instruction, the light ones fused around it, and their backward
    and update parts.
    """

    name: str
    path: str
    kind: str
    heavy: int
    instructions: tuple[int, ...]
    factors: tuple[int, ...]
    """Factors that a choice may split."""


@dataclass(frozen=True)
class OperatorGraph:
    """A captured training step."""

    name: str
    tensors: tuple[Tensor, ...]
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]
    arguments: tuple[Argument, ...]
    outputs: tuple[int, ...]
    operators: tuple[Operator, ...]
    factors: tuple[Factor, ...]
    owner: tuple[int, ...]
    """Per instruction its operator, -1 for none (a scalar of the step)."""
    home: tuple[int, ...]
    """Per tensor the operator that computes it; for an argument its first reader."""
    labels: tuple[Label, ...]
    """Per tensor its label in the factors of its home."""
    uses: tuple[Use, ...]
    """All reads under a label that differs from the tensor's own, within or between operators."""
    batch_size: Count = 0
    notes: tuple[str, ...] = ()
    target: str = ""
    """The platform for which the step was captured ("cpu", "cuda", "cuda:8.0", "tpu"), "" in files
    that do not say."""

    @cached_property
    def derived(self) -> dict[Callable[[OperatorGraph], Any], Any]:
        """Function of the graph -> its value (`per_graph`)."""
        return {}

    @property
    def flops(self) -> float:
        """FLOPs of one step, global."""
        return sum(i.flops * i.trips for i in self.instructions)

    @property
    def parameter_count(self) -> int:
        """Number of elements of all parameters."""
        return sum(self.tensors[a.tensor].size for a in self.arguments if a.role == "parameter")

    def factor(self, operator: int, name: str) -> int | None:
        """The factor of an operator by its name, None if it has no such factor."""
        for factor in self.operators[operator].factors:
            if self.factors[factor].name == name:
                return factor
        return None

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def to_json(self) -> dict[str, Any]:
        """A plain JSON value; `from_json` of it equals this graph."""
        return {"schema": SCHEMA, "graph": _to_lists(self)}

    @staticmethod
    def from_json(value: Any, where: str = "The graph") -> OperatorGraph:
        """The graph of a JSON value: fields by position, as `to_json` writes them.

        PartitaError names the wrong field. `graph.check` states the properties beyond the format.
        """
        return checked(value, _graph_fields, where, GRAPH_FILE)

    def save(self, path: str | Path) -> None:
        """Write the graph as JSON."""
        content = with_checksum(self.to_json())
        write_text(path, json.dumps(content, separators=(",", ":")))

    @staticmethod
    def load(path: str | Path) -> OperatorGraph:
        """The graph in a JSON file. PartitaError names the problem of a wrong file."""
        return read_json(path, GRAPH_FILE, _graph_fields)


GRAPH_FILE = FileKind("a graph", "capture the program again", by_hand=False, most_bytes=2**32)


def _graph_fields(value: Any) -> OperatorGraph:
    """The graph of a JSON value; FieldError names the wrong field."""
    schema = version(SCHEMA, "capture the program again")
    fields = sealed(table({"schema": schema, "graph": record(OperatorGraph)}))(value)
    graph = fields["graph"]
    try:
        _check_numbers(graph)
        return check(graph)
    except FieldError as error:
        raise error.inside("graph") from None
    except AssertionError as error:
        raise FieldError(f"unsound ({error})", "capture the program again").inside(
            "graph"
        ) from None


def _check_numbers(graph: OperatorGraph) -> None:
    """FieldError for a field that names a tensor, an operator or a factor that does not exist."""
    tensors = len(graph.tensors)
    operators = len(graph.operators)
    factors = len(graph.factors)
    instructions = len(graph.instructions)
    _check_length("home", graph.home, tensors)
    _check_length("labels", graph.labels, tensors)
    _check_length("owner", graph.owner, instructions)
    _check_below("outputs", graph.outputs, tensors)
    _check_below("home", graph.home, operators, least=-1)
    _check_below("owner", graph.owner, operators, least=-1)
    for number, label in enumerate(graph.labels):
        _check_label(f"labels[{number}]", label, graph.tensors[number], factors)
    for number, instruction in enumerate(graph.instructions):
        _check_instruction(f"instructions[{number}]", instruction, graph.tensors)
    for number, loop in enumerate(graph.loops):
        _check_below(f"loops[{number}]", (loop.instruction,), instructions)
        _check_below(f"loops[{number}].body", loop.body, instructions + 1)
        for values in loop.carried:
            _check_below(f"loops[{number}].carried", values, tensors)
    for number, argument in enumerate(graph.arguments):
        result = () if argument.result is None else (argument.result,)
        _check_below(f"arguments[{number}]", (argument.tensor, *result), tensors)
        if result and argument.result not in graph.outputs:
            raise FieldError("no output", "capture the program again").inside(
                f"arguments[{number}].result"
            )
    for number, operator in enumerate(graph.operators):
        _check_below(f"operators[{number}].heavy", (operator.heavy,), instructions)
        _check_below(f"operators[{number}].instructions", operator.instructions, instructions)
        _check_below(f"operators[{number}].factors", operator.factors, factors)
    for number, factor in enumerate(graph.factors):
        _check_below(f"factors[{number}].operator", (factor.operator,), operators)
    for number, use in enumerate(graph.uses):
        _check_use(f"uses[{number}]", use, graph)


def _check_instruction(path: str, instruction: Instruction, tensors: Sequence[Tensor]) -> None:
    _check_below(f"{path}.operands", instruction.operands, len(tensors))
    _check_below(f"{path}.results", instruction.results, len(tensors))
    rule = instruction.rule
    if rule is None:
        return
    count = len(rule.sizes)
    _check_length(f"{path}.rule.operands", rule.operands, len(instruction.operands))
    _check_length(f"{path}.rule.results", rule.results, len(instruction.results))
    indexed = chain(rule.operands, rule.results)
    for tensor, dims in zip((*instruction.operands, *instruction.results), indexed, strict=True):
        _check_length(f"{path}.rule", dims, len(tensors[tensor].shape))
        for factors in dims:
            _check_below(f"{path}.rule", factors, count)
    for factors in (rule.reduction, rule.halo, rule.gathered):
        _check_below(f"{path}.rule", factors, count)
    for factor, _ in instruction.windows:
        _check_below(f"{path}.windows", (factor,), count)


def _check_use(path: str, use: Use, graph: OperatorGraph) -> None:
    _check_below(f"{path}.tensor", (use.tensor,), len(graph.tensors))
    _check_below(f"{path}.operator", (use.operator,), len(graph.operators))
    _check_label(f"{path}.label", use.label, graph.tensors[use.tensor], len(graph.factors))
    for index, position in use.instructions:
        _check_below(f"{path}.instructions", (index,), len(graph.instructions))
        operands = graph.instructions[index].operands
        _check_below(f"{path}.instructions", (position,), len(operands))


def _check_label(path: str, label: Label, tensor: Tensor, factors: int) -> None:
    _check_length(path, label, len(tensor.shape))
    _check_below(path, label, factors, least=-1)


def _check_length(path: str, values: Sequence[Any], length: int) -> None:
    if len(values) != length:
        problem = f"a list of {len(values):,}, not of {length:,}"
        raise FieldError(problem, "capture the program again").inside(path)


def _check_below(path: str, values: Iterable[int], count: int, least: int = 0) -> None:
    for value in values:
        if not least <= value < count:
            fix = f"use numbers from {least} to {count - 1:,}, or capture the program again"
            raise FieldError(f"{value:,}", fix).inside(path)


def _to_lists(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return [_to_lists(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple):
        return [_to_lists(item) for item in value]
    return value


def _lines(graph: OperatorGraph) -> Iterator[str]:
    """One line per operator: factors, instructions per phase, FLOPs, parameters."""
    target = f", for {graph.target}" if graph.target not in ("", "cpu") else ""
    yield (
        f"{graph.name}: {len(graph.operators)} operators, {len(graph.instructions)} instructions, "
        f"{graph.parameter_count:,} parameters, {graph.flops / 1e9:.3g} GFLOP a step{target}"
    )
    width = max((len(operator.name) for operator in graph.operators), default=0)
    kind_width = max(8, *(len(operator.kind) for operator in graph.operators))
    for operator, arguments in zip(graph.operators, operator_arguments(graph), strict=True):
        factors = [graph.factors[f] for f in operator.factors]
        factor_text = " ".join(f"{factor.name}={factor.size}" for factor in factors)
        instructions = [graph.instructions[i] for i in operator.instructions]
        counts = []
        for phase in ("forward", "backward", "update"):
            counts.append(str(sum(i.phase == phase for i in instructions)))
        megaflops = sum(i.flops * i.trips for i in instructions) / 1e6
        parameters = [a.tensor for a in arguments if a.role == "parameter"]
        parameter_count = sum(graph.tensors[tensor].size for tensor in parameters)
        yield (
            f"  {operator.name:{width}}  {operator.kind:{kind_width}} {factor_text:32} "
            f"{'/'.join(counts):>12}  {megaflops:10.3f} MFLOP  {parameter_count:>10,} parameters"
        )


T = TypeVar("T")
U = TypeVar("U")


class IdentityKey(Generic[T]):
    """A cache key for a large value, equal by identity.

    Hashing a graph by content takes longer than the cached work.
    """

    def __init__(self, value: T) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdentityKey) and other.value is self.value


def per_graph(function: Callable[[OperatorGraph], U]) -> Callable[[OperatorGraph], U]:
    """A function of a graph, computed once for each graph. Callers must not change its result.

    The graph has the result, so that a step keeps it while thousands of pieces come and go.
    """

    @wraps(function)
    def wrapper(graph: OperatorGraph) -> U:
        derived = graph.derived
        if wrapper not in derived:
            derived[wrapper] = function(graph)
        return derived[wrapper]

    return wrapper


@per_graph
def constant_tensors(graph: OperatorGraph) -> frozenset[int]:
    """Tensors that depend on no argument, and results of scalars alone.

    Each device computes its own part of broadcast constants, iotas and causal masks.
    """
    carried = carried_tensors(graph.loops)
    constants: set[int] = set()
    of_scalars: set[int] = set()
    for instruction in graph.instructions:
        has_argument = any(tensor not in constants for tensor in instruction.operands)
        if not has_argument and not carried & set(instruction.results):
            constants.update(instruction.results)
        if not any(graph.tensors[tensor].shape for tensor in instruction.operands):
            of_scalars.update(instruction.results)
    return frozenset(constants | of_scalars)


@per_graph
def first_backward(graph: OperatorGraph) -> int:
    """The first instruction of the backward pass that computes no constant.

    Constants of the backward pass stand anywhere before it.
    """
    constants = constant_tensors(graph)
    backward = (
        i
        for i, x in enumerate(graph.instructions)
        if x.phase == "backward" and not constants.issuperset(x.results)
    )
    return next(backward, len(graph.instructions))


def is_repeated(graph: OperatorGraph, instruction: int) -> bool:
    """Whether an instruction computes a forward value again in the backward pass."""
    is_later = instruction > first_backward(graph)
    return is_later and graph.instructions[instruction].phase == "forward"


@per_graph
def producers(graph: OperatorGraph) -> dict[int, int]:
    """Tensor -> the instruction that computes it."""
    producer = {}
    for index, instruction in enumerate(graph.instructions):
        producer.update(dict.fromkeys(instruction.results, index))
    return producer


@per_graph
def read_labels(graph: OperatorGraph) -> dict[tuple[int, int], Label]:
    """(instruction, operand position) -> label of the read, where it is not the tensor's."""
    return {read: use.label for use in graph.uses for read in use.instructions}


def operand_labels(graph: OperatorGraph, instruction: int) -> list[Label]:
    """The labels under which an instruction reads its operands."""
    labels = read_labels(graph)
    operands = graph.instructions[instruction].operands
    return [
        labels.get((instruction, position), graph.labels[tensor])
        for position, tensor in enumerate(operands)
    ]


def carried_tensors(loops: Iterable[Loop]) -> set[int]:
    """All tensors of the loops' carried variables."""
    tensors: set[int] = set()
    for loop in loops:
        for values in loop.carried:
            tensors.update(values)
    return tensors


def operator_arguments(graph: OperatorGraph) -> list[list[Argument]]:
    """Per operator, the arguments whose home it is."""
    arguments: list[list[Argument]] = [[] for _ in graph.operators]
    for argument in graph.arguments:
        home = graph.home[argument.tensor]
        if home >= 0:
            arguments[home].append(argument)
    return arguments
