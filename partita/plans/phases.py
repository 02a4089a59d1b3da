"""When the statements of a step run if its batch comes in microbatches: by dependence.

JAX labels an instruction forward, backward or update by the function that wrote it. The label of a
metric is "update", and it has to run for every microbatch. So the label only decides between
statements of equal dependence:

| class | dependence | runs |
|---|---|---|
| copied | on no argument, or a scalar of scalars of the optimizer (beta powers) | in each reader |
| copied | on weights alone, and light | in each reader |
| forward | on the batch and on no gradient; or labelled so; or only a metric's | per microbatch |
| backward | on the batch, and labelled so or between two gradients | per microbatch |
| update | all others, and scalars between the loss and the update or state | once per step |

Not here: where a statement runs (`plans.pieces`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from partita.graph.operator_graph import (
    CONDITIONALS,
    Argument,
    Instruction,
    OperatorGraph,
    constant_tensors,
    per_graph,
)

Class = Literal["copied", "forward", "backward", "update"]

NEVER_COPIED = ("rng", "custom_call", "while")
"""Beginnings of names of instructions that are too expensive to copy, or not pure."""
LIGHT = frozenset(
    {"add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "sign"}
    | {"compare", "select", "clamp", "and", "or", "not", "convert", "exponential", "tanh"}
    | {"logistic", "rsqrt", "sqrt", "erf", "broadcast_in_dim", "reshape", "transpose"}
    | {"slice", "concatenate", "pad"}
)
"""Instructions that are computed again rather than stored or sent, where their operands are."""
TOTALS = frozenset({"add", "maximum", "minimum", "convert", "reshape"})
"""Instructions that add values to a total, or leave it as it is."""


@dataclass(frozen=True)
class Statement:
    """An operation of the step's outermost block, with all of its loops and branches."""

    instruction: int
    reads: tuple[int, ...]
    """Tensors from outside of it, those that its loops and branches read included."""
    makes: tuple[int, ...]


@dataclass(frozen=True)
class DataFlow:
    """The statements of a step, and the tensors between them."""

    graph: OperatorGraph
    statements: tuple[Statement, ...]

    @staticmethod
    def of(graph: OperatorGraph) -> DataFlow:
        """The data flow of a graph, cached."""
        return _data_flow(graph)

    @cached_property
    def classes(self) -> tuple[Class, ...]:
        """Per statement its class."""
        return tuple(_classes(self))

    def instruction(self, statement: int) -> Instruction:
        """The instruction of a statement."""
        return self.graph.instructions[self.statements[statement].instruction]

    def instructions(self, statements: Sequence[int]) -> list[int]:
        """The instructions of statements, those in loops and branches included."""
        starts = self._starts
        return [n for k in statements for n in range(starts[k], starts[k + 1])]

    @cached_property
    def _starts(self) -> list[int]:
        """[statement]: its first instruction, and at the end the number of all."""
        starts = [statement.instruction for statement in self.statements]
        return [*starts, len(self.graph.instructions)]

    def is_variable(self, tensor: int) -> bool:
        """Whether a tensor is a variable of the step, or the conversion of one."""
        producer = self.producer.get(tensor, -1)
        if producer >= 0 and self.instruction(producer).name == "convert":
            (tensor,) = self.statements[producer].reads
        return self.roles.get(tensor, "batch") != "batch"

    def owner(self, statement: int) -> int:
        """The operator of a statement, -1 for none."""
        return self.graph.owner[self.statements[statement].instruction]

    def name(self, tensor: int) -> str:
        """The path of an argument, or the layer and instruction of another tensor, for people."""
        for argument in self.graph.arguments:
            if argument.tensor == tensor:
                return argument.path
        instruction = self.instruction(self.producer[tensor])
        return f"{instruction.path or 'the step'} ({instruction.name})"

    @cached_property
    def producer(self) -> dict[int, int]:
        """Tensor -> the statement that makes it. Arguments have none."""
        return {t: k for k, statement in enumerate(self.statements) for t in statement.makes}

    @cached_property
    def readers(self) -> dict[int, list[int]]:
        """Tensor -> the statements that read it."""
        readers: dict[int, list[int]] = defaultdict(list)
        for k, statement in enumerate(self.statements):
            for t in statement.reads:
                readers[t].append(k)
        return readers

    @cached_property
    def inputs(self) -> list[tuple[int, ...]]:
        """Per statement, the tensors from which it and copied statements before it compute."""
        through: dict[int, tuple[int, ...]] = {}
        """Result of a copied statement -> its inputs."""
        inputs = []
        for k, statement in enumerate(self.statements):
            own: dict[int, None] = {}
            for t in statement.reads:
                for source in through.get(t, (t,)):
                    own[source] = None
            inputs.append(tuple(own))
            if self.classes[k] == "copied":
                for t in statement.makes:
                    through[t] = tuple(own)
        return inputs

    @cached_property
    def roles(self) -> dict[int, str]:
        """Tensor of an argument -> its role."""
        return {argument.tensor: argument.role for argument in self.graph.arguments}

    @cached_property
    def of_batch(self) -> frozenset[int]:
        """Tensors that depend on the batch, the batch included."""
        return self.dependent([t for t, role in self.roles.items() if role == "batch"])

    def dependent(self, tensors: Sequence[int]) -> frozenset[int]:
        """These tensors, and all that depend on them."""
        dependent = set(tensors)
        for statement in self.statements:
            if not dependent.isdisjoint(statement.reads):
                dependent.update(statement.makes)
        return frozenset(dependent)


