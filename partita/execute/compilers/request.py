"""A planned step, or a piece of one, as a request to compile it: annotated program, shardings,
target.

A request is a folder of two files, so that a child process can read it: `request.json`, and
`program.bin`, the MLIR bytecode of the annotated step. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from partita.capture.jax_functions import Captured
from partita.execute.annotate import annotate
from partita.execute.compilers.base import CompileTarget
from partita.execute.dispatch import PieceRole
from partita.execute.program import check_one_program, leaf_shardings
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

    role: PieceRole
    scale: float
    """Factor of sums over microbatches."""
    shardings: tuple[SpecText, ...]
    """Of the outputs."""

    @staticmethod
    def from_json(value: dict[str, Any]) -> PieceRequest:
        """The value that `dataclasses.asdict` gave, from JSON."""
        role = {name: tuple(positions) for name, positions in value["role"].items()}
        return PieceRequest(PieceRole(**role), value["scale"], tuple(value["shardings"]))


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
    piece: PieceRequest | None = None
    """For a piece of a step, which has no state: its inputs are its arguments."""

    def to_json(self) -> dict[str, Any]:
        """All but the program."""
        values = asdict(self)
        del values["program"]
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
        program=annotate(text.mlir_module_serialized, graph, plan.mesh, layout),
        inputs=tuple(_array(aval) for aval in text.in_avals),
        outputs=tuple(_array(aval) for aval in text.out_avals),
        kept=tuple(text.module_kept_var_idx),
        state_count=len(jax.tree.leaves(captured.state)),
        axes=_axes(plan.mesh),
        shardings=tuple(shardings),
        target=target,
    )


def piece_request_of(step: StepInPieces, number: int, target: CompileTarget) -> CompileRequest:
    """The request for a piece of a step."""
    piece = step.cut.pieces[number]
    place = step.layouts[piece.place]
    text = step.text(number)

    def spec(tensor: int) -> SpecText:
        stored_as = step.cut.argument_of.get(tensor, tensor)
        return _spec(place.layout.shardings[stored_as], place.mesh)

    return CompileRequest(
        program=text.mlir_module_serialized,
        inputs=tuple(_array(aval) for aval in text.in_avals),
        outputs=tuple(_array(aval) for aval in text.out_avals),
        kept=tuple(text.module_kept_var_idx),
        state_count=0,
        axes=_axes(place.mesh),
        shardings=tuple(spec(t) for t in piece.reads),
        target=target,
        piece=PieceRequest(
            role=step.dispatch.roles[number],
            scale=1 / step.plan.microbatches,
            shardings=tuple(spec(t) for t in piece.gives),
        ),
    )


def _spec(sharding: Sharding, mesh: Mesh) -> SpecText:
    return [[mesh.axes[axis].name for axis in axes] for axes in sharding]


def _axes(mesh: Mesh) -> tuple[tuple[str, int], ...]:
    return tuple((axis.name, axis.size) for axis in mesh.axes) or (("a", 1),)


def _array(aval: Any) -> ArrayText:
    """Shape and dtype of an array; of its data for an array of random keys."""
    if jax.numpy.issubdtype(aval.dtype, jax.dtypes.prng_key):
        aval = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return list(aval.shape), str(aval.dtype)
