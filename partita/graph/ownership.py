"""Owners: the operator of every instruction.

- A heavy forward instruction (product, convolution, gather, window, sort, a loop around one) makes
  an operator.
- A light forward instruction belongs to the operator of its largest operand, as XLA fuses it.
- A rematerialized instruction belongs to the operator of its original, an optimization barrier to
  that of its first reader.
- A backward instruction belongs to the operator of the forward instruction with the same layer
  path. The forward tensors that it reads decide between several.
- An update instruction belongs to the owner of the parameter or gradient that it reads.
- All instructions in a loop belong to the owner of the loop.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from itertools import accumulate
from operator import mul

from partita.graph.flat import EDGE_KERNELS, SHAPE_ONLY, FlatProgram
from partita.graph.gradient_sums import gradient_sums
from partita.graph.normalizations import normalizations
from partita.graph.weight_slices import WeightSlices, product_readers

IndexSets = dict[int, set[int]]
"""Tensor or operator -> a set of operators, instructions or tensors."""


def assign_owners(
    program: FlatProgram,
    outputs: Sequence[int],
    separate_normalizations: bool = False,
    slices: Sequence[WeightSlices] = (),
) -> tuple[list[int], list[int]]:
    """The operator of every instruction (-1: none), and the heavy instruction of every operator.

    `separate_normalizations`: whether normalizations after products are operators of their own.
    `slices`: slices of weights, which are operators of their own.
    """
    heavy = _heavy_instructions(program, [one.instructions[0] for one in slices])
    owner = [-1] * len(program.instructions)
    for operator, index in enumerate(heavy):
        owner[index] = operator
    owners = _Owners(program, owner, slices)
    owners.own_forward()
    if separate_normalizations:
        heavy = owners.separate_normalizations(heavy)
    argument_owner = owners.argument_owners()
    _BackwardOwners(owners, heavy).own_backward()
    owners.own_gradient_sums(outputs)
    owners.own_update(argument_owner)
    owners.own_rest()
    owners.own_loop_bodies()
    return owner, heavy


def _heavy_instructions(program: FlatProgram, others: Collection[int]) -> list[int]:
    """One instruction per operator; without heavy ones, the one with the largest result.

    `others`: light instructions that make an operator too.
    """
    forward = program.top_level("forward")
    heavy = [index for index in forward if program.is_heavy(index) or index in others]
    if heavy:
        return heavy
    with_results = [index for index in forward if program.instructions[index].results]
    candidates = with_results or range(len(program.instructions))

    def result_size(index: int) -> int:
        results = program.instructions[index].results
        return sum(program.tensors[tensor].size for tensor in results)

    return [max(candidates, key=result_size)]


class _Owners:
    """The owner of every instruction, assigned phase by phase."""

    def __init__(
        self, program: FlatProgram, owner: list[int], slices: Sequence[WeightSlices]
    ) -> None:
        self.program = program
        self.owner = owner
        self.slices = slices

    def largest_operand_owner(
        self,
        index: int,
        allowed: set[int] | None = None,
        phase: str | None = None,
    ) -> int:
        """The owner of an instruction's largest owned operand, -1 if there is none.

        Of equal operands the latest operator wins. `allowed` and `phase` restrict the owners and
        the phase of the operands' producers.
        """
        program = self.program
        instruction = program.instructions[index]
        best = (-1, -1)
        for tensor in program.reads(index):
            producer = program.producer.get(tensor)
            if producer is None or program.is_scalar(tensor):
                continue
            operator = self.owner[producer]
            if operator < 0:
                continue
            if allowed is not None and operator not in allowed:
                continue
            if phase is not None and program.producer_phase(tensor) != phase:
                continue
            size = 0
            if instruction.name != "concatenate":
                # A broadcast counts as its source: a mask must not claim the tensor that it masks.
                source = program.base(tensor)
                nbytes = program.tensors[tensor].nbytes
                size = min(nbytes, program.tensors[source].nbytes)
            best = max(best, (size, operator))
        return best[1]

    def own_by_readers(self, indices: Sequence[int]) -> None:
        """Remaining instructions belong to their first owned reader.

        These have no owned operands: casts of the input, broadcast parameters.
        """
        for index in reversed(indices):
            if self.owner[index] >= 0:
                continue
            readers: list[int] = []
            for tensor in self.program.instructions[index].results:
                inner_readers = self.program.readers[tensor]
                readers += self.program.outermost(inner_readers)
            operators = [self.owner[reader] for reader in readers]
            assigned = [operator for operator in operators if operator >= 0]
            if assigned:
                self.owner[index] = min(assigned)

    def own_forward(self) -> None:
        """Light instructions belong with their largest operand, else with their first reader."""
        for slices in self.slices:
            for index in slices.instructions:
                self.owner[index] = self.owner[slices.instructions[0]]
        order = self.program.top_level("forward")
        for index in order:
            if self.owner[index] < 0:
                self.owner[index] = self.largest_operand_owner(index)
        self.own_by_readers(order)

    def separate_normalizations(self, heavy: Sequence[int]) -> list[int]:
        """Makes normalizations after products operators. The heavy instructions, in order."""
        separate = normalizations(self.program, self.owner, heavy)
        in_order = sorted([*heavy, *(normalization.heavy for normalization in separate)])
        number = {index: operator for operator, index in enumerate(in_order)}
        for index, operator in enumerate(self.owner):
            if operator >= 0:
                self.owner[index] = number[heavy[operator]]
        for normalization in separate:
            for index in normalization.instructions:
                self.owner[index] = number[normalization.heavy]
        return in_order

    def argument_owners(self) -> dict[int, int]:
        """Argument tensor -> the operator that reads it first in the forward phase."""
        owners = {}
        for argument in self.program.arguments:
            readers = self.program.readers[argument.tensor]
            for reader in self.program.outermost(readers):
                is_forward = self.program.instructions[reader].phase == "forward"
                if is_forward and self.owner[reader] >= 0:
                    owners[argument.tensor] = self.owner[reader]
                    break
        return owners

    def own_gradient_sums(self, outputs: Sequence[int]) -> None:
        """The additions of a weight's gradients belong to the first operator that uses the weight.

        It owns the weight, and computes one of the gradients.
        """
        program = self.program
        for gradient in gradient_sums(program.instructions, program.loops, outputs):
            leaf_owners = [self.owner[index] for index in gradient.leaves]
            first = min(leaf_owners)
            if first < 0:
                continue
            for index in gradient.additions:
                self.owner[index] = first

    def own_update(self, argument_owner: dict[int, int]) -> None:
        """`argument_owner`: owners of parameters, completed with those of their slots."""
        program = self.program
        tensor_of = {argument.path: argument.tensor for argument in program.arguments}
        for argument in program.arguments:
            if argument.parameter is None:
                continue
            parameter = tensor_of.get(argument.parameter)
            if parameter is not None and parameter in argument_owner:
                argument_owner[argument.tensor] = argument_owner[parameter]
        order = program.top_level("update")
        for index in order:
            shaped = [tensor for tensor in program.reads(index) if not program.is_scalar(tensor)]
            owned = [argument_owner[tensor] for tensor in shaped if tensor in argument_owner]
            if owned:
                self.owner[index] = owned[0]
                continue
            self.owner[index] = self._sliced_gradient_owner(index)
            if self.owner[index] < 0:
                self.owner[index] = self.largest_operand_owner(index)
            if self.owner[index] < 0:
                continue
            for tensor in shaped:
                # A slot without a recognized name belongs with the gradient that it meets.
                if tensor not in program.producer:
                    argument_owner[tensor] = self.owner[index]
        self.own_by_readers(order)

    def _sliced_gradient_owner(self, index: int) -> int:
        """The owner of a weight's slices, for the concatenation of their gradients, else -1.

        The operators of the gradients read the slices.
        """
        program = self.program
        instruction = program.instructions[index]
        if instruction.name != "concatenate":
            return -1
        shape = program.tensors[instruction.results[0]].shape
        owners = {self.owner[program.producer[tensor]] for tensor in instruction.operands}
        for slices in self.slices:
            if program.tensors[slices.parameter].shape != shape:
                continue
            readers = product_readers(program, slices)
            if owners <= {self.owner[reader] for reader in readers}:
                return self.owner[slices.instructions[0]]
        return -1

    def own_rest(self) -> None:
        """Remaining instructions belong with their operands, else to the last operator.

        Instructions on scalars alone stay without an owner.
        """
        last = max(self.owner)
        for index, instruction in enumerate(self.program.instructions):
            if self.owner[index] >= 0 or index in self.program.loop_of:
                continue
            self.owner[index] = self.largest_operand_owner(index)
            if self.owner[index] >= 0:
                continue
            tensors = instruction.operands + instruction.results
            only_scalars = all(map(self.program.is_scalar, tensors))
            if not only_scalars or instruction.name == "while":
                self.owner[index] = last

    def own_loop_bodies(self) -> None:
        """All instructions in a loop belong to its owner."""
        for index, number in self.program.loop_of.items():
            loop = self.program.loops[number]
            self.owner[index] = self.owner[loop.instruction]


class _BackwardOwners:
    """Owners of backward instructions."""

    def __init__(self, owners: _Owners, heavy: Sequence[int]) -> None:
        self.owners = owners
        self.program = owners.program
        self.owner = owners.owner
        self.heavy = heavy
        self.order = self.program.top_level("backward")
        self.path_operators: dict[str, Counter[int]] = defaultdict(Counter)
        """Layer path -> number of forward instructions of each operator."""
        for index, instruction in enumerate(self.program.instructions):
            if instruction.phase == "forward" and self.owner[index] >= 0:
                self.path_operators[instruction.path][self.owner[index]] += 1
        self.reversed_kernels: set[tuple[int, str]] = set()
        """Operators of kernels over edges, with names of backward kernels that they own."""
        self.reads: list[set[int]] = []
        """Per operator, the tensors that its heavy instruction reads, or computes for the backward
        pass alone (the order of a sort); none for a normalization."""
        for index in heavy:
            if self.program.is_heavy(index):
                self.reads.append(self._bases(index) | self._saved_results(index))
            else:
                self.reads.append(set())

    def own_backward(self) -> None:
        """Rematerialized instructions and products first, then sums of gradients, then all others
        by layer path."""
        self._own_clones()
        self._own_products()
        barriers = [index for index in self.order if self.program.is_barrier(index)]
        self.owners.own_by_readers(barriers)
        imports = self._forward_imports()
        for index in self.order:
            if self.program.is_barrier(index):
                continue
            if self.owner[index] < 0:
                self.owner[index] = self._accumulation_owner(index, imports)
            if self.owner[index] < 0:
                self.owner[index] = self._path_owner(index)
        self.owners.own_by_readers(self.order)

    def _own_clones(self) -> None:
        """Rematerialized instructions belong to the operators of their originals."""
        program = self.program
        for index in self.order:
            if program.is_barrier(index):
                continue
            for tensor in program.instructions[index].results:
                original = program.originals.get(tensor)
                if original in program.producer:
                    self.owner[index] = self.owner[program.producer[original]]

    def _bases(self, index: int) -> set[int]:
        """The tensors that an instruction reads, without rearrangements and scalars, repeated ones
        as their originals."""
        bases = set()
        for tensor in self.program.instructions[index].operands:
            if not self.program.is_scalar(tensor):
                base = self.program.base(tensor)
                bases.add(self.program.originals.get(base, base))
        return bases

    def _saved_results(self, index: int) -> set[int]:
        """The results of an instruction that the forward pass at most rearranges."""
        program = self.program
        return {
            tensor
            for tensor in program.instructions[index].results
            if all(self._only_rearranges(reader) for reader in program.readers[tensor])
        }

    def _only_rearranges(self, index: int) -> bool:
        """Whether an instruction of the forward pass rearranges its operand for the backward pass,
        or is of the backward pass."""
        instruction = self.program.instructions[index]
        if instruction.phase != "forward":
            return True
        return instruction.name in SHAPE_ONLY and all(
            self._only_rearranges(reader)
            for tensor in instruction.results
            for reader in self.program.readers[tensor]
        )

    def _own_products(self) -> None:
        """Heavy backward instructions belong to the operator whose operands they share."""
        readers: IndexSets = defaultdict(set)
        for operator, bases in enumerate(self.reads):
            for tensor in bases:
                readers[tensor].add(operator)
        products = {}
        for index in self.order:
            if self.program.is_heavy(index) and self.owner[index] < 0:
                products[index] = self._bases(index)
        siblings = self._sibling_reads(products)
        given: set[tuple[int, frozenset[int]]] = set()
        """Operators with the reads of their products. Two uses of a layer on values that are added
        or subtracted have products of equal reads, those of the last use first."""
        for index, bases in products.items():
            candidates = self._reversed_kernel(index)
            for tensor in bases if not candidates else ():
                candidates |= readers[tensor]
            best_score = (0, 0, False, 0, False)
            best = -1
            for operator in sorted(candidates) or range(len(self.heavy)):
                fit = self._score(index, operator, bases, siblings[index])
                is_new = (operator, frozenset(bases)) not in given
                if any(fit) and (*fit, is_new) >= best_score:
                    best_score = (*fit, is_new)
                    best = operator
            if best >= 0:
                self.owner[index] = best
                given.add((best, frozenset(bases)))

    def _reversed_kernel(self, index: int) -> set[int]:
        """The operator of the kernel over edges that a backward kernel passes in reverse, if any.

        Both have equal numbers of edges, and the gradient of the result has the result's shape. Of
        several, the last one without a backward kernel of that name: gradients come in reverse.
        """
        program = self.program
        instruction = program.instructions[index]
        if instruction.name not in EDGE_KERNELS:
            return set()
        edges = program.tensors[instruction.operands[2]].shape
        gradient = program.tensors[instruction.operands[-1]].shape
        for operator in reversed(range(len(self.heavy))):
            heavy = program.instructions[self.heavy[operator]]
            if heavy.name not in EDGE_KERNELS or heavy.path != instruction.path:
                continue
            same_edges = program.tensors[heavy.operands[2]].shape == edges
            same_rows = program.tensors[heavy.results[0]].shape == gradient
            reversed_before = (operator, instruction.name) in self.reversed_kernels
            if same_edges and same_rows and not reversed_before:
                self.reversed_kernels.add((operator, instruction.name))
                return {operator}
        return set()

    def _score(
        self,
        index: int,
        operator: int,
        bases: set[int],
        sibling_bases: set[int],
    ) -> tuple[int, int, bool, int]:
        """How well an operator fits a backward instruction: shared reads, then the layer path."""
        path = self.program.instructions[index].path
        heavy = self.program.instructions[self.heavy[operator]]
        reads = self.reads[operator]
        operators = self.path_operators.get(path, Counter())
        has_path = path == heavy.path
        return (
            len(bases & reads),
            len(sibling_bases & reads),
            has_path,
            0 if has_path else operators[operator],
        )

    def _sibling_reads(self, products: IndexSets) -> IndexSets:
        """Per product, the reads of all products that share a gradient with it, without its own.

        The two gradients of a product read one common gradient, and together both operands of the
        product. That distinguishes several uses of one weight, of which one gradient reads only the
        weight.
        """
        sharing: IndexSets = defaultdict(set)
        for index, bases in products.items():
            for tensor in bases:
                if self._is_backward(tensor):
                    sharing[tensor].add(index)
        siblings = {}
        for index, bases in products.items():
            reads: set[int] = set()
            for tensor in bases:
                for sibling in sharing.get(tensor, ()):
                    reads |= products[sibling]
            siblings[index] = reads - bases
        return siblings

    def _is_backward(self, tensor: int) -> bool:
        return self.program.producer_phase(tensor) == "backward"

    def _forward_imports(self) -> IndexSets:
        """Per operator, the forward values of other operators that it reads, not rearranged."""
        imports: IndexSets = defaultdict(set)
        for index, instruction in enumerate(self.program.instructions):
            operator = self.owner[index]
            if instruction.phase != "forward" or operator < 0:
                continue
            for tensor in map(self.program.base, instruction.operands):
                producer = self.program.producer.get(tensor)
                if producer is None:
                    continue
                if self.owner[producer] not in (-1, operator):
                    imports[operator].add(tensor)
        return imports

    def _accumulation_owner(self, index: int, imports: IndexSets) -> int:
        """The owner of the forward value whose gradients a backward addition sums, else -1.

        With its readers, the sum would tie them to each other (query, key and value of attention).
        So it belongs to the producer of the value. If several values qualify (both operators read
        the encoder and the decoder), the next layer of the gradient decides.
        """
        instruction = self.program.instructions[index]
        if instruction.name != "add" or len(instruction.operands) != 2:
            return -1
        one = self._backward_owner(instruction.operands[0])
        other = self._backward_owner(instruction.operands[1])
        if one < 0 or other < 0 or one == other:
            return -1
        shape = self.program.tensors[instruction.results[0]].shape
        candidates: set[int] = set()
        for tensor in imports[one] | imports[other]:
            if not _is_rearranged(self.program.tensors[tensor].shape, shape):
                continue
            producer = self.program.producer[tensor]
            operator = self.owner[producer]
            one_uses_it = operator == one or tensor in imports[one]
            other_uses_it = operator == other or tensor in imports[other]
            if one_uses_it and other_uses_it:
                candidates.add(operator)
        if len(candidates) > 1:
            next_path = self._next_path(index)
            next_operators = self.path_operators.get(next_path, Counter())
            candidates = candidates & set(next_operators) or candidates
        return max(candidates, default=-1)

    def _backward_owner(self, tensor: int) -> int:
        """The owner of a tensor that a backward instruction computes, else -1."""
        if not self._is_backward(tensor):
            return -1
        return self.owner[self.program.producer[tensor]]

    def _next_path(self, index: int) -> str:
        """The path of the next layer that reads a value.

        Its first reader, or that one's first reader, and on to another layer.
        """
        path = self.program.instructions[index].path
        while True:
            instruction = self.program.instructions[index]
            if instruction.path != path:
                return instruction.path
            readers: list[int] = []
            for tensor in instruction.results:
                readers += self.program.readers[tensor]
            if not readers:
                return path
            index = readers[0]

    def _path_owner(self, index: int) -> int:
        """The operator with the instruction's path; of several, that of its largest operand."""
        path = self.program.instructions[index].path
        candidates = set(self.path_operators.get(path, ()))
        if len(candidates) == 1:
            return next(iter(candidates))
        for phase in ("forward", None):
            operator = self.owners.largest_operand_owner(
                index,
                allowed=candidates,
                phase=phase,
            )
            if operator >= 0:
                return operator
        return self.owners.largest_operand_owner(index)


def _is_rearranged(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether a reshape that merges or splits neighbouring dims turns one shape into another, or a
    transpose.

    >>> _is_rearranged((2, 6, 5), (2, 3, 2, 5)), _is_rearranged((2, 6, 5), (5, 6, 2))
    (True, True)
    >>> _is_rearranged((2, 6, 5), (2, 3, 5, 2))
    False
    """
    if sorted(shape) == sorted(other):
        return True
    bounds = set(accumulate(shape, mul, initial=1))
    other_bounds = set(accumulate(other, mul, initial=1))
    return max(bounds) == max(other_bounds) and (bounds <= other_bounds or other_bounds <= bounds)