@per_graph
def _data_flow(graph: OperatorGraph) -> DataFlow:
    return DataFlow(graph, _statements(graph))


def _statements(graph: OperatorGraph) -> tuple[Statement, ...]:
    """The instructions outside loops and branches, each with all that it contains."""
    inside = {i for loop in graph.loops for i in range(*loop.body)}
    entering: dict[int, set[int]] = defaultdict(set)
    """Loop -> the values of its body that stand for carried variables."""
    yielded: dict[int, list[int]] = defaultdict(list)
    for loop in graph.loops:
        yielded[loop.instruction] += [value for _, _, value, _ in loop.carried]
        if graph.instructions[loop.instruction].name not in CONDITIONALS:
            entering[loop.instruction].update(value for _, value, _, _ in loop.carried)
    first = [i for i in range(len(graph.instructions)) if i not in inside]
    statements = []
    for start, end in zip(first, [*first[1:], len(graph.instructions)], strict=True):
        operands: list[int] = []
        made: set[int] = set()
        for i in range(start, end):
            operands += [*graph.instructions[i].operands, *yielded.get(i, ())]
            made |= entering.get(i, set())
            if i > start:
                made.update(graph.instructions[i].results)
        reads = tuple(t for t in dict.fromkeys(operands) if t not in made)
        statements.append(Statement(start, reads, graph.instructions[start].results))
    return tuple(statements)


def _classes(flow: DataFlow) -> list[Class]:
    """Per statement its class."""
    forward_only = _forward_only(flow)
    scalars = _scalars(flow) - forward_only
    constants = constant_tensors(flow.graph) - flow.roles.keys()
    cheap = {*scalars, *constants}
    copied: set[int] = set()
    of_weights = {t for t, role in flow.roles.items() if role == "parameter"}
    """Weights, and light values of weights alone."""
    of_gradient: set[int] = set()
    result: list[Class] = []
    for k, statement in enumerate(flow.statements):
        label = flow.instruction(k).phase
        on_batch = not flow.of_batch.isdisjoint(statement.reads)
        on_gradient = not of_gradient.isdisjoint(statement.reads)
        on_gradient = on_gradient or (label == "backward" and on_batch)
        if on_gradient:
            of_gradient.update(statement.makes)
        is_light = label != "update" and flow.instruction(k).name in LIGHT
        if not on_batch and _is_copied(flow, k, cheap, copied):
            cheap.update(statement.makes)
            copied.update(statement.makes)
            result.append("copied")
        elif is_light and of_weights.issuperset(set(statement.reads) - cheap):
            of_weights.update(statement.makes)
            result.append("copied")
        elif label == "backward" or (on_gradient and label == "forward"):
            result.append("backward" if on_batch else "forward")
        elif on_gradient:
            result.append("update")
        else:
            repeated = on_batch or label == "forward"
            repeated = repeated or not forward_only.isdisjoint(statement.reads)
            result.append("forward" if repeated else "update")
    _run_before_readers(flow, result, of_gradient)
    _run_scalars_of_update(flow, result)
    return result


