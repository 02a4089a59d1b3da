"""A plan in stages, microbatches or places as a step that runs: its pieces, compiled, and a loop
over the actions of `execute.dispatch`.

The step behaves like `execute.program.PlannedStep`. Its state lives where the pieces read it: each
variable on the devices of one place. Python starts the actions and does not wait for them, so
places work at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from partita.capture.jax_functions import Captured, Text
from partita.cost.partial import unsummed
from partita.cost.reshard import Axes
from partita.execute import members
from partita.execute.annotate import Annotator
from partita.execute.dispatch import Dispatch, RunAction, TransferAction, Value, dispatch
from partita.execute.microbatches import microbatch_of, numbers_of_step
from partita.execute.piece_function import (
    Names,
    lower_device_sums,
    lower_piece,
    partial_sharding,
)
from partita.execute.piece_text import aval, piece_text
from partita.execute.process_arrays import digest, put
from partita.execute.processes import alone, same
from partita.execute.sharding import device_mesh, named_sharding
from partita.execute.slots import SlotOutput, SlotRun, SlotSchedule, slot_schedule
from partita.execute.transport import Between, Local, SharedOutput
from partita.plans.layout import Layout, layout_of, layout_over, shard_bytes
from partita.plans.phases import DataFlow
from partita.plans.piece_graph import backward_reads, gathers_of_runs
from partita.plans.pieces import Cut, cut
from partita.plans.pipeline import Place
from partita.plans.plan import Mesh, Plan, is_accelerator


@dataclass(frozen=True)
class PlaceLayout:
    """The mesh of a place, and the layout of values there."""

    mesh: Mesh
    layout: Layout


@dataclass(frozen=True)
class StepInPieces:
    """A step cut into pieces under a plan. It needs no devices."""

    captured: Captured
    """The step on the whole batch."""
    plan: Plan
    microbatch: Captured
    """The step on one microbatch, which is cut."""
    cut: Cut
    dispatch: Dispatch
    layout: Layout
    """Sharding of every tensor of `microbatch`, over all axes of the plan."""
    layouts: tuple[PlaceLayout, ...]
    """[place]: its mesh, and the layout there."""

    def nbytes(self, value: Value) -> int:
        """Bytes of one device for a value."""
        tensor = self.cut.argument_of.get(value.tensor, value.tensor)
        return self._nbytes[value.place][tensor]

    @cached_property
    def _nbytes(self) -> list[list[int]]:
        graph = self.cut.flow.graph
        return [shard_bytes(graph, place.mesh, place.layout) for place in self.layouts]

    def runs(self, piece: int) -> int:
        """The number of a piece's runs in a step."""
        return self.plan.microbatches if self.cut.pieces[piece].is_repeated else 1

    @cached_property
    def partial_sums(self) -> dict[int, Axes]:
        """Gradient that is added up over microbatches on each device by itself -> the axes of its
        place over which the update sums it.
        """
        partial: dict[int, Axes] = {}
        readers = self.cut.readers()
        for piece, role in zip(self.cut.pieces, self.dispatch.roles, strict=True):
            gradients = []
            for n in set(role.sums) - set(role.raw):
                tensor = piece.gives[n]
                places = {self.cut.pieces[r].place for r in readers[tensor]}
                if places == {piece.place}:
                    gradients.append(tensor)
            layout = self.layouts[piece.place].layout
            partial.update(unsummed(self.cut.flow.graph, layout, gradients))
        return partial

    @cached_property
    def schedule(self) -> SlotSchedule:
        """The actions of a step over slots."""
        return slot_schedule(self.dispatch, self.partial_sums)

    def device_sums_of(self, piece: int) -> list[int]:
        """The partial sums that a piece is the first to read."""
        for action in self.schedule.actions:
            if isinstance(action, SlotRun) and action.piece == piece:
                return [self.schedule.values[slot].tensor for slot in action.partial]
        return []

    def partial_axes(self, tensor: int, place: int) -> Names:
        """The names of the axes over which a sum stays partial."""
        axes = self.layouts[place].mesh.axes
        return tuple(axes[axis].name for axis in self.partial_sums.get(tensor, ()))

    def text(self, number: int) -> Text:
        """The program of a piece, with the layout inside its place written into it."""
        piece = self.cut.pieces[number]
        place = self.layouts[piece.place]
        annotator = None
        graph = self.cut.flow.graph
        if place.mesh.axes:
            producer = self.cut.flow.producer
            sums = self.partial_sums.items()
            own = {t: axes for t, axes in sums if producer[t] in piece.statements}
            layout = place.layout
            if self.late_runs and piece.phase == "backward":
                # `late_copies` writes what the gathers of runs wait for.
                flow = self.cut.flow
                late = gathers_of_runs(flow, piece, layout.reads, self.late_runs)
                reads = [
                    replace(r, after=-1) if (r.tensor, r.target) in late else r
                    for r in backward_reads(flow, layout.reads, late)
                ]
                layout = replace(layout, reads=tuple(reads))
            instructions = set(self.cut.flow.instructions(piece.statements))
            annotator = Annotator(graph, place.mesh, layout, own, instructions)
        name = f"{piece.phase}_{number}_of_place_{piece.place}"
        numbers = self._numbers
        return piece_text(
            self.microbatch.text, self.cut.flow, piece, name, annotator, numbers, self.late_runs
        )

    @property
    def late_runs(self) -> Sequence[int]:
        """[statement]: its rematerialized run, () where copies wait for no gradient."""
        return self.cut.runs if is_accelerator(self.plan.target) else ()

    @cached_property
    def _numbers(self) -> dict[tuple[int, int], float]:
        return numbers_of_step(self.captured, self.microbatch, self.cut.flow)


