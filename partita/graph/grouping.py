"""Groups a flat program into operators and labels every tensor dim with a factor.

Who owns an instruction. A heavy forward instruction (product, convolution, gather, window, sort, a loop around one) makes
an operator. A light one goes to the operator of its largest operand, as XLA fuses it; backward instructions go to the
operator of the forward instruction with the same layer path, told apart by the forward tensors that they read; update
instructions go to the owner of the parameter or gradient that they read.

What a dim is called. Within an operator, Shardy's rules tie dims together: two dims that one rule maps to the same factor
are one factor. Ties are kept in a union-find whose atoms may be refined (a reshape of heads*width splits the atom in two).
A tie that would put one factor twice on a tensor (x times its own transpose) is refused: the reading instruction then sees
the tensor under another label, a Use, and the difference is a reshard that costs what it costs. So a choice of factors
fixes the sharding of every value of an operator, and all communication is in reductions, halos and Uses.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from partita.graph.gradient_sums import gradient_sums
from partita.graph.operator_graph import (
    Argument,
    DimFactors,
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

HEAVY = {
    "dot_general",
    "convolution",
    "gather",
    "reduce_window",
    "sort",
    "fft",
    "cholesky",
    "triangular_solve",
    "custom_call",
    "select_and_scatter",
    "scatter",
    "top_k",
}
SHAPE_ONLY = {
    "reshape",
    "transpose",
    "convert",
    "broadcast_in_dim",
    "reverse",
    "copy",
    "optimization_barrier",
    "negate",
}
KIND = {
    "dot_general": "dot",
    "convolution": "conv",
    "reduce_window": "pool",
    "gather": "gather",
    "sort": "sort",
    "while": "loop",
    "select_and_scatter": "pool",
    "scatter": "scatter",
    "top_k": "sort",
}
RESHAPING = {"reshape", "bitcast_convert"}
CONTRACTING = {"dot_general", "convolution", "gather"}


def group(
    name: str,
    tensors: Sequence[Tensor],
    instructions: Sequence[Instruction],
    loops: Sequence[Loop],
    arguments: Sequence[Argument],
    outputs: Sequence[int],
    batch_size: int = 0,
    notes: Sequence[str] = (),
) -> OperatorGraph:
    """The OperatorGraph of a flat program. `batch_size` is dim 0 of the batch arguments, for information."""
    if not any(i.phase == "forward" for i in instructions):
        # A step without a gradient: everything it does is its forward part.
        instructions = [replace(i, phase="forward") for i in instructions]
    flat = _Flat(tensors, _with_loops_forward(instructions, loops), loops, arguments)
    owner, heavy = _owners(flat, outputs)
    return _label(name, flat, owner, heavy, tuple(outputs), batch_size, tuple(notes))


def _with_loops_forward(
    instructions: Sequence[Instruction], loops: Sequence[Loop]
) -> list[Instruction]:
    """The instructions, a loop around forward ones being forward: one over microbatches has whole passes in its body."""
    found = list(instructions)
    for loop in loops:
        if (
            any(instructions[i].phase == "forward" for i in range(*loop.body))
            and found[loop.instruction].phase == "update"
        ):
            found[loop.instruction] = replace(found[loop.instruction], phase="forward")
    return found


class _Flat:
    """The program with who produces and who reads each tensor."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        instructions: Sequence[Instruction],
        loops: Sequence[Loop],
        arguments: Sequence[Argument],
    ) -> None:
        self.tensors, self.instructions, self.loops, self.arguments = (
            tensors,
            instructions,
            loops,
            arguments,
        )
        self.producer: dict[int, int] = {}
        self.readers: dict[int, list[int]] = defaultdict(list)
        self.loop_of: dict[int, int] = {}
        """Instruction -> the outermost loop around it."""
        for index, instruction in enumerate(instructions):
            for t in instruction.results:
                self.producer[t] = index
            for t in instruction.operands:
                self.readers[t].append(index)
        self.fixed: set[int] = set()
        """Tensors that depend on no argument (a causal mask): XLA computes them once, nobody needs to plan them."""
        carried = {t for loop in loops for values in loop.carried for t in values}
        for instruction in instructions:
            if all(t in self.fixed for t in instruction.operands) and not carried & set(
                instruction.results
            ):
                self.fixed.update(instruction.results)
        for number, loop in enumerate(loops):
            for index in range(*loop.body):
                self.loop_of.setdefault(index, number)
            for _, inside, yielded, _ in loop.carried:
                self.producer.setdefault(inside, loop.instruction)
                self.readers[yielded].append(loop.instruction)
        # Nested loops are numbered inner first: let the outermost win.
        for number in sorted(range(len(loops)), key=lambda n: loops[n].body[1] - loops[n].body[0]):
            for index in range(*loops[number].body):
                self.loop_of[index] = number

    def base(self, t: int) -> int:
        """The tensor that `t` is a mere re-arrangement of."""
        while (index := self.producer.get(t)) is not None:
            instruction = self.instructions[index]
            if instruction.name not in SHAPE_ONLY or not instruction.operands:
                break
            t = instruction.operands[0]
        return t