def _is_copied(
    flow: DataFlow,
    statement: int,
    cheap: set[int],
    copied: set[int],
) -> bool:
    """Whether every reader computes a statement's result itself.

    `cheap`: tensors that every reader has anyway; `copied`: those of them that statements make.
    """
    reads = flow.statements[statement].reads
    makes = flow.statements[statement].makes
    if flow.instruction(statement).name.startswith(NEVER_COPIED):
        return False
    if not cheap.issuperset(reads):
        return False
    all_scalars = not any(flow.graph.tensors[t].shape for t in (*reads, *makes))
    return not reads or all_scalars or copied.issuperset(reads)


def _scalars(flow: DataFlow) -> set[int]:
    """Scalar arguments that are not of the batch."""
    return {t for t, role in flow.roles.items() if role != "batch" and not _shape(flow, t)}


def _shape(flow: DataFlow, tensor: int) -> tuple[int, ...]:
    return flow.graph.tensors[tensor].shape


def _forward_only(flow: DataFlow) -> set[int]:
    """Arguments that values of the batch are computed with, and no update.

    Such a scalar (the count of a metric) changes with every microbatch.
    """
    of_gradient: set[int] = set()
    for k, statement in enumerate(flow.statements):
        on_batch = not flow.of_batch.isdisjoint(statement.reads)
        is_gradient = on_batch and flow.instruction(k).phase == "backward"
        if is_gradient or not of_gradient.isdisjoint(statement.reads):
            of_gradient.update(statement.makes)
    into_update: set[int] = set()
    into_forward: set[int] = set()
    for statement in reversed(flow.statements):
        makes = statement.makes
        if not (of_gradient.isdisjoint(makes) and into_update.isdisjoint(makes)):
            into_update.update(statement.reads)
        elif not (flow.of_batch.isdisjoint(makes) and into_forward.isdisjoint(makes)):
            into_forward.update(statement.reads)
    return (into_forward - into_update) & flow.roles.keys()


def _run_before_readers(flow: DataFlow, result: list[Class], of_gradient: set[int]) -> None:
    """Moves statements out of the update that forward or backward statements read."""
    for k in reversed(range(len(result))):
        if result[k] != "update":
            continue
        makes = flow.statements[k].makes
        if not of_gradient.isdisjoint(makes):
            continue
        if any(result[r] in ("forward", "backward") for t in makes for r in flow.readers[t]):
            result[k] = "forward"


def _run_scalars_of_update(flow: DataFlow, result: list[Class]) -> None:
    """Moves scalars of the loss into the update if only the update reads them, or if they are
    state: they are then those of the mean loss.

    A smaller learning rate on a plateau has such scalars, and a moving average of the loss.
    """
    of_means = _of_means(flow)
    outputs = frozenset(flow.graph.outputs)
    for k in reversed(range(len(result))):
        statement = flow.statements[k]
        if result[k] != "forward" or flow.instruction(k).phase != "update":
            continue
        if any(_shape(flow, t) for t in statement.reads if t in flow.of_batch):
            continue
        readers = {result[r] for t in statement.makes for r in flow.readers[t]}
        returned = outputs.intersection(statement.makes)
        if readers - {"update"} or not (readers or returned):
            continue
        if all(_is_of_mean(flow, k, t, of_means) for t in returned):
            result[k] = "update"


