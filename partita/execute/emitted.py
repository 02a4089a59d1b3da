"""The collectives and the peak memory of a compiled step, read from the compiled program."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partita.capture.names import layer_path
from partita.graph.operator_graph import ITEMSIZE

KINDS = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "all-to-all": "all_to_all",
    "reduce-scatter": "reduce_scatter",
    "collective-permute": "collective_permute",
}
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


@dataclass(frozen=True, slots=True)
class Emitted:
    """One collective of the compiled program."""

    kind: str
    nbytes: int
    """Bytes per device: the result of an all-gather, else the operand."""
    group: int
    """Number of devices in a replica group."""
    trips: int
    """Repetitions in a step."""
    path: str
    """Path of its layer."""
    name: str
    """Its name in the program."""


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"%([\w.\-]+)")
_LOOP_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(
    r"(?:to_apply|calls|called_computations=\{|true_computation|false_computation)=?%?([\w.\-]+)"
)
_CALLS = ("call", "conditional", "fusion", "async-start")


def emitted(text: str) -> list[Emitted]:
    """The collectives in the text of a compiled program, those in loops with the trip counts."""
    computations: dict[str, list[str]] = {}
    current = ""
    entry = ""
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match and not line.startswith(" "):
            current = match.group(1)
            computations[current] = []
            if line.startswith("ENTRY"):
                entry = current
        elif current:
            computations[current].append(line)
    return list(_collectives(computations, entry, 1))


def _collectives(
    computations: Mapping[str, Sequence[str]], computation: str, trips: int
) -> Iterator[Emitted]:
    """The collectives of a computation that runs `trips` times, and of those that it calls."""
    names: dict[str, str] = {}
    for line in computations.get(computation, ()):
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        opcode = match.group(3)
        op_name = _OP_NAME.search(line)
        names[match.group(1)] = op_name.group(1) if op_name else ""
        kind = KINDS.get(opcode.removesuffix("-start"))
        if kind:
            yield from _tensors(line, match, kind, names, trips)
        elif opcode == "while":
            body = _LOOP_BODY.search(line)
            count = _TRIP_COUNT.search(line)
            if body:
                loop_trips = int(count.group(1)) if count else 1
                yield from _collectives(computations, body.group(1), trips * loop_trips)
        elif opcode in _CALLS:
            for called in _CALLED.findall(line):
                yield from _collectives(computations, called, trips)


def _tensors(
    line: str,
    match: re.Match[str],
    kind: str,
    names: Mapping[str, str],
    trips: int,
) -> Iterator[Emitted]:
    """An entry per tensor of a collective.

    XLA combines several into one, so the name is that of the operand.
    """
    name = names[match.group(1)]
    group = _group(line)
    shapes = _SHAPE.findall(match.group(2))
    if match.group(3).endswith("-start"):
        sizes = [_nbytes(*shape) for shape in shapes]
        # The result of a start has its operands and its results.
        nbytes = max(sizes) if len(sizes) <= 2 else sum(sizes) // 2
        yield Emitted(
            kind,
            nbytes,
            group,
            trips,
            layer_path(name),
            name,
        )
        return
    operands = _OPERAND.findall(line[match.end() : line.index(")", match.end())])
    combined = len(shapes) == len(operands) > 1
    for position, shape in enumerate(shapes):
        tensor_name = name
        if combined:
            tensor_name = names.get(operands[position], "") or name
        path = layer_path(tensor_name)
        yield Emitted(
            kind,
            _nbytes(*shape),
            group,
            trips,
            path,
            tensor_name,
        )


def _nbytes(dtype: str, dims: str) -> int:
    size = math.prod(int(dim) for dim in dims.split(",") if dim)
    return size * ITEMSIZE.get(HLO_DTYPES.get(dtype, ""), 4)


def _group(line: str) -> int:
    """Number of devices in a replica group of a collective; 2 for a permute."""
    match = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if match:
        return int(match.group(2))
    match = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if match:
        return len(match.group(1).split(","))
    match = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return 2 if match else 0


def peak_bytes(compiled: Any) -> int:
    """Peak memory per device by the compiler: arguments, outputs and temporaries, aliases counted
    once.
    """
    analysis = compiled.memory_analysis()
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