@dataclass(frozen=True)
class PlaceDevices:
    """The devices of a place, and the layout of values there."""

    mesh: Mesh
    layout: Layout
    devices: jax.sharding.Mesh
    sharding_source: dict[int, int]
    """New state -> the argument that it replaces, whose sharding it has."""

    def sharding(self, tensor: int) -> NamedSharding:
        """The sharding of a tensor on this place."""
        if tensor not in self._shardings:
            source = self.sharding_source.get(tensor, tensor)
            sharding = self.layout.shardings[source]
            self._shardings[tensor] = named_sharding(sharding, self.mesh, self.devices)
        return self._shardings[tensor]

    @cached_property
    def _shardings(self) -> dict[int, NamedSharding]:
        return {}

    def destination(self, tensor: int) -> Any:
        """The sharding of a tensor on this place, or the place's only device: `device_put` takes
        half of Python's time then.
        """
        return self.sharding(tensor) if self.mesh.size > 1 else self.devices.devices.flat[0]

    @cached_property
    def is_here(self) -> bool:
        """Whether this process has a device of it."""
        own = members.index()
        return any(device.process_index == own for device in self.devices.devices.flat)


@dataclass(frozen=True)
class StagedProgram:
    """A compiled step in pieces: `program(state, batch) -> (outputs, state)`."""

    step: StagedStep
    programs: tuple[Any, ...]
    """Per piece its compiled program; None for pieces of other processes."""

    def __call__(self, state: Any, batch: dict[Value, Any]) -> tuple[Any, Any]:
        step = self.step
        schedule = step.schedule
        arrays: list[Any] = [None] * schedule.count
        leaves = jax.tree.leaves(state)
        for leaf, slot in step.state_slots:
            arrays[slot] = leaves[leaf]
        for value, array in batch.items():
            arrays[schedule.slot_of[value]] = array
        transport = step.transport
        transport.start_step()
        for action in schedule.actions:
            if isinstance(action, SlotRun):
                if self.programs[action.piece] is not None:
                    self._run(action, arrays)
            else:
                moved = transport.move(action.actions, [arrays[slot] for slot in action.sources])
                for slot, array in zip(action.targets, moved, strict=True):
                    arrays[slot] = array
            for slot in action.frees:
                arrays[slot] = None
        return step.results(arrays)

    def _run(self, run: SlotRun, arrays: list[Any]) -> None:
        donated = [arrays[slot] for slot in run.donated]
        if run.partial:
            sums = self.step.device_sums(run.piece)([arrays[slot] for slot in run.partial])
            for slot, array in zip(run.partial, sums, strict=True):
                arrays[slot] = array
        others = [arrays[slot] for slot in run.others]
        if run.is_first and run.sums:
            sums = self.step.zeros(run.piece)
        else:
            sums = [arrays[slot] for slot in run.sums]
        given, totals = self.programs[run.piece](donated, others, sums)
        for slot, array in zip(run.gives, given, strict=True):
            arrays[slot] = array
        for slot, array in zip(run.sums, totals, strict=True):
            arrays[slot] = array
        if self.step.is_awaited:
            jax.block_until_ready((given, totals))