def _is_of_mean(flow: DataFlow, statement: int, output: int, of_means: frozenset[int]) -> bool:
    """Whether a scalar that a step returns is computed from the mean loss of its microbatches.

    That is so for state, except for layers' and for totals of other values than returned means.
    """
    if _shape(flow, output) or output not in flow.of_batch:
        return False
    if output in of_means:
        return True
    argument = _replaced(flow).get(output)
    if argument is None or flow.graph.home[argument.tensor] >= 0 or is_total(flow, argument):
        return False
    return not any(_is_sum(flow, t) for t in flow.statements[statement].reads)


def _returned_means(flow: DataFlow) -> set[int]:
    """Scalars of the batch, and of no state, that a step returns. They are taken for means if they
    are no bare sums.
    """
    state = [t for t, role in flow.roles.items() if role == "state"]
    of_state = flow.dependent([t for t in state if flow.graph.tensors[t].is_floating])
    means = set()
    for t in flow.of_batch.intersection(flow.graph.outputs) - of_state - flow.roles.keys():
        if not _shape(flow, t) and not _is_sum(flow, t):
            means.add(t)
    return means


def _of_means(flow: DataFlow) -> frozenset[int]:
    """Scalars that depend on the batch by returned means alone, these excluded."""
    means = _returned_means(flow)
    of_means: set[int] = set()
    for k, statement in enumerate(flow.statements):
        of_batch = flow.of_batch.intersection(statement.reads)
        is_last = flow.instruction(k).phase == "update"
        if is_last and of_batch and of_batch <= means | of_means:
            of_means.update(statement.makes)
    return frozenset(of_means)


def _is_sum(flow: DataFlow, tensor: int) -> bool:
    """Whether a scalar is a sum, a maximum or a count over samples, or no floating number at all
    that the passes compute.
    """
    k = flow.producer.get(tensor)
    if k is None or tensor not in flow.of_batch:
        return False
    instruction = flow.instruction(k)
    if instruction.name in ("convert", "reshape"):
        return _is_sum(flow, instruction.operands[0])
    is_number = flow.graph.tensors[tensor].is_floating or instruction.phase == "update"
    return instruction.name == "reduce" or not is_number


def scalars_of_step(flow: DataFlow) -> frozenset[int]:
    """Statements of scalar state and returned means alone that run once per step, such as a counter
    of samples. A number in them that is the size of the batch is that of the whole batch.
    """
    of_step = (_scalars(flow) & flow.readers.keys()) | _returned_means(flow)
    constants: set[int] = set()
    statements = set()
    for k, statement in enumerate(flow.statements):
        if constants.issuperset(statement.reads):
            constants.update(statement.makes)
        is_once = flow.classes[k] in ("update", "copied")
        is_scalar = not any(_shape(flow, t) for t in (*statement.reads, *statement.makes))
        others = set(statement.reads) - constants
        if is_once and is_scalar and others and others <= of_step:
            statements.add(k)
            of_step.update(statement.makes)
    return frozenset(statements)


def _replaced(flow: DataFlow) -> dict[int, Argument]:
    """New value -> the state that it replaces."""
    arguments = flow.graph.arguments
    return {a.result: a for a in arguments if a.role == "state" and a.result is not None}


def is_total(flow: DataFlow, argument: Argument) -> bool:
    """Whether a state's new value is its old one with others added, or the largest or smallest of
    them: the same over microbatches as over their batch.
    """
    totals = {argument.tensor}
    for k, statement in enumerate(flow.statements):
        if flow.instruction(k).name in TOTALS and not totals.isdisjoint(statement.reads):
            totals.update(statement.makes)
    return argument.result in totals
