"""Compiled programs: the HLO text of a compiler, as computations of instructions.

The reader knows as much of the text as its users need: shapes, operands, called computations and
trip counts. All else stays in the line of an instruction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from partita.graph.operator_graph import ITEMSIZE

HLO_DTYPES = {
    "pred": "bool",
    "s8": "int8",
    "u8": "uint8",
    "s16": "int16",
    "u16": "uint16",
    "s32": "int32",
    "u32": "uint32",
    "s64": "int64",
    "u64": "uint64",
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "f64": "float64",
    "c64": "complex64",
    "c128": "complex128",
}
ONE_BYTE = r"f8\w+|[su]4|[su]2|f4\w+"
"""Dtypes of a byte or less."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LOOP_BODY = re.compile(r"body=%?([\w.\-]+)")
_PARAMETER = re.compile(r" parameter\((\d+)\)")
_LOOP_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r" constant\((\d+)\)")
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(
    r"(?:to_apply|calls|called_computations=\{|true_computation|false_computation)=?%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CALLS = ("call", "conditional", "fusion", "async-start")


@dataclass(frozen=True, slots=True)
class HloShape:
    """An array's dtype, as HLO writes it, and its dims."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes, without padding."""
        if re.fullmatch(ONE_BYTE, self.dtype):
            return self.size
        return self.size * ITEMSIZE.get(HLO_DTYPES.get(self.dtype, ""), 4)


@dataclass(frozen=True, slots=True)
class HloInstruction:
    """One instruction of a computation."""

    name: str
    opcode: str
    shapes: tuple[HloShape, ...]
    """Arrays of its result, those of nested tuples one after another."""
    operands: tuple[str, ...]
    """Names of its operands."""
    line: str

    @property
    def op_name(self) -> str:
        """Its name in the program that was compiled, "" without one."""
        match = _OP_NAME.search(self.line)
        return match[1] if match else ""


@dataclass(frozen=True, slots=True)
class Visit:
    """An instruction where it runs."""

    instruction: HloInstruction
    computation: str
    trips: int
    """Repetitions in a run of the program."""
    is_fused: bool
    """Whether it is a part of a fusion."""
    caller: Visit | None
    """The instruction that calls its computation, None in the entry."""


@dataclass(frozen=True)
class HloModule:
    """A compiled program."""

    computations: dict[str, dict[str, HloInstruction]]
    """Instructions by name, in their order."""
    entry: str

    @staticmethod
    def of(text: str) -> HloModule:
        """The program of a text."""
        computations: dict[str, dict[str, HloInstruction]] = {}
        current: dict[str, HloInstruction] = {}
        entry = ""
        for line in text.splitlines():
            match = _COMPUTATION.match(line)
            if match and not line.startswith(" "):
                current = computations.setdefault(match[2], {})
                entry = match[2] if match[1] else entry
                continue
            instruction = _read(line)
            if instruction is not None:
                current[instruction.name] = instruction
        return HloModule(computations, entry)

    def visits(self) -> Iterator[Visit]:
        """All instructions that run, each computation once per instruction that calls it."""
        yield from self._visits(self.entry, 1, False, None)

    def _visits(
        self, computation: str, trips: int, is_fused: bool, caller: Visit | None
    ) -> Iterator[Visit]:
        for instruction in self.computations.get(computation, {}).values():
            visit = Visit(instruction, computation, trips, is_fused, caller)
            yield visit
            line = instruction.line
            if instruction.opcode == "while":
                body = _LOOP_BODY.search(line)
                if body:
                    loop_trips = trips * self._loop_trips(line)
                    yield from self._visits(body[1], loop_trips, is_fused, visit)
            elif instruction.opcode in _CALLS:
                inside = is_fused or instruction.opcode == "fusion"
                branches = _OPERAND.findall(_name(_BRANCHES, line))
                for called in [*_CALLED.findall(line), *branches]:
                    yield from self._visits(called, trips, inside, visit)

    def _loop_trips(self, line: str) -> int:
        """Repetitions of a loop: as its line says, or else the limit of a counter in its condition,
        which starts at 0 in JAX's loops; 1 if neither is there.
        """
        count = _TRIP_COUNT.search(line)
        if count:
            return int(count[1])
        condition = self.computations.get(_name(_LOOP_CONDITION, line), {})
        limits = []
        for instruction in condition.values():
            if instruction.opcode == "compare" and "direction=LT" in instruction.line:
                limits += [condition.get(operand) for operand in instruction.operands]
        for limit in limits:
            constant = _CONSTANT.search(limit.line) if limit is not None else None
            if constant:
                return int(constant[1])
        return 1

    def name_of(self, visit: Visit, operand: str) -> str:
        """The name in the program of an operand, outside of a fusion if it is its parameter."""
        instruction = self.computations[visit.computation].get(operand)
        if instruction is None:
            return ""
        parameter = _PARAMETER.search(instruction.line)
        if instruction.op_name or parameter is None or visit.caller is None:
            return instruction.op_name
        outside = visit.caller.instruction.operands
        position = int(parameter[1])
        return self.name_of(visit.caller, outside[position]) if position < len(outside) else ""

    def operand_shapes(self, visit: Visit) -> tuple[HloShape, ...]:
        """The arrays that an instruction reads."""
        known = self.computations[visit.computation]
        shapes: list[HloShape] = []
        for operand in visit.instruction.operands:
            if operand in known:
                shapes += known[operand].shapes
        return tuple(shapes)


def _name(pattern: re.Pattern[str], line: str) -> str:
    match = pattern.search(line)
    return match[1] if match else ""


def _read(line: str) -> HloInstruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    shapes = []
    for dtype, dims in _SHAPE.findall(match[2]):
        shapes.append(HloShape(dtype, tuple(int(dim) for dim in dims.split(",") if dim)))
    arguments = line[match.end() : line.find(")", match.end())]
    return HloInstruction(
        name=match[1],
        opcode=match[3],
        shapes=tuple(shapes),
        operands=tuple(_OPERAND.findall(arguments)),
        line=line,
    )
