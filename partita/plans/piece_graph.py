"""A piece of a step as an operator graph of its own, so that the cost model applies to it.

Tensors keep their numbers. The values of a piece are counted where they are stored, which is
outside of it: each of its results takes the place of an argument.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from partita.graph.flat import Reader
from partita.graph.operator_graph import Argument, Instruction, Loop, OperatorGraph, Use
from partita.plans.layout import Layout, Read, Sharding, prefetching_product
from partita.plans.phases import DataFlow
from partita.plans.pieces import Piece


def piece_graph(
    flow: DataFlow,
    piece: Piece,
    layout: Layout,
    summed: Collection[int],
    late: Collection[int],
    runs: Sequence[int] = (),
    updates: Collection[int] = (),
) -> tuple[OperatorGraph, Layout]:
    """(the graph of a piece, its layout).

    Statements run in program order, but those in `late` directly before their first reader.
    Results in `summed` are added to a sum over the microbatches. `runs`: the rematerialized run of
    every statement, if the copies of a backward piece wait for gradients. The additions of results
    in `updates` count as an update, for which sums over devices wait.
    """
    if runs and piece.phase == "backward":
        gathers = gathers_of_runs(flow, piece, layout.reads, runs)
        layout = replace(layout, reads=backward_reads(flow, layout.reads, gathers))
    return _PieceGraph(flow, piece, layout, summed, late, updates).build()


def prefetching_gradient(flow: DataFlow, reader: int) -> int:
    """The gradient after which the gathers of a rematerialized run begin, -1 for none.

    `reader` is the first statement of the backward pass that reads a value of the run.
    """
    if reader < 0:
        return -1
    product = prefetching_product(flow.graph, flow.statements[reader].instruction)
    return -1 if product < 0 else flow.graph.instructions[product].results[0]


def gathers_of_runs(
    flow: DataFlow, piece: Piece, reads: Iterable[Read], runs: Sequence[int]
) -> dict[tuple[int, Sharding], int]:
    """(variable, its sharding behind the gather) -> a statement of a backward piece.

    Copies of a rematerialized run read the variable there, and gradients read the same gather. The
    statement is the first of the backward pass that reads a value of the run.
    """
    run_of = {i: runs[k] for k in piece.statements for i in flow.instructions([k])}
    first = _first_readers(flow, piece, runs)
    gathers: dict[tuple[int, Sharding], int] = {}
    for read in reads:
        key = (read.tensor, read.target)
        for i, _ in read.readers if flow.is_variable(read.tensor) else ():
            run = run_of.get(i, -1)
            if run in first:
                gathers[key] = min(first[run], gathers.get(key, first[run]))
    return gathers


def backward_reads(
    flow: DataFlow, reads: Sequence[Read], gathers: Mapping[tuple[int, Sharding], int]
) -> tuple[Read, ...]:
    """The reads of a step for a backward piece with copies of runs, given the gathers of these.

    Copies of a run and gradients read one gather. No gather waits for a copied product, as those of
    the forward pass do for the original.
    """
    readers: dict[tuple[int, Sharding], tuple[Reader, ...]] = defaultdict(tuple)
    for read in reads:
        readers[read.tensor, read.target] += read.readers
    once: dict[object, Read] = {}
    for number, read in enumerate(reads):
        key = (read.tensor, read.target)
        producer = flow.producer.get(read.after, -1)
        if key in gathers:
            after = prefetching_gradient(flow, gathers[key])
            once[key] = replace(read, readers=readers[key], after=after)
        elif producer >= 0 and flow.classes[producer] == "forward":
            once[number] = replace(read, after=-1)
        else:
            once[number] = read
    return tuple(once.values())


def _first_readers(flow: DataFlow, piece: Piece, runs: Sequence[int]) -> dict[int, int]:
    """Run -> the first statement of the backward pass that reads one of its values."""
    own = set(piece.statements)
    first: dict[int, int] = {}
    for k in piece.statements:
        for t in flow.statements[k].makes if runs[k] >= 0 else ():
            for reader in own.intersection(flow.readers[t]):
                if flow.classes[reader] == "backward":
                    first[runs[k]] = min(reader, first.get(runs[k], reader))
    return first


def returned_reads(graph: OperatorGraph, layout: Layout) -> tuple[Read, ...]:
    """The reads of a step's layout by which results of a piece come under the sharding of the
    arguments that they replace, as new variables whose updates are split (ZeRO-1).

    `piece_graph` leaves them out, because such results are stored outside of the piece.
    """
    positions = {tensor: position for position, tensor in enumerate(graph.outputs)}
    returned = []
    for read in layout.reads:
        if read.tensor in positions and any(i < 0 for i, _ in read.readers):
            returned.append(replace(read, readers=((-1, positions[read.tensor]),)))
    return tuple(returned)


class _PieceGraph:
    def __init__(
        self,
        flow: DataFlow,
        piece: Piece,
        layout: Layout,
        summed: Collection[int],
        late: Collection[int],
        updates: Collection[int],
    ) -> None:
        self.flow = flow
        self.piece = piece
        self.layout = layout
        self.late = set(late)
        self.updates = updates
        self.summed = set(summed).intersection(piece.gives)
        graph = flow.graph
        self.tensors = list(graph.tensors)
        self.homes = list(graph.home)
        self.labels = list(graph.labels)
        self.shardings = list(layout.shardings)
        self.instructions: list[Instruction] = []
        self.owners: list[int] = []
        self.position: dict[int, int] = {}
        """Instruction of the step -> its position in the piece."""
        self.results: dict[int, int] = {}
        """New argument -> the result that takes its place."""

    def build(self) -> tuple[OperatorGraph, Layout]:
        graph = self.flow.graph
        for statement in self._ordered_statements():
            self._add_statement(statement)
        for t in self.piece.gives:
            if t not in self.summed:
                self.results[self._copy_of(t)] = t
        arguments = [Argument("", "batch", t) for t in self.piece.reads]
        arguments += [Argument("", "batch", t, result) for t, result in self.results.items()]
        piece = replace(
            graph,
            tensors=tuple(self.tensors),
            instructions=tuple(self.instructions),
            loops=tuple(self._loops()),
            arguments=tuple(arguments),
            outputs=tuple(self.results.values()),
            owner=tuple(self.owners),
            home=tuple(self.homes),
            labels=tuple(self.labels),
            uses=tuple(self._uses()),
        )
        layout = replace(self.layout, shardings=tuple(self.shardings), reads=tuple(self._reads()))
        return piece, layout

    def _ordered_statements(self) -> list[int]:
        """The statements of the piece in the order in which they run."""
        flow = self.flow
        late = self.late.intersection(self.piece.statements)
        if not late:
            return list(self.piece.statements)
        ordered: dict[int, None] = {}
        for own in self.piece.statements:
            waiting = [] if own in late else [own]
            while waiting:
                producers = {flow.producer.get(t, -1) for t in flow.statements[waiting[-1]].reads}
                missing = (producers & late) - ordered.keys()
                if missing:
                    waiting.append(max(missing))
                else:
                    ordered[waiting.pop()] = None
        return list(ordered)

    def _add_statement(self, statement: int) -> None:
        graph = self.flow.graph
        for i in self.flow.instructions([statement]):
            self.position[i] = len(self.instructions)
            self._add(graph.instructions[i], graph.owner[i])
        for t in self.flow.statements[statement].makes:
            if t in self.summed:
                self._add_sum(t, graph.owner[self.flow.statements[statement].instruction])

    def _add_sum(self, tensor: int, owner: int) -> None:
        """Adds the addition of a value to its sum over the microbatches."""
        before = self._copy_of(tensor)
        after = self._copy_of(tensor)
        phase = "update" if tensor in self.updates else self.piece.phase
        self._add(Instruction("add", "", phase, (before, tensor), (after,), None), owner)
        self.results[before] = after

    def _add(self, instruction: Instruction, owner: int) -> None:
        self.instructions.append(instruction)
        self.owners.append(owner)

    def _copy_of(self, tensor: int) -> int:
        """A new tensor like another one."""
        self.tensors.append(self.tensors[tensor])
        self.homes.append(self.homes[tensor])
        self.labels.append(self.labels[tensor])
        self.shardings.append(self.shardings[tensor])
        return len(self.tensors) - 1

    def _loops(self) -> list[Loop]:
        loops = []
        for loop in self.flow.graph.loops:
            if loop.instruction in self.position:
                first, end = loop.body
                start = self.position[loop.instruction] + first - loop.instruction
                body = (start, start + end - first)
                instruction = self.position[loop.instruction]
                loops.append(replace(loop, instruction=instruction, body=body))
        return loops

    def _uses(self) -> list[Use]:
        """The reads of the piece under other labels."""
        uses = []
        for use in self.flow.graph.uses:
            readers = [(self.position[i], n) for i, n in use.instructions if i in self.position]
            if readers:
                uses.append(replace(use, instructions=tuple(readers)))
        return uses

    def _reads(self) -> list[Read]:
        """The reads of the piece under other shardings. They wait for no gradient of others."""
        made = {t for instruction in self.instructions for t in instruction.results}
        reads = []
        for read in self.layout.reads:
            readers = [(self.position[i], n) for i, n in read.readers if i in self.position]
            if readers:
                after = read.after if read.after in made else -1
                reads.append(replace(read, readers=tuple(readers), after=after))
        return reads
