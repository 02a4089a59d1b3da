"""Rematerialization of a step: the forward values of operators, computed again for the backward
pass.

A *run* is a set of operators. Its values are not stored from the forward to the backward pass.
Copies of the instructions that compute them stand in front of their first backward reader. The
copies read stored values, the inputs of the run, behind an optimization barrier that waits for a
gradient. So a compiler can neither merge the copies with the originals nor run them early
(`jax.checkpoint` writes the same program).

- `copies_of` chooses the copied instructions and the stored inputs.
- `rematerialized` is the graph with the copies. A copy belongs to the operator of its original and
  has its labels, so that a plan of the graph is a plan of the rematerialized graph.

The text of the program is changed alike in `execute.rematerialize`.

Values that depend on parameters and constants alone are not computed again: a converted parameter
is small beside activations, and a stored one is gathered again anyway. Loops and conditionals are
not copied.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from partita.errors import PlanError
from partita.graph.check import check
from partita.graph.clones import BARRIER
from partita.graph.flat import HEAVY, SHAPE_ONLY, Reader, readers_of
from partita.graph.operator_graph import (
    CONDITIONALS,
    IdentityKey,
    Instruction,
    Label,
    Loop,
    Operator,
    OperatorGraph,
    Rule,
    Tensor,
    Use,
    per_graph,
    producers,
)

T = TypeVar("T")
Run = tuple[str, str]
"""The first and the last operator of a run, in the order of the graph."""
UNCOPIED = {"while", *CONDITIONALS, BARRIER}
"""Instructions that are not computed again."""
LONGEST_CHAIN = 64
"""Light instructions of other operators, at most, that are copied to avoid a stored value."""


@dataclass(frozen=True)
class Copies:
    """The copies of one run. Tensors and instructions have the numbers of the original graph."""

    position: int
    """The instruction in front of which the copies stand."""
    gradient: int
    """A gradient for which they wait, -1 for none."""
    inputs: tuple[int, ...]
    """Stored tensors that the copies read behind the barrier."""
    instructions: tuple[int, ...]
    """The copied instructions."""
    readers: tuple[Reader, ...]
    """Readers of copied values in the backward pass."""
    gradient_readers: tuple[Reader, ...]
    """Readers of the gradient behind the position."""

    @property
    def barrier(self) -> tuple[int, ...]:
        """The tensors behind the barrier, the gradient first."""
        return self.inputs if self.gradient < 0 else (self.gradient, *self.inputs)


@lru_cache(maxsize=8)
def _copies_of(key: IdentityKey[OperatorGraph], runs: tuple[Run, ...]) -> tuple[Copies, ...]:
    chooser = _Chooser(key.value, runs)
    copies = []
    for run in reversed(range(len(runs))):
        copies_of_run = chooser.copies(run)
        if copies_of_run is None:
            first, last = runs[run]
            raise PlanError(
                f"The plan rematerializes '{first}' to '{last}', but the backward pass reads none "
                "of their values: there is nothing to free. Remove this run from the plan."
            )
        copies.append(copies_of_run)
    return tuple(sorted(copies, key=lambda one: one.position))


def copies_of(graph: OperatorGraph, runs: tuple[Run, ...]) -> tuple[Copies, ...]:
    """The copies of all runs, in the order of their positions.

    PlanError for a run without a value that the backward pass reads.
    """
    return _copies_of(IdentityKey(graph), runs)


def useful_runs(graph: OperatorGraph, runs: Sequence[Run]) -> tuple[Run, ...]:
    """The runs with values that the backward pass reads."""
    chooser = _Chooser(graph, runs)
    useful = [run for run in reversed(range(len(runs))) if chooser.copies(run) is not None]
    return tuple(runs[run] for run in reversed(useful))


def rematerialized(graph: OperatorGraph, runs: tuple[Run, ...]) -> OperatorGraph:
    """The graph with the copies of the runs, the graph itself without runs."""
    return _rematerialized(IdentityKey(graph), runs) if runs else graph


@lru_cache(maxsize=8)
def _rematerialized(key: IdentityKey[OperatorGraph], runs: tuple[Run, ...]) -> OperatorGraph:
    return _Rewriter(key.value, copies_of(key.value, runs)).graph_with_copies()


# ---- choice of the copies


@per_graph
def _fixed(graph: OperatorGraph) -> frozenset[int]:
    """Tensors that depend on parameters and constants alone."""
    fixed = {a.tensor for a in graph.arguments if a.role == "parameter"}
    for instruction in graph.instructions:
        if instruction.name not in UNCOPIED and fixed.issuperset(instruction.operands):
            fixed.update(instruction.results)
    return frozenset(fixed)


@per_graph
def compared_extremes(graph: OperatorGraph) -> dict[int, frozenset[int]]:
    """Comparison -> the maxima (of dims or segments) with which it compares, with the tensors
    between.

    They are computed again with the compared values: a copy may round differently, and would equal
    no stored maximum.
    """
    producer = producers(graph)
    comparisons = {}
    for index, instruction in enumerate(graph.instructions):
        extremes: set[int] = set()
        for operand in instruction.operands if instruction.name == "compare" else ():
            between = [operand]
            while (source := producer.get(between[-1], -1)) >= 0:
                made_by = graph.instructions[source]
                if made_by.name in ("reduce", "scatter") and not made_by.adds:
                    extremes.update(between)
                if made_by.name not in SHAPE_ONLY and made_by.name != "gather":
                    break
                between.append(made_by.operands[0])
        if extremes:
            comparisons[index] = frozenset(extremes)
    return comparisons


@per_graph
def _outermost(graph: OperatorGraph) -> tuple[int, ...]:
    """[instruction]: the outermost loop around it, or the instruction itself."""
    outermost = list(range(len(graph.instructions)))
    for loop in sorted(graph.loops, key=lambda loop: loop.body[1] - loop.body[0]):
        for index in range(*loop.body):
            outermost[index] = loop.instruction
    return tuple(outermost)


class _Chooser:
    """Chooses the copies of runs, from the last run to the first."""

    def __init__(self, graph: OperatorGraph, runs: Sequence[Run]) -> None:
        self.graph = graph
        self.runs = runs
        self.producers = producers(graph)
        self.fixed = _fixed(graph)
        self.extremes = compared_extremes(graph)
        self.outermost = _outermost(graph)
        numbers = {operator.name: number for number, operator in enumerate(graph.operators)}
        self.members = [range(numbers[first], numbers[last] + 1) for first, last in runs]
        self.run_of = {o: run for run, members in enumerate(self.members) for o in members}
        self.stored = self._stored()
        """Forward values that are in memory in the backward pass."""
        self.backward_instructions = self._backward_instructions()
        self.backward_readers = self._backward_readers()

    def _stored(self) -> set[int]:
        """Tensors that operators outside all runs read after the forward pass, and results."""
        stored = set(self.graph.outputs)
        for loop in self.graph.loops:
            stored.update(tensor for values in loop.carried for tensor in values)
        for index, instruction in enumerate(self.graph.instructions):
            is_kept = instruction.phase != "forward" and not self._is_in_a_run(index)
            if is_kept or self.outermost[index] != index:
                stored.update(instruction.operands)
        return stored

    def _is_in_a_run(self, index: int) -> bool:
        return self._is_backward(index) and self.graph.owner[index] in self.run_of

    def _backward_instructions(self) -> list[list[int]]:
        """[run]: its instructions of the backward pass, in program order."""
        instructions: list[list[int]] = [[] for _ in self.runs]
        for index in range(len(self.graph.instructions)):
            if self._is_in_a_run(index):
                instructions[self.run_of[self.graph.owner[index]]].append(index)
        return instructions

    def _backward_readers(self) -> list[list[Reader]]:
        """[run]: its reads of forward values in the backward pass, in program order."""
        readers: list[list[Reader]] = []
        for instructions in self.backward_instructions:
            reads: list[Reader] = []
            for index in instructions:
                for position, tensor in enumerate(self.graph.instructions[index].operands):
                    if self._is_copyable(tensor):
                        reads.append((index, position))
            readers.append(reads)
        return readers

    def _is_copyable(self, tensor: int) -> bool:
        """Whether a tensor is a forward value that can be computed again."""
        index = self.producers.get(tensor, -1)
        if index < 0 or tensor in self.fixed or self.outermost[index] != index:
            return False
        instruction = self.graph.instructions[index]
        return instruction.phase == "forward" and instruction.name not in UNCOPIED

    def copies(self, run: int) -> Copies | None:
        """The copies of a run, None if it frees nothing. Later runs come first: their inputs are
        stored.
        """
        readers = self.backward_readers[run]
        needed = [self.graph.instructions[index].operands[position] for index, position in readers]
        instructions, inputs = self._closure(run, needed)
        copied = {t for index in instructions for t in self.graph.instructions[index].results}
        reading = [r for r, tensor in zip(readers, needed, strict=True) if tensor in copied]
        if not reading:
            return None
        self.stored.update(inputs)
        position = self.outermost[reading[0][0]]
        gradient = self._gradient(run, position)
        return Copies(
            position=position,
            gradient=gradient,
            inputs=tuple(sorted(inputs)),
            instructions=tuple(sorted(instructions)),
            readers=tuple(reading),
            gradient_readers=self._readers_behind(gradient, position),
        )

    def _closure(self, run: int, needed: Iterable[int]) -> tuple[set[int], set[int]]:
        """(instructions to copy, stored tensors that they read) for the needed values of a run."""
        instructions: set[int] = set()
        inputs: set[int] = set()
        outside: set[int] = set()
        self._visit(run, needed, instructions, inputs, outside)
        for tensor in sorted(outside, reverse=True):
            chain = self._light_chain(tensor, inputs | outside)
            if chain is None:
                inputs.add(tensor)
                continue
            instructions |= chain
            inputs |= self._read_by(chain) - outside
        copied = {t for index in instructions for t in self.graph.instructions[index].results}
        return instructions, (inputs & self._read_by(instructions)) - copied

    def _visit(
        self,
        run: int,
        needed: Iterable[int],
        instructions: set[int],
        inputs: set[int],
        outside: set[int],
    ) -> None:
        """Follows needed values to the inputs of their run."""
        pending = list(needed)
        extremes: set[int] = set()
        while pending:
            tensor = pending.pop()
            if tensor in self.fixed:
                continue
            is_stored = tensor in self.stored and tensor not in extremes
            if is_stored or not self._is_copyable(tensor):
                inputs.add(tensor)
                continue
            index = self.producers[tensor]
            if index in instructions:
                continue
            if self.run_of.get(self.graph.owner[index]) == run or tensor in extremes:
                instructions.add(index)
                extremes |= self.extremes.get(index, frozenset())
                pending += self.graph.instructions[index].operands
            else:
                outside.add(tensor)

    def _light_chain(self, tensor: int, available: Collection[int]) -> set[int] | None:
        """Light instructions that compute a value of another operator from available ones, None
        if there are none or too many."""
        chain: set[int] = set()
        pending = [tensor]
        while pending:
            one = pending.pop()
            is_available = one in available or one in self.stored
            if one in self.fixed or (is_available and one != tensor):
                continue
            if not self._is_copyable(one):
                # An argument is in memory anyway.
                if one in self.producers:
                    return None
                continue
            index = self.producers[one]
            is_heavy = self.graph.instructions[index].name in HEAVY
            if is_heavy or len(chain) >= LONGEST_CHAIN or index in self.extremes:
                return None
            chain.add(index)
            pending += self.graph.instructions[index].operands
        return chain

    def _read_by(self, instructions: Iterable[int]) -> set[int]:
        """Tensors that instructions read and none of them computes, without fixed ones."""
        read: set[int] = set()
        computed: set[int] = set()
        for index in instructions:
            read.update(self.graph.instructions[index].operands)
            computed.update(self.graph.instructions[index].results)
        return read - computed - self.fixed

    def _gradient(self, run: int, position: int) -> int:
        """The latest gradient in front of a position that the run reads after it, else the latest
        that any instruction does; -1 for none.
        """
        own = self.backward_instructions[run]
        read = []
        for index in own[bisect_left(own, position) :]:
            read += self.graph.instructions[index].operands
        latest = [(self.producers[t], t) for t in read if self._is_gradient(t, position)]
        if latest:
            return max(latest)[1]
        for producer in range(position - 1, -1, -1):
            for tensor in reversed(self.graph.instructions[producer].results):
                readers = readers_of(self.graph).get(tensor, ())
                backward = [i for i, _ in readers if self._is_backward(i) and i >= position]
                if backward and self._is_gradient(tensor, position):
                    return tensor
        return -1

    def _is_gradient(self, tensor: int, position: int) -> bool:
        """Whether a tensor with dims is computed by the backward pass in front of a position."""
        producer = self.producers.get(tensor, -1)
        is_before = 0 <= producer < position and self.outermost[producer] == producer
        return is_before and self._is_backward(producer) and bool(self.graph.tensors[tensor].shape)

    def _is_backward(self, index: int) -> bool:
        return self.graph.instructions[index].phase == "backward"

    def _readers_behind(self, gradient: int, position: int) -> tuple[Reader, ...]:
        """The readers of a gradient from a position on, without loops and barriers."""
        readers = []
        for index, place in readers_of(self.graph).get(gradient, ()):
            if index < position or self.outermost[index] != index:
                continue
            if self.graph.instructions[index].name not in UNCOPIED:
                readers.append((index, place))
        return tuple(readers)


# ---- the graph with the copies


class _Rewriter:
    """Writes copies into a graph, and numbers tensors and instructions anew in program order.

    While instructions are written, new tensors have numbers above all original ones.
    """

    def __init__(self, graph: OperatorGraph, copies: Sequence[Copies]) -> None:
        self.graph = graph
        self.use_of: dict[Reader, Use] = {r: use for use in graph.uses for r in use.instructions}
        self.originals: list[int] = []
        """Per new tensor, the tensor whose value, home and label it has."""
        self.first_after: list[int] = []
        """Per new tensor, the first original tensor that is computed after it."""
        self.instructions: list[Instruction] = []
        self.owners: list[int] = []
        self.index_of: dict[int, int] = {}
        """Original instruction -> its new number."""
        self.copied_reads: list[tuple[Reader, Reader]] = []
        """(reader in a copy, the same reader in the original)."""
        self.redirected: dict[Reader, int] = {}
        """Original reader -> the new tensor that it reads."""
        self.gradients: dict[int, int] = {}
        """Gradient -> its newest name behind a barrier."""
        self._write(copies)
        self.numbers = self._numbers()

    def graph_with_copies(self) -> OperatorGraph:
        """The rewritten graph."""
        graph = self.graph
        number = self.numbers.__getitem__
        tensors_of_copies = [graph.tensors[t] for t in self.originals]
        labels_of_copies = [graph.labels[t] for t in self.originals]
        homes_of_copies = [graph.home[t] for t in self.originals]
        arguments = []
        for argument in graph.arguments:
            result = None if argument.result is None else number(argument.result)
            arguments.append(replace(argument, tensor=number(argument.tensor), result=result))
        instructions = []
        for one in self.instructions:
            operands = tuple(map(number, one.operands))
            results = tuple(map(number, one.results))
            instructions.append(replace(one, operands=operands, results=results))
        return check(
            replace(
                graph,
                tensors=self._in_order((*graph.tensors, *tensors_of_copies)),
                labels=self._in_order((*graph.labels, *labels_of_copies)),
                home=self._in_order((*graph.home, *homes_of_copies)),
                instructions=tuple(instructions),
                owner=tuple(self.owners),
                loops=tuple(self._loop(loop) for loop in graph.loops),
                arguments=tuple(arguments),
                outputs=tuple(map(number, graph.outputs)),
                operators=self._operators(),
                uses=self._uses(),
            )
        )

    def _write(self, copies: Sequence[Copies]) -> None:
        """Writes all instructions, with copies in front of their position."""
        pending = list(copies)
        for index, instruction in enumerate(self.graph.instructions):
            while pending and pending[0].position == index:
                self._write_copies(pending.pop(0))
            operands = []
            for position, tensor in enumerate(instruction.operands):
                operands.append(self.redirected.get((index, position), tensor))
            self.index_of[index] = len(self.instructions)
            self._append(replace(instruction, operands=tuple(operands)), self.graph.owner[index])

    def _write_copies(self, copies: Copies) -> None:
        """Writes the barriers and the copied instructions of one run."""
        graph = self.graph
        following = graph.instructions[copies.position :]
        first_after = next(min(x.results) for x in following if x.results)
        copy_of: dict[int, int] = {}
        for tensor in copies.barrier:
            operand = self.gradients.get(tensor, tensor)
            copy_of[tensor] = self._new(tensor, first_after)
            barrier = _barrier(graph.tensors[tensor], operand, copy_of[tensor])
            self._append(barrier, graph.home[tensor])
        for index in copies.instructions:
            instruction = graph.instructions[index]
            operands = tuple(copy_of.get(t, t) for t in instruction.operands)
            results = tuple(self._new(t, first_after) for t in instruction.results)
            copy_of.update(zip(instruction.results, results, strict=True))
            for position in range(len(operands)):
                reader = (len(self.instructions), position)
                self.copied_reads.append((reader, (index, position)))
            copy = replace(instruction, operands=operands, results=results, phase="backward")
            self._append(copy, graph.owner[index])
        for index, position in (*copies.readers, *copies.gradient_readers):
            tensor = graph.instructions[index].operands[position]
            self.redirected[index, position] = copy_of[tensor]
        if copies.gradient >= 0:
            self.gradients[copies.gradient] = copy_of[copies.gradient]

    def _append(self, instruction: Instruction, owner: int) -> None:
        self.instructions.append(instruction)
        self.owners.append(owner)

    def _new(self, original: int, first_after: int) -> int:
        """A new tensor with the value of an original one."""
        self.originals.append(original)
        self.first_after.append(first_after)
        return len(self.graph.tensors) + len(self.originals) - 1

    def _numbers(self) -> list[int]:
        """Per tensor, its number in program order."""
        count = len(self.graph.tensors)
        starts = sorted(self.first_after)
        numbers = [tensor + bisect_right(starts, tensor) for tensor in range(count)]
        for new, first_after in enumerate(self.first_after):
            numbers.append(first_after + new)
        return numbers

    def _in_order(self, values: Sequence[T]) -> tuple[T, ...]:
        """Values of tensors, in program order."""
        ordered = sorted(range(len(values)), key=self.numbers.__getitem__)
        return tuple(values[tensor] for tensor in ordered)

    def _loop(self, loop: Loop) -> Loop:
        carried = []
        for values in loop.carried:
            before, inside, yielded, after = (self.numbers[tensor] for tensor in values)
            carried.append((before, inside, yielded, after))
        first, end = loop.body
        body = (self.index_of[first], self.index_of[end - 1] + 1) if first < end else (0, 0)
        index = self.index_of[loop.instruction]
        return replace(loop, instruction=index, carried=tuple(carried), body=body)

    def _operators(self) -> tuple[Operator, ...]:
        owned: dict[int, list[int]] = {number: [] for number in range(len(self.graph.operators))}
        for index, owner in enumerate(self.owners):
            if owner >= 0:
                owned[owner].append(index)
        operators = []
        for number, operator in enumerate(self.graph.operators):
            heavy = self.index_of[operator.heavy]
            operators.append(replace(operator, heavy=heavy, instructions=tuple(owned[number])))
        return tuple(operators)

    def _uses(self) -> tuple[Use, ...]:
        """All uses, those of copies like those of their originals."""
        readers: dict[tuple[int, int, Label], list[Reader]] = {}

        def add(reader: Reader, use: Use) -> None:
            index, position = reader
            tensor = self.numbers[self.instructions[index].operands[position]]
            readers.setdefault((tensor, use.operator, use.label), []).append(reader)

        for use in self.graph.uses:
            for index, position in use.instructions:
                add((self.index_of[index], position), use)
        for reader, original in self.copied_reads:
            if original in self.use_of:
                add(reader, self.use_of[original])
        uses = []
        for (tensor, operator, label), reading in readers.items():
            uses.append(Use(tensor, operator, label, tuple(reading)))
        return tuple(uses)


def _barrier(tensor: Tensor, operand: int, result: int) -> Instruction:
    """An optimization barrier of one tensor."""
    dims = tuple((dim,) for dim in range(len(tensor.shape)))
    rule = Rule(sizes=tensor.shape, operands=(dims,), results=(dims,))
    return Instruction(BARRIER, "", "backward", (operand,), (result,), rule)
