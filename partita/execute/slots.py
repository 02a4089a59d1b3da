"""The actions of a step with numbers in place of values, so that a running step looks nothing up.

A value has a slot, a position in a list of arrays. Transfers that follow each other are one action:
starting several copies at once takes Python less time.

Values only; no JAX.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from partita.execute.dispatch import (
    Action,
    Combination,
    Dispatch,
    PieceRole,
    RunAction,
    TransferAction,
    Value,
)

Slots = tuple[int, ...]


@dataclass(frozen=True)
class SlotRun:
    """One run of a piece."""

    piece: int
    donated: Slots
    others: Slots
    sums: Slots
    """Read, added to, and given."""
    is_first: bool
    """Whether it is the first run of its piece in the step: its sums are empty."""
    partial: Slots
    """Sums over microbatches to sum over devices before the run."""
    gives: Slots
    frees: Slots


@dataclass(frozen=True)
class SlotTransfers:
    """Transfers that follow each other."""

    actions: tuple[TransferAction, ...]
    sources: Slots
    targets: Slots
    frees: Slots


@dataclass(frozen=True)
class SlotOutput:
    """A result of the step."""

    slots: Slots
    combination: Combination


@dataclass(frozen=True)
class SlotSchedule:
    """The actions of one step over slots."""

    slot_of: dict[Value, int]
    actions: tuple[SlotRun | SlotTransfers, ...] = ()
    outputs: tuple[SlotOutput, ...] = ()

    @property
    def count(self) -> int:
        """Number of slots."""
        return len(self.slot_of)

    @cached_property
    def values(self) -> tuple[Value, ...]:
        """[slot]: its value."""
        return tuple(self.slot_of)

    def slots(self, values: Sequence[Value]) -> Slots:
        """The slots of values."""
        return tuple(self.slot_of[value] for value in values)


def slot_schedule(dispatch: Dispatch, partial: Collection[int]) -> SlotSchedule:
    """The actions of a step over slots.

    `partial`: tensors whose sums over microbatches are those of a device. The first run that reads
    one sums it over devices.
    """
    numbers: dict[Value, int] = {}
    for value in _values(dispatch):
        numbers.setdefault(value, len(numbers))
    schedule = SlotSchedule(numbers)
    actions: list[SlotRun | SlotTransfers] = []
    started: set[int] = set()
    """Pieces that have run."""
    waiting = set(partial)
    for is_run, group in itertools.groupby(dispatch.actions, lambda a: isinstance(a, RunAction)):
        if not is_run:
            actions.append(
                _transfers(schedule, [a for a in group if isinstance(a, TransferAction)])
            )
            continue
        for run in group:
            assert isinstance(run, RunAction)
            role = dispatch.roles[run.piece]
            sums = [run.reads[n] for n in role.averaged if run.reads[n].tensor in waiting]
            waiting.difference_update(value.tensor for value in sums)
            actions.append(_run(schedule, role, run, sums, run.piece not in started))
            started.add(run.piece)
    outputs = [SlotOutput(schedule.slots(o.values), o.combination) for o in dispatch.outputs]
    return SlotSchedule(numbers, tuple(actions), tuple(outputs))


def _values(dispatch: Dispatch) -> list[Value]:
    """All values of a step, in the order in which they first occur."""
    values = [*dispatch.state.values(), *dispatch.batch]
    for action in dispatch.actions:
        values += _of_action(action)
    for output in dispatch.outputs:
        values += output.values
    return values


def _of_action(action: Action) -> tuple[Value, ...]:
    if isinstance(action, TransferAction):
        return (action.source, action.target)
    return (*action.reads, *action.sums, *action.gives)


def _run(
    schedule: SlotSchedule,
    role: PieceRole,
    run: RunAction,
    partial: Sequence[Value],
    is_first: bool,
) -> SlotRun:
    donated = role.donated
    reads = schedule.slots(run.reads)
    return SlotRun(
        piece=run.piece,
        donated=tuple(reads[n] for n in donated),
        others=tuple(slot for n, slot in enumerate(reads) if n not in donated),
        sums=schedule.slots(run.sums),
        is_first=is_first,
        partial=schedule.slots(partial),
        gives=schedule.slots(run.gives),
        frees=schedule.slots(run.frees),
    )


def _transfers(schedule: SlotSchedule, actions: Sequence[TransferAction]) -> SlotTransfers:
    return SlotTransfers(
        actions=tuple(actions),
        sources=schedule.slots([action.source for action in actions]),
        targets=schedule.slots([action.target for action in actions]),
        frees=schedule.slots([value for action in actions for value in action.frees]),
    )
