"""The operators of a step within a budget, each a compiled program.

Tables lie in tiles (`tables`), the tensors of the plan. The smaller the budget, the smaller are
tiles. Each job on each range is an operator. Jobs on ranges of equal size share a program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from partita.gnn.kernels.bridge import step_options
from partita.gnn.nn.block import AXIS
from partita.gnn.prepare import GraphData, mesh_of
from partita.gnn.spill.groups import GroupedModel, PieceGroup
from partita.gnn.spill.jobs import Carry, Job, JobInputs, first_carry, jobs_of
from partita.gnn.spill.plan import LayerOperator, StepWork
from partita.gnn.spill.tables import Table, TileCuts, array_bytes, is_tiled, ranges
from partita.gnn.step import StepState, exchanged_bytes, loss_scale, on_each_device, peak_bytes

FINENESS = (1, 2, 4, 8, 16)
"""Numbers of columns that tables may be cut into, with twice that number of rows; 1 is uncut."""

PLACES = 16
"""Tables are cut until the budget holds the largest operator this many times: its scratch, and
tiles that wait."""

NARROW = 4
"""Columns of a tile at least."""


@dataclass(frozen=True)
class Run:
    """An operator as it runs.

    program         `program(carry, (data, tables), (trainable, others, first))`
    first           number of the first row or column
    reads, writes   its tiles
    read_cuts       how these tiles lie in the tables that it reads
    write_cuts      how these tiles lie in the tables that it writes
    exchanged_bytes bytes of rows that the devices exchange, padding included
    """

    program: Any
    first: Any
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    read_cuts: tuple[TileCuts, ...] = ()
    write_cuts: tuple[TileCuts, ...] = ()
    exchanged_bytes: int = 0


@dataclass(frozen=True)
class CompiledStep:
    """A step of one kind.

    work        its operators, for the planner
    runs        operators as they run, by name
    features    (rows, columns) of each tile of the features
    """

    work: StepWork
    runs: dict[str, Run]
    features: dict[str, tuple[slice, slice]]


@dataclass(frozen=True)
class ModelShapes:
    """A model with the shapes of its variables, and of the data of a graph without features.

    data        of one device, of `data.block.parts`
    compiles    whether operators are compiled, to run; else their scratch is the larger of their
                inputs and outputs and of the values inside, and no device is needed
    """

    model: Any
    state: StepState
    data: GraphData
    compiles: bool = True

    @property
    def devices(self) -> int:
        return self.data.block.parts

    def own(self, shapes: Any) -> Any:
        """The shapes of arrays of which each device has its own."""
        return self._placed(shapes, PartitionSpec(AXIS), (self.devices,))

    def equal(self, shapes: Any) -> Any:
        """The shapes of arrays that are equal on every device."""
        return self._placed(shapes, PartitionSpec(), ())

    def _placed(self, shapes: Any, spec: PartitionSpec, before: tuple[int, ...]) -> Any:
        """The shapes with dims `before` theirs, over several devices."""
        if self.devices == 1:
            return shapes
        sharding = NamedSharding(mesh_of(self.devices), spec)

        def placed(shape: Any) -> jax.ShapeDtypeStruct:
            dims = (*before, *shape.shape)
            return jax.ShapeDtypeStruct(dims, shape.dtype, sharding=sharding)

        return jax.tree.map(placed, shapes)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that are always allocated on a device.

        Data, variables before and after the step, gradients.
        """
        trainable, others, optimizer = self.state
        once = jax.tree.leaves((self.data, others, others))
        twice = jax.tree.leaves((trainable, optimizer, trainable))
        return sum(map(array_bytes, once)) + 2 * sum(map(array_bytes, twice))


def fitted_step(
    shapes: ModelShapes, grouped: GroupedModel, budget: int
) -> tuple[int, CompiledStep]:
    """(fineness, the training step) of the coarsest tables that leave space beside an operator."""
    available = budget - shapes.fixed_bytes
    cuttable = any(group.by != "whole" for group in grouped.groups)
    options = FINENESS if cuttable else FINENESS[:1]
    for fineness in options[:-1]:
        if _estimated_bytes(grouped, fineness) > available:
            continue
        step = compiled_step(shapes, grouped, "train", fineness)
        if step.work.smallest_budget() <= budget:
            return fineness, step
    return options[-1], compiled_step(shapes, grouped, "train", options[-1])


def _estimated_bytes(grouped: GroupedModel, fineness: int) -> int:
    """Bytes that make tables of this fineness worth compiling."""
    if fineness == 1:
        return 2 * sum(map(array_bytes, grouped.shapes.values()))
    tables = cut_tables(grouped, fineness)
    operators = []
    for group in grouped.groups:
        parts = [tables[name].part(group.by, 0) for name in group.reads + group.writes]
        operators.append(sum(map(array_bytes, parts)))
    return PLACES * max(operators)