# --------------------------------------------------------------------------------------------------------- ownership


def _owners(flat: _Flat, outputs: Sequence[int]) -> tuple[list[int], list[int]]:
    """(owner per instruction, heavy instruction per operator)."""
    instructions = flat.instructions
    owner = [-1] * len(instructions)
    heavy: list[int] = []
    for index, instruction in enumerate(instructions):
        if instruction.phase == "forward" and index not in flat.loop_of and _is_heavy(flat, index):
            owner[index] = len(heavy)
            heavy.append(index)
    if not heavy:
        # Nothing heavy at all: the instruction with the largest result stands for the whole step.
        forward = [
            i
            for i, x in enumerate(instructions)
            if x.phase == "forward" and x.results and i not in flat.loop_of
        ]
        index = max(
            forward or range(len(instructions)),
            key=lambda i: sum(flat.tensors[t].size for t in instructions[i].results),
        )
        owner[index] = 0
        heavy.append(index)
    _own_forward(flat, owner)
    parameter_owner = _argument_owners(flat, owner)
    _own_backward(flat, owner, heavy)
    for found in gradient_sums(flat.instructions, flat.loops, outputs):
        # The operator that uses the weight first has the weight, and makes one of the gradients that are added.
        first = min(owner[i] for i in found.leaves)
        for i in found.additions if first >= 0 else ():
            owner[i] = first
    _own_update(flat, owner, parameter_owner)
    _own_rest(flat, owner)
    for index, number in flat.loop_of.items():
        owner[index] = owner[flat.loops[number].instruction]
    return owner, heavy


def _is_heavy(flat: _Flat, index: int) -> bool:
    instruction = flat.instructions[index]
    if all(t in flat.fixed for t in instruction.results):
        return False
    if instruction.name == "while":
        return any(
            flat.instructions[i].name in HEAVY
            for n, loop in enumerate(flat.loops)
            if loop.instruction == index
            for i in range(*loop.body)
        )
    if instruction.name == "gather":
        return (
            len(flat.tensors[instruction.operands[0]].shape) > 1
            and flat.tensors[instruction.results[0]].size > 1
        )
    if instruction.name == "custom_call":
        return any(len(flat.tensors[t].shape) > 1 for t in instruction.results)
    return instruction.name in HEAVY


def _largest(
    flat: _Flat,
    owner: list[int],
    index: int,
    allowed: set[int] | None = None,
    phase: str | None = None,
) -> int:
    """The owner of the largest operand that has one; of equals, the latest operator. -1 if there is none."""
    instruction = flat.instructions[index]
    best = (-1, -1)
    for t in instruction.operands:
        producer = flat.producer.get(t)
        if producer is None or owner[producer] < 0 or not flat.tensors[t].shape:
            continue
        if (
            allowed is not None
            and owner[producer] not in allowed
            or phase
            and flat.instructions[producer].phase != phase
        ):
            continue
        # A broadcast weighs what it is made from: a mask must not claim what it masks.
        size = (
            0
            if instruction.name == "concatenate"
            else min(flat.tensors[t].nbytes, flat.tensors[flat.base(t)].nbytes)
        )
        best = max(best, (size, owner[producer]))
    return best[1]


def _own_forward(flat: _Flat, owner: list[int]) -> None:
    order = [
        i for i, x in enumerate(flat.instructions) if x.phase == "forward" and i not in flat.loop_of
    ]
    for index in order:
        if owner[index] < 0:
            owner[index] = _largest(flat, owner, index)
    _from_readers(flat, owner, order)


