"""The plan written into the program: a mesh, a sharding for every value, a chain for every reshard.

The module is the captured one, instruction for instruction. Every value is pinned to the sharding
of its operator's choice. A read with another sharding has its reshard steps pinned too. So
propagation decides nothing, and XLA's partitioner emits the planned collectives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jax.extend.mlir import ir

from partita.capture import stablehlo
from partita.capture.barriers import barrier, join_barriers
from partita.capture.conditionals import CONDITIONALS, join_conditionals
from partita.cost.early_sums import Wait, waits
from partita.cost.partial import PendingSums, pending_sums
from partita.cost.reshard import Axes, reshard_steps
from partita.execute.local_calls import write_local_calls
from partita.graph.flat import HEAVY, readers_of
from partita.graph.operator_graph import Instruction, OperatorGraph, producers
from partita.plans.layout import Layout, Read, Sharding
from partita.plans.plan import Mesh

MESH = "partita_mesh"
CONSTRAINT = "sdy.sharding_constraint"
LOOPS = {"while", "case", "if"}

Source = tuple[int, int]
"""(tensor, gradient that its reshard waits for or -1)."""
Chain = tuple[Sharding, ...]
"""Shardings of a tensor from its own to a reader's, one reshard step apart."""


def annotate(
    source: bytes,
    graph: OperatorGraph,
    mesh: Mesh,
    layout: Layout,
) -> bytes:
    """The captured program with the plan's layout written into it, as portable bytes."""
    with stablehlo.context(), ir.Location.unknown():
        module = stablehlo.parse(source)
        writer = Annotator(graph, mesh, layout)
        writer.write(module)
        return stablehlo.serialize(module)


def join_split(block: Any) -> None:
    """Joins the barriers and conditionals that capture split by variable."""
    join_barriers(block)
    join_conditionals(block)


