"""A planned step, or a piece of one, as a request to compile it: annotated program, shardings,
target.

A request is a folder of two files, so that a child process can read it: `request.json`, and
`program.bin`, the MLIR bytecode of the annotated step. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.extend.mlir import ir

from partita.capture import stablehlo
from partita.capture.jax_functions import Captured
from partita.capture.names import location_name
from partita.execute.annotate import annotate
from partita.execute.compilers.base import CompileTarget
from partita.execute.dispatch import PieceRole
from partita.execute.piece_text import aval
from partita.execute.program import check_one_program, host_leaves, leaf_shardings
from partita.execute.rematerialize import rematerialized_step
from partita.execute.staged import StepInPieces
from partita.plans.check import check
from partita.plans.layout import Sharding, layout_of
from partita.plans.plan import Mesh, Plan

PROGRAM_FILE = "program.bin"
REQUEST_FILE = "request.json"
RESULT_FILE = "result.json"
TEXT_FILE = "program.hlo.gz"

SpecText = list[list[str]]
"""Axes of every dim of a tensor, by name; empty if it is replicated."""


ArrayText = tuple[list[int], str]
"""Shape and dtype of an array."""


@dataclass(frozen=True)
class PieceRequest:
    """The part of a request that pieces of a step have beside their program."""

    role: PieceRole | None
    """None for the sums over devices that a piece waits for, which have no program."""
    scale: float
    """Factor of sums over microbatches."""
    shardings: tuple[SpecText, ...]
    """Of the outputs."""
    partial: tuple[tuple[str, ...], ...]
    """Per output the axes over which it stays a sum of a device, or, for sums over devices, over
    which the input is one.
    """

    @staticmethod
    def from_json(value: dict[str, Any]) -> PieceRequest:
        """The value that `dataclasses.asdict` gave, from JSON."""
        role = value["role"]
        if role is not None:
            role = PieceRole(**{name: tuple(positions) for name, positions in role.items()})
        partial = tuple(tuple(names) for names in value["partial"])
        return PieceRequest(role, value["scale"], tuple(value["shardings"]), partial)


@dataclass(frozen=True)
class CompileRequest:
    """A planned step to compile. Its inputs and outputs are flat: state, then batch."""

    program: bytes
    """The annotated module."""
    inputs: tuple[ArrayText, ...]
    outputs: tuple[ArrayText, ...]
    kept: tuple[int, ...]
    """Positions of the inputs that the module takes; the step reads no others."""
    state_count: int
    """The first inputs are the state; they are donated, and the last outputs are the new state."""
    axes: tuple[tuple[str, int], ...]
    """Names and sizes of the mesh."""
    shardings: tuple[SpecText, ...]
    """Of the inputs."""
    target: CompileTarget
    host: tuple[int, ...] = ()
    """The inputs of the state in the memory of the host."""
    piece: PieceRequest | None = None
    """For a piece of a step, which has no state: its inputs are its arguments."""

    def to_json(self) -> dict[str, Any]:
        """All but the program."""
        values = asdict(self)
        del values["program"]
        if not self.host:
            del values["host"]
        return values

    def digest(self, compiler_version: str, flags: str) -> str:
        """The key of the compiled program in the cache."""
        content = hashlib.sha256(self.program)
        for part in (json.dumps(self.to_json(), sort_keys=True), compiler_version, flags):
            content.update(part.encode())
        return content.hexdigest()[:32]

    def write(self, folder: Path) -> None:
        """Writes the two files."""
        (folder / PROGRAM_FILE).write_bytes(self.program)
        (folder / REQUEST_FILE).write_text(json.dumps(self.to_json()), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> CompileRequest:
        """The request of a folder."""
        values = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
        return CompileRequest(
            program=(folder / PROGRAM_FILE).read_bytes(),
            inputs=tuple(values["inputs"]),
            outputs=tuple(values["outputs"]),
            kept=tuple(values["kept"]),
            state_count=values["state_count"],
            axes=tuple((name, size) for name, size in values["axes"]),
            shardings=tuple(values["shardings"]),
            target=CompileTarget(**values["target"]),
            host=tuple(values.get("host", ())),
            piece=PieceRequest.from_json(values["piece"]) if values["piece"] else None,
        )


def request_of(captured: Captured, plan: Plan, target: CompileTarget) -> CompileRequest:
    """The request for a captured step under a plan. PlanError for a plan that cannot run."""
    check(plan, captured.graph)
    check_one_program(plan)
    captured = rematerialized_step(captured, plan)
    graph = captured.graph
    layout = layout_of(graph, plan)
    text = captured.text
    shardings = [_spec(sharding, plan.mesh) for sharding in leaf_shardings(captured, layout)]
    return CompileRequest(
        program=_without_lines(annotate(text.mlir_module_serialized, graph, plan.mesh, layout)),
        inputs=tuple(_array(x) for x in text.in_avals),
        outputs=tuple(_array(x) for x in text.out_avals),
        kept=tuple(text.module_kept_var_idx),
        state_count=len(jax.tree.leaves(captured.state)),
        axes=_axes(plan.mesh),
        shardings=tuple(shardings),
        target=target,
        host=tuple(sorted(host_leaves(captured, layout))),
    )


def piece_request_of(step: StepInPieces, number: int, target: CompileTarget) -> CompileRequest:
    """The request for a piece of a step."""
    piece = step.cut.pieces[number]
    place = step.layouts[piece.place]
    text = step.text(number)
    return CompileRequest(
        program=_without_lines(text.mlir_module_serialized),
        inputs=tuple(_array(x) for x in text.in_avals),
        outputs=tuple(_array(x) for x in text.out_avals),
        kept=tuple(text.module_kept_var_idx),
        state_count=0,
        axes=_axes(place.mesh),
        shardings=_stored_as(step, piece.place, piece.reads),
        target=target,
        piece=PieceRequest(
            role=step.dispatch.roles[number],
            scale=1 / step.plan.microbatches,
            shardings=_stored_as(step, piece.place, piece.gives),
            partial=tuple(step.partial_axes(t, piece.place) for t in piece.gives),
        ),
    )


def device_sums_request_of(
    step: StepInPieces, number: int, target: CompileTarget
) -> CompileRequest:
    """The request for the sums over devices that a piece of a step waits for."""
    tensors = step.device_sums_of(number)
    place = step.cut.pieces[number].place
    arrays = tuple(_array(aval(step.cut.flow.graph.tensors[t])) for t in tensors)
    shardings = _stored_as(step, place, tensors)
    partial = tuple(step.partial_axes(t, place) for t in tensors)
    return CompileRequest(
        program=b"",
        inputs=arrays,
        outputs=arrays,
        kept=(),
        state_count=0,
        axes=_axes(step.layouts[place].mesh),
        shardings=shardings,
        target=target,
        piece=PieceRequest(None, 1.0, shardings, partial),
    )


def _without_lines(source: bytes) -> bytes:
    """A program whose instructions have the names of their layers, and no lines of files.

    So the cache finds the program again after an edit elsewhere in the user's script.
    """

    def drop(operation: Any) -> ir.WalkResult:
        operation.location = ir.Location.name(location_name(operation))
        return ir.WalkResult.ADVANCE

    with stablehlo.context():
        module = stablehlo.parse(source)
        module.operation.walk(drop)
        return stablehlo.serialize(module)


def _stored_as(step: StepInPieces, place: int, tensors: Sequence[int]) -> tuple[SpecText, ...]:
    """The shardings of tensors on a place; new state is stored as the old."""
    layout = step.layouts[place].layout
    argument_of = step.cut.argument_of
    shardings = [layout.shardings[argument_of.get(t, t)] for t in tensors]
    return tuple(_spec(sharding, step.layouts[place].mesh) for sharding in shardings)


def _spec(sharding: Sharding, mesh: Mesh) -> SpecText:
    return [[mesh.axes[axis].name for axis in axes] for axes in sharding]


def _axes(mesh: Mesh) -> tuple[tuple[str, int], ...]:
    return tuple((axis.name, axis.size) for axis in mesh.axes) or (("a", 1),)


def _array(aval: Any) -> ArrayText:
    """Shape and dtype of an array; of its data for an array of random keys."""
    if jax.numpy.issubdtype(aval.dtype, jax.dtypes.prng_key):
        aval = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return list(aval.shape), str(aval.dtype)