@dataclass(frozen=True)
class StagedStep(StepInPieces):
    """A step that runs in pieces: `step(state, batch) -> (outputs, state)`."""

    places: tuple[PlaceDevices, ...]
    mesh: jax.sharding.Mesh
    """All devices."""
    donates: bool = True
    """Whether a step consumes the old state."""

    # -------------------------------------------------------------------------------------- values

    @cached_property
    def leaf_of(self) -> dict[int, int]:
        """Argument -> its position among the leaves of (state, batch)."""
        return dict(enumerate(self.microbatch.text.module_kept_var_idx))

    @cached_property
    def state_shardings(self) -> Any:
        """A sharding for every leaf of the state."""
        leaves, tree = jax.tree.flatten(self.captured.state)
        replicated = NamedSharding(self.places[0].devices, PartitionSpec())
        shardings = [replicated] * len(leaves)
        for argument, value in self.dispatch.state.items():
            leaf = self.leaf_of[argument]
            if leaf < len(leaves):
                shardings[leaf] = self.places[value.place].sharding(argument)
        return jax.tree.unflatten(tree, shardings)

    def place_state(self, state: Any) -> Any:
        """The state on the devices, as the step takes it."""
        return put(state, self.state_shardings)

    def place_batch(self, batch: Any) -> dict[Value, Any]:
        """The microbatches of a batch on the devices that read them."""
        state_count = len(jax.tree.leaves(self.captured.state))
        leaves = jax.tree.leaves(batch)
        parts = jax.tree.leaves(self.microbatch.batch)
        placed = {}
        for value in self.dispatch.batch:
            if not self.places[value.place].is_here:
                continue
            leaf = self.leaf_of[value.tensor] - state_count
            array = leaves[leaf]
            size = parts[leaf].shape[0] if parts[leaf].shape else 0
            if np.shape(array) != parts[leaf].shape:
                array = array[value.microbatch * size : (value.microbatch + 1) * size]
            sharding = self.places[value.place].sharding(value.tensor)
            placed[value] = put(array, sharding)
        return placed

    @cached_property
    def state_slots(self) -> tuple[tuple[int, int], ...]:
        """(leaf of the state, its slot) pairs of the variables of this process."""
        pairs = []
        for argument, value in self.dispatch.state.items():
            if self.places[value.place].is_here:
                pairs.append((self.leaf_of[argument], self.schedule.slot_of[value]))
        return tuple(pairs)

    def zeros(self, piece: int) -> list[Any]:
        """The empty sums of a piece."""
        if piece not in self._zeros:
            self._zeros[piece] = self._zeros_of(piece)
        return self._zeros[piece]()

    @cached_property
    def _zeros(self) -> dict[int, Callable[[], list[Any]]]:
        """Piece -> a compiled function that makes its empty sums."""
        return {}

    def _zeros_of(self, piece: int) -> Callable[[], list[Any]]:
        gives = self.cut.pieces[piece].gives
        place = self.places[self.cut.pieces[piece].place]
        tensors = [gives[n] for n in self.dispatch.roles[piece].sums]
        shapes = [aval(self.cut.flow.graph.tensors[t]) for t in tensors]
        shardings = [place.sharding(t) for t in tensors]
        if any(t in self.partial_sums for t in tensors):
            names = [self.partial_axes(t, self.cut.pieces[piece].place) for t in tensors]
            shardings = [
                partial_sharding(sharding, len(shape.shape), axes)
                for sharding, shape, axes in zip(shardings, shapes, names, strict=True)
            ]
        return jax.jit(
            lambda: [jnp.zeros(shape.shape, shape.dtype) for shape in shapes],
            out_shardings=shardings,
        )

    def device_sums(self, piece: int) -> Any:
        """The sums over devices that a piece waits for, compiled."""
        if piece not in self._device_sums:
            place = self.cut.pieces[piece].place
            tensors = self.device_sums_of(piece)
            arrays = [self._shape(t, place) for t in tensors]
            names = [self.partial_axes(t, place) for t in tensors]
            self._device_sums[piece] = lower_device_sums(arrays, names).compile()
        return self._device_sums[piece]

    @cached_property
    def _device_sums(self) -> dict[int, Any]:
        return {}

    @cached_property
    def explicit_results(self) -> dict[int, NamedSharding]:
        """Slot of a result that a piece with partial sums makes, on an explicit mesh -> its
        sharding on the mesh of its place.
        """
        results = {slot for output in self.schedule.outputs for slot in output.slots}
        shardings = {}
        for action in self.dispatch.actions:
            if not isinstance(action, RunAction):
                continue
            piece = self.cut.pieces[action.piece]
            place = self.places[piece.place]
            if not place.is_here or self.partial_sums.keys().isdisjoint(piece.gives):
                continue
            for value in action.gives:
                slot = self.schedule.slot_of[value]
                if slot in results:
                    shardings[slot] = place.sharding(value.tensor)
        return shardings

    def results(self, arrays: list[Any]) -> tuple[Any, Any]:
        """(outputs, new state) from the arrays of all slots after the last action."""
        for slot, sharding in self.explicit_results.items():
            arrays[slot] = _with_sharding(arrays[slot], sharding)
        flat = [_combined(output, arrays) for output in self.schedule.outputs]
        outputs = self.transport.everywhere(flat[: self.output_count])
        state = []
        results = self.dispatch.outputs[self.output_count :]
        for array, output in zip(flat[self.output_count :], results, strict=True):
            state.append(self._elsewhere(output.values[-1]) if array is None else array)
        return jax.tree.unflatten(self.microbatch.text.out_tree, [*outputs, *state])

    @property
    def output_count(self) -> int:
        """Number of results of the step that are not new state."""
        return len(self.dispatch.outputs) - len(jax.tree.leaves(self.captured.state))

    def _elsewhere(self, value: Value) -> Any:
        """An array of a place without devices of this process."""
        shape = aval(self.cut.flow.graph.tensors[value.tensor])
        sharding = self.places[value.place].sharding(value.tensor)
        return jax.make_array_from_single_device_arrays(
            shape.shape, sharding, [], dtype=shape.dtype
        )

    @cached_property
    def transport(self) -> Local | Between:
        """The copies of values from place to place."""
        if alone():
            return Local(self.places)
        graph = self.cut.flow.graph
        outputs = []
        for output in self.dispatch.outputs[: self.output_count]:
            value = output.values[-1]
            shape = aval(graph.tensors[value.tensor])
            size = shape.shape
            if output.combination == "concatenate":
                size = (len(output.values) * size[0], *size[1:])
            outputs.append(SharedOutput(value.place, size, shape.dtype))
        return Between(
            self.places,
            [a for a in self.dispatch.actions if isinstance(a, TransferAction)],
            outputs,
            self.cut.flow,
        )

    # ------------------------------------------------------------------------------------- programs

    @cached_property
    def is_awaited(self) -> bool:
        """Whether Python waits for every piece: on a CPU, pieces with collectives that overlap take
        all threads and wait for each other.
        """
        own = [place for place in self.places if place.is_here]
        return jax.default_backend() == "cpu" and any(place.mesh.size > 1 for place in own)

    def compile(self) -> StagedProgram:
        """The compiled step: the pieces of this process.

        ProcessError if the processes would exchange other values.
        """
        if isinstance(self.transport, Between):
            same(
                "Transfers between device groups",
                digest(self.transport.numbers),
                "Use the same version of Partita, JAX and Keras in all processes.",
            )
        programs = []
        for number, piece in enumerate(self.cut.pieces):
            is_here = self.places[piece.place].is_here
            programs.append(self._compiled(number) if is_here else None)
        return StagedProgram(self, tuple(programs))

    @cached_property
    def program(self) -> StagedProgram:
        """The compiled step, compiled once."""
        return self.compile()

    def step(self, state: Any, batch: dict[Value, Any]) -> tuple[Any, Any]:
        """One step on placed values."""
        return self.program(state, batch)

    def _compiled(self, number: int) -> Any:
        piece = self.cut.pieces[number]
        role = self.dispatch.roles[number]
        text = self.text(number)
        names = {n: self.partial_axes(t, piece.place) for n, t in enumerate(piece.gives)}
        return lower_piece(
            text.call,
            text.fun_name,
            role,
            1 / self.plan.microbatches,
            [self._shape(t, piece.place) for t in piece.reads],
            [self._shape(t, piece.place) for t in piece.gives],
            {n: axes for n, axes in names.items() if axes},
        ).compile()

    def _shape(self, tensor: int, place: int) -> jax.ShapeDtypeStruct:
        shape = aval(self.cut.flow.graph.tensors[tensor])
        sharding = self.places[place].sharding(tensor)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _with_sharding(array: Any, sharding: NamedSharding) -> Any:
    """An array with an equal sharding on another mesh of the same devices."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def _combined(output: SlotOutput, arrays: Sequence[Any]) -> Any:
    """A result of the step; None if another process has it."""
    last = arrays[output.slots[-1]]
    if last is None or output.combination == "last":
        return last
    parts = [arrays[slot] for slot in output.slots]
    return _mean(parts) if output.combination == "mean" else jnp.concatenate(parts)


@jax.jit
def _mean(arrays: Sequence[Any]) -> Any:
    return sum(arrays) / len(arrays)


def in_pieces(captured: Captured, plan: Plan, donate: bool = True) -> StepInPieces:
    """The captured step, cut into pieces under a plan.

    With `donate`, pieces reuse the memory of old state.
    PlanError if the step cannot be cut where the plan says, or cannot run in its microbatches.
    """
    microbatch = microbatch_of(captured, plan)
    graph = microbatch.graph
    layout = layout_of(graph, plan)
    pieces = cut(DataFlow.of(graph), plan, shard_bytes(graph, plan.mesh, layout))
    whole = captured.graph
    count = len(whole.outputs) - len(jax.tree.leaves(captured.state))
    shapes = [whole.tensors[t].shape for t in whole.outputs[:count]]
    layouts = []
    for place in pieces.places:
        slices = dict(place)
        mesh = Mesh(tuple(axis for axis in plan.mesh.axes if axis.name not in slices))
        layouts.append(PlaceLayout(mesh, layout_over(layout, plan.mesh, mesh)))
    return StepInPieces(
        captured=captured,
        plan=plan,
        microbatch=microbatch,
        cut=pieces,
        dispatch=dispatch(pieces, plan, shapes, donate),
        layout=layout,
        layouts=tuple(layouts),
    )


def staged_step(
    captured: Captured,
    plan: Plan,
    devices: Sequence[Any] | None = None,
    donate: bool = True,
) -> StagedStep:
    """The captured step in pieces under a plan, ready to compile for devices.

    PlanError if the step cannot be cut where the plan says.
    """
    step = in_pieces(captured, plan, donate)
    mesh = device_mesh(plan.mesh, devices)
    places = []
    for place, layout in zip(step.cut.places, step.layouts, strict=True):
        grid = _devices(place, plan.mesh, mesh)
        places.append(PlaceDevices(layout.mesh, layout.layout, grid, step.cut.argument_of))
    values = {f.name: getattr(step, f.name) for f in fields(step)}
    return StagedStep(**values, places=tuple(places), mesh=mesh, donates=donate)


def _devices(place: Place, mesh: Mesh, devices: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The devices of a place: the slices of the mesh that its operators are on."""
    slices = dict(place)
    axes = tuple(axis for axis in mesh.axes if axis.name not in slices)
    index = tuple(slices.get(axis.name, slice(None)) for axis in mesh.axes)
    grid = devices.devices[index] if mesh.axes else devices.devices
    names = tuple(axis.name for axis in axes) or ("a",)
    grid = np.array(grid, dtype=object).reshape([axis.size for axis in axes] or [1])
    return jax.sharding.Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))