def _from_readers(flat: _Flat, owner: list[int], order: Iterable[int]) -> None:
    """What has no owned operand (casts of the input, broadcast parameters) goes to its first owned reader."""
    for index in reversed(list(order)):
        if owner[index] < 0:
            readers = [
                owner[r]
                for t in flat.instructions[index].results
                for r in _outer(flat, flat.readers[t])
                if owner[r] >= 0
            ]
            if readers:
                owner[index] = min(readers)


def _outer(flat: _Flat, indices: Iterable[int]) -> Iterable[int]:
    """The instructions, those in loops replaced by their loop."""
    return (flat.loops[flat.loop_of[i]].instruction if i in flat.loop_of else i for i in indices)


def _argument_owners(flat: _Flat, owner: list[int]) -> dict[int, int]:
    """Argument tensor -> the operator that reads it first in the forward phase."""
    found = {}
    for argument in flat.arguments:
        readers = [
            owner[i]
            for i in _outer(flat, flat.readers[argument.tensor])
            if owner[i] >= 0 and flat.instructions[i].phase == "forward"
        ]
        if readers:
            found[argument.tensor] = readers[0]
    return found


def _own_backward(flat: _Flat, owner: list[int], heavy: list[int]) -> None:
    by_path: dict[str, Counter[int]] = defaultdict(Counter)
    reads: dict[int, set[int]] = {}
    for index, instruction in enumerate(flat.instructions):
        if instruction.phase == "forward" and owner[index] >= 0:
            by_path[instruction.path][owner[index]] += 1
    for operator, index in enumerate(heavy):
        reads[operator] = {
            flat.base(t) for t in flat.instructions[index].operands if flat.tensors[t].shape
        }
    order = [
        i
        for i, x in enumerate(flat.instructions)
        if x.phase == "backward" and i not in flat.loop_of
    ]
    forward_of, together = _reads_of_products(flat, order)
    users: dict[int, set[int]] = defaultdict(set)
    for operator, bases in reads.items():
        for t in bases:
            users[t].add(operator)
    for index, bases in forward_of.items():
        instruction, beside = flat.instructions[index], together[index]
        paths = by_path.get(instruction.path, Counter())
        score = lambda o, bases=bases, beside=beside, instruction=instruction, paths=paths: (
            len(bases & reads[o]),
            len(beside & reads[o]),
            instruction.path == flat.instructions[heavy[o]].path,
            paths[o],
            o,
        )
        best = max(set().union(*(users[t] for t in bases)) or range(len(heavy)), key=score)
        if any(score(best)[:4]):
            owner[index] = best
    imports = _forward_imports(flat, owner)
    for index in order:
        if owner[index] >= 0:
            continue
        owner[index] = _accumulates_for(flat, owner, imports, by_path, index)
        if owner[index] >= 0:
            continue
        candidates = set(by_path.get(flat.instructions[index].path, ()))
        if len(candidates) == 1:
            owner[index] = next(iter(candidates))
            continue
        for allowed, phase in ((candidates, "forward"), (candidates, None), (None, None)):
            owner[index] = _largest(flat, owner, index, allowed, phase)
            if owner[index] >= 0:
                break
    _from_readers(flat, owner, order)


def _reads_of_products(
    flat: _Flat, order: Sequence[int]
) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """Per heavy backward instruction what it reads, and what those read that share a gradient with it.

    The two gradients of a product read one gradient, and between them both operands of the product. That tells apart the uses of a weight,
    of which the one gradient reads only the weight.
    """
    reads: dict[int, set[int]] = {}
    sharing: dict[int, set[int]] = defaultdict(set)
    for index in order:
        if _is_heavy(flat, index):
            reads[index] = {
                flat.base(t) for t in flat.instructions[index].operands if flat.tensors[t].shape
            }
            for t in reads[index]:
                if t in flat.producer and flat.instructions[flat.producer[t]].phase == "backward":
                    sharing[t].add(index)
    together = {
        index: set().union(*(reads[i] for t in bases for i in sharing.get(t, ()))) - bases
        for index, bases in reads.items()
    }
    return reads, together