class Annotator:
    """Writes a layout into modules of a captured program.

    In a piece of a step, a gradient is summed over devices where it is computed, besides those in
    `partial`, and reshards and products wait for gradients of the piece alone.
    """

    def __init__(
        self,
        graph: OperatorGraph,
        mesh: Mesh,
        layout: Layout,
        partial: Mapping[int, Axes] | None = None,
        instructions: Collection[int] = (),
    ) -> None:
        """`partial`: for a piece of a step, the tensors that stay sums of a device, and the axes
        over which they are to be summed; `instructions` are those of the piece.
        """
        self.graph = graph
        self.mesh = mesh
        self.layout = layout
        self.values: list[Any] = []
        self.ids: dict[Any, int] = {}
        self.operations: list[Any] = []
        self.texts: dict[Sharding, str] = {}
        self.pinned: set[int] = set()
        self.arguments = {a.tensor: a.path for a in graph.arguments}
        self.is_whole = partial is None
        self.instructions = instructions
        pending = pending_sums(graph, layout) if partial is None else PendingSums(partial, {})
        self.pending = pending

    def write(self, module: ir.Module) -> None:
        """Writes the whole layout into a module."""
        self.annotate(module)
        instructions = range(len(self.operations))
        self.finish(stablehlo.main_block(module), instructions)

    def finish(self, block: Any, instructions: Iterable[int]) -> None:
        """Writes the calls of these instructions, which are left in a block, as calls on parts."""
        operations = {n: self.operations[n] for n in instructions}
        write_local_calls(operations, self.graph, self.mesh, self.layout, MESH)
        join_split(block)

    def annotate(self, module: ir.Module) -> None:
        """Writes shardings and reshards into a module."""
        axes = ", ".join(f'"{a.name}"={a.size}' for a in self.mesh.axes)
        mesh = ir.Operation.parse(f"sdy.mesh @{MESH} = <[{axes}]>")
        ir.InsertionPoint.at_block_begin(module.body).insert(mesh)
        block = stablehlo.main_block(module)
        self.values, self.operations = stablehlo.numbered(block)
        self.ids = {value: t for t, value in enumerate(self.values)}
        assert len(self.values) == len(self.graph.tensors), (
            "the text and the graph number the same values"
        )
        for operation, instruction in zip(self.operations, self.graph.instructions, strict=True):
            if instruction.name in LOOPS:
                self._pin_carried(operation)
            elif _is_pinned(instruction):
                self._pin_whole(operation, instruction)
        for t in self.pending.axes:
            self._leave_unsummed(t)
        self._add_reshards(block)
        for operation in self.operations:
            if operation.name in CONDITIONALS:
                self._pin_yielded(operation)
            self._annotate_results(operation)
        self._annotate_arguments(block)

    def _is_split(self, t: int) -> bool:
        return any(self.layout.shardings[t])

    def _annotate_results(self, operation: Any) -> None:
        """Gives an instruction's results their shardings."""
        if stablehlo.short(operation.name) in LOOPS:
            return
        tensors = [self.ids[result] for result in operation.results]
        if not any(self.graph.tensors[t].shape for t in tensors):
            return
        text = ", ".join(f"<@{MESH}, {self._result_text(t)}>" for t in tensors)
        attribute = ir.Attribute.parse(f"#sdy.sharding_per_value<[{text}]>")
        operation.attributes["sdy.sharding"] = attribute

    def _annotate_arguments(self, block: Any) -> None:
        """Gives the step's arguments their shardings."""
        attributes = [self.argument_attribute(self.ids[argument]) for argument in block.arguments]
        block.owner.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)

    def argument_attribute(self, tensor: int) -> ir.DictAttr:
        """The attributes of an argument with a tensor's sharding."""
        attribute = ir.Attribute.parse(self.text(self.layout.shardings[tensor]))
        return ir.DictAttr.get({"sdy.sharding": attribute})

    def _pin_whole(self, operation: Any, instruction: Instruction) -> None:
        """Pins the replicated results of an instruction, and a replicated value that it windows."""
        for value in operation.results:
            t = self.ids[value]
            if t not in self.pending.axes and not self._is_split(t):
                self._pin(value)
        if not instruction.windows:
            return
        operand = instruction.operands[0]
        # XLA would split a replicated value that a split window reads, and with it the value's
        # other readers.
        if not self._is_split(operand) and any(self._is_split(t) for t in instruction.results):
            self._pin(self.values[operand])

    def _pin_carried(self, loop: Any) -> None:
        """Pins the values that a loop carries, by constraints.

        XLA loses count if the loop itself has shardings and captures a constant.
        """
        carried = list(loop.results)
        if stablehlo.short(loop.name) == "while":
            body = loop.regions[1].blocks[0]
            carried += list(body.arguments)
            for entering in (loop, list(body)[-1].operation):
                self._pin_entering(entering, body)
        for value in carried:
            self._pin(value)

    def _pin_yielded(self, conditional: Any) -> None:
        """Pins values that branches yield in another sharding than the conditional's result.

        XLA refuses branches whose results have different shardings.
        """
        for branch in stablehlo.inner_blocks(conditional):
            terminator = list(branch)[-1].operation
            for position, result in enumerate(conditional.results):
                yielded = self.ids.get(terminator.operands[position])
                sharding = self.layout.shardings[self.ids[result]]
                if yielded is not None and self.layout.shardings[yielded] != sharding:
                    value = self._constrain(terminator.operands[position], sharding)
                    terminator.operands[position] = value

    def _pin_entering(self, entering: Any, body: Any) -> None:
        """Pins operands that become a loop's arguments of equal sharding."""
        for position, (value, inside) in enumerate(
            zip(entering.operands, body.arguments, strict=True)
        ):
            t = self.ids[inside]
            entered = self.ids.get(value)
            if entered is None or not self.graph.tensors[t].shape:
                continue
            sharding = self.layout.shardings[t]
            if self.layout.shardings[entered] == sharding:
                entering.operands[position] = self._constrain(value, sharding)

    def _pin(self, value: Any) -> None:
        """Puts a constraint between a value and its readers.

        A `sdy.sharding` on an instruction is enough to split its result, but XLA forgets one that
        says replicated.
        """
        t = self.ids[value]
        if self.graph.tensors[t].shape and t not in self.pinned:
            self.pinned.add(t)
            self._pinned(value, self.text(self.layout.shardings[t]))

    def _axes_text(self, axes: Sequence[int]) -> str:
        names = ", ".join(f'"{self.mesh.axes[a].name}"' for a in axes)
        return "{" + names + "}"

    def _dims_text(self, sharding: Sharding) -> str:
        dims = ", ".join(self._axes_text(axes) for axes in sharding)
        return f"[{dims}]"

    def _result_text(self, t: int) -> str:
        """A tensor's sharding after its instruction, with the axes of a pending sum."""
        text = self._dims_text(self.layout.shardings[t])
        axes = self.pending.axes.get(t, ())
        if axes:
            text += f", unreduced={self._axes_text(axes)}"
        return text

    def _leave_unsummed(self, t: int) -> None:
        """Marks a value as a pending sum over devices, and the total of such values as summed.

        XLA follows the constraint, not the instruction. It delays a sum through additions only.
        """
        value = self.values[t]
        pinned = self._pinned(value, f"#sdy.sharding<@{MESH}, {self._result_text(t)}>")
        if t in self.pending.totals:
            self.values[t] = self._pinned(pinned, self.text(self.layout.shardings[t]))
            self.ids[self.values[t]] = t

    def text(self, sharding: Sharding) -> str:
        if sharding not in self.texts:
            self.texts[sharding] = f"#sdy.sharding<@{MESH}, {self._dims_text(sharding)}>"
        return self.texts[sharding]

    def _add_reshards(self, block: Any) -> None:
        """Puts the steps of every reshard between a value and its readers of another sharding.

        Shardy moves later readers of a value to the end of a chain of constraints that starts at
        the value, unless another constraint reads it too. So the value is pinned for its plain
        readers, and each chain gets a constraint of its own where chains part.
        """
        chains: dict[tuple[Source, Sharding], Chain] = {}
        for read in self.layout.reads:
            chains[self._source(read), read.target] = self._chain(read)
            self._pin(self.values[read.tensor])
        continuations = _continuations(chains)
        starts = {(tensor, -1): self.values[tensor] for tensor in range(len(self.values))}
        resharded: dict[tuple[Source, Chain], Any] = {}
        replacements: list[tuple[int, int, Any]] = []
        sums: dict[tuple[int, Sharding], Any] = {}
        """(gradient, its sharding behind the sum) -> that value."""
        for read in sorted(self.layout.reads, key=lambda read: read.after >= 0):
            source = self._source(read)
            chain = chains[source, read.target]
            if source not in starts:
                starts[source] = self._behind(read)
            value = starts[source]
            for n in range(1, len(chain)):
                key = (source, chain[: n + 1])
                if key not in resharded:
                    if n == 1 or len(continuations[source, chain[:n]]) > 1:
                        value = self._constrain(value, chain[n - 1])
                    resharded[key] = self._constrain(value, chain[n])
                value = resharded[key]
            if len(continuations[source, chain]) > 1:
                value = self._constrain(value, chain[-1])
            sums[read.tensor, read.target] = value
            for index, position in read.readers:
                replacements.append((index, position, value))
        terminator = list(block)[-1].operation
        for index, position, value in replacements:
            reader = terminator if index < 0 else self.operations[index]
            _set_operand(reader, position, value)
        self._add_waits(sums)

    def _add_waits(self, sums: dict[tuple[int, Sharding], Any]) -> None:
        """Puts a barrier before every product that waits for sums of gradients.

        `sums` are those that a reshard has computed: (gradient, its sharding) -> value. In a piece,
        a product waits for sums of the piece alone.
        """
        for wait in waits(self.graph, self.layout):
            index, position = wait.reader
            totals = self._sums_here(wait)
            if not totals:
                continue
            tensor = self.graph.instructions[index].operands[position]
            reader = self.operations[index]
            values = [reader.operands[position]]
            shardings = [self.layout.targets.get(wait.reader, self.layout.shardings[tensor])]
            for total in totals:
                if total not in sums:
                    # XLA drops a value that nothing but the barrier reads.
                    sums[total] = self._pinned(self.values[total[0]], self.text(total[1]))
                values.append(sums[total])
                shardings.append(total[1])
            behind = self._barrier(values, shardings, reader)
            reader.operands[position] = behind.results[0]

    def _sums_here(self, wait: Wait) -> tuple[tuple[int, Sharding], ...]:
        """The sums for which a product waits that are in the program of the product."""
        if self.is_whole:
            return wait.sums
        if wait.reader[0] not in self.instructions:
            return ()
        made_by = producers(self.graph)
        return tuple(
            total
            for total in wait.sums
            if made_by[total[0]] in self.instructions and total[0] not in self.pending.axes
        )

    def _source(self, read: Read) -> Source:
        """The value that a read reshards. In a piece, it waits for gradients of the piece alone."""
        if self.is_whole:
            return read.tensor, read.after
        is_here = producers(self.graph).get(read.after, -1) in self.instructions
        is_read = any(index in self.instructions for index, _ in read.readers)
        is_waiting = is_here and is_read and read.after not in self.pending.axes
        return read.tensor, read.after if is_waiting else -1

    def _behind(self, read: Read) -> Any:
        """The tensor of a read behind a barrier, which waits for the read's gradient.

        A constraint of its own keeps the barrier from reading the end of another chain: a slice of
        the gathered tensor, which then stays in memory. Later readers of the gradient read it
        behind the barrier: XLA drops an element that nothing reads there, if the barrier alone
        reads a reshape of the gradient (AlgebraicSimplifier).
        """
        tensors = (read.tensor, read.after)
        values = [self.values[t] for t in tensors]
        values[0] = self._constrain(values[0], self.layout.shardings[read.tensor])
        computed_at = producers(self.graph)
        is_first = computed_at.get(read.tensor, -1) < computed_at[read.after]
        last = values[is_first].owner.operation
        shardings = [self.layout.shardings[t] for t in tensors]
        behind = self._barrier(values, shardings, last)
        behind.move_after(last)
        available = max(computed_at.get(tensor, -1) for tensor in tensors)
        for index, position in readers_of(self.graph)[read.after]:
            if index > available:
                self.operations[index].operands[position] = behind.results[1]
        return behind.results[0]

    def _barrier(
        self, values: Sequence[Any], shardings: Sequence[Sharding], place: ir.Operation
    ) -> ir.Operation:
        """A barrier of values under these shardings, before the instruction `place`."""
        texts = [f"<@{MESH}, {self._dims_text(sharding)}>" for sharding in shardings]
        return barrier(values, place, texts)

    def _chain(self, read: Read) -> Chain:
        """The shardings of a read's reshard."""
        source = self.layout.shardings[read.tensor]
        shape = self.graph.tensors[read.tensor].shape
        steps = reshard_steps(
            source,
            read.target,
            self.mesh.sizes,
            shape,
        )
        return (source, *(step.result for step in steps))

    def _constrain(self, value: Any, sharding: Sharding) -> Any:
        return self._constrained(value, self.text(sharding))

    def _pinned(self, value: Any, sharding: str) -> Any:
        """The result of a new constraint, which all readers of the value read instead."""
        pinned = self._constrained(value, sharding)
        value.replace_all_uses_except(pinned, pinned.owner.operation)
        return pinned

    def _constrained(self, value: Any, sharding: str) -> Any:
        """The result of a new constraint, directly after the value's instruction."""
        owner = value.owner
        is_argument = isinstance(owner, ir.Block)
        block = owner if is_argument else owner.operation.block
        constraint = ir.Operation.create(
            CONSTRAINT,
            results=[value.type],
            operands=[value],
            attributes={"sharding": ir.Attribute.parse(sharding)},
            loc=self._location(value) if is_argument else owner.location,
            ip=ir.InsertionPoint.at_block_begin(block),
        )
        if not is_argument:
            constraint.move_after(owner.operation)
        return constraint.results[0]

    def _location(self, value: Any) -> ir.Location:
        """The location of an argument's reshards, by its path: it has no location of its own."""
        path = self.arguments.get(self.ids[value])
        return ir.Location.name(f"{path}/reshard") if path else ir.Location.unknown()


