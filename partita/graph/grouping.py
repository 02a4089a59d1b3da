"""An operator graph from a flat program: owners, factors, labels and names.

flat program -> owners of instructions (`ownership`) -> factors of operators (`factors`)
             -> other owners of instructions without a factor (`strays`)
             -> sample factors and names (here) -> OperatorGraph
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from partita.graph.factors import OperatorFactors
from partita.graph.flat import KIND, FlatProgram, constant_results, dilates_operand
from partita.graph.operator_graph import (
    Argument,
    Factor,
    FactorKind,
    Instruction,
    Label,
    Loop,
    Operator,
    OperatorGraph,
    Tensor,
    Use,
)
from partita.graph.ownership import assign_owners
from partita.graph.strays import Labels, strays
from partita.graph.weight_slices import weight_slices, weights_of


def group(
    name: str,
    tensors: Sequence[Tensor],
    instructions: Sequence[Instruction],
    loops: Sequence[Loop],
    arguments: Sequence[Argument],
    outputs: Sequence[int],
    batch_size: int = 0,
    is_accelerated: bool = False,
) -> OperatorGraph:
    """The operator graph of a flat program.

    `batch_size`: size of dim 0 of the batch arguments, for information only.
    `is_accelerated`: whether normalizations after products, and slices of a weight, are operators
    of their own, as on GPUs and TPUs.
    """
    if not any(instruction.phase == "forward" for instruction in instructions):
        # A step without a gradient is all forward.
        instructions = [replace(instruction, phase="forward") for instruction in instructions]
    instructions = _with_forward_loops(instructions, loops)
    if not is_accelerated:
        instructions = [_with_whole_positions(instruction) for instruction in instructions]
    program = FlatProgram(
        tensors,
        instructions,
        loops,
        arguments,
    )
    slices = weight_slices(program) if is_accelerated else []
    owner, heavy = assign_owners(program, outputs, is_accelerated, slices)
    weights = weights_of(program, slices)
    labels = _labelled(program, owner, heavy, weights)
    moves = strays(program, Labels(labels.labels, labels.home, labels.uses), heavy)
    if moves:
        owner = [moves.get(index, operator) for index, operator in enumerate(owner)]
        labels = _labelled(program, owner, heavy, weights)
    samples = _sample_factors(program, labels.labels, labels.uses)
    operators = []
    for operator, operator_name in enumerate(_operator_names(program, heavy)):
        instruction = instructions[heavy[operator]]
        operators.append(
            Operator(
                name=operator_name,
                path=instruction.path,
                kind=KIND.get(instruction.name, instruction.name),
                heavy=heavy[operator],
                instructions=tuple(labels.members[operator]),
                factors=labels.operator_factors[operator],
            )
        )
    return OperatorGraph(
        name=name,
        tensors=tuple(tensors),
        instructions=tuple(instructions),
        loops=tuple(loops),
        arguments=tuple(arguments),
        outputs=tuple(outputs),
        operators=tuple(operators),
        factors=tuple(_named_factors(labels.factors, labels.operator_factors, samples)),
        owner=tuple(owner),
        home=tuple(labels.home),
        labels=tuple(labels.labels),
        uses=_merged_uses(labels.uses),
        batch_size=batch_size,
    )


def _with_whole_positions(instruction: Instruction) -> Instruction:
    """An instruction whose windows stay whole if it is the weight gradient of a transposed
    convolution.

    XLA:CPU gathers both operands, and every device computes the gradient of all positions.
    """
    rule = instruction.rule
    if rule is None or not dilates_operand(instruction):
        return instruction
    summed = {factor for factor, _ in instruction.windows if factor in rule.reduction}
    return replace(
        instruction, rule=replace(rule, gathered=tuple(sorted(summed.union(rule.gathered))))
    )


def _with_forward_loops(
    instructions: Sequence[Instruction], loops: Sequence[Loop]
) -> list[Instruction]:
    """The instructions, with loops around forward instructions marked forward.

    A loop over microbatches has whole passes in its body. A constant says nothing: equal ones of
    both passes and the update are one, with the label of the first.
    """
    constants = constant_results(instructions, loops)
    forward = set()
    for index, instruction in enumerate(instructions):
        if instruction.phase == "forward" and not constants.issuperset(instruction.results):
            forward.add(index)
    marked = list(instructions)
    for loop in loops:
        has_forward = not forward.isdisjoint(range(*loop.body))
        if has_forward and marked[loop.instruction].phase == "update":
            marked[loop.instruction] = replace(marked[loop.instruction], phase="forward")
    return marked


class _Labels:
    """Labels of all tensors and uses, collected operator by operator."""

    def __init__(self, program: FlatProgram, weights: frozenset[int]) -> None:
        self.program = program
        self.weights = weights
        self.labels: list[Label] = [(-1,) * len(tensor.shape) for tensor in program.tensors]
        self.home = [-1] * len(program.tensors)
        self.factors: list[Factor] = []
        self.operator_factors: list[tuple[int, ...]] = []
        self.uses: list[Use] = []
        self.members: list[Sequence[int]] = []
        """Per operator its instructions."""

    def add_operator(
        self,
        operator: int,
        members: Sequence[int],
        heavy: int,
    ) -> None:
        """Label the tensors of one operator. Operators come in order."""
        self.members.append(members)
        first = len(self.factors)
        own_factors = OperatorFactors(
            self.program,
            operator,
            members,
            heavy,
            first,
            self.weights,
        )
        self.factors += own_factors.factors
        self.operator_factors.append(tuple(range(first, len(self.factors))))
        for tensor, dims in own_factors.dims.results.items():
            self.labels[tensor] = own_factors.label(dims)
            self.home[tensor] = operator
        for tensor, views in own_factors.dims.views.items():
            for view in views:
                label = own_factors.label(view.dims)
                self._add_view(
                    tensor,
                    operator,
                    label,
                    tuple(view.reads),
                )
        self.uses += own_factors.restricted_uses()

    def _add_view(
        self,
        tensor: int,
        operator: int,
        label: Label,
        reads: tuple[tuple[int, int], ...],
    ) -> None:
        is_argument = tensor not in self.program.producer
        if is_argument and self.home[tensor] < 0:
            # An argument's home is the operator that reads it first, under that operator's label.
            self.labels[tensor] = label
            self.home[tensor] = operator
        elif self.home[tensor] != operator or self.labels[tensor] != label:
            self.uses.append(
                Use(
                    tensor,
                    operator,
                    label,
                    reads,
                )
            )


def _labelled(
    program: FlatProgram, owner: Sequence[int], heavy: Sequence[int], weights: frozenset[int]
) -> _Labels:
    """The labels of all operators, from the owner of every instruction."""
    members: list[list[int]] = [[] for _ in heavy]
    for index, operator in enumerate(owner):
        if operator >= 0:
            members[operator].append(index)
    labels = _Labels(program, weights)
    for operator, indices in enumerate(members):
        labels.add_operator(operator, indices, heavy[operator])
    return labels


def _merged_uses(uses: Iterable[Use]) -> tuple[Use, ...]:
    """One Use per tensor, operator and label. The last entry for a read counts."""
    key_of_read: dict[tuple[int, int], tuple[int, int, Label]] = {}
    for use in uses:
        for read in use.instructions:
            key_of_read[read] = (use.tensor, use.operator, use.label)
    reads: dict[tuple[int, int, Label], list[tuple[int, int]]] = defaultdict(list)
    for read, key in key_of_read.items():
        reads[key].append(read)
    merged = []
    for (tensor, operator, label), instructions in reads.items():
        merged.append(
            Use(
                tensor,
                operator,
                label,
                tuple(instructions),
            )
        )
    return tuple(merged)


def _sample_factors(
    program: FlatProgram,
    labels: Sequence[Label],
    uses: Iterable[Use],
) -> set[int]:
    """The factors that index the batch.

    These are reached from the samples of the batch arguments through Uses.
    """
    linked: dict[int, set[int]] = defaultdict(set)
    for use in uses:
        for factor, used_factor in zip(labels[use.tensor], use.label, strict=True):
            if factor >= 0 and used_factor >= 0:
                linked[factor].add(used_factor)
                linked[used_factor].add(factor)
    samples: set[int] = set()
    pending = _batch_factors(program, labels, uses)
    while pending:
        factor = pending.pop()
        if factor not in samples:
            samples.add(factor)
            pending += linked[factor]
    return samples


def _batch_factors(
    program: FlatProgram,
    labels: Sequence[Label],
    uses: Iterable[Use],
) -> list[int]:
    """The factors of dim 0 of the batch arguments.

    A step that accumulates gradients slices dim 0, which then is in one piece: its samples are
    those of the slices.
    """
    arguments = [a.tensor for a in program.arguments if a.role == "batch"]
    pending = [(tensor, 0) for tensor in arguments if labels[tensor]]
    readings: dict[int, list[Label]] = defaultdict(list)
    for use in uses:
        readings[use.tensor].append(use.label)
    factors = []
    while pending:
        tensor, dim = pending.pop()
        found = [label[dim] for label in (labels[tensor], *readings[tensor]) if label[dim] >= 0]
        factors += found
        if not found:
            pending += _microbatches(program, tensor, dim)
    return factors


def _microbatches(program: FlatProgram, tensor: int, dim: int) -> Iterator[tuple[int, int]]:
    """(tensor, dim) of the slices of a tensor along a dim, and of the dims that it becomes."""
    for loop in program.loops:
        for before, inside, _, _ in loop.carried:
            if before == tensor != inside:
                yield inside, dim
    shape = program.tensors[tensor].shape
    for reader in program.readers[tensor]:
        instruction = program.instructions[reader]
        if instruction.operands[:1] != (tensor,):
            continue
        if instruction.name in ("slice", "dynamic_slice", "convert"):
            yield instruction.results[0], dim
        elif instruction.name == "reshape":
            result = instruction.results[0]
            reshaped = program.tensors[result].shape
            for position in _dims_after_reshape(shape, reshaped, dim):
                yield result, position


def _dims_after_reshape(shape: Sequence[int], reshaped: Sequence[int], dim: int) -> Iterator[int]:
    """The dims that a dim becomes; for a dim of size 1 that is dropped, the next one.

    >>> list(_dims_after_reshape((64, 8), (4, 16, 8), 0))
    [0, 1]
    >>> list(_dims_after_reshape((1, 16, 8), (16, 8), 0))
    [0]
    """
    start = math.prod(shape[:dim])
    end = start * max(2, shape[dim])
    before = 1
    for position, size in enumerate(reshaped):
        if start <= before < end and size > 1:
            yield position
        before *= size


def _named_factors(
    factors: Sequence[Factor],
    operator_factors: Iterable[tuple[int, ...]],
    samples: set[int],
) -> list[Factor]:
    """The factors with their final kinds, named by kind and numbered where one occurs twice."""
    named = []
    for indices in operator_factors:
        kinds: list[FactorKind] = []
        for index in indices:
            kinds.append("S" if index in samples else factors[index].kind)
        for index, kind, name in zip(
            indices,
            kinds,
            _numbered(kinds, ""),
            strict=True,
        ):
            named.append(replace(factors[index], kind=kind, name=name))
    return named


def _numbered(names: Sequence[str], separator: str) -> list[str]:
    """The names, those that occur twice or more with a number."""
    count = Counter(names)
    number: Counter[str] = Counter()
    numbered = []
    for name in names:
        number[name] += 1
        numbered.append(f"{name}{separator}{number[name]}" if count[name] > 1 else name)
    return numbered


def _operator_names(program: FlatProgram, heavy: Sequence[int]) -> list[str]:
    """Unique names of the operators.

    In order of preference: the layer path, the path of the operator's weight, its kind.
    """
    weights = {a.tensor: a.path for a in program.arguments if a.role == "parameter"}
    matrices = [path for t, path in weights.items() if len(program.tensors[t].shape) > 1]
    # A layer has one matrix, a plain dict of weights has several.
    matrix_count = Counter(path.rpartition("/")[0] for path in matrices)
    names = []
    for index in heavy:
        instruction = program.instructions[index]
        bases = [program.base(tensor) for tensor in instruction.operands]
        paths = [weights[tensor] for tensor in bases if tensor in weights]
        name = instruction.path
        if not name and paths:
            folder = paths[0].rpartition("/")[0]
            name = folder if folder and matrix_count[folder] < 2 else paths[0]
        names.append(name or KIND.get(instruction.name, instruction.name))
    return _numbered(names, ":")