def cut_tables(grouped: GroupedModel, fineness: int) -> dict[str, Table]:
    """The tables with their tiles: by rows where an operator is, by columns where one is."""
    tables = {}
    for name, shape in grouped.shapes.items():
        groups = [group for group in grouped.groups if name in group.reads + group.writes]
        if groups:
            tables[name] = _cut_table(shape, groups, fineness)
    return tables


def _cut_table(shape: Any, groups: Sequence[PieceGroup], fineness: int) -> Table:
    """A table that these groups read or write."""
    by_columns = [group for group in groups if group.by == "columns"]
    grains = [piece.grain for group in by_columns for piece in group.pieces]
    height = shape.shape[0]
    width = math.prod(shape.shape[1:])
    rows = columns = 1
    if fineness > 1:
        rows = 2 * fineness if any(group.by == "rows" for group in groups) else 1
        columns = fineness if grains else 1
    grain = math.lcm(*grains) if grains else 1
    tile_columns = max(width / columns, min(NARROW, width))
    tile_width = math.ceil(tile_columns / grain) * grain
    return Table(
        shape.shape,
        shape.dtype,
        ranges(height, math.ceil(height / rows)),
        ranges(width, tile_width),
    )


def compiled_step(
    shapes: ModelShapes, grouped: GroupedModel, kind: str, fineness: int
) -> CompiledStep:
    """The operators of a step of this kind (`jobs.KINDS`), each compiled."""
    begin = partial(first_carry, shapes.model, shapes.devices)
    carry = jax.eval_shape(begin, shapes.state.trainable, shapes.state.others)
    assembly = _Assembly(shapes, grouped, cut_tables(grouped, fineness), carry)
    for job in jobs_of(shapes.model, grouped, kind):
        assembly.add(job)
    if kind == "train":
        assembly.add_update()
    work = StepWork(tuple(assembly.operators), assembly.tile_bytes, shapes.fixed_bytes)
    return CompiledStep(work, assembly.runs, assembly.features)


@dataclass(frozen=True)
class _Program:
    """A compiled job: bytes of its scratch, and those that devices exchange."""

    run: Any
    scratch: int
    exchanged_bytes: int