def _forward_imports(flat: _Flat, owner: list[int]) -> dict[int, set[int]]:
    """Per operator, the forward values that it takes from other operators, as what they are rearrangements of."""
    found: dict[int, set[int]] = defaultdict(set)
    for index, instruction in enumerate(flat.instructions):
        if instruction.phase == "forward" and owner[index] >= 0:
            for t in map(flat.base, instruction.operands):
                producer = flat.producer.get(t)
                if producer is not None and 0 <= owner[producer] != owner[index]:
                    found[owner[index]].add(t)
    return found


def _accumulates_for(
    flat: _Flat,
    owner: list[int],
    imports: dict[int, set[int]],
    by_path: dict[str, Counter[int]],
    index: int,
) -> int:
    """The owner of the forward value whose gradient a backward addition of several readers' gradients is, else -1.

    Left to the readers, the sum would tie them to each other (query, key and value of attention); it belongs to what they read. Where that
    may be several values (both read the encoder and the decoder), the gradient goes on to the layer that it is of.
    """
    instruction = flat.instructions[index]
    if instruction.name != "add" or len(instruction.operands) != 2:
        return -1
    sides = []
    for t in instruction.operands:
        producer = flat.producer.get(t)
        if (
            producer is None
            or owner[producer] < 0
            or flat.instructions[producer].phase != "backward"
        ):
            return -1
        sides.append(owner[producer])
    if sides[0] == sides[1]:
        return -1
    one, other = sides
    size = flat.tensors[instruction.results[0]].size
    of = {
        t: owner[flat.producer[t]]
        for t in imports[one] | imports[other]
        if flat.tensors[t].size == size
    }
    common = {
        o
        for t, o in of.items()
        if (o == one or t in imports[one]) and (o == other or t in imports[other])
    }
    if len(common) > 1:
        common = common & set(by_path.get(_next_path(flat, index), ())) or common
    return max(common) if common else -1


def _next_path(flat: _Flat, index: int) -> str:
    """The path of the layer that a value goes on to: of the first reader, or reader's reader, in another layer."""
    path = flat.instructions[index].path
    while True:
        readers = [r for t in flat.instructions[index].results for r in flat.readers[t]]
        if not readers or flat.instructions[index].path != path:
            return flat.instructions[index].path
        index = readers[0]


def _own_update(flat: _Flat, owner: list[int], parameter_owner: dict[int, int]) -> None:
    path_tensor = {a.path: a.tensor for a in flat.arguments}
    for argument in flat.arguments:
        if (
            argument.parameter is not None
            and path_tensor.get(argument.parameter) in parameter_owner
        ):
            parameter_owner[argument.tensor] = parameter_owner[path_tensor[argument.parameter]]
    order = [
        i for i, x in enumerate(flat.instructions) if x.phase == "update" and i not in flat.loop_of
    ]
    for index in order:
        owned = [
            parameter_owner[t]
            for t in flat.instructions[index].operands
            if t in parameter_owner and flat.tensors[t].shape
        ]
        owner[index] = owned[0] if owned else _largest(flat, owner, index)
        if owner[index] >= 0 and not owned:
            for t in flat.instructions[index].operands:
                # A slot without a recognised name: it goes where the gradient that it meets goes.
                if t not in flat.producer and flat.tensors[t].shape:
                    parameter_owner[t] = owner[index]
    _from_readers(flat, owner, order)


def _own_rest(flat: _Flat, owner: list[int]) -> None:
    """Anything still without an owner that works on more than scalars goes with its operands, else to the last operator."""
    last = max(owner)
    for index, instruction in enumerate(flat.instructions):
        if owner[index] < 0 and index not in flat.loop_of:
            shaped = any(flat.tensors[t].shape for t in instruction.operands + instruction.results)
            found = _largest(flat, owner, index)
            owner[index] = (
                found if found >= 0 else last if shaped or instruction.name == "while" else -1
            )


# ------------------------------------------------------------------------------------------------------------ labels


