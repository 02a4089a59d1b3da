"""The collectives and the peak memory of a compiled step, read from the compiled program.

Compilers write one collective in several ways. XLA:GPU writes a start and a done, and combines
tensors of several layers into one. XLA:TPU repeats an asynchronous collective in every fusion that
runs beside it, all with one chain, and writes a reduce-scatter as a fusion of an all-reduce and a
slice. The result has each collective once, under the name that a plan has for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from partita.capture.names import layer_path
from partita.execute.hlo import HloInstruction, HloModule, HloShape, Visit

KINDS = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "reduce-scatter": "reduce_scatter",
    "collective-permute": "collective_permute",
}
SCATTERING = "all-reduce-scatter"
"""Beginning of the name of the fusions that are reduce-scatters of XLA:TPU."""


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


def emitted(text: str) -> list[Emitted]:
    """The collectives in the text of a compiled program, those in loops with the trip counts."""
    return collectives_of(HloModule.of(text))


def collectives_of(module: HloModule) -> list[Emitted]:
    """The collectives of a compiled program, each tensor of a combined one by itself."""
    result: list[Emitted] = []
    chains: set[tuple[str, str, int]] = set()
    for visit in module.visits():
        instruction = visit.instruction
        opcode = instruction.opcode.removesuffix("-start")
        if opcode not in KINDS:
            continue
        chain = chain_of(instruction)
        if chain:
            key = (opcode, chain, visit.trips)
            if key in chains:
                continue
            chains.add(key)
        result += _tensors(module, visit, _kind(visit, KINDS[opcode]))
    return result


def chain_of(instruction: HloInstruction) -> str:
    """Channel and chain of an asynchronous collective that several fusions contain, else ""."""
    chain = re.search(r'chain_id="(\d+)"', instruction.line)
    channel = re.search(r"channel_id=(\d+)", instruction.line)
    if chain is None or channel is None:
        return ""
    return f"{channel[1]}/{chain[1]}"


def _kind(visit: Visit, kind: str) -> str:
    """The kind that a plan has for a collective."""
    if kind == "all_reduce" and visit.computation.startswith(SCATTERING):
        return "reduce_scatter"
    return kind


def _tensors(module: HloModule, visit: Visit, kind: str) -> Iterator[Emitted]:
    """An entry per tensor of a collective.

    XLA combines several into one, so the name is that of the operand.
    """
    instruction = visit.instruction
    name = instruction.op_name or _name_outside(visit)
    group = _group(instruction.line)
    shapes = _moved(module, visit)
    operands = instruction.operands
    combined = len(shapes) == len(operands) > 1
    for position, shape in enumerate(shapes):
        tensor_name = name
        if combined:
            tensor_name = module.name_of(visit, operands[position]) or name
        yield Emitted(
            kind=kind,
            nbytes=shape.nbytes,
            group=group,
            trips=visit.trips,
            path=layer_path(tensor_name),
            name=tensor_name,
        )


def _name_outside(visit: Visit) -> str:
    """The name of the fusion that a collective is a part of, "" if it is not."""
    return visit.caller.instruction.op_name if visit.caller is not None else ""


def _moved(module: HloModule, visit: Visit) -> tuple[HloShape, ...]:
    """The tensors whose bytes count: results of an all-gather, else the operands.

    The result of a start is the pair of its operands and its results, besides that of an
    all-reduce, and may have counters behind them.
    """
    instruction = visit.instruction
    shapes = instruction.shapes
    opcode = instruction.opcode
    count = len(instruction.operands)
    if opcode.endswith("-start") and opcode != "all-reduce-start" and len(shapes) >= 2 * count:
        is_gather = opcode.startswith("all-gather")
        return shapes[count : 2 * count] if is_gather else shapes[:count]
    if opcode == "reduce-scatter":
        operands = module.operand_shapes(visit)
        return operands if len(operands) == len(shapes) else shapes
    return shapes


def _group(line: str) -> int:
    """Number of devices in a replica group of a collective; 2 for a permute."""
    match = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if match:
        return int(match[2])
    match = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if match:
        return len(match[1].split(","))
    match = re.search(r"replica_groups=(?:@\w+|mesh\[([^\]]*)\])[^{]*\{([^}]*)\}", line)
    if match:
        return _mesh_group(match[1] or "", match[2])
    match = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return 2 if match else 0


def _mesh_group(mesh: str, axes: str) -> int:
    """Devices of a group over axes of a mesh, whole ones ('a') or parts ('a':(1)2).

    >>> _mesh_group("'a'=4,'b'=2", "'a', 'b'"), _mesh_group("'a'=8", "'a':(1)2")
    (8, 2)
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    group = 1
    for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes):
        group *= int(part) if part else sizes.get(name, 1)
    return group


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