@dataclass
class _Assembly:
    """The operators of a step while they are compiled."""

    shapes: ModelShapes
    grouped: GroupedModel
    tables: dict[str, Table]
    carry: Carry
    operators: list[LayerOperator] = field(default_factory=list)
    runs: dict[str, Run] = field(default_factory=dict)
    tile_bytes: dict[str, int] = field(default_factory=dict)
    features: dict[str, tuple[slice, slice]] = field(default_factory=dict)
    programs: dict[tuple[str, int, int], _Program] = field(default_factory=dict)

    def add(self, job: Job) -> None:
        """Adds the operators of a job, one for each range."""
        group = self.grouped.groups[job.number]
        parts = list(enumerate(self._ranges(group)))
        family = f"{job.kind} {job.number}"
        several = len(parts) > 1
        if job.kind == "backward":
            parts.reverse()
        for k, part in parts:
            name = f"{family}[{k}]" if several else family
            self._add_operator(name, family, job, group, k, part)

    def _ranges(self, group: PieceGroup) -> Sequence[slice]:
        """The ranges that an operator runs on one after the other."""
        table = self.tables[(group.reads + group.writes)[0]]
        if group.by == "rows":
            return table.rows
        return table.columns if group.by == "columns" else (slice(0, 0),)

    def _add_operator(
        self, name: str, family: str, job: Job, group: PieceGroup, k: int, part: slice
    ) -> None:
        """Adds the operator of a job on its k-th range."""
        by = group.by
        inputs = [self.tables[table].part(by, k) for table, _ in job.reads]
        outputs = [self.tables[table].part(by, k) for table, _ in job.writes]
        read_cuts = tuple(self.tables[table].cuts(by) for table, _ in job.reads)
        write_cuts = tuple(self.tables[table].cuts(by) for table, _ in job.writes)
        reads = self._tiles(job.reads, by, k)
        writes = self._tiles(job.writes, by, k)
        program = self._program(job, part.stop - part.start, inputs, outputs)
        scratch = program.scratch
        if job.kind == "predict":
            rows = [self.tables[table].part(by, k) for table in group.writes]
            scratch += sum(map(array_bytes, rows))
        joined_bytes = _tiled_bytes(inputs, read_cuts)
        split_bytes = _tiled_bytes(outputs, write_cuts)
        scratch = max(scratch + joined_bytes, split_bytes)
        self.operators.append(LayerOperator(name, reads, writes, scratch, family=family))
        first = np.int32(part.start)
        self.runs[name] = Run(
            program.run, first, reads, writes, read_cuts, write_cuts, program.exchanged_bytes
        )

    def _tiles(self, names: Sequence[tuple[str, str]], by: str, k: int) -> tuple[str, ...]:
        """The tiles of a range of tables, given as (table with the same tiles, name)."""
        tiles = []
        for table_name, name in names:
            table = self.tables[table_name]
            for row, column in table.tiles(by, k):
                tile = f"{name}[{row},{column}]"
                tiles.append(tile)
                self.tile_bytes[tile] = table.tile_bytes(row, column)
                if name == "x0":
                    self.features[tile] = (table.rows[row], table.columns[column])
        return tuple(tiles)

    def _program(
        self, job: Job, size: int, inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> _Program:
        """The program of a job on a range of this size."""
        key = (job.kind, job.number, size)
        table_bytes = sum(map(array_bytes, [*inputs, *outputs]))
        shapes = self.shapes
        function = _separate(job.function, size)
        if key not in self.programs and not shapes.compiles:
            axes = [(AXIS, shapes.devices)]
            program = jax.make_jaxpr(function, axis_env=axes)(
                self.carry,
                (shapes.data, list(inputs)),
                (shapes.state.trainable, shapes.state.others, jnp.int32(0)),
            )
            inside = peak_bytes(program.jaxpr) - sum(map(array_bytes, outputs))
            scratch = max(table_bytes, inside)
            self.programs[key] = _Program(None, scratch, 0)
        if key not in self.programs:
            function = on_each_device(function, shapes.devices, (True, True, False), gives_own=True)
            step = jax.jit(function, donate_argnums=0, compiler_options=step_options())
            number = jax.ShapeDtypeStruct((), jnp.int32)
            traced = step.trace(
                shapes.own(self.carry),
                shapes.own((shapes.data, list(inputs))),
                shapes.equal((shapes.state.trainable, shapes.state.others, number)),
            )
            program: Any = traced.lower().compile()
            self.programs[key] = _Program(
                program,
                _scratch_bytes(program, table_bytes),
                exchanged_bytes(traced.jaxpr, shapes.devices),
            )
        return self.programs[key]

    def add_update(self) -> None:
        """Adds the optimizer's update of the variables."""
        if not self.shapes.compiles:
            self.operators.append(LayerOperator("update", (), ()))
            return
        state = self.shapes.equal(self.shapes.state)
        apply = jax.jit(partial(_updated, self.shapes.model))
        program: Any = apply.lower(state.optimizer, state.trainable, state.trainable).compile()
        self.operators.append(LayerOperator("update", (), (), _scratch_bytes(program, 0)))
        self.runs["update"] = Run(program, None, (), ())


def _updated(model: Any, optimizer: Any, gradients: Sequence[Any], trainable: Any) -> Any:
    """(trainable variables, those of the optimizer) after an update by gradients of the loss."""
    scale = loss_scale(model, optimizer)
    scaled = [(scale * gradient).astype(gradient.dtype) for gradient in gradients]
    return model.optimizer.stateless_apply(optimizer, scaled, trainable)


def _separate(
    function: Callable[[JobInputs, tuple[Any, ...]], Any], size: int
) -> Callable[..., Any]:
    """A job's function for ranges of a size. Each array that it gives can be deleted by itself."""

    def program(carry: Carry, own: tuple[GraphData, list[Any]], equal: tuple[Any, Any, Any]) -> Any:
        data, tables = own
        trainable, others, first = equal
        inputs = JobInputs(carry, trainable, others, data, first, size)
        carry, results = function(inputs, tuple(tables))
        arrays = jax.tree.leaves((trainable, others, data, first, tables))
        given = {id(array) for array in arrays}
        separate = []
        for result in results:
            separate.append(jnp.array(result, copy=True) if id(result) in given else result)
            given.add(id(result))
        return carry, separate

    return program


def _tiled_bytes(parts: Sequence[Any], cuts: Sequence[TileCuts]) -> int:
    """Bytes of the parts that consist of several tiles."""
    pairs = zip(parts, cuts, strict=True)
    return sum(array_bytes(part) for part, part_cuts in pairs if is_tiled(part_cuts))


def _scratch_bytes(program: Any, otherwise: int) -> int:
    """Bytes that a compiled program needs inside; `otherwise` if its compiler has no report."""
    analysis = program.memory_analysis()
    return otherwise if analysis is None else analysis.temp_size_in_bytes