def _is_pinned(instruction: Instruction) -> bool:
    """Whether replicated results need a constraint: of heavy instructions and reductions."""
    if instruction.name in HEAVY:
        return True
    return instruction.rule is not None and bool(instruction.rule.reduction)


def _continuations(
    chains: dict[tuple[Source, Sharding], Chain],
) -> dict[tuple[Source, Chain], set[Sharding | None]]:
    """Source and beginning of a chain -> the next shardings; None for the end of a chain.

    Chains with the same beginning share its steps.
    """
    continuations: dict[tuple[Source, Chain], set[Sharding | None]] = {}
    for (source, _), chain in chains.items():
        for n in range(1, len(chain) + 1):
            following = chain[n] if n < len(chain) else None
            continuations.setdefault((source, chain[:n]), set()).add(following)
    return continuations


def _set_operand(reader: Any, position: int, value: Any) -> None:
    """Replaces an operand of an instruction, or a value that a loop's body or a branch yields.

    `position` counts on from the operands to the yielded values, of a conditional branch by branch.
    """
    count = len(reader.operands)
    if position < count:
        reader.operands[position] = value
        return
    region, number = 1, (position - count) % count
    if stablehlo.short(reader.name) != "while":
        region, number = divmod(position - count, len(reader.results))
    yielded = list(reader.regions[region].blocks[0])[-1].operation
    yielded.operands[number] = value
