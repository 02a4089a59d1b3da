"""Copies of rematerialized runs that wait for the backward pass, in the text of a piece.

A backward piece computes the forward values of its rematerialized runs again, from stored values
alone. XLA:GPU may then compute all runs before the first gradient. So the copies of a run stand in
front of their first reader, and read the stored values behind an optimization barrier that waits
for the latest gradient before it (as `graph.rematerialize` does in one program). The gathers of
stored parameters that copies read wait for an earlier gradient (`plans.layout.PREFETCHED`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from jax.extend.mlir import ir

from partita.capture import stablehlo
from partita.capture.barriers import barrier
from partita.execute.annotate import CONSTRAINT, Annotator
from partita.plans.phases import LIGHT, DataFlow
from partita.plans.piece_graph import prefetching_gradient


class _Delay(NamedTuple):
    """The copies of a run, and what they wait for."""

    members: Sequence[Any]
    """The copied operations, with their reshards."""
    first: Any
    """The operation of the backward pass before which they stand."""
    gradient: Any
    """The value for which they wait."""
    readers: Sequence[tuple[Any, int]]
    """(operation, position of its operand): the later readers of this value."""
    inputs: Sequence[Any]
    """Stored activations that they read."""
    gathers: Sequence[Sequence[Any]]
    """The reshards of stored parameters that they read, each as its constraints in order."""
    earlier: Any
    """The gradient for which these wait, None for none."""


@dataclass(frozen=True)
class LateCopies:
    """Delays the copies of runs in the block of a backward piece."""

    block: ir.Block
    flow: DataFlow
    runs: Sequence[int]
    """[statement]: its rematerialized run, -1 for none."""
    statements: Mapping[Any, int]
    """Operation of the piece -> its statement."""
    tensors: Mapping[Any, int]
    """Value of the block -> its tensor."""
    annotator: Annotator | None

    def write(self) -> None:
        """Moves the copies of every run behind a barrier."""
        delays = [delay for delay in map(self._delay_of, self._members()) if delay is not None]
        for delay in delays:
            self._move(delay)
            self._gather_late(delay)

    @cached_property
    def _order(self) -> dict[Any, int]:
        """Operation of the block -> its position, before copies move."""
        return {op.operation: position for position, op in enumerate(self.block)}

    @cached_property
    def _copies(self) -> dict[Any, int]:
        """Copied operation -> the rematerialized run of its statement."""
        copies = {}
        for operation, k in self.statements.items():
            if self.flow.classes[k] in ("forward", "copied"):
                copies[operation] = self.runs[k]
        return copies

    def _members(self) -> list[list[Any]]:
        """Per run its copied operations in order, with reshards and copies that only they read, and
        without those that copies of other runs read."""
        members: dict[int, set[Any]] = defaultdict(set)
        for operation, run in self._copies.items():
            if run >= 0:
                members[run].add(operation)
        users_of = {}
        for operation in reversed(self._order):
            if operation.name == CONSTRAINT or operation in self._copies:
                users_of[operation] = self._users(operation)
        for own in members.values():
            others = self._copies.keys() - own
            for operation, users in users_of.items():
                if own.issuperset(users):
                    for run in members.values():
                        run.discard(operation)
                    own.add(operation)
                elif not others.isdisjoint(users):
                    own.discard(operation)
                    others.add(operation)
            for operation in self._order:
                if operation.name == CONSTRAINT and operation.operands[0].owner in own:
                    own.add(operation)
        return [sorted(own, key=self._order.__getitem__) for own in members.values() if own]

    def _users(self, operation: Any) -> set[Any]:
        """The operations of the block that read the results of one, also inside loops."""
        users = set()
        for result in operation.results:
            for use in result.uses:
                user = use.owner.operation
                while user not in self._order:
                    user = user.parent.operation
                users.add(user)
        return users

    def _delay_of(self, members: Sequence[Any]) -> _Delay | None:
        """The delay of the copies of a run, None if they cannot wait."""
        readers = set().union(*map(self._users, members)).difference(members)
        first = min(readers, key=self._order.__getitem__)
        gradient = self._gradient(self._order[first])
        inputs = self._inputs(members)
        if first in self._copies or gradient is None or not inputs:
            return None
        gathers = self._gathers(set(members), first)
        earlier = self._earlier_gradient(first) if gathers else None
        of_slices = self._made_from(steps[0].operands[0] for steps in gathers)
        late = [operation for operation in members if operation not in of_slices]
        readers_of_gradient = [
            (use.owner.operation, use.operand_number)
            for use in gradient.uses
            if self._order.get(use.owner.operation, -1) >= self._order[first]
        ]
        return _Delay(late, first, gradient, readers_of_gradient, inputs, gathers, earlier)

    def _move(self, delay: _Delay) -> None:
        """Moves copies in front of their first reader, behind a barrier."""
        behind = self._barrier([delay.gradient, *delay.inputs], delay.first)
        for operation, position in delay.readers:
            if operation.operands[position] == delay.gradient:
                operation.operands[position] = behind[0]
        copies = dict(zip(delay.inputs, behind[1:], strict=True))
        for operation in delay.members:
            stablehlo.replace_operands(operation, copies)
            operation.move_before(delay.first)

    def _gather_late(self, delay: _Delay) -> None:
        """Moves the gathers of a run behind a barrier of their slices."""
        gradient = delay.earlier
        if gradient is None:
            return
        place = gradient.owner.operation
        slices = [steps[0].operands[0] for steps in delay.gathers]
        behind = self._barrier([gradient, *slices], place)
        last = behind[0].owner.operation
        last.move_after(place)
        gradient.replace_all_uses_except(behind[0], last)
        for steps, part in zip(delay.gathers, behind[1:], strict=True):
            steps[0].operands[0] = part
            for step in steps:
                step.move_after(last)
                last = step

    def _gathers(self, members: Set[Any], first: Any) -> list[Sequence[Any]]:
        """The reshards of variables that copies read, and that nothing before `first` reads."""
        gathers = []
        for operation in self._order:
            if operation.name != CONSTRAINT:
                continue
            if not self.flow.is_variable(self.tensors.get(operation.operands[0], -1)):
                continue
            steps, readers = self._reshard(operation)
            is_early = any(self._order[r] < self._order[first] for r in readers - members)
            is_gather = len({str(step.attributes["sharding"]) for step in steps}) > 1
            if is_gather and not is_early and readers & members:
                gathers.append(steps)
        return gathers

    def _made_from(self, values: Iterable[Any]) -> set[Any]:
        """The operations of the block that compute values."""
        operations: set[Any] = set()
        waiting = list(values)
        while waiting:
            owner = waiting.pop().owner
            if not isinstance(owner, ir.Block) and owner not in operations:
                operations.add(owner)
                waiting += owner.operands
        return operations

    def _earlier_gradient(self, first: Any) -> Any:
        """The gradient for which the gathers of a run wait, None for none."""
        tensor = prefetching_gradient(self.flow, self.statements.get(first, -1))
        for value, own in self.tensors.items():
            if own == tensor and not isinstance(value.owner, ir.Block):
                readers = [use.owner.operation for use in value.uses]
                return None if self._is_partial(tensor, readers) else value
        return None

    def _reshard(self, constraint: Any) -> tuple[list[Any], set[Any]]:
        """(the constraints of a reshard from its first one on, the readers of their values)."""
        steps = [constraint]
        readers: set[Any] = set()
        for step in steps:
            for user in self._users(step):
                if user.name == CONSTRAINT:
                    steps.append(user)
                else:
                    readers.add(user)
        return steps, readers

    def _gradient(self, end: int) -> Any:
        """The latest value of the backward pass before a position that it reads from there on, None
        if there is none."""
        values = list(self.block.arguments)
        for operation in list(self._order)[:end]:
            values += operation.results
        for value in reversed(values):
            tensor = self._tensor(value, "backward")
            if tensor < 0 or not self.flow.graph.tensors[tensor].shape:
                continue
            readers = [use.owner.operation for use in value.uses]
            is_read = any(self._order.get(r, -1) >= end and self._is_backward(r) for r in readers)
            if is_read and not self._is_partial(tensor, readers):
                return value
        return None

    def _is_backward(self, operation: Any) -> bool:
        """Whether an operation is a statement of the backward pass."""
        statement = self.statements.get(operation, -1)
        return statement >= 0 and self.flow.classes[statement] == "backward"

    def _is_partial(self, tensor: int, readers: Sequence[Any]) -> bool:
        """Whether a tensor, or what light instructions compute from it, stays a sum of a device."""
        if self.annotator is None:
            return False
        light = [reader for reader in readers if stablehlo.short(reader.name) in LIGHT]
        made = {self.tensors.get(result, -1) for reader in light for result in reader.results}
        return not self.annotator.pending.axes.keys().isdisjoint({tensor, *made})

    def _inputs(self, members: Sequence[Any]) -> list[Any]:
        """The stored activations that copies read."""
        made = {result for operation in members for result in operation.results}
        read = dict.fromkeys(value for operation in members for value in operation.operands)
        return [
            value for value in read if value not in made and self._tensor(value, "forward") >= 0
        ]

    def _tensor(self, value: Any, of_class: str) -> int:
        """The tensor of a value or of the reshard that it is, -1 if its statement has another
        class."""
        owner = value.owner
        while not isinstance(owner, ir.Block) and owner.name == CONSTRAINT:
            value = owner.operands[0]
            owner = value.owner
        tensor = self.tensors.get(value, -1)
        producer = self.flow.producer.get(tensor, -1)
        return tensor if producer >= 0 and self.flow.classes[producer] == of_class else -1

    def _barrier(self, values: Sequence[Any], place: Any) -> Sequence[Any]:
        """The results of a barrier of values in front of an operation."""
        shardings = [] if self.annotator is None else list(map(self._sharding, values))
        return list(barrier(values, place, shardings).results)

    def _sharding(self, value: Any) -> str:
        """The sharding of a value, as an element of those of an operation."""
        assert self.annotator is not None
        owner = value.owner
        if not isinstance(owner, ir.Block) and owner.name == CONSTRAINT:
            text = str(owner.operation.attributes["sharding"])
        else:
            text = self.annotator.text(self.annotator.layout.shardings[self.tensors[value]])
        return text.removeprefix("#sdy.sharding")
