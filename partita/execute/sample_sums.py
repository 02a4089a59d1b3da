"""A step as a program of samples, sums over samples, and the rest.

A statement belongs to the *samples* if it reads a value with a sample dim that depends on the
batch. A value without a sample dim that such a statement makes is a *sum*, if the statement adds
over the samples: a gradient, a loss, the count of a metric. All others are the *rest*, which runs
once per step. Sums over any parts of the batch add up to those of the whole batch, so the rest
gives the whole step's result, however the batch is cut.

The samples run by the program of a part of the batch, captured again, with the numbers of the whole
batch's program (the divisor of a mean). Values that a part cannot compute are computed for the
whole batch first (*givens*): random values with a sample dim, of which a part takes its samples,
and numbers made of the size of the batch. A dim is a sample dim if its size differs between the two
programs.

A step whose samples read a sum (batch statistics) has no such form; `sample_sums` says why.

Not here: the loop over parts on devices (`execute.shares`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jax.extend.mlir import ir

from partita.capture import stablehlo
from partita.capture.jax_functions import Captured, Text
from partita.capture.reader import tensor_of
from partita.errors import PlanError
from partita.execute.piece_text import statements
from partita.graph.operator_graph import OperatorGraph, Rule
from partita.plans.phases import DataFlow
from partita.plans.pieces import Piece, PiecePhase

CONSTANT = "stablehlo.constant"
FLOATING = ("float", "bfloat", "complex")
SUMMED = (*FLOATING, "int", "uint")
"""Beginnings of dtypes that are added up."""


@dataclass(frozen=True)
class SampleSums:
    """The three programs of a step, as pieces of its text and of the text of a part."""

    whole: Captured
    flow: DataFlow
    """Of `whole`."""
    part_text: Text
    """The step on a part of the batch, with the numbers of the whole batch."""
    part_flow: DataFlow
    """Of `part_text`, whose tensors have numbers of their own; arguments have the same."""
    part_count: int
    """Number of parts of the batch."""
    givens: Piece
    """Of `whole`: random values with a sample dim, and numbers made of the size of the batch."""
    samples: Piece
    """Of `part_text`: reads arguments and givens; gives the sums."""
    rest: Piece
    """Of `whole`."""
    sums: tuple[int, ...]
    """Tensors of `whole` that `samples` gives, in its order."""
    given: dict[int, int]
    """Tensor of `part_text` -> the tensor that `givens` gives, or its samples."""


def sample_sums(captured: Captured, parts: int) -> SampleSums:
    """The sums over samples of a step whose batch is cut into equal parts.

    Raises:
        PlanError: The batch cannot be cut into these parts, or a sample's result depends on others.
    """
    part = _captured_part(captured, parts)
    pairing = _Pairing(captured, part)
    return _Splitter(captured, part, pairing, parts).split()


def _captured_part(captured: Captured, parts: int) -> Captured:
    """The step on one of equal parts of its batch."""
    graph = captured.graph
    size = graph.batch_size // parts if parts else 0
    if captured.at_batch_size is None or size * parts != graph.batch_size or size < 2:
        raise PlanError(
            f"The batch of {graph.name} has {graph.batch_size} samples, which do not divide into "
            f"{parts} equal parts of 2 or more, so it has no shares. Use another batch size."
        )
    return captured.at_batch_size(size)


@dataclass(frozen=True)
class _Patched:
    """The program of a part with the numbers of the whole batch."""

    text: Text
    flow: DataFlow
    computing: tuple[int, ...]
    """Statements that are no constants."""


class _Pairing:
    """The instructions of two programs of one step, in pairs.

    Constants have no pair: a program has each number once, and the size of a batch may equal
    another number in one program only.
    """

    def __init__(self, whole: Captured, part: Captured) -> None:
        self.whole = whole
        self.part = part
        pairs = zip(_computing(whole.graph), _computing(part.graph), strict=False)
        self.pairs = dict(pairs)
        """Number of an instruction of the whole batch -> its number for a part."""
        is_equal = len(_computing(whole.graph)) == len(_computing(part.graph))
        if not is_equal or not all(self._are_alike(n, m) for n, m in self.pairs.items()):
            raise PlanError(
                f"{whole.graph.name} is another program on {part.graph.batch_size} samples than on "
                f"{whole.graph.batch_size}, so its batch has no shares. Use a larger batch."
            )

    def _are_alike(self, n: int, m: int) -> bool:
        one = self.whole.graph.instructions[n]
        other = self.part.graph.instructions[m]
        names = (one.name, len(one.operands), len(one.results))
        return names == (other.name, len(other.operands), len(other.results))

    @cached_property
    def with_samples(self) -> frozenset[int]:
        """Tensors of the whole batch with a sample dim, constants left out."""
        tensors = self._part_tensors
        return frozenset(t for t, u in tensors.items() if not self._have_one_shape(t, u))

    @cached_property
    def _part_tensors(self) -> dict[int, int]:
        """Tensor of the whole batch's program -> tensor of a part's."""
        graph, other = self.whole.graph, self.part.graph
        tensors = {
            a.tensor: b.tensor for a, b in zip(graph.arguments, other.arguments, strict=True)
        }
        for n, m in self.pairs.items():
            results = zip(graph.instructions[n].results, other.instructions[m].results, strict=True)
            tensors |= dict(results)
        return tensors

    def has_samples_first(self, tensor: int, parts: int) -> bool:
        """Whether dim 0 of a tensor, and no other one, is a sample dim."""
        whole = self.whole.graph.tensors[tensor].shape
        part = self.part.graph.tensors[self._part_tensors[tensor]].shape
        return whole == (part[0] * parts, *part[1:])

    def _have_one_shape(self, tensor: int, other: int) -> bool:
        shape = self.whole.graph.tensors[tensor].shape
        return shape == self.part.graph.tensors[other].shape

    def operands_with_samples(self, n: int) -> list[bool]:
        """Per operand of an instruction whether it has a sample dim, constants included."""
        operands = self.whole.graph.instructions[n].operands
        others = self.part.graph.instructions[self.pairs[n]].operands
        pairs = zip(operands, others, strict=True)
        return [not self._have_one_shape(t, u) for t, u in pairs]

    @cached_property
    def of_size(self) -> frozenset[int]:
        """Instructions of the whole batch that read a whole number that differs for a part."""
        with stablehlo.context(), ir.Location.unknown():
            whole, part = self._modules()
            operations = self._operations(whole, part)
            return frozenset(n for n, pair in operations.items() if _reads_other_integers(*pair))

    def _modules(self) -> tuple[ir.Module, ir.Module]:
        """The programs of the whole batch and of a part. Operations live as long as these."""
        whole, part = (text.mlir_module_serialized for text in (self.whole.text, self.part.text))
        return stablehlo.parse(whole), stablehlo.parse(part)

    def _operations(self, whole: ir.Module, part: ir.Module) -> dict[int, tuple[Any, Any]]:
        """Instruction of the whole batch -> its operations in both programs."""
        _, ours = stablehlo.numbered(stablehlo.main_block(whole))
        _, theirs = stablehlo.numbered(stablehlo.main_block(part))
        return {n: (ours[n], theirs[m]) for n, m in self.pairs.items()}

    def patched(self) -> _Patched:
        """The program of a part with the numbers of the whole batch.

        A floating-point number that differs is the divisor of a mean or made of it. A whole number
        may be the bound of an index and stays; values made of it are in `of_size`.
        """
        with stablehlo.context(), ir.Location.unknown():
            whole, part = self._modules()
            for model, operation in self._operations(whole, part).values():
                _take_numbers(operation, model)
            block = stablehlo.main_block(part)
            source = stablehlo.serialize(part)
            values, _ = stablehlo.numbered(block)
            tensors = tuple(tensor_of(value.type) for value in values)
            names = [op.operation.name for op in block][:-1]
        graph = dataclasses.replace(self.part.graph, tensors=tensors)
        computing = tuple(k for k, name in enumerate(names) if name != CONSTANT)
        flow = DataFlow(graph, statements(source))
        return _Patched(Text.of(self.part.text, source), flow, computing)


def _computing(graph: OperatorGraph) -> list[int]:
    """The instructions that are no constants."""
    return [n for n, one in enumerate(graph.instructions) if one.name != "constant"]


def _take_numbers(operation: Any, model: Any) -> None:
    """Replaces the floating-point numbers that an operation reads by those that another reads."""
    for position, (value, other) in enumerate(zip(operation.operands, model.operands, strict=True)):
        own, number = stablehlo.elements_of(value), stablehlo.elements_of(other)
        if own is None or number is None or not (own.is_splat and number.is_splat):
            continue
        splat = number.get_splat_value()
        if own.get_splat_value() == splat or not isinstance(splat, ir.FloatAttr):
            continue
        constant = ir.Operation.create(
            CONSTANT,
            results=[value.type],
            attributes={"value": ir.DenseElementsAttr.get_splat(value.type, splat)},
            loc=operation.location,
            ip=ir.InsertionPoint(operation),
        )
        operation.operands[position] = constant.results[0]


def _reads_other_integers(one: Any, other: Any) -> bool:
    """Whether an operation reads a constant of integers that differs from that of another one."""
    for value, counterpart in zip(one.operands, other.operands, strict=True):
        elements, others = stablehlo.elements_of(value), stablehlo.elements_of(counterpart)
        if elements is None or others is None or value.type != counterpart.type:
            continue
        if isinstance(value.type.element_type, ir.IntegerType) and elements != others:
            return True
    return False


class _Splitter:
    """Sorts the statements of a step."""

    def __init__(self, whole: Captured, part: Captured, pairing: _Pairing, parts: int) -> None:
        self.whole = whole
        self.part = part
        self.pairing = pairing
        self.parts = parts
        self.flow = DataFlow.of(whole.graph)
        self.with_samples = pairing.with_samples
        self.of_samples: set[int] = set()
        """Statements."""
        self.sums: set[int] = set()
        """Tensors."""

    def split(self) -> SampleSums:
        flow = self.flow
        self._sort()
        outputs = set(flow.graph.outputs)
        self._check_results(outputs)
        made = outputs - flow.roles.keys() - self.sums
        rest_statements, rest_reads = traced(flow, made, self.sums)
        sums = sorted(self.sums & (rest_reads | outputs))
        read = {t for k in self.of_samples for t in flow.statements[k].reads}
        _, read = traced(flow, read, self._not_of_parts | self._made_by_samples)
        givens = sorted(read & self._not_of_parts)
        given_statements, given_reads = traced(flow, givens, set())
        self._check_first_dims([*givens, *(t for t in read if t in flow.roles)])
        patched = self.pairing.patched()
        part_of = self._part_tensors(patched)
        given = {part_of[t]: t for t in givens}
        gives = [part_of[t] for t in sums]
        sample_statements, sample_reads = traced(patched.flow, gives, given)
        return SampleSums(
            whole=self.whole,
            flow=flow,
            part_text=patched.text,
            part_flow=patched.flow,
            part_count=self.parts,
            givens=_piece("forward", given_statements, given_reads, givens),
            samples=_piece("backward", sample_statements, sample_reads, gives),
            rest=_piece("update", rest_statements, rest_reads, sorted(made)),
            sums=tuple(sums),
            given=given,
        )

    # -------------------------------------------------------------------------------- statements

    def _sort(self) -> None:
        """Finds the statements of samples and their sums."""
        for k, statement in enumerate(self.flow.statements):
            read = self.varying.intersection(statement.reads)
            if not read:
                continue
            reads_samples = not self.with_samples.isdisjoint(read)
            reads_sums = not self.with_samples.issuperset(read)
            makes_samples = not self.with_samples.isdisjoint(statement.makes)
            if reads_sums and (reads_samples or makes_samples):
                raise self._mixed(k)
            if reads_samples:
                self._check_samples_apart(k)
                self.of_samples.add(k)
                self.sums.update(set(statement.makes) - self.with_samples)

    def _check_samples_apart(self, statement: int) -> None:
        """PlanError unless a statement computes each sample from itself, or adds over samples."""
        for n in self.flow.instructions([statement]):
            instruction = self.whole.graph.instructions[n]
            if n not in self.pairing.pairs or not any(self.pairing.operands_with_samples(n)):
                continue
            other = self.part.graph.instructions[self.pairing.pairs[n]].rule
            if instruction.rule is None or other is None:
                raise PlanError(
                    f"'{instruction.path}' computes samples in a {instruction.name}, which is not "
                    "known to add them up, so it has no shares."
                )
            if not self._is_apart(n, instruction.rule, other):
                raise self._mixed(statement)

    def _have_samples(self, tensors: Iterable[int]) -> bool:
        return self.with_samples.issuperset(tensors)

    def _is_apart(self, n: int, rule: Rule, other: Rule) -> bool:
        """Whether an instruction maps samples to samples, or adds them up."""
        if len(rule.sizes) != len(other.sizes):
            return False
        factors = [f for f, size in enumerate(rule.sizes) if size != other.sizes[f]]
        if len(factors) != 1 or factors[0] in (*rule.halo, *rule.gathered):
            return False
        factor = factors[0]
        instruction = self.whole.graph.instructions[n]
        expected = self.pairing.operands_with_samples(n)
        expected += [t in self.with_samples for t in instruction.results]
        for has_samples, dims in zip(expected, (*rule.operands, *rule.results), strict=True):
            if any(factor in dim for dim in dims) != has_samples:
                return False
        if self._have_samples(instruction.results):
            return True
        dtypes = [self.whole.graph.tensors[t].dtype for t in instruction.results]
        can_add = instruction.adds and all(dtype.startswith(SUMMED) for dtype in dtypes)
        return can_add and factor in rule.reduction

    def _mixed(self, statement: int) -> PlanError:
        """The error for a statement that computes a sample with others."""
        path = self.flow.instruction(statement).path or self.whole.graph.name
        return PlanError(
            f"'{path}' computes a sample with values of the other samples (batch statistics, or a "
            "loss that is no sum over samples), so parts of the batch would give another result: "
            "it has no shares."
        )

    @cached_property
    def varying(self) -> frozenset[int]:
        """Tensors that depend on samples of the batch."""
        batch = [t for t, role in self.flow.roles.items() if role == "batch"]
        return self.flow.dependent([t for t in batch if t in self.with_samples])

    # -------------------------------------------------------------------------------------- values

    @cached_property
    def _made_by_samples(self) -> set[int]:
        return {t for k in self.of_samples for t in self.flow.statements[k].makes}

    @cached_property
    def _not_of_parts(self) -> set[int]:
        """Values of no sample that a part would compute otherwise than the whole batch: random
        values with a sample dim, and numbers made of the size of the batch.
        """
        tensors = self.flow.graph.tensors
        states = [t for t, role in self.flow.roles.items() if role == "state"]
        seeds = [t for t in states if not tensors[t].dtype.startswith(FLOATING)]
        random = self.flow.dependent(seeds)
        of_size: set[int] = set()
        found: set[int] = set()
        for statement in self.flow.statements:
            n = statement.instruction
            if n not in self.pairing.pairs or not self.varying.isdisjoint(statement.reads):
                continue
            reads_size = n in self.pairing.of_size or not of_size.isdisjoint(statement.reads)
            adds_samples = any(self.pairing.operands_with_samples(n))
            for t in statement.makes:
                has_samples = t in self.with_samples
                is_floating = tensors[t].dtype.startswith(FLOATING)
                if reads_size:
                    of_size.add(t)
                is_number = reads_size and is_floating
                is_draw = has_samples and t in random
                if is_number or is_draw or (adds_samples and not has_samples):
                    found.add(t)
        return found

    def _part_tensors(self, part: _Patched) -> dict[int, int]:
        """Tensor of the whole batch's program -> tensor of a part's; constants are left out."""
        tensors = {t: t for t in self.flow.roles}
        statements = [
            statement
            for k, statement in enumerate(self.flow.statements)
            if self.flow.instruction(k).name != "constant"
        ]
        for statement, k in zip(statements, part.computing, strict=True):
            tensors |= dict(zip(statement.makes, part.flow.statements[k].makes, strict=True))
        return tensors

    def _check_results(self, outputs: Iterable[int]) -> None:
        """PlanError for a result of the step with a sample dim."""
        for t in sorted(outputs):
            if t in self.with_samples:
                raise PlanError(
                    f"{self.whole.graph.name} returns a value per sample ({self.flow.name(t)}), "
                    "which devices with unequal shares do not have together. Return its mean."
                )

    def _check_first_dims(self, tensors: Iterable[int]) -> None:
        """PlanError for a value whose samples are not those of dim 0."""
        for t in tensors:
            if t in self.with_samples and not self.pairing.has_samples_first(t, self.parts):
                raise PlanError(
                    f"The samples of {self.flow.name(t)} are not along dim 0, so the batch of "
                    f"{self.whole.graph.name} has no shares. Put samples first."
                )


def traced(
    flow: DataFlow, tensors: Iterable[int], inputs: Collection[int]
) -> tuple[set[int], set[int]]:
    """(the statements that compute tensors, the arguments and inputs that these read)."""
    found: set[int] = set()
    reads: set[int] = set()
    waiting = list(tensors)
    while waiting:
        t = waiting.pop()
        k = flow.producer.get(t)
        if k is None or t in inputs:
            reads.add(t)
        elif k not in found:
            found.add(k)
            waiting += flow.statements[k].reads
    return found, reads


def _piece(
    phase: PiecePhase, statements: Iterable[int], reads: Iterable[int], gives: Iterable[int]
) -> Piece:
    return Piece(
        place=0,
        phase=phase,
        statements=tuple(sorted(statements)),
        reads=tuple(sorted(reads)),
        gives=tuple(gives),
        after=frozenset(),
    )
