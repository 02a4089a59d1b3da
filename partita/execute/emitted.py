"""What the compiler emitted: the collectives of a compiled step, read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
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
    """One collective of the compiled program. `nbytes` is per device: the result of an all-gather, else the operand."""

    kind: str
    nbytes: int
    group: int
    trips: int
    path: str
    name: str


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def emitted(text: str) -> list[Emitted]:
    """The collectives in a compiled program's text, those in loops with the loops' trip counts."""
    computations: dict[str, list[str]] = {}
    current = entry = ""
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


def _collectives(computations: dict[str, list[str]], name: str, trips: int) -> Iterator[Emitted]:
    names: dict[str, str] = {}
    for line in computations.get(name, ()):
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        opcode = match.group(3)
        own = re.search(r'op_name="([^"]*)"', line)
        names[match.group(1)] = own.group(1) if own else ""
        kind = KINDS.get(opcode.removesuffix("-start"))
        if kind:
            yield from _parts(line, match, kind, names, trips)
        elif opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", line)
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            if body:
                yield from _collectives(
                    computations, body.group(1), trips * (int(count.group(1)) if count else 1)
                )
        elif opcode in ("call", "conditional", "fusion", "async-start"):
            for called in re.findall(
                r"(?:to_apply|calls|called_computations=\{|true_computation|false_computation)=?%?([\w.\-]+)",
                line,
            ):
                yield from _collectives(computations, called, trips)


def _parts(
    line: str, match: re.Match[str], kind: str, names: dict[str, str], trips: int
) -> Iterator[Emitted]:
    """One entry per tensor of a collective: XLA combines several into one, whose name then says little; that of its operand does."""
    own, group = names[match.group(1)], _group(line)
    shapes = _SHAPE.findall(match.group(2))
    operands = re.findall(r"%([\w.\-]+)", line[match.end() : line.index(")", match.end())])
    if match.group(3).endswith("-start"):
        size = (
            max(_nbytes(*s) for s in shapes)
            if len(shapes) <= 2
            else sum(_nbytes(*s) for s in shapes) // 2
        )
        yield Emitted(kind, size, group, trips, layer_path(own), own)
        return
    for position, shape in enumerate(shapes):
        source = names.get(operands[position], "") if len(shapes) == len(operands) > 1 else ""
        full = source or own
        yield Emitted(kind, _nbytes(*shape), group, trips, layer_path(full), full)


def _nbytes(dtype: str, dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d) * ITEMSIZE.get(
        HLO_DTYPES.get(dtype, ""), 4
    )


def _group(line: str) -> int:
    match = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if match:
        return int(match.group(2))
    match = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if match:
        return len(match.group(1).split(","))
    match = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return 2 if match else 0


def peak_bytes(compiled: Any) -> int:
    """Peak memory per device by the compiler's own account: arguments, outputs and temporaries, aliases counted once."""
    m = compiled.memory_analysis()
    return int(
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        + m.temp_size_in_bytes
        - m.alias_size_in_bytes
    )
