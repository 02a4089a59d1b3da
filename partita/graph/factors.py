"""Factors: names for the dims of all tensors of one operator.

Shardy's rules tie dims together: two dims that one rule maps to the same factor are one factor.
Ties are a union-find over *atoms*. An atom may be refined: a reshape of heads * width splits one in
two.

A tie that would put one factor twice on a tensor (x times its own transpose) is refused. The
reading instruction then has its own view of the tensor, a Use, and the difference is a reshard with
a cost. So a choice of factors fixes the sharding of every value of an operator, and all
communication is in reductions, halos and Uses.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from partita.graph.flat import CONTRACTING, EDGE_KERNELS, HEAVY, RESHAPING, FlatProgram
from partita.graph.operator_graph import (
    DimFactors,
    Factor,
    FactorKind,
    Instruction,
    Label,
    Loop,
    Rule,
    Use,
)

Dims = list[tuple[int, ...]]
"""Per dim of a tensor its atoms, major to minor; () for a dim that is never split."""


class Atoms:
    """Union-find over the independent dims of one operator."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.size: list[int] = []
        self.parts: dict[int, tuple[int, ...]] = {}
        """Refined atom -> its parts, major to minor."""
        self.places: list[set[object]] = []
        """Per root, the tensors and instructions that it indexes. Two atoms with a common place
        must never become one."""

    def new(self, size: int, places: Iterable[object] = ()) -> int:
        """A new atom of a size that indexes `places`."""
        self.parent.append(len(self.parent))
        self.size.append(size)
        self.places.append(set(places))
        return len(self.parent) - 1

    def root(self, atom: int) -> int:
        """The representative of an atom's set."""
        while self.parent[atom] != atom:
            self.parent[atom] = self.parent[self.parent[atom]]
            atom = self.parent[atom]
        return atom

    def resolve(self, atoms: Iterable[int]) -> list[int]:
        """Roots that are not refined further, without those of size 1."""
        roots: list[int] = []
        for atom in map(self.root, atoms):
            if atom in self.parts:
                roots += self.resolve(self.parts[atom])
            elif self.size[atom] > 1:
                roots.append(atom)
        return roots

    def tie(self, dim: Iterable[int], other: Iterable[int]) -> bool:
        """Make two dims one, refining atoms where needed. False where that is impossible."""
        atoms = self.resolve(dim)
        other_atoms = self.resolve(other)
        while atoms and other_atoms:
            x = atoms.pop(0)
            y = other_atoms.pop(0)
            if x == y:
                continue
            if self.size[x] == self.size[y]:
                if not self._unite(x, y):
                    return False
                continue
            if self.size[x] > self.size[y]:
                remainder = self._refine(x, y)
                remaining_atoms = atoms
            else:
                remainder = self._refine(y, x)
                remaining_atoms = other_atoms
            if remainder is None:
                return False
            remaining_atoms.insert(0, remainder)
        return not atoms and not other_atoms

    def _refine(self, atom: int, major: int) -> int | None:
        """Split an atom into a smaller one and a remainder. The remainder, None if impossible."""
        size = self.size[atom]
        major_size = self.size[major]
        if size % major_size:
            return None
        if self.places[atom] & self.places[major]:
            return None
        remainder = self.new(size // major_size, self.places[atom])
        self.parts[atom] = (major, remainder)
        self.places[major] |= self.places[atom]
        return remainder

    def _unite(self, x: int, y: int) -> bool:
        if self.places[x] & self.places[y]:
            return False
        if len(self.places[x]) < len(self.places[y]):
            x, y = y, x
        self.parent[y] = x
        self.places[x] |= self.places[y]
        self.places[y] = set()
        return True


@dataclass
class TensorView:
    """A tensor as some instructions of an operator read it."""

    dims: Dims
    reads: list[tuple[int, int]]
    """(instruction, operand position) pairs."""


@dataclass
class _Iteration:
    """The iteration space of one instruction: an atom per factor of its sharding rule."""

    rule: Rule
    atoms: list[int]
    windowed: set[int]
    """Factors that move a window."""
    unsplit: set[int]
    """Factors that must not be split."""


class OperatorDims:
    """The dims of all tensors of one operator, tied by the sharding rules of its instructions."""

    def __init__(self, program: FlatProgram, members: Sequence[int]) -> None:
        self.program = program
        self.members = members
        self.atoms = Atoms()
        self.results: dict[int, Dims] = {}
        """Tensor computed by the operator -> its dims."""
        self.views: dict[int, list[TensorView]] = defaultdict(list)
        """Tensor -> its views that differ from its own dims."""
        self.graph_parts: list[int] = []
        """The atoms of the parts of a graph, which all kernels over edges of the operator share."""
        self.iteration: dict[int, list[int]] = {}
        """Instruction -> the atoms of its iteration space."""
        loops = {loop.instruction: loop for loop in program.loops}
        for index in members:
            if index in loops:
                self._enter_loop(loops[index])
        conditionals = []
        for index in members:
            if index not in loops:
                self._tie_instruction(index)
            elif index in program.captured:
                conditionals.append(loops[index])
            else:
                self._tie_loop(loops[index])
        for conditional in conditionals:
            self._tie_branches(conditional)
        self._tie_gradients()

    def all_dims(self) -> Iterator[tuple[int, ...]]:
        """The dims of all tensors, in all views."""
        for dims in self.results.values():
            yield from dims
        for views in self.views.values():
            for view in views:
                yield from view.dims

    def dims_at(self, tensor: int, read: tuple[int, int]) -> Dims | None:
        """The dims of a tensor as an instruction's operand reads it, None if they are unknown."""
        for view in self.views.get(tensor, ()):
            if read in view.reads:
                return view.dims
        return self.results.get(tensor)

    def _shape(self, tensor: int) -> tuple[int, ...]:
        return self.program.tensors[tensor].shape

    def _unsplit(self, tensor: int) -> Dims:
        return [()] * len(self._shape(tensor))

    def _new_dims(self, tensor: int) -> Dims:
        place = ("t", tensor)
        dims: Dims = []
        for size in self._shape(tensor):
            dims.append((self.atoms.new(size, [place]),) if size > 1 else ())
        return dims

    def _enter_loop(self, loop: Loop) -> None:
        for _, inside, _, after in loop.carried:
            for tensor in (inside, after):
                if tensor not in self.results:
                    self.results[tensor] = self._new_dims(tensor)

    def _read(
        self,
        tensor: int,
        target: Dims,
        index: int,
        position: int,
    ) -> None:
        """Record that an instruction reads a tensor with dims `target`, tied to its existing views.

        Dims are tied one by one: a reader that cannot split one dim still shares the others.
        """
        if not self._shape(tensor):
            return
        if tensor in self.results and self._tie_all(self.results[tensor], target):
            return
        for view in self.views[tensor]:
            if self._tie_all(view.dims, target):
                view.reads.append((index, position))
                return
        place = ("i", tensor, len(self.views[tensor]))
        dims = self._tied_dims(tensor, target, place)
        view = TensorView(dims, reads=[(index, position)])
        self.views[tensor].append(view)
        self._tie_to_original(tensor, dims)

    def _tie_to_original(self, tensor: int, dims: Dims) -> None:
        """Ties a rematerialized tensor to its original, if the operator has or reads that."""
        original = self.program.originals.get(tensor)
        if original is None:
            return
        if original in self.results:
            self._tie_all(self.results[original], dims)
        elif original in self.views:
            self._tie_all(self.views[original][0].dims, dims)

    def _tie_all(self, dims: Dims, target: Dims) -> bool:
        """Tie dims pairwise, all of them even if one fails. Whether all agree."""
        agree = True
        for dim, target_dim in zip(dims, target, strict=True):
            if dim and target_dim:
                agree &= self.atoms.tie(dim, target_dim)
            elif dim or target_dim:
                agree = False
        return agree

    def _tied_dims(
        self,
        tensor: int,
        target: Dims,
        place: object,
    ) -> Dims:
        """New dims of a tensor, tied to those of `target` where possible, never split elsewhere."""
        dims: Dims = []
        for size, target_dim in zip(self._shape(tensor), target, strict=True):
            dim: tuple[int, ...] = ()
            if size > 1 and target_dim:
                dim = (self.atoms.new(size, [place]),)
                if not self.atoms.tie(dim, target_dim):
                    dim = ()
            dims.append(dim)
        return dims

    def _tie_instruction(self, index: int) -> None:
        instruction = self.program.instructions[index]
        rule = instruction.rule
        if rule is None:
            for position, tensor in enumerate(instruction.operands):
                self._read(
                    tensor,
                    self._unsplit(tensor),
                    index,
                    position,
                )
            for tensor in instruction.results:
                self.results.setdefault(tensor, self._unsplit(tensor))
            return
        place = ("r", index)
        atoms = [self.atoms.new(size, [place]) for size in rule.sizes]
        self.iteration[index] = atoms
        if instruction.name in EDGE_KERNELS:
            self.graph_parts += atoms
            self.atoms.tie(self.graph_parts[:1], atoms)
        windowed = {factor for factor, _ in instruction.windows}
        unsplit = instruction.whole_factors | self._unsplit_windows(instruction, windowed)
        iteration = _Iteration(
            rule,
            atoms,
            windowed,
            unsplit,
        )
        for position, tensor in enumerate(instruction.operands[: len(rule.operands)]):
            mapping = rule.operands[position]
            if len(mapping) == len(self._shape(tensor)):
                self._read(
                    tensor,
                    self._rule_dims(
                        tensor,
                        mapping,
                        iteration,
                        place,
                    ),
                    index,
                    position,
                )
        for tensor, mapping in zip(instruction.results, rule.results, strict=False):
            target = self._unsplit(tensor)
            if len(mapping) == len(self._shape(tensor)):
                target = self._rule_dims(
                    tensor,
                    mapping,
                    iteration,
                    place,
                )
            self.results[tensor] = self._tied_dims(tensor, target, ("t", tensor))
            self._tie_to_original(tensor, self.results[tensor])

    def _rule_dims(
        self,
        tensor: int,
        mapping: DimFactors,
        iteration: _Iteration,
        place: object,
    ) -> Dims:
        """The dims of a tensor in the iteration space of an instruction."""
        dims: Dims = []
        for size, factors in zip(self._shape(tensor), mapping, strict=True):
            if factors and factors[0] in iteration.windowed:
                # A window of stride n covers n elements at each of its positions.
                factors = factors[:1]
            dims.append(
                self._rule_dim(
                    size,
                    factors,
                    iteration,
                    place,
                )
            )
        return dims

    def _rule_dim(
        self,
        size: int,
        factors: tuple[int, ...],
        iteration: _Iteration,
        place: object,
    ) -> tuple[int, ...]:
        sizes = iteration.rule.sizes
        covered = math.prod(sizes[factor] for factor in factors)
        if size <= 1 or covered <= 1 or iteration.unsplit & set(factors):
            return ()
        if covered == size:
            split = [factor for factor in factors if sizes[factor] > 1]
            return tuple(iteration.atoms[factor] for factor in split)
        if size % covered == 0 and set(factors) <= iteration.windowed:
            atoms = [iteration.atoms[factor] for factor in factors]
            return (*atoms, self.atoms.new(size // covered, [place]))
        return ()

    def _unsplit_windows(self, instruction: Instruction, windowed: set[int]) -> set[int]:
        """Window factors that are never split.

        These are the elements within a window, and summed positions that do not divide the dim.
        """
        rule = instruction.rule
        unsplit: set[int] = set()
        if rule is None or not windowed:
            return unsplit
        shape = self._shape(instruction.operands[0])
        for size, factors in zip(shape, rule.operands[0], strict=True):
            if not factors or factors[0] not in windowed:
                continue
            position = factors[0]
            unsplit.update(factors[1:])
            if position in rule.reduction and size % rule.sizes[position]:
                unsplit.add(position)
        return unsplit

    def _tie_loop(self, loop: Loop) -> None:
        """Tie the values of every carried variable: before, inside and after the loop."""
        index = loop.instruction
        operands = len(self.program.instructions[index].operands)
        for number, (before, inside, yielded, after) in enumerate(loop.carried):
            if not self._shape(inside):
                continue
            dims = self.results.get(inside) or self._new_dims(inside)
            self.results[inside] = dims
            if after != inside and after in self.results:
                self._tie_after_loop(after, inside)
            self._read(
                before,
                dims,
                index,
                number % max(1, operands),
            )
            if yielded != inside and yielded in self.results:
                self._read(
                    yielded,
                    self.results[inside],
                    index,
                    operands + number,
                )

    def _tie_branches(self, conditional: Loop) -> None:
        """Tie the results of a conditional to the values that its branches yield."""
        index = conditional.instruction
        operands = len(self.program.instructions[index].operands)
        for number, (_, result, yielded, _) in enumerate(conditional.carried):
            self._read(
                yielded,
                self.results[result],
                index,
                operands + number,
            )

    def _tie_gradients(self) -> None:
        """Ties dims of gradients that no rule ties to a forward value.

        The backward pass of a linear function (a choice of rows, resizing, average pooling) reads
        no forward value, or constants alone. A gradient from another operator has the dims of the
        forward result of its shape, and one that this operator computes those of the forward
        operand of its shape. Windows stay whole: those of a pooling's gradient are padded to an
        odd size, and XLA:TPU aborts where only their sums are split.
        """
        forward: list[tuple[int, Dims]] = []
        gradients: list[tuple[int, Dims]] = []
        for tensor, dims in self._split_tensors():
            is_gradient = self.program.producer_phase(tensor) == "backward"
            (gradients if is_gradient else forward).append((tensor, dims))
        tied = {atom for _, dims in forward for atom in self._roots(dims)}
        untied = [entry for entry in gradients if not self._roots(entry[1]) <= tied]
        if not untied:
            return
        windows = self._gradient_windows()
        for tensor, dims in untied:
            is_result = tensor in self.results
            for other, target in forward if is_result else reversed(forward):
                is_value = (other in self.results) != is_result
                same_shape = self._shape(other) == self._shape(tensor)
                if is_value and same_shape and self._agree(dims, target, tied):
                    split = [d if windows.isdisjoint(self._roots([d])) else () for d in dims]
                    self._tie_all(split, target)
                    break

    def _agree(self, dims: Dims, target: Dims, tied: set[int]) -> bool:
        """Whether the dims with atoms in `tied` are those of `target`."""
        for dim, target_dim in zip(dims, target, strict=True):
            atoms = self.atoms.resolve(dim)
            if not tied.isdisjoint(atoms) and atoms != self.atoms.resolve(target_dim):
                return False
        return True

    def _split_tensors(self) -> Iterator[tuple[int, Dims]]:
        """Every tensor of the operator that is no constant, with its dims, in order."""
        for tensor, views in self.views.items():
            if tensor not in self.results and tensor not in self.program.constants:
                for view in views:
                    yield tensor, view.dims
        for tensor, dims in self.results.items():
            if tensor not in self.program.constants:
                yield tensor, dims

    def _gradient_windows(self) -> set[int]:
        """The atoms over which instructions of the backward pass move windows."""
        atoms = set()
        for index, iteration in self.iteration.items():
            instruction = self.program.instructions[index]
            if instruction.phase == "backward":
                atoms |= self._roots([(iteration[factor],) for factor, _ in instruction.windows])
        return atoms

    def _roots(self, dims: Iterable[tuple[int, ...]]) -> set[int]:
        return {atom for dim in dims for atom in self.atoms.resolve(dim)}

    def _tie_after_loop(self, after: int, inside: int) -> None:
        """Tie a loop's result to the carried value; both stay whole if one dim cannot be tied."""
        pairs = zip(self.results[after], self.results[inside], strict=True)
        for after_dim, inside_dim in pairs:
            if after_dim and inside_dim and not self.atoms.tie(after_dim, inside_dim):
                self.results[after] = self._unsplit(after)
                self.results[inside] = self._unsplit(inside)


class OperatorFactors:
    """The factors that an operator may split, and labels in them."""

    def __init__(
        self,
        program: FlatProgram,
        operator: int,
        members: Sequence[int],
        heavy: int,
        first_factor: int,
        weights: frozenset[int],
    ) -> None:
        self.program = program
        self.weights = weights
        self.operator = operator
        self.members = members
        self.dims = OperatorDims(program, members)
        self.atoms = self.dims.atoms
        self.factor_of: dict[int, int] = {}
        """Atom -> its factor in the graph."""
        self.factors: list[Factor] = []
        candidates, reduced = self._candidates(heavy)
        indexing = self._parameter_atoms()
        if program.instructions[heavy].name == "reduce":
            # A normalization: a table of positions makes no feature of a position.
            indexing &= self._summed_atoms(heavy)
        majors = self._major_atoms()
        for atom in candidates:
            if atom not in majors:
                continue
            kind: FactorKind = "A"
            if atom in reduced:
                kind = "R"
            elif atom in indexing:
                kind = "P"
            self.factor_of[atom] = first_factor + len(self.factors)
            self.factors.append(
                Factor(
                    "",
                    self.atoms.size[atom],
                    kind,
                    operator,
                )
            )

    def _candidates(self, heavy: int) -> tuple[list[int], set[int]]:
        """The atoms of the operator's main iteration spaces, and those that are summed."""
        candidates: dict[int, None] = {}
        reduced = set()
        for index, factor_atoms in self.dims.iteration.items():
            if not self._offers_factors(index, heavy):
                continue
            instruction = self.program.instructions[index]
            assert instruction.rule is not None
            for factor, factor_atom in enumerate(factor_atoms):
                atoms = self.atoms.resolve([factor_atom])
                candidates.update(dict.fromkeys(atoms))
                if factor in instruction.rule.reduction and instruction.name in CONTRACTING:
                    reduced.update(atoms)
        return list(candidates), reduced

    def _offers_factors(self, index: int, heavy: int) -> bool:
        """Whether an instruction's iteration space offers factors.

        That of the heavy instruction does, and of heavy instructions inside the operator's loop.
        """
        if index == heavy:
            return True
        if self.program.loop_around(index) != heavy:
            return False
        return self.program.instructions[index].name in HEAVY

    def _parameter_atoms(self) -> set[int]:
        """The atoms of weights."""
        atoms = set()
        for tensor in self.weights:
            for view in self.dims.views.get(tensor, ()):
                for dim in view.dims:
                    atoms.update(self.atoms.resolve(dim))
        return atoms

    def _summed_atoms(self, index: int) -> set[int]:
        """The atoms that an instruction sums."""
        rule = self.program.instructions[index].rule
        summed = set()
        for factor in rule.reduction if rule else ():
            summed.update(self.atoms.resolve([self.dims.iteration[index][factor]]))
        return summed

    def _major_atoms(self) -> set[int]:
        """The atoms that are the major one of some dim: only these can be split."""
        majors = set()
        for dim in self.dims.all_dims():
            atoms = self.atoms.resolve(dim)
            if atoms:
                majors.add(atoms[0])
        return majors

    def label(self, dims: Iterable[tuple[int, ...]], excluded: Iterable[int] = ()) -> Label:
        """Per dim its major factor, -1 where the operator cannot split it or it is excluded."""
        label = []
        for dim in dims:
            atoms = self.atoms.resolve(dim)
            factor = self.factor_of.get(atoms[0], -1) if atoms else -1
            label.append(-1 if factor in excluded else factor)
        return tuple(label)

    def restricted_uses(self) -> list[Use]:
        """Reads by instructions that merge dims, without factors that are minor in their tensors.

        Flattening height x width x channels can keep a split of the height, never one of the
        channels. The channels must be gathered before: a Use with that dim unsplit.
        """
        uses = []
        for index in self.members:
            if self.program.instructions[index].name not in RESHAPING:
                continue
            minor = self._minor_factors(index)
            for position, tensor in enumerate(self.program.instructions[index].operands):
                dims = self.dims.dims_at(tensor, (index, position))
                if dims is None:
                    continue
                label = self.label(dims, excluded=minor)
                if label != self.label(dims):
                    uses.append(
                        Use(
                            tensor,
                            self.operator,
                            label,
                            ((index, position),),
                        )
                    )
        return uses

    def _minor_factors(self, index: int) -> set[int]:
        """Factors that are minor in a dim of an instruction's tensors."""
        instruction = self.program.instructions[index]
        minor = set()
        for tensor in instruction.operands + instruction.results:
            dims = list(self.dims.results.get(tensor, ()))
            for view in self.dims.views.get(tensor, ()):
                dims += view.dims
            for dim in dims:
                for atom in self.atoms.resolve(dim)[1:]:
                    if atom in self.factor_of:
                        minor.add(self.factor_of[atom])
        return minor
