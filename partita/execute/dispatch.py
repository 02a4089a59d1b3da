"""The actions of one step in pieces, in the order in which Python starts them.

Everything that does not change from step to step is decided here, once: runs of pieces in the order
that the simulator takes (`plans.pipeline.order`), transfers directly after the run that makes the
value, and the end of every value's life.

| value | over the microbatches |
|---|---|
| read by the update | added up where it is made, averaged by the update |
| state that forward or backward replaces (moving statistics, seeds, metrics) | carried along |
| output of the step that depends on such floating-point state | the last one |
| other outputs | scalars: their mean; with the batch's dim 0: concatenated; else refused |

Values only; no JAX.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph, Phase
from partita.plans.phases import is_total
from partita.plans.pieces import Cut, Piece
from partita.plans.pipeline import order
from partita.plans.plan import Plan

STEP = -1
"""In place of a microbatch: once per step."""

Combination = Literal["last", "mean", "concatenate"]


class Value(NamedTuple):
    """An array: a tensor on a place, of a microbatch or of the step.

    An argument that is carried has the number of the microbatch that reads it.
    """

    tensor: int
    place: int
    microbatch: int


@dataclass(frozen=True)
class RunAction:
    """One run of a piece."""

    piece: int
    microbatch: int
    reads: tuple[Value, ...]
    gives: tuple[Value, ...]
    """For `PieceRole.raw`, in order."""
    sums: tuple[Value, ...]
    """For `PieceRole.sums`, in order: read, added to, and given."""
    frees: tuple[Value, ...] = ()
    """Values that no later action reads."""


@dataclass(frozen=True)
class TransferAction:
    """The copy of a value to another place."""

    source: Value
    target: Value
    frees: tuple[Value, ...] = ()


Action = RunAction | TransferAction


@dataclass(frozen=True)
class PieceRole:
    """The part of a piece in the step."""

    raw: tuple[int, ...]
    """Positions in `gives` of values that others read as they are."""
    sums: tuple[int, ...]
    """Positions in `gives` of values that are added up."""
    averaged: tuple[int, ...]
    """Positions in `reads` of sums over microbatches."""
    donated: tuple[int, ...]
    """Positions in `reads` of state that the piece replaces and nobody reads later."""


@dataclass(frozen=True)
class Output:
    """A result of the step."""

    values: tuple[Value, ...]
    combination: Combination


@dataclass(frozen=True)
class Dispatch:
    """The actions of one step, and the places of its arguments and results."""

    actions: tuple[Action, ...]
    roles: tuple[PieceRole, ...]
    """Per piece."""
    state: dict[int, Value]
    """Argument that is not of the batch -> its value before the step."""
    batch: tuple[Value, ...]
    """Values of batch arguments that runs read."""
    outputs: tuple[Output, ...]
    """Per output of the graph."""


def dispatch(
    cut: Cut,
    plan: Plan,
    outputs: Sequence[tuple[int, ...]],
    donate: bool,
) -> Dispatch:
    """The actions of a step that is cut by a plan.

    `outputs`: shapes on the whole batch of the step's outputs that are not new state. With
    `donate`, pieces reuse the memory of old state.

    PlanError for values that cannot be combined over microbatches, and for stages that wait for
    each other.
    """
    return _Dispatcher(cut, plan.microbatches).dispatch(plan, outputs, donate)


def changed_meanings(cut: Cut, plan: Plan) -> tuple[str, ...]:
    """Notes on layers that mean something else by a batch: they see one microbatch.

    The statistics of a layer, the state of random numbers, and averages of a loss change with every
    microbatch. Sums do too, to the same result.
    """
    if plan.microbatches == 1:
        return ()
    graph = cut.flow.graph
    statistics = []
    draws = []
    replaced = []
    repeated = {t for piece in cut.pieces if piece.is_repeated for t in piece.gives}
    for argument in graph.arguments:
        if argument.role != "state" or argument.result not in repeated:
            continue
        if graph.home[argument.tensor] < 0:
            if graph.tensors[argument.tensor].is_floating and not is_total(cut.flow, argument):
                replaced.append(argument.path)
            continue
        kinds = statistics if graph.tensors[argument.tensor].is_floating else draws
        layer = argument.path.rpartition("/")[0] or argument.path
        if layer not in kinds:
            kinds.append(layer)
    notes = []
    if statistics:
        notes.append(
            f"{_names(statistics)} normalizes over a microbatch of {graph.batch_size}, and updates "
            f"its moving statistics {plan.microbatches} times per step"
        )
    if draws:
        notes.append(
            f"{_names(draws)} draws anew for each microbatch: other numbers than one device, of "
            "the same distribution"
        )
    if replaced:
        notes.append(
            f"{_names(replaced)} changes with every microbatch, {plan.microbatches} times per "
            "step, and is no sum: other values than one device"
        )
    return tuple(notes)


def joint_updates(cut: Cut) -> tuple[str, ...]:
    """Notes on instructions of the update that read values of several places, and replace state.

    A conditional around the whole update, or one vector of all gradients, runs on one place, which
    then stores that state. Sums of the gradients of tied weights are no such instructions.
    """
    flow = cut.flow
    maker = cut.maker()
    notes = []
    for piece in cut.pieces:
        for k in () if piece.is_repeated else piece.statements:
            statement = flow.statements[k]
            arrays = [t for t in statement.reads if flow.graph.tensors[t].shape]
            computed = [t for t in arrays if t in flow.producer]
            sources = {cut.pieces[maker[t]].place if t in maker else piece.place for t in computed}
            if len(sources) < 2 or flow.instruction(k).name == "add":
                continue
            notes.append(
                f"the update reads gradients of device groups {min(sources)} and {max(sources)} in "
                f"one instruction ({flow.instruction(k).name}), so group {piece.place} stores the "
                "state that follows from it: update each variable by itself to store it where it "
                "is read"
            )
    return tuple(dict.fromkeys(notes))


def _names(layers: Sequence[str]) -> str:
    """The first layers' names, and the number of the others.

    >>> _names(["norm"]), _names(["a", "b", "c", "d"])
    ("'norm'", "'a', 'b' and 2 more, each of which")
    """
    text = ", ".join(repr(layer) for layer in layers[:2])
    if len(layers) == 1:
        return text
    more = f" and {len(layers) - 2} more" if len(layers) > 2 else ""
    return f"{text}{more}, each of which"


class _Dispatcher:
    def __init__(self, cut: Cut, microbatches: int) -> None:
        self.cut = cut
        self.graph: OperatorGraph = cut.flow.graph
        self.count = microbatches
        self.maker = cut.maker()
        self.readers = cut.readers()
        self.roles = cut.flow.roles
        self.name = cut.flow.name
        self.actions: list[Action] = []
        self.sent: set[Value] = set()
        """Targets of transfers."""

    # ------------------------------------------------------------------------------------- kinds

    @cached_property
    def added(self) -> frozenset[int]:
        """Values of microbatches that the update reads added up."""
        if self.count == 1:
            return frozenset()
        for piece in self.cut.pieces:
            for t in () if piece.is_repeated else piece.reads:
                self._check_update_read(t)
        for t in sorted(self.cut.summed):
            self._check_floating(t)
        return self.cut.summed

    def _piece_of(self, tensor: int) -> Piece:
        return self.cut.pieces[self.maker[tensor]]

    def _check_update_read(self, tensor: int) -> None:
        if self.roles.get(tensor) == "batch":
            raise PlanError(
                f"The update reads {self.name(tensor)!r} of the batch itself, so the step cannot "
                "run in microbatches. Use a plan with 1 microbatch."
            )

    def _check_floating(self, tensor: int) -> None:
        dtype = self.graph.tensors[tensor].dtype
        if not dtype.startswith(("float", "bfloat", "complex")):
            raise PlanError(
                f"The update reads a value of {self.name(tensor)!r} that is {dtype} and differs "
                "between microbatches, so it has no mean. Use a plan with 1 microbatch."
            )

    # ------------------------------------------------------------------------------------- values

    def _read(self, tensor: int, piece: Piece, microbatch: int) -> Value:
        """The value that a run of a piece reads; microbatch is STEP for the update."""
        place = piece.place
        role = self.roles.get(tensor)
        if role == "batch":
            return Value(tensor, place, max(microbatch, 0))
        if role is not None:
            return self._read_state(tensor, place, microbatch)
        if not self._piece_of(tensor).is_repeated:
            return Value(tensor, place, STEP)
        if piece.is_repeated:
            return self._made(tensor, place, microbatch)
        if tensor in self.added:
            return Value(tensor, place, STEP)
        return self._made(tensor, place, self.count - 1)

    def _read_state(self, argument: int, place: int, microbatch: int) -> Value:
        is_carried = argument in self.cut.carried.values()
        home = self.cut.homes[argument]
        if is_carried and place == home:
            return Value(argument, place, max(microbatch, 0))
        if is_carried and self.count > 1:
            raise PlanError(
                f"'{self.name(argument)}' changes with every microbatch and is read on places "
                f"{home} and {place}, so the places cannot overlap. "
                "Place its readers together, or use a plan with 1 microbatch."
            )
        return Value(argument, place, STEP)

    def _made(self, tensor: int, place: int, microbatch: int) -> Value:
        """The value of a repeated piece."""
        argument = self.cut.carried.get(tensor)
        if argument is not None and place == self.cut.homes[argument]:
            return Value(argument, place, microbatch + 1)
        return Value(tensor, place, microbatch)

    def _initial(self, argument: int) -> Value:
        """State before the step."""
        is_carried = argument in self.cut.carried.values()
        return Value(argument, self.cut.homes[argument], 0 if is_carried else STEP)

    # ------------------------------------------------------------------------------------ actions

    def dispatch(
        self,
        plan: Plan,
        outputs: Sequence[tuple[int, ...]],
        donate: bool,
    ) -> Dispatch:
        self._send_state()
        for number, microbatch in self._runs(plan):
            self._run(number, microbatch)
        shapes = [*outputs, *(None for _ in self.graph.outputs[len(outputs) :])]
        results = tuple(
            self._output(tensor, shape)
            for tensor, shape in zip(self.graph.outputs, shapes, strict=True)
        )
        last_reads = self._last_reads(results)
        batch = {v for a in self.actions for v in _reads(a) if self.roles.get(v.tensor) == "batch"}
        for output in results:
            batch |= {v for v in output.values if self.roles.get(v.tensor) == "batch"}
        return Dispatch(
            actions=self._with_frees(last_reads),
            roles=tuple(self._role(n, donate, last_reads) for n in range(len(self.cut.pieces))),
            state={t: self._initial(t) for t in self.cut.homes},
            batch=tuple(sorted(batch)),
            outputs=results,
        )

    def _send_state(self) -> None:
        """Copies variables to the places that read them and do not store them."""
        for argument, home in self.cut.homes.items():
            places = {self.cut.pieces[n].place for n in self.readers.get(argument, ())}
            for place in sorted(places - {home}):
                target = self._read_state(argument, place, STEP)
                self.actions.append(TransferAction(self._initial(argument), target))

    def _runs(self, plan: Plan) -> list[tuple[int, int]]:
        """(piece, microbatch) in the order of the step."""
        pieces = self.cut.pieces
        in_order = self.cut.in_order()
        if self.count == 1:
            return [(n, 0 if pieces[n].is_repeated else STEP) for n in in_order]
        waits: dict[tuple[int, Phase], set[tuple[int, Phase]]] = defaultdict(set)
        for piece in pieces:
            for t in piece.reads if piece.is_repeated else ():
                if t in self.maker:
                    self._check_made_before(t)
                    source = self._piece_of(t)
                    if (source.place, source.phase) != (piece.place, piece.phase):
                        waits[piece.place, piece.phase].add((source.place, source.phase))
        runs = []
        for stage, phase, microbatch in order(plan, waits):
            for n in in_order:
                if (pieces[n].place, pieces[n].phase) == (stage, phase):
                    runs.append((n, microbatch))
        runs += [(n, STEP) for n in in_order if not pieces[n].is_repeated]
        return runs

    def _check_made_before(self, tensor: int) -> None:
        if not self._piece_of(tensor).is_repeated:
            raise PlanError(
                f"The step computes with its update again (at {self.name(tensor)!r}), so it "
                "cannot run in microbatches. Use a plan with 1 microbatch."
            )

    def _run(self, number: int, microbatch: int) -> None:
        """Adds a run of a piece, and the transfers of its results."""
        piece = self.cut.pieces[number]
        raw, sums = self._raw_and_sums(piece)
        gives = [self._given(piece.gives[n], piece, microbatch) for n in raw]
        totals = [Value(piece.gives[n], piece.place, STEP) for n in sums]
        self.actions.append(
            RunAction(
                piece=number,
                microbatch=microbatch,
                reads=tuple(self._read(t, piece, microbatch) for t in piece.reads),
                gives=tuple(gives),
                sums=tuple(totals),
            )
        )
        for position, value in zip(raw, gives, strict=True):
            self._send(piece.gives[position], value, microbatch)
        if microbatch == self.count - 1:
            for position, value in zip(sums, totals, strict=True):
                self._send(piece.gives[position], value, microbatch, is_sum=True)

    def _given(self, tensor: int, piece: Piece, microbatch: int) -> Value:
        if not piece.is_repeated:
            return Value(tensor, piece.place, STEP)
        return self._made(tensor, piece.place, microbatch)

    def _raw_and_sums(self, piece: Piece) -> tuple[list[int], list[int]]:
        """Positions in `gives` of values that are read as they are, and of those added up."""
        raw = []
        sums = []
        outputs = set(self.graph.outputs)
        for n, t in enumerate(piece.gives):
            readers = [self.cut.pieces[r] for r in self.readers.get(t, ())]
            is_added = piece.is_repeated and t in self.added
            if is_added:
                sums.append(n)
            if not is_added or t in outputs or any(reader.is_repeated for reader in readers):
                raw.append(n)
        return raw, sums

    def _send(self, tensor: int, value: Value, microbatch: int, is_sum: bool = False) -> None:
        """Copies a value of a piece to the other places that read it."""
        piece = self._piece_of(tensor)
        for n in self.readers.get(tensor, ()):
            reader = self.cut.pieces[n]
            if reader.place == piece.place:
                continue
            if piece.is_repeated and not self._reads_now(tensor, reader, microbatch, is_sum):
                continue
            target = self._read(tensor, reader, microbatch if reader.is_repeated else STEP)
            if target not in self.sent:
                self.sent.add(target)
                self.actions.append(TransferAction(value, target))

    def _reads_now(
        self,
        tensor: int,
        reader: Piece,
        microbatch: int,
        is_sum: bool,
    ) -> bool:
        """Whether a piece reads this value of a repeated piece."""
        if reader.is_repeated:
            return not is_sum
        return is_sum == (tensor in self.added) and microbatch == self.count - 1

    # ------------------------------------------------------------------------------------ results

    def _output(self, tensor: int, whole_shape: tuple[int, ...] | None) -> Output:
        """A result of the step; new state has no shape on the whole batch."""
        role = self.roles.get(tensor)
        if role == "batch":
            values = tuple(Value(tensor, 0, i) for i in range(self.count))
            return Output(values, "concatenate" if self.count > 1 else "last")
        if role is not None:
            return Output((self._initial(tensor),), "last")
        piece = self._piece_of(tensor)
        if not piece.is_repeated:
            return Output((Value(tensor, piece.place, STEP),), "last")
        combination: Combination = "last"
        if whole_shape is not None and self.count > 1:
            combination = self._combination(tensor, whole_shape)
        microbatches = range(self.count) if combination != "last" else (self.count - 1,)
        values = tuple(self._made(tensor, piece.place, i) for i in microbatches)
        return Output(values, combination)

    def _combination(self, tensor: int, whole_shape: tuple[int, ...]) -> Combination:
        """The rule for an output that every microbatch computes."""
        flow = self.cut.flow
        state = [t for t in self.cut.carried.values() if self.graph.tensors[t].is_floating]
        if tensor in flow.dependent(state) or tensor not in flow.of_batch:
            return "last"
        shape = self.graph.tensors[tensor].shape
        if not shape and self.graph.tensors[tensor].is_floating:
            return "mean"
        if shape and whole_shape[0] == self.count * shape[0]:
            return "concatenate"
        raise PlanError(
            f"The step returns a value of {self.name(tensor)!r} with shape {shape} that differs "
            "between microbatches. Return its mean, return a value per sample, or use a plan with "
            "1 microbatch."
        )

    # ------------------------------------------------------------------------------- ends of lives

    def _last_reads(self, results: tuple[Output, ...]) -> dict[Value, int]:
        """Value -> the last action that reads it, or the number of actions for a result."""
        last: dict[Value, int] = {}
        for number, action in enumerate(self.actions):
            made = action.gives if isinstance(action, RunAction) else ()
            for value in (*_reads(action), *made):
                last[value] = number
        for output in results:
            last.update(dict.fromkeys(output.values, len(self.actions)))
        return last

    def _with_frees(self, last_reads: dict[Value, int]) -> tuple[Action, ...]:
        ends: dict[int, list[Value]] = defaultdict(list)
        for value, number in last_reads.items():
            ends[number].append(value)
        return tuple(replace(a, frees=tuple(ends[n])) for n, a in enumerate(self.actions))

    def _role(self, number: int, donate: bool, last_reads: dict[Value, int]) -> PieceRole:
        piece = self.cut.pieces[number]
        raw, sums = self._raw_and_sums(piece)
        averaged = []
        if not piece.is_repeated:
            averaged = [n for n, t in enumerate(piece.reads) if t in self.added]
        donated = []
        replaced = {self.cut.argument_of.get(t) for t in piece.gives}
        for position, t in enumerate(piece.reads):
            is_here = t in replaced and self.cut.homes.get(t) == piece.place
            if donate and is_here and self._is_read_last(number, position, last_reads):
                donated.append(position)
        return PieceRole(tuple(raw), tuple(sums), tuple(averaged), tuple(donated))

    def _is_read_last(self, piece: int, position: int, last_reads: dict[Value, int]) -> bool:
        """Whether every run of a piece is the last reader of one of its arguments, and of copies
        in the same memory.
        """
        for n, run in self._runs_of[piece]:
            value = run.reads[position]
            ends = [last_reads.get(v, n) for v in (value, *self._shared[value])]
            if max(ends) > n:
                return False
        return True

    @cached_property
    def _shared(self) -> dict[Value, list[Value]]:
        """Value -> its copies on places that have some of its devices. There, `device_put` of JAX
        makes another array of the same memory, so that both end when one is donated.
        """
        shared: dict[Value, list[Value]] = defaultdict(list)
        for action in self.actions:
            if not isinstance(action, TransferAction):
                continue
            slices = dict(self.cut.places[action.source.place])
            target = self.cut.places[action.target.place]
            if all(slices.get(axis, number) == number for axis, number in target):
                shared[action.source].append(action.target)
        return shared

    @cached_property
    def _runs_of(self) -> dict[int, list[tuple[int, RunAction]]]:
        """Piece -> its runs with their positions among all actions."""
        runs: dict[int, list[tuple[int, RunAction]]] = defaultdict(list)
        for number, action in enumerate(self.actions):
            if isinstance(action, RunAction):
                runs[action.piece].append((number, action))
        return runs


def _reads(action: Action) -> tuple[Value, ...]:
    if isinstance(action, TransferAction):
        return (action.source,)
    return (*action.reads, *action.sums)
