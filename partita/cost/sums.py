"""Sums over devices, and the passes by which compilers move, join and narrow them.

The partitioner sums a partial result right after the instruction that computes it. A compiler may
then rewrite the program. Each pass takes the sums of a program and returns those of the rewritten
one. A backend (`cost.backends`) is a sequence of passes, named as in XLA:

- `fold` (AllReduceFolder): a sum over one axis, then over another, is one sum over both.
- `leave_loops` (WhileLoopAllReduceCodeMotion): a loop that adds a sum to a carried value in every
  trip adds partial values instead, and one sum follows the loop.
- `join_additions` (AllReduceReassociate): the sum of two sums is one sum of the added values.
- `scatter` (ReduceScatterCreator): a sum of which every device reads only its slice is a
  reduce-scatter. `join_additions` then joins those of one addition (ReduceScatterReassociate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from partita.cost.early_sums import waits
from partita.cost.partial import keeps_elements
from partita.cost.reshard import Axes, emitted_steps
from partita.graph.flat import Reader, readers_of
from partita.graph.gradient_sums import PASSING
from partita.graph.operator_graph import Instruction, OperatorGraph, per_graph
from partita.plans.layout import Layout, Sharding
from partita.plans.plan import Mesh

CHANGES = ("convert", "negate", "copy")
"""Instructions behind which a compiler does not look for slices of a sum."""
SumKind = Literal["all_reduce", "all_gather", "reduce_scatter"]


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum of partial values over devices."""

    kind: SumKind
    """An "all_gather" where an instruction has several results, summed after it."""
    instruction: int
    """It computes the partial values."""
    tensor: int
    """The sum."""
    sharding: Sharding
    """Of the sum, before a reduce-scatter."""
    axes: Axes
    """Mesh axes over which it sums."""
    trips: int


@dataclass(frozen=True)
class LaidOutProgram:
    """A graph under a layout: the program that a compiler rewrites."""

    graph: OperatorGraph
    mesh: Mesh
    layout: Layout
    in_pieces: bool = False
    """Whether the update is a program of its own."""


@dataclass(frozen=True, slots=True)
class LoopSum:
    """A value that a loop adds up: it can be summed over devices after the loop."""

    tensor: int
    """The carried tensor after the loop."""
    trips: int
    """Trips of one run of the loop."""


def only_reader(graph: OperatorGraph, tensor: int) -> int | None:
    """The instruction that alone reads a tensor, through changes of shape. None if several do."""
    while True:
        readers = readers_of(graph).get(tensor, ())
        if len(readers) != 1 or readers[0][0] < 0:
            return None
        reader = readers[0][0]
        if graph.instructions[reader].name not in PASSING:
            return reader
        tensor = graph.instructions[reader].results[0]


@per_graph
def loop_sums(graph: OperatorGraph) -> dict[int, LoopSum]:
    """Tensor computed in a loop that only adds it to a carried tensor -> the sum after the loop."""
    added: dict[int, LoopSum] = {}
    for loop in graph.loops:
        for _, inside, yielded, after in loop.carried:
            readers = readers_of(graph).get(inside, ())
            if inside == yielded or len(readers) != 1 or readers[0][0] < 0:
                continue
            addition = graph.instructions[readers[0][0]]
            if addition.name == "add" and yielded in addition.results:
                for tensor in addition.operands:
                    if tensor != inside:
                        added[readers[0][0]] = LoopSum(after, loop.trips)
    sums = {}
    if not added:
        return sums
    for instruction in graph.instructions:
        for tensor in instruction.results:
            reader = only_reader(graph, tensor) if instruction.trips > 1 else None
            if reader in added:
                sums[tensor] = added[reader]
    return sums


def fold(
    program: LaidOutProgram,
    sums: Sequence[Sum],
    folds: Callable[[Instruction], bool],
) -> list[Sum]:
    """Sums of which those of the same tensor over several axes are one, if its instruction folds
    them."""
    folded: dict[int, Sum] = {}
    others = []
    for total in sums:
        earlier = folded.get(total.tensor)
        is_folded = folds(program.graph.instructions[total.instruction])
        if total.kind != "all_reduce" or not is_folded:
            others.append(total)
        elif earlier is None:
            folded[total.tensor] = total
        else:
            axes = tuple(sorted({*earlier.axes, *total.axes}))
            folded[total.tensor] = replace(earlier, axes=axes)
    return [*folded.values(), *others]