class _Atoms:
    """Union-find over the independent dims of one operator; an atom may be refined into several (major to minor)."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.size: list[int] = []
        self.parts: dict[int, tuple[int, ...]] = {}
        self.places: list[set[object]] = []
        """Per root, what it indexes: two atoms that index the same thing must never become one."""

    def new(self, size: int, places: Iterable[object] = ()) -> int:
        self.parent.append(len(self.parent))
        self.size.append(size)
        self.places.append(set(places))
        return len(self.parent) - 1

    def root(self, atom: int) -> int:
        while self.parent[atom] != atom:
            self.parent[atom] = self.parent[self.parent[atom]]
            atom = self.parent[atom]
        return atom

    def resolve(self, atoms: Iterable[int]) -> list[int]:
        """Roots that cannot be refined further, sizes of 1 left out."""
        found: list[int] = []
        for atom in atoms:
            atom = self.root(atom)
            if atom in self.parts:
                found += self.resolve(self.parts[atom])
            elif self.size[atom] > 1:
                found.append(atom)
        return found

    def tie(self, left: Iterable[int], right: Iterable[int]) -> bool:
        """Makes two dims one, refining where needed. False, with nothing harmful done, where that cannot be."""
        a, b = self.resolve(left), self.resolve(right)
        while a and b:
            x, y = a.pop(0), b.pop(0)
            if x == y:
                continue
            if self.size[x] == self.size[y]:
                if not self._union(x, y):
                    return False
            else:
                big, small, rest = (x, y, a) if self.size[x] > self.size[y] else (y, x, b)
                if self.size[big] % self.size[small] or self.places[big] & self.places[small]:
                    return False
                remainder = self.new(self.size[big] // self.size[small], self.places[big])
                self.parts[big] = (small, remainder)
                self.places[small] |= self.places[big]
                rest.insert(0, remainder)
        return not a and not b

    def _union(self, x: int, y: int) -> bool:
        if self.places[x] & self.places[y]:
            return False
        if len(self.places[x]) < len(self.places[y]):
            x, y = y, x
        self.parent[y] = x
        self.places[x] |= self.places[y]
        self.places[y] = set()
        return True


@dataclass
class _Seen:
    """A tensor as an operator sees it: atoms per dim. A dim of () is never split."""

    dims: list[tuple[int, ...]]
    reads: list[tuple[int, int]]


class _Labeller:
    """Labels the tensors of one operator."""

    def __init__(self, flat: _Flat, members: Sequence[int]) -> None:
        self.flat, self.members = flat, members
        self.atoms = _Atoms()
        self.own: dict[int, list[tuple[int, ...]]] = {}
        self.variants: dict[int, list[_Seen]] = defaultdict(list)
        self.iteration: dict[int, list[int]] = {}
        loops = {loop.instruction: loop for loop in flat.loops}
        for index in members:
            if index in loops and index not in self.iteration:
                self._enter_loop(loops[index])
        for index in members:
            if index in loops:
                self._loop(loops[index])
            else:
                self._instruction(index)

    def _fresh(self, t: int, key: object) -> list[tuple[int, ...]]:
        return [(self.atoms.new(n, [key]),) if n > 1 else () for n in self.flat.tensors[t].shape]

    def _enter_loop(self, loop: Loop) -> None:
        for _, inside, _, after in loop.carried:
            for t in (inside, after):
                if t not in self.own:
                    self.own[t] = self._fresh(t, ("t", t))

    def _read(self, t: int, wanted: list[tuple[int, ...]], index: int, position: int) -> None:
        """Records that an instruction reads `t` with dims `wanted`, tying them to the views of `t` that there are.

        Dims are tied one by one, so that a reader that cannot split one dim still shares the names of the others.
        """
        if not self.flat.tensors[t].shape:
            return
        own = self.own.get(t)
        if own is not None and self._agree(own, wanted):
            return
        for seen in self.variants[t]:
            if self._agree(seen.dims, wanted):
                seen.reads.append((index, position))
                return
        key = ("i", t, len(self.variants[t]))
        seen = _Seen([], [(index, position)])
        for n, want in zip(self.flat.tensors[t].shape, wanted, strict=True):
            atom = (self.atoms.new(n, [key]),) if n > 1 and want else ()
            seen.dims.append(atom if atom and self.atoms.tie(atom, want) else ())
        self.variants[t].append(seen)

    def _agree(self, own: list[tuple[int, ...]], wanted: list[tuple[int, ...]]) -> bool:
        tied = [
            self.atoms.tie(a, b) if a and b else not a and not b
            for a, b in zip(own, wanted, strict=True)
        ]
        return all(tied)

    def _instruction(self, index: int) -> None:
        instruction = self.flat.instructions[index]
        rule = instruction.rule
        if rule is None:
            for position, t in enumerate(instruction.operands):
                self._read(t, [()] * len(self.flat.tensors[t].shape), index, position)
            for t in instruction.results:
                self.own.setdefault(t, [()] * len(self.flat.tensors[t].shape))
            return
        key = ("r", index)
        factors = [self.atoms.new(n, [key]) for n in rule.sizes]
        self.iteration[index] = factors
        # Only a window exchanges a halo; slicing, padding or reversing a split dim moves nearly all of it, so it is gathered.
        windowed = {f for f, _ in instruction.windows}
        whole = (
            set(rule.gathered) | (set(rule.halo) - windowed) | self._inside(instruction, windowed)
        )

        def dims(t: int, label: DimFactors) -> list[tuple[int, ...]]:
            found: list[tuple[int, ...]] = []
            for n, mapped in zip(self.flat.tensors[t].shape, label, strict=True):
                if mapped and mapped[0] in windowed:
                    # Each position of the window covers several elements where it moves by several.
                    mapped = mapped[:1]
                covered = math.prod(rule.sizes[f] for f in mapped)
                dim: tuple[int, ...] = ()
                if n > 1 and not whole & set(mapped) and covered > 1:
                    if covered == n:
                        dim = tuple(factors[f] for f in mapped if rule.sizes[f] > 1)
                    elif n % covered == 0 and set(mapped) <= windowed:
                        dim = (*(factors[f] for f in mapped), self.atoms.new(n // covered, [key]))
                found.append(dim)
            return found

        for position, (t, label) in enumerate(
            zip(instruction.operands, rule.operands, strict=False)
        ):
            if len(label) == len(self.flat.tensors[t].shape):
                self._read(t, dims(t, label), index, position)
        for t, label in zip(instruction.results, rule.results, strict=False):
            wanted = (
                dims(t, label)
                if len(label) == len(self.flat.tensors[t].shape)
                else [()] * len(self.flat.tensors[t].shape)
            )
            own = []
            for n, want in zip(self.flat.tensors[t].shape, wanted, strict=True):
                atom = (self.atoms.new(n, [("t", t)]),) if want else ()
                own.append(atom if atom and self.atoms.tie(atom, want) else ())
            self.own[t] = own

    def _inside(self, instruction: Instruction, windowed: set[int]) -> set[int]:
        """Factors of windows that are never split: places in a window, and positions that are summed and do not divide the dim."""
        rule, found = instruction.rule, set()
        if rule is None or not windowed:
            return found
        for n, mapped in zip(
            self.flat.tensors[instruction.operands[0]].shape, rule.operands[0], strict=True
        ):
            if mapped and mapped[0] in windowed:
                found.update(mapped[1:])
                if mapped[0] in rule.reduction and n % rule.sizes[mapped[0]]:
                    found.add(mapped[0])
        return found

    def _loop(self, loop: Loop) -> None:
        operands = len(self.flat.instructions[loop.instruction].operands)
        for number, (before, inside, yielded, after) in enumerate(loop.carried):
            if not self.flat.tensors[inside].shape:
                continue
            own = self.own.get(inside) or self._fresh(inside, ("t", inside))
            self.own[inside] = own
            if after != inside and after in self.own:
                for a, b in zip(self.own[after], own, strict=True):
                    if a and b and not self.atoms.tie(a, b):
                        self._freeze(after, inside)
            self._read(before, own, loop.instruction, number % max(1, operands))
            if yielded != inside:
                self._yield(yielded, inside, loop.instruction, operands + number)

    def _yield(self, yielded: int, inside: int, index: int, position: int) -> None:
        if yielded in self.own:
            self._read(yielded, self.own[inside], index, position)

    def _freeze(self, *tensors: int) -> None:
        for t in tensors:
            self.own[t] = [()] * len(self.flat.tensors[t].shape)


def _label(
    name: str,
    flat: _Flat,
    owner: list[int],
    heavy: list[int],
    outputs: tuple[int, ...],
    batch_size: int,
    notes: tuple[str, ...],
) -> OperatorGraph:
    members: list[list[int]] = [[] for _ in heavy]
    for index, operator in enumerate(owner):
        if operator >= 0:
            members[operator].append(index)
    labels: list[Label] = [(-1,) * len(t.shape) for t in flat.tensors]
    home = [-1] * len(flat.tensors)
    factors: list[Factor] = []
    uses: list[Use] = []
    usable: list[tuple[int, ...]] = []
    for operator, own in enumerate(members):
        view = _View(flat, operator, own, heavy[operator], len(factors))
        factors += view.factors
        usable.append(tuple(range(len(factors) - len(view.factors), len(factors))))
        for t, dims in view.labeller.own.items():
            labels[t], home[t] = view.label(dims), operator
        for t, variants in view.labeller.variants.items():
            for seen in variants:
                label = view.label(seen.dims)
                if t not in flat.producer and home[t] < 0:
                    # An argument lives with the operator that reads it first, under that operator's label.
                    labels[t], home[t] = label, operator
                elif home[t] != operator or label != labels[t]:
                    uses.append(Use(t, operator, label, tuple(seen.reads)))
        uses += view.restricted(labels, home)
    sample = _sample_factors(flat, labels, uses)
    named = _name_factors(factors, usable, sample)
    operators = tuple(
        Operator(
            n,
            flat.instructions[i].path,
            KIND.get(flat.instructions[i].name, flat.instructions[i].name),
            i,
            tuple(own),
            fs,
        )
        for n, i, own, fs in zip(_operator_names(flat, heavy), heavy, members, usable, strict=True)
    )
    return OperatorGraph(
        name,
        tuple(flat.tensors),
        tuple(flat.instructions),
        tuple(flat.loops),
        tuple(flat.arguments),
        outputs,
        operators,
        tuple(named),
        tuple(owner),
        tuple(home),
        tuple(labels),
        _merged(uses),
        batch_size,
        notes,
    )


class _View:
    """One operator's atoms turned into the factors that it may split, and labels in them."""

    def __init__(
        self, flat: _Flat, operator: int, members: Sequence[int], heavy: int, first: int
    ) -> None:
        self.flat, self.operator, self.members = flat, operator, members
        self.labeller = _Labeller(flat, members)
        self.atoms = self.labeller.atoms
        self.ids: dict[int, int] = {}
        self.factors: list[Factor] = []
        reduced, chosen = set(), {}
        for index in members:
            if index in self.labeller.iteration and _weighs(flat, index, heavy):
                rule = flat.instructions[index].rule
                assert rule is not None
                for f, atom in enumerate(self.labeller.iteration[index]):
                    for a in self.atoms.resolve([atom]):
                        chosen[a] = None
                        if f in rule.reduction and flat.instructions[index].name in CONTRACTING:
                            reduced.add(a)
        majors = {a[0] for a in self._resolved_views() if a}
        parameters = {a.tensor for a in flat.arguments if a.role == "parameter"}
        indexing = {
            a
            for t in parameters
            for seen in self.labeller.variants.get(t, ())
            for d in seen.dims
            for a in self.atoms.resolve(d)
        }
        for a in chosen:
            if a in majors:
                kind: FactorKind = "R" if a in reduced else "P" if a in indexing else "A"
                self.ids[a] = first + len(self.factors)
                self.factors.append(Factor("", self.atoms.size[a], kind, operator))

    def _resolved_views(self) -> Iterable[list[int]]:
        for dims in self.labeller.own.values():
            yield from (self.atoms.resolve(d) for d in dims)
        for variants in self.labeller.variants.values():
            for seen in variants:
                yield from (self.atoms.resolve(d) for d in seen.dims)

    def label(self, dims: Iterable[tuple[int, ...]], but: frozenset[int] = frozenset()) -> Label:
        """Per dim its major factor, if the operator may split it and it is not in `but`."""
        found = []
        for dim in dims:
            f = next((self.ids.get(a, -1) for a in self.atoms.resolve(dim)), -1)
            found.append(-1 if f in but else f)
        return tuple(found)

    def restricted(self, labels: Sequence[Label], home: Sequence[int]) -> list[Use]:
        """Reads by instructions that merge dims: they see whole every factor that is minor in one of their tensors.

        Flattening height x width x channels can keep a split of the height, never one of the channels: the channels must be
        gathered before, which is a Use with that dim unsplit.
        """
        minor: dict[int, set[int]] = defaultdict(set)
        for index in self.members:
            if self.flat.instructions[index].name not in RESHAPING:
                continue
            for t in self.flat.instructions[index].operands + self.flat.instructions[index].results:
                for dims in [self.labeller.own.get(t, [])] + [
                    s.dims for s in self.labeller.variants.get(t, ())
                ]:
                    for dim in dims:
                        minor[index] |= {
                            self.ids[a] for a in self.atoms.resolve(dim)[1:] if a in self.ids
                        }
        found = []
        for index, but in minor.items():
            for position, t in enumerate(self.flat.instructions[index].operands):
                seen = next(
                    (
                        s.dims
                        for s in self.labeller.variants.get(t, ())
                        if (index, position) in s.reads
                    ),
                    self.labeller.own.get(t),
                )
                if seen is not None and but:
                    label = self.label(seen, frozenset(but))
                    if label != self.label(seen):
                        found.append(Use(t, self.operator, label, ((index, position),)))
        return found


