"""Writes a plan into the program text: a mesh, a sharding on every value, and every reshard as a chain of constraints.

The module that comes out is the captured one, instruction for instruction. Nothing is left for propagation to decide:
each value is pinned to the sharding of its operator's choice, and where a reader wants another one the steps between are
pinned too, so that XLA's partitioner emits the collectives that were planned.
"""

from __future__ import annotations

from typing import Any

from jax.extend.mlir import ir

from partita.capture import stablehlo
from partita.cost.partial import pending_sums
from partita.cost.reshard import reshard_steps
from partita.graph.flat import HEAVY
from partita.graph.operator_graph import OperatorGraph
from partita.plans.layout import Layout, Sharding
from partita.plans.plan import Mesh

MESH = "partita_mesh"
LOOPS = {"while", "case", "if"}


def annotate(source: bytes, graph: OperatorGraph, mesh: Mesh, layout: Layout) -> bytes:
    """The captured program with the plan's layout written into it, as portable bytes."""
    with stablehlo.context(), ir.Location.unknown():
        module = stablehlo.parse(source)
        writer = _Writer(graph, mesh, layout)
        writer.write(module)
        return stablehlo.serialize(module)


class _Writer:
    def __init__(self, graph: OperatorGraph, mesh: Mesh, layout: Layout) -> None:
        self.graph, self.mesh, self.layout = graph, mesh, layout
        self.values: list[Any] = []
        self.ids: dict[Any, int] = {}
        self.operations: list[Any] = []
        self.cache: dict[Sharding, str] = {}
        self.pinned: set[int] = set()
        self.arguments = {a.tensor: a.path for a in graph.arguments}
        self.pending = pending_sums(graph, layout)

    def write(self, module: ir.Module) -> None:
        axes = ", ".join(f'"{a.name}"={a.size}' for a in self.mesh.axes)
        ir.InsertionPoint.at_block_begin(module.body).insert(
            ir.Operation.parse(f"sdy.mesh @{MESH} = <[{axes}]>")
        )
        block = stablehlo.main_block(module)
        self.values, self.operations = stablehlo.numbered(block)
        self.ids = {value: t for t, value in enumerate(self.values)}
        assert len(self.values) == len(self.graph.tensors), (
            "the text and the graph number the same values"
        )
        for operation, instruction in zip(self.operations, self.graph.instructions, strict=True):
            if instruction.name in LOOPS:
                self._pin_carried(operation)
            elif (
                instruction.name in HEAVY
                or instruction.rule is not None
                and instruction.rule.reduction
            ):
                for value in operation.results:
                    if self.ids[value] not in self.pending.axes and not any(
                        self.layout.shardings[self.ids[value]]
                    ):
                        self._pin(value)
                own = [
                    any(self.layout.shardings[t])
                    for t in (*instruction.operands[:1], *instruction.results)
                ]
                if instruction.windows and not own[0] and any(own):
                    # XLA would split a whole value that a split window reads, and with it what else reads it.
                    self._pin(self.values[instruction.operands[0]])
        for t in self.pending.axes:
            self._leave_unsummed(t)
        self._constraints(block)
        for operation in self.operations:
            if stablehlo.short(operation.name) in LOOPS:
                continue
            if any(self.graph.tensors[self.ids[r]].shape for r in operation.results):
                text = ", ".join(f"<@{MESH}, {self._of(self.ids[r])}>" for r in operation.results)
                operation.attributes["sdy.sharding"] = ir.Attribute.parse(
                    f"#sdy.sharding_per_value<[{text}]>"
                )
        function = block.owner
        arguments = [
            ir.DictAttr.get(
                {"sdy.sharding": ir.Attribute.parse(self._text(self.layout.shardings[self.ids[a]]))}
            )
            for a in block.arguments
        ]
        function.attributes["arg_attrs"] = ir.ArrayAttr.get(arguments)

    def _pin_carried(self, loop: Any) -> None:
        """Pins what a loop carries by constraints: XLA loses count when the loop itself has shardings and captures a constant."""
        carried = list(loop.results)
        if stablehlo.short(loop.name) == "while":
            body = loop.regions[1].blocks[0]
            carried += list(body.arguments)
            for entering in (loop, list(body)[-1].operation):
                for position, (value, inside) in enumerate(
                    zip(entering.operands, body.arguments, strict=True)
                ):
                    t, entered = self.ids[inside], self.ids.get(value)
                    if (
                        self.graph.tensors[t].shape
                        and entered is not None
                        and self.layout.shardings[entered] == self.layout.shardings[t]
                    ):
                        entering.operands[position] = self._constrain(
                            value, self.layout.shardings[t]
                        )
        for value in carried:
            self._pin(value)

    def _pin(self, value: Any) -> None:
        """Puts a constraint between a value and its readers.

        A `sdy.sharding` on an instruction is enough to split its result, but XLA forgets one that says replicated.
        """
        t = self.ids[value]
        if self.graph.tensors[t].shape and t not in self.pinned:
            self.pinned.add(t)
            pinned = self._constrain(value, self.layout.shardings[t])
            value.replace_all_uses_except(pinned, pinned.owner.operation)

    def _dims(self, sharding: Sharding) -> str:
        dims = ", ".join(
            "{" + ", ".join(f'"{self.mesh.axes[a].name}"' for a in d) + "}" for d in sharding
        )
        return f"[{dims}]"

    def _of(self, t: int) -> str:
        """How a tensor is split as it is made, and over what it is then still to be summed."""
        axes = ", ".join(f'"{self.mesh.axes[a].name}"' for a in self.pending.axes.get(t, ()))
        return self._dims(self.layout.shardings[t]) + (f", unreduced={{{axes}}}" if axes else "")

    def _leave_unsummed(self, t: int) -> None:
        """Says of a value that it is still to be summed over devices; behind the last addition of such values, that it no longer is.

        XLA believes what a constraint says, not what the instruction says. It keeps a sum waiting through additions only.
        """
        value = self.values[t]
        pinned = self._constrained(value, f"#sdy.sharding<@{MESH}, {self._of(t)}>")
        value.replace_all_uses_except(pinned, pinned.owner.operation)
        if t in self.pending.totals:
            whole = self._constrain(pinned, self.layout.shardings[t])
            pinned.replace_all_uses_except(whole, whole.owner.operation)
            self.values[t] = whole
            self.ids[whole] = t

    def _text(self, sharding: Sharding) -> str:
        if sharding not in self.cache:
            self.cache[sharding] = f"#sdy.sharding<@{MESH}, {self._dims(sharding)}>"
        return self.cache[sharding]

    def _constraints(self, block: Any) -> None:
        """Puts the steps of every reshard between a value and the readers that want it otherwise.

        Shardy moves later readers of a value to the end of a chain of constraints that starts at it, unless another constraint
        reads the value too. So the value is pinned for its plain readers, and wherever ways part each gets a constraint of its own.
        """
        ways: dict[tuple[int, Sharding], list[Sharding]] = {}
        for read in self.layout.reads:
            source = self.layout.shardings[read.tensor]
            steps = reshard_steps(
                source, read.target, self.mesh.sizes, self.graph.tensors[read.tensor].shape
            )
            ways[read.tensor, read.target] = [source, *(s.result for s in steps)]
            self._pin(self.values[read.tensor])
        # What two ways begin with is done once: a step is known by the tensor and the shardings up to it.
        leads: dict[tuple[int, tuple[Sharding, ...]], set[Sharding | None]] = {}
        for (t, _), way in ways.items():
            for n in range(1, len(way) + 1):
                leads.setdefault((t, tuple(way[:n])), set()).add(way[n] if n < len(way) else None)
        made: dict[tuple[int, tuple[Sharding, ...]], Any] = {}
        later: list[tuple[int, int, Any]] = []
        for read in self.layout.reads:
            way = ways[read.tensor, read.target]
            value = self.values[read.tensor]
            for n in range(1, len(way)):
                key = (read.tensor, tuple(way[: n + 1]))
                if key not in made:
                    if n == 1 or len(leads[read.tensor, tuple(way[:n])]) > 1:
                        value = self._constrain(value, way[n - 1])
                    made[key] = self._constrain(value, way[n])
                value = made[key]
            if len(leads[read.tensor, tuple(way)]) > 1:
                value = self._constrain(value, way[-1])
            for index, position in read.readers:
                later.append((index, position, value))
        terminator = list(block)[-1].operation
        for index, position, value in later:
            if index < 0:
                terminator.operands[position] = value
            elif position < len(self.operations[index].operands):
                self.operations[index].operands[position] = value
            else:
                # A value that a loop's body yields: `position` counts on from the loop's operands.
                loop = self.operations[index]
                yielded = list(loop.regions[1].blocks[0])[-1].operation
                yielded.operands[(position - len(loop.operands)) % len(loop.operands)] = value

    def _constrain(self, value: Any, sharding: Sharding) -> Any:
        return self._constrained(value, self._text(sharding))

    def _constrained(self, value: Any, sharding: str) -> Any:
        owner = value.owner
        made = ir.Operation.create(
            "sdy.sharding_constraint",
            results=[value.type],
            operands=[value],
            attributes={"sharding": ir.Attribute.parse(sharding)},
            loc=self._location(value) if isinstance(owner, ir.Block) else owner.location,
            ip=ir.InsertionPoint.at_block_begin(
                owner if isinstance(owner, ir.Block) else owner.operation.block
            ),
        )
        if not isinstance(owner, ir.Block):
            made.move_after(owner.operation)
        return made.results[0]

    def _location(self, value: Any) -> ir.Location:
        """An argument of the step has no location of its own: what is made of it is named by its path."""
        path = self.arguments.get(self.ids[value])
        return ir.Location.name(f"{path}/reshard") if path else ir.Location.unknown()