def leave_loops(program: LaidOutProgram, sums: Sequence[Sum]) -> list[Sum]:
    """Sums that loops only add up, moved behind their loops."""
    after_loop = loop_sums(program.graph)
    result = []
    for total in sums:
        later = after_loop.get(total.tensor)
        if total.kind == "all_reduce" and later is not None:
            sharding = program.layout.shardings[later.tensor]
            total = replace(
                total, tensor=later.tensor, sharding=sharding, trips=total.trips // later.trips
            )
        result.append(total)
    return result


def join_additions(program: LaidOutProgram, sums: Sequence[Sum]) -> list[Sum]:
    """Sums of which one addition reads two, and nothing else does: they follow the addition.

    A product that waits for a sum (`cost.early_sums`) reads it too.
    Operands that the addition reads under another sharding must be reduce-scatters to it.
    """
    graph = program.graph
    moved = program.layout.targets
    waited_for = set()
    if not program.in_pieces:
        waited_for = {t for wait in waits(graph, program.layout) for t, _ in wait.sums}
    by_tensor = {
        total.tensor: total
        for total in sums
        if total.kind != "all_gather" and total.tensor not in waited_for
    }
    kept = {id(total): total for total in sums}
    for i, instruction in enumerate(graph.instructions):
        if instruction.name != "add" or len(set(instruction.operands)) != 2:
            continue
        one, other = (by_tensor.get(tensor) for tensor in instruction.operands)
        if one is None or other is None or (one.axes, one.kind) != (other.axes, other.kind):
            continue
        is_moved = any((i, position) in moved for position in (0, 1))
        if is_moved and one.kind == "all_reduce":
            continue
        if any(len(readers_of(graph)[tensor]) != 1 for tensor in instruction.operands):
            continue
        result = instruction.results[0]
        sharding = one.sharding
        if one.kind == "all_reduce":
            sharding = program.layout.shardings[result]
        joined = replace(one, tensor=result, sharding=sharding)
        del kept[id(one)]
        del kept[id(other)]
        kept[id(joined)] = joined
        by_tensor[result] = joined
    return list(kept.values())


def scatter(program: LaidOutProgram, sums: Sequence[Sum]) -> list[Sum]:
    """Sums of which a device reads only the slice that its place among the summands gives it."""
    targets = program.layout.targets
    result = []
    for total in sums:
        if total.kind == "all_reduce" and _is_sliced(program, total, targets):
            total = replace(total, kind="reduce_scatter")
        result.append(total)
    return result


def _is_sliced(
    program: LaidOutProgram,
    total: Sum,
    targets: dict[Reader, Sharding],
) -> bool:
    """Whether every reader of a sum first slices it over exactly its axes, without remainder, in
    the program that sums."""
    tensor = _last_form(program.graph, total.tensor, targets)
    if program.in_pieces and _is_updating(program.graph, tensor):
        return False
    shape = program.graph.tensors[tensor].shape
    sizes = program.mesh.sizes
    source = total.sharding if tensor == total.tensor else program.layout.shardings[tensor]
    read_as = {targets.get(reader) for reader in readers_of(program.graph).get(tensor, ())}
    if len(read_as) != 1:
        return False
    (target,) = read_as
    if target is None:
        return False
    steps = emitted_steps(source, target, sizes, shape)
    if not steps or steps[0].kind != "all_slice":
        return False
    new_axes: set[int] = set()
    for size, before, after in zip(shape, source, steps[0].result, strict=True):
        new_axes.update(set(after) - set(before))
        if size % math.prod(sizes[axis] for axis in after):
            return False
    return tuple(sorted(new_axes)) == tuple(sorted(total.axes))


def _is_updating(graph: OperatorGraph, tensor: int) -> bool:
    """Whether an update reads a tensor."""
    readers = readers_of(graph).get(tensor, ())
    return any(i >= 0 and graph.instructions[i].phase == "update" for i, _ in readers)


def _last_form(graph: OperatorGraph, tensor: int, moved: dict[Reader, Sharding]) -> int:
    """A tensor, or what its only readers make of it by changes of shape."""
    while True:
        readers = readers_of(graph).get(tensor, ())
        if len(readers) != 1 or readers[0][0] < 0 or readers[0] in moved:
            return tensor
        instruction = graph.instructions[readers[0][0]]
        if instruction.name in CHANGES or not keeps_elements(graph, instruction):
            return tensor
        tensor = instruction.results[0]