def _merged(uses: list[Use]) -> tuple[Use, ...]:
    """Uses of one tensor by one operator under one label as one; a later entry for the same read replaces an earlier one."""
    place: dict[tuple[int, int], tuple[int, int, Label]] = {}
    for use in uses:
        for read in use.instructions:
            place[read] = (use.tensor, use.operator, use.label)
    reads: dict[tuple[int, int, Label], list[tuple[int, int]]] = defaultdict(list)
    for read, key in place.items():
        reads[key].append(read)
    return tuple(Use(t, o, label, tuple(r)) for (t, o, label), r in reads.items())


def _name_factors(
    factors: Sequence[Factor], usable: Sequence[tuple[int, ...]], sample: set[int]
) -> list[Factor]:
    """Factors with the sample kind where it applies, named by their kind, numbered where an operator has several."""
    kinds: list[FactorKind] = [
        "S" if f in sample else factor.kind for f, factor in enumerate(factors)
    ]
    named = []
    for ids in usable:
        count, seen = Counter(kinds[f] for f in ids), Counter()
        for f in ids:
            seen[kinds[f]] += 1
            name = kinds[f] + (str(seen[kinds[f]]) if count[kinds[f]] > 1 else "")
            named.append(replace(factors[f], kind=kinds[f], name=name))
    return named


