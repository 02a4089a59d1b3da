"""The stages of a model as groups of pieces, each of which is one operator of a memory plan.

Stages become pieces (`pieces.Piece`): dense products, cut by rows, and aggregations, cut by
columns. A stage without pieces is one piece on all. Neighbours by rows become one group, whose
inner tables exist only inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras

from partita.errors import GraphError
from partita.gnn.nn.block import AXIS
from partita.gnn.nn.pieces import BlockPiece, by_rows
from partita.gnn.prepare import GraphData
from partita.gnn.step import StepState, build_metrics


@dataclass(frozen=True)
class StagePiece:
    """A piece with the names of tables of the whole model.

    stage       number of the stage
    used        numbers of the trainable variables that it reads
    changed     numbers of the other variables that it changes
    penalizes   whether it adds to the loss

    Tables are "x0", the features, to "xn", the output, after the stages, and "name.i" inside stage
    i.
    """

    stage: int
    piece: BlockPiece
    used: tuple[int, ...]
    changed: tuple[int, ...]
    penalizes: bool


@dataclass(frozen=True)
class PieceGroup:
    """Pieces that are one operator.

    used        numbers of the trainable variables that it reads
    penalizes   whether a layer of it adds to the loss, as by `add_loss`
    stage       number of the stage of its last piece
    """

    by: str
    pieces: tuple[BlockPiece, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    used: tuple[int, ...]
    penalizes: bool = False
    stage: int = 0

    @property
    def linear(self) -> bool:
        """Whether the gradient does not depend on the values of the tables."""
        return not self.penalizes and all(piece.linear for piece in self.pieces)


@dataclass(frozen=True)
class GroupedModel:
    """The groups of a model in order, and the shapes and types of all tables."""

    groups: tuple[PieceGroup, ...]
    shapes: dict[str, Any]


def stages_of(model: Any) -> list[Any]:
    """The stages of a model. GraphError if its `call` does something else than to run them."""
    for kind in type(model).__mro__:
        if "stages" in vars(kind):
            return model.stages()
        if "call" in vars(kind):
            break
    raise GraphError(
        f"{type(model).__name__} has a call of its own, and a memory plan runs a model's stages: "
        "give it stages() beside call, or remove memory."
    )


def run_group(
    model: Any,
    group: PieceGroup,
    variables: tuple[Any, Any],
    graph: Any,
    column: Any,
    tables: dict[str, Any],
) -> tuple[list[Any], dict[int, Any], list[Any]]:
    """(tables written, other variables that changed by their number, penalties).

    `variables`: (trainable, others), from which each piece begins; `column`: the number of the
    first column. Penalties are those that layers add to the loss, scalars.
    """
    trainable, others = variables
    values = [
        *zip(model.trainable_variables, trainable, strict=True),
        *zip(model.non_trainable_variables, others, strict=True),
    ]
    tables = dict(tables)
    changed: dict[int, Any] = {}
    penalties: list[Any] = []
    for piece in group.pieces:
        with keras.StatelessScope(state_mapping=values, collect_losses=True) as scope:
            before = [scope.get_current_value(v) for v in model.non_trainable_variables]
            results = piece.function(graph, column, *(tables[name] for name in piece.reads))
        tables.update(zip(piece.writes, results, strict=True))
        penalties += scope.losses
        for k, variable in enumerate(model.non_trainable_variables):
            value = scope.get_current_value(variable)
            if value is not before[k]:
                changed[k] = value
    return [tables[name] for name in group.writes], changed, penalties


def grouped_model(
    model: Any, features: tuple[int, ...], data: GraphData, state: StepState, training: bool
) -> GroupedModel:
    """The groups of a model, from features of this shape.

    GraphError if two stages change one variable.

    `state`: shapes of the variables. Pieces are traced; nothing is computed.
    """
    stages = stages_of(model)
    shapes: dict[str, Any] = {"x0": jax.ShapeDtypeStruct(features, jnp.float32)}
    stage_pieces: list[StagePiece] = []
    trace = partial(_traced, model, data, state)
    for i, stage in enumerate(stages):
        width = shapes[f"x{i}"].shape[-1]
        pieces = _pieces(stage, width, training, is_last=i == len(stages) - 1)
        members, shapes_after = _members(trace, i, pieces, shapes)
        if any(member.penalizes and member.piece.by != "whole" for member in members):
            # A penalty may be of all rows together, such as a mean.
            pieces = [_whole_piece(stage, training)]
            members, shapes_after = _members(trace, i, pieces, shapes)
        stage_pieces += members
        shapes = shapes_after
    _check_owners(model, stage_pieces)
    built = partial(build_metrics, model, splits=True)
    jax.eval_shape(built, data, shapes[f"x{len(stages)}"])
    return GroupedModel(_grouped(stage_pieces), shapes)


def _members(
    trace: Any, stage: int, pieces: Sequence[BlockPiece], shapes: dict[str, Any]
) -> tuple[list[StagePiece], dict[str, Any]]:
    """(pieces of a stage with the model's names, shapes of all tables so far)."""
    shapes = dict(shapes)
    members = []
    for piece in pieces:
        named = replace(
            piece,
            reads=tuple(_table_name(stage, name) for name in piece.reads),
            writes=tuple(_table_name(stage, name) for name in piece.writes),
        )
        written, changed, used, penalizes = trace(named, shapes)
        shapes |= zip(named.writes, written, strict=True)
        members.append(StagePiece(stage, named, used, changed, penalizes))
    return members, shapes


def _check_owners(model: Any, stage_pieces: Sequence[StagePiece]) -> None:
    """GraphError if two stages change one variable."""
    owners: dict[int, int] = {}
    for member in stage_pieces:
        for k in member.changed:
            owner = owners.setdefault(k, member.stage)
            if owner != member.stage:
                path = model.non_trainable_variables[k].path
                raise GraphError(
                    f"Stages {owner} and {member.stage} both change {path}, and a memory plan runs "
                    "stages by themselves: give each stage layers of its own, or remove memory."
                )


def _whole_piece(stage: Any, training: bool) -> BlockPiece:
    """A stage as one piece on all vertices."""

    def whole(graph: Any, column: Any, x: Any) -> tuple[Any]:
        return (stage(x, graph, training),)

    return BlockPiece("whole", ("x",), ("y",), whole)


def _pieces(stage: Any, width: int, training: bool, is_last: bool) -> Sequence[BlockPiece]:
    """The pieces of a stage, from rows of `width` features.

    The last one of the model is cut by rows or whole.
    """
    pieces = stage.pieces(width, training) if hasattr(stage, "pieces") else None
    if pieces is None:
        return [_whole_piece(stage, training)]
    if not is_last or pieces[-1].by != "columns":
        return pieces
    renamed = []
    for piece in pieces:
        writes = tuple("last" if name == "y" else name for name in piece.writes)
        renamed.append(replace(piece, writes=writes))
    return [*renamed, by_rows("last", "y", lambda x: x)]


def _table_name(stage: int, name: str) -> str:
    """The name in the whole model of a table of a stage."""
    if name == "x":
        return f"x{stage}"
    return f"x{stage + 1}" if name == "y" else f"{name}.{stage}"


def _traced(
    model: Any, data: GraphData, state: StepState, piece: BlockPiece, shapes: dict[str, Any]
) -> tuple[list[Any], tuple[int, ...], tuple[int, ...], bool]:
    """(shapes of tables written, numbers of other variables that change, those used, penalizes)."""
    alone = PieceGroup(piece.by, (piece,), piece.reads, piece.writes, ())

    def run(trainable: Any, others: Any, graph: Any, *tables: Any) -> Any:
        named = dict(zip(piece.reads, tables, strict=True))
        return run_group(model, alone, (trainable, others), graph, 0, named)

    tables = [shapes[name] for name in piece.reads]
    axes = [(AXIS, data.block.parts)]
    trace = jax.make_jaxpr(run, axis_env=axes, return_shape=True)
    program, (written, changed, penalties) = trace(
        state.trainable, state.others, data.block, *tables
    )
    read = {id(variable) for variable in program.jaxpr.outvars}
    for equation in program.jaxpr.eqns:
        read |= {id(variable) for variable in equation.invars}
    numbers = range(len(state.trainable))
    used = tuple(k for k in numbers if id(program.jaxpr.invars[k]) in read)
    return written, tuple(changed), used, bool(penalties)


def _grouped(stage_pieces: Sequence[StagePiece]) -> tuple[PieceGroup, ...]:
    """Pieces with neighbours that are cut by rows together."""
    ends = []
    for n, member in enumerate(stage_pieces):
        follows = n > 0 and member.piece.by == "rows" == stage_pieces[n - 1].piece.by
        if follows:
            ends[-1] = n + 1
        else:
            ends.append(n + 1)
    groups = []
    first = 0
    outputs = set(stage_pieces[-1].piece.writes)
    for end in ends:
        members = stage_pieces[first:end]
        later = {name for member in stage_pieces[end:] for name in member.piece.reads} | outputs
        groups.append(_group(members, later))
        first = end
    return tuple(groups)


def _group(members: Sequence[StagePiece], later: set[str]) -> PieceGroup:
    """Pieces as one group; `later`: the tables that are read after it."""
    pieces = tuple(member.piece for member in members)
    inner = [name for piece in pieces for name in piece.writes]
    outer = [name for piece in pieces for name in piece.reads if name not in inner]
    used = {number for member in members for number in member.used}
    return PieceGroup(
        by=pieces[0].by,
        pieces=pieces,
        reads=tuple(dict.fromkeys(outer)),
        writes=tuple(name for name in inner if name in later),
        used=tuple(sorted(used)),
        penalizes=any(member.penalizes for member in members),
        stage=members[-1].stage,
    )