def _weighs(flat: _Flat, index: int, heavy: int) -> bool:
    """Whether the instruction's iteration space offers factors: the heavy one, or a heavy one inside the operator's loop."""
    if index == heavy:
        return True
    number = flat.loop_of.get(index)
    return (
        number is not None
        and flat.loops[number].instruction == heavy
        and flat.instructions[index].name in HEAVY
    )


def _sample_factors(flat: _Flat, labels: Sequence[Label], uses: Sequence[Use]) -> set[int]:
    """The factors that index the batch: those reached from dim 0 of the batch arguments through Uses."""
    link: dict[int, set[int]] = defaultdict(set)
    for use in uses:
        for a, b in zip(labels[use.tensor], use.label, strict=True):
            if a >= 0 and b >= 0:
                link[a].add(b)
                link[b].add(a)
    pending = [
        labels[a.tensor][0] for a in flat.arguments if a.role == "batch" and labels[a.tensor]
    ]
    found: set[int] = {-1}
    while pending:
        f = pending.pop()
        if f not in found:
            found.add(f)
            pending += link[f]
    return found


def _operator_names(flat: _Flat, heavy: Sequence[int]) -> list[str]:
    """The layer path of each operator; without one, where the weight that it reads is in the state; else what it does."""
    weights = {a.tensor: a.path for a in flat.arguments if a.role == "parameter"}
    kernels = Counter(
        path.rpartition("/")[0] for t, path in weights.items() if len(flat.tensors[t].shape) > 1
    )
    """Weights that are no vectors, by what they are in: a layer has one, a plain dict of weights several."""

    def by_weight(path: str) -> str:
        above = path.rpartition("/")[0]
        return above if above and kernels[above] < 2 else path

    def plain(index: int) -> str:
        instruction = flat.instructions[index]
        read = [weights[t] for t in map(flat.base, instruction.operands) if t in weights]
        return (
            instruction.path
            or (by_weight(read[0]) if read else "")
            or KIND.get(instruction.name, instruction.name)
        )

    names_of = [plain(i) for i in heavy]
    count, names = Counter(names_of), []
    seen: Counter[str] = Counter()
    for name in names_of:
        seen[name] += 1
        names.append(f"{name}:{seen[name]}" if count[name] > 1 else name)
    return names
