"""Fusion: the kernels that XLA makes of a graph, with their reads and writes.

XLA's instruction fusion goes from the last instruction to the first and pulls producers into their
consumer. A cheap producer with several consumers is duplicated into each of them; an expensive one
is written once and read. This is that algorithm on an OperatorGraph, as the CPU backend runs it
(xla/service/instruction_fusion.cc and cpu/cpu_instruction_fusion.cc), without its rules on layouts
and index arithmetic. `cost.laid_out_fusion` cuts the kernels where a plan has a collective.

FLOPs, traffic and peak memory of light instructions follow from it.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache

from partita.cost.backends.base import FusionRules
from partita.graph.flat import EDGE_KERNELS, PRODUCTS, Reader, transposes
from partita.graph.operator_graph import (
    IdentityKey,
    Instruction,
    OperatorGraph,
    per_graph,
    producers,
)

ALONE = {
    *EDGE_KERNELS,
    "dot_general",
    "convolution",
    "reduce_window",
    "scatter",
    "select_and_scatter",
    "sort",
    "while",
    "case",
    "if",
    "custom_call",
    "fused_attention",
    "recurrence",
    "pallas_kernel",
    "optimization_barrier",
    "all_reduce",
    "fft",
    "cholesky",
    "triangular_solve",
    "rng_bit_generator",
    "top_k",
    "dynamic_reshape",
}
"""Instructions that are kernels of their own."""
POOLING = {"reduce_window", "select_and_scatter"}
"""Pooling, and the gradient of pooling by maximum."""
EXPENSIVE = {
    "exponential",
    "exponential_minus_one",
    "log",
    "log_plus_one",
    "tanh",
    "power",
    "divide",
    "remainder",
    "rsqrt",
    "sqrt",
    "cbrt",
    "logistic",
    "erf",
    "sine",
    "cosine",
    "tan",
    "atan2",
    "reduce",
    "gather",
}
"""Instructions that are computed once and written, not duplicated into every reader."""
STORED = {"reduce", "gather"}
"""Those of EXPENSIVE that even a compiler with fast elementwise instructions computes once."""
FREE = {"constant", "iota", "broadcast_in_dim", "reshape", "bitcast_convert"}
"""Instructions that take no time alone: XLA makes them part of their readers."""
GENERATED = FREE - {"reshape", "bitcast_convert"}
"""Those of FREE whose results need no tensor of their rank."""
SHAPES = {"broadcast_in_dim", "reshape", "convert"}
"""Instructions that spread a sum over its row."""
SMALL_SHARE = 8
"""A tensor with a smaller part of a value's elements than one in eight is not counted as read."""
Kernel = tuple[int, ...]
"""Instructions of a kernel, in program order."""
OUTSIDE = 1 << 60
"""A reader that is no instruction: a result of the step, a value that a loop yields."""


@dataclass(frozen=True)
class Fusion:
    """The kernels of a graph."""

    kernels: dict[int, Kernel]
    """Root instruction, which writes the result -> the instructions of its kernel."""
    computed_in: tuple[tuple[int, ...], ...]
    """Per instruction, the roots of the kernels that compute it.

    They are several where duplication is cheaper than a write.
    """

    def written(self, graph: OperatorGraph) -> set[int]:
        """The tensors that exist in memory: results of kernels, and tensors carried by loops."""
        tensors: set[int] = set()
        for root in self.kernels:
            tensors.update(graph.instructions[root].results)
        for loop in graph.loops:
            for carried in loop.carried:
                tensors.update(carried)
        return tensors


def fusion(
    graph: OperatorGraph,
    rules: FusionRules,
    split_rows: frozenset[int] = frozenset(),
) -> Fusion:
    """The kernels of a graph under a compiler's rules, cached.

    `split_rows` are reductions whose rows are spread over devices.
    """
    split = {i for i in split_rows if _sums_rows(graph.instructions[i])}
    if split and rules.longest_row:
        return _fusion(IdentityKey(graph), rules, frozenset(split))
    whole = _with_whole_rows(graph)
    if rules not in whole:
        whole[rules] = _Fuser(graph, rules, frozenset()).run()
    return whole[rules]


@per_graph
def _with_whole_rows(graph: OperatorGraph) -> dict[FusionRules, Fusion]:
    """Cache: rules -> the kernels where no row is spread over devices."""
    return {}


@lru_cache(maxsize=8)
def _fusion(
    key: IdentityKey[OperatorGraph],
    rules: FusionRules,
    split_rows: frozenset[int],
) -> Fusion:
    return _Fuser(key.value, rules, split_rows).run()


def _sums_rows(instruction: Instruction) -> bool:
    """Whether a reduction is over the minor dim."""
    rule = instruction.rule
    dims = rule.operands[0] if rule else ()
    return bool(rule and dims and dims[-1] and dims[-1][0] in rule.reduction)


class _Fuser:
    """XLA's instruction fusion. Producers and readers are instructions."""

    def __init__(
        self,
        graph: OperatorGraph,
        rules: FusionRules,
        split_rows: frozenset[int],
    ) -> None:
        self.graph = graph
        self.rules = rules
        self.split_rows = split_rows
        self.alone = ALONE - PRODUCTS if rules.fuses_operands else ALONE
        if rules.fuses_windows:
            self.alone = self.alone - POOLING
        """Names of instructions that read their operands from memory."""
        expensive = STORED if rules.cheap_elementwise else EXPENSIVE
        self.producer = producers(graph)
        self.producers = [self._producers_of(x) for x in graph.instructions]
        self.readers = self._readers()
        self.nbytes: list[int] = []
        """Per instruction, bytes of its results."""
        self.elements: list[int] = []
        """Per instruction, elements of its results."""
        self.rank: list[int] = []
        """Per instruction, the largest rank of its results."""
        self.expensive: list[bool] = []
        for instruction in graph.instructions:
            results = [graph.tensors[tensor] for tensor in instruction.results]
            rank = max((len(tensor.shape) for tensor in results), default=0)
            self.nbytes.append(sum(tensor.nbytes for tensor in results))
            self.elements.append(sum(tensor.size for tensor in results))
            self.rank.append(rank)
            self.expensive.append(instruction.name in expensive and rank > 0)
        self.fusible = [self._is_fusible(x) for x in graph.instructions]
        self.merged = self._merged() if rules.merges_products else set()
        """Conversions of variables for merged products, computed by each product that reads
        them."""
        self.sums_columns = [self._sums_columns(i) for i in range(len(graph.instructions))]
        """Per instruction, whether it is a reduction that no reader can take in."""
        self.gathering: set[int] = set()
        """Instructions that are written only because their readers would read more."""
        self.members: list[set[int]] = [set() for _ in graph.instructions]
        """Per instruction, the roots of the kernels that compute it."""

    def _producers_of(self, instruction: Instruction) -> list[int]:
        operands = dict.fromkeys(instruction.operands)
        return [self.producer[tensor] for tensor in operands if tensor in self.producer]

    def _merged(self) -> set[int]:
        arguments = {argument.tensor for argument in self.graph.arguments}
        by_operand: dict[int, list[int]] = defaultdict(list)
        for i, instruction in enumerate(self.graph.instructions):
            if instruction.name == "dot_general":
                by_operand[instruction.operands[0]].append(i)
        merged: set[int] = set()
        for products in by_operand.values():
            others = {self.graph.instructions[i].operands[1] for i in products}
            sources = {self.producer[tensor] for tensor in others if tensor in self.producer}
            conversions = {
                i
                for i in sources
                if self._name(i) == "convert"
                and self.graph.instructions[i].operands[0] in arguments
            }
            if len(conversions) > 1:
                merged |= conversions
        return merged

    def _readers(self) -> list[set[int]]:
        readers: list[set[int]] = [set() for _ in self.graph.instructions]
        for reader, sources in enumerate(self.producers):
            for source in sources:
                readers[source].add(reader)
        yielded = [tensor for loop in self.graph.loops for _, _, tensor, _ in loop.carried]
        for tensor in (*self.graph.outputs, *yielded):
            if tensor in self.producer:
                readers[self.producer[tensor]].add(OUTSIDE)
        return readers

    def run(self) -> Fusion:
        """The kernels, found from the last instruction to the first."""
        single = self._single_copies()
        kernels = {}
        for root in reversed(range(len(self.fusible))):
            is_constant = self.graph.instructions[root].name == "constant"
            if not is_constant and self._is_read(root):
                kernels[root] = self._kernel(root, single)
        if self.rules.counts_reads:
            self._compute_in_readers(kernels)
        computed_in = tuple(tuple(sorted(roots)) for roots in self.members)
        return Fusion(dict(sorted(kernels.items())), computed_in)

    def _compute_in_readers(self, kernels: dict[int, Kernel]) -> None:
        """Gives kernels of several operands to their readers, if these then move no more tensors.

        PriorityFusion counts the tensors of their size that kernels read and write. An operand
        that a reader reads anyway counts once.
        """
        reads_of = {root: set(reads(self.graph, kernel)) for root, kernel in kernels.items()}
        readers: dict[int, set[int]] = defaultdict(set)
        for root, tensors in reads_of.items():
            for tensor in tensors:
                readers[tensor].add(root)
        for root in sorted(self.gathering & kernels.keys(), reverse=True):
            result = self.graph.instructions[root].results[0]
            reading = readers[result]
            if any(self._name(i) == "reduce" for i in kernels[root]):
                continue
            operands = reads_of[root]
            whole = {t for t in operands if self.graph.tensors[t].nbytes >= self.nbytes[root]}
            read_again = sum(len(whole - reads_of[reader]) for reader in reading)
            if not reading or read_again > len(whole) + 1 + len(reading):
                continue
            kernel = kernels.pop(root)
            del reads_of[root]
            for tensor in operands:
                readers[tensor] = readers[tensor] - {root} | reading
            for i in kernel:
                self.members[i] = self.members[i] - {root} | reading
            for reader in reading:
                reads_of[reader] = reads_of[reader] - {result} | operands
                kernels[reader] = tuple(sorted({*kernels[reader], *kernel}))

    def _is_fusible(self, instruction: Instruction) -> bool:
        """Whether an instruction can be computed inside its reader."""
        if instruction.name in ALONE or len(instruction.results) != 1:
            return False
        if instruction.name == "reduce":
            # Reductions over the major dims have a kernel of their own.
            return _sums_rows(instruction)
        if instruction.name == "concatenate":
            if self.rules.reads_written:
                return True
            # Joined along the minor dim, every element would ask which operand it is from.
            operand, result = instruction.operands[0], instruction.results[0]
            tensors = self.graph.tensors
            return tensors[operand].shape[-1] == tensors[result].shape[-1]
        return True

    def _sums_columns(self, i: int) -> bool:
        """Whether an instruction is a reduction over major dims, or one that is not fused."""
        instruction = self.graph.instructions[i]
        if instruction.name != "reduce":
            return False
        return not (_sums_rows(instruction) if self.rules.reads_written else self.fusible[i])

    def _is_read(self, instruction: int) -> bool:
        """Whether some kernel reads the instruction's result without computing it."""
        readers = self.readers[instruction]
        if not readers:
            return True
        kernels = self.members[instruction]
        return any(reader == OUTSIDE or not self.members[reader] <= kernels for reader in readers)

    def _kernel(self, root: int, single: set[int]) -> Kernel:
        """The instructions that the kernel of `root` computes.

        Producers are considered latest first.
        """
        instruction = self.graph.instructions[root]
        inside = {root: False}
        """Instruction of the kernel -> whether its elements are read more than once."""
        self.members[root].add(root)
        is_library_reduction = self.sums_columns[root]
        is_alone = instruction.name in self.alone and not transposes(instruction)
        sources = self.producers[root]
        if is_alone:
            sources = self.merged.intersection(sources) | self._reversed_kernels(instruction)
        queue = [-source for source in sources]
        heapq.heapify(queue)
        considered: set[int] = set()
        while queue:
            candidate = -heapq.heappop(queue)
            if candidate in considered or not self.fusible[candidate]:
                continue
            considered.add(candidate)
            expensive = self.expensive[candidate]
            is_whole = is_library_reduction and not self._is_always_fused(candidate)
            stays_single = expensive or is_whole or candidate in single
            if stays_single and self._is_shared(candidate, inside):
                continue
            reused = self._is_reused(candidate, inside)
            if self._name(candidate) == "reduce" and self._has_short_rows(candidate):
                reused = False
            if reused and expensive:
                continue
            inside[candidate] = reused
            self.members[candidate].add(root)
            if is_alone:
                continue
            for producer in self.producers[candidate]:
                heapq.heappush(queue, -producer)
        return tuple(sorted(inside))

    def _reversed_kernels(self, instruction: Instruction) -> set[int]:
        """The reversal of the kernel of an ungrouped convolution, if that reads it as it is."""
        is_convolution = instruction.name == "convolution" and not instruction.is_grouped
        if not self.rules.reads_reversed or not is_convolution:
            return set()
        source = self.producer.get(instruction.operands[1], -1)
        return {source} if source >= 0 and self._name(source) == "reverse" else set()

    def _is_always_fused(self, candidate: int) -> bool:
        """Whether even a reduction over major dims computes an instruction that others read."""
        is_generated = self.rules.reads_written and self._name(candidate) in GENERATED
        return is_generated or self._is_repeated(candidate)

    def _is_shared(self, candidate: int, inside: dict[int, bool]) -> bool:
        """Whether an instruction has readers outside a kernel, or in several."""
        return any(
            reader not in inside or len(self.members[reader]) > 1
            for reader in self.readers[candidate]
        )

    def _is_reused(self, candidate: int, inside: dict[int, bool]) -> bool:
        """Whether a kernel would read elements of an instruction more than once."""
        return any(
            inside[reader] or self._spreads(reader, candidate)
            for reader in inside.keys() & self.readers[candidate]
        )

    def _spreads(self, reader: int, producer: int) -> bool:
        """Whether a reader broadcasts the result of a producer."""
        is_broadcast = self.graph.instructions[reader].name == "broadcast_in_dim"
        return is_broadcast and self.nbytes[reader] > self.nbytes[producer]

    def _single_copies(self) -> set[int]:
        """Producers that are never duplicated, because that would read more than it saves.

        A backend that duplicates does it even then, unless some reader needs them written.
        """
        single: set[int] = set()
        if self.rules.reads_written:
            single = self._written_for_a_reader() | self._gathered() | self._long_chains()
        if self.rules.writes_sums:
            single |= {i for i in range(len(self.readers)) if self._is_sliced_gradient(i)}
        if self.rules.writes_after_products:
            single |= self._after_products()
        for producer, readers in enumerate(self.readers):
            if len(readers) <= 1 or not self.fusible[producer] or not self._gathers(producer):
                continue
            if (
                self.rules.recomputes_summed
                and producer not in single
                and self._reads_as_much(producer)
            ):
                continue
            if producer not in single:
                self.gathering.add(producer)
            if (
                self.rules.duplicates
                and not self._is_written_sum(producer)
                and all(self._is_absorbed(producer, r, single) for r in readers)
            ):
                continue
            single.add(producer)
        return single

    def _written_for_a_reader(self) -> set[int]:
        """Producers with several readers, of which one needs the result in memory.

        A reduction over major dims takes in only producers that nothing else reads.
        """
        in_reduction: set[int] = set()
        """Major reductions, and instructions that are computed in one and nowhere else."""
        written = set()
        for i, instruction in reversed(list(enumerate(self.graph.instructions))):
            readers = self.readers[i]
            is_alone_read = len(readers) == 1 and not readers.isdisjoint(in_reduction)
            if is_alone_read or self.sums_columns[i]:
                in_reduction.add(i)
            if len(readers) <= 1 or not self.fusible[i] or instruction.name in GENERATED:
                continue
            if i in self.merged or self._is_repeated(i):
                continue
            is_needed = any(self._needs_memory(r) for r in readers)
            if not is_needed and any(r in in_reduction for r in readers):
                is_needed = not self._is_recomputed(i, in_reduction)
            if not is_needed and any(self._compares_rows(r) for r in readers):
                is_needed = self._ends_row_kernel(i)
            if is_needed:
                written.add(i)
        return written

    def _is_recomputed(self, i: int, in_reduction: Set[int]) -> bool:
        """Whether other readers compute an instruction that reductions over major dims read: the
        kernel of the reductions reads no more elements if it computes the instruction itself."""
        if not self.rules.recomputes_summed or i in self._stored:
            return False
        result = self.graph.instructions[i].results[0]
        others: set[int] = set()
        stack = [i]
        while stack:
            for reader in self.readers[stack.pop()] & in_reduction:
                for tensor in self.graph.instructions[reader].operands:
                    if tensor != result:
                        others |= self._large_reads(tensor, self.elements[i])
                if not self.sums_columns[reader]:
                    stack.append(reader)
        own = self._large_reads(result, self.elements[i])
        sources = [self.producer[tensor] for tensor in own if tensor in self.producer]
        is_joined = any(self._name(source) == "concatenate" for source in sources)
        elements = sum(self.graph.tensors[tensor].size for tensor in own - others)
        return not is_joined and elements <= self.elements[i]

    def _reads_as_much(self, i: int) -> bool:
        """Whether a kernel that computes an instruction reads no more elements than that writes.

        Not if a product reads it, which reads what the kernel of a sum writes.
        """
        if i in self._stored or any(self._name(reader) in PRODUCTS for reader in self.readers[i]):
            return False
        own = self._large_reads(self.graph.instructions[i].results[0], self.elements[i])
        return sum(self.graph.tensors[tensor].size for tensor in own) <= self.elements[i]

    def _large_reads(self, result: int, elements: int) -> set[int]:
        """Tensors that a kernel reads which computes a tensor, without those that are small beside
        a number of elements."""
        reads: set[int] = set()
        visited = {result}
        stack = [result]
        while stack:
            tensor = stack.pop()
            source = self.producer.get(tensor, -1)
            is_computed = source >= 0 and self.fusible[source] and source not in self._stored
            if not is_computed or self._name(source) == "concatenate":
                reads.add(tensor)
                continue
            for operand in self.graph.instructions[source].operands:
                is_large = self.graph.tensors[operand].size * SMALL_SHARE >= elements
                if is_large and operand not in visited and not self._is_generated(operand):
                    visited.add(operand)
                    stack.append(operand)
        return reads

    @cached_property
    def _stored(self) -> set[int]:
        """Residual sums and results behind products that several kernels read: they are written."""
        shared = (i for i, readers in enumerate(self.readers) if len(readers) > 1)
        stored = {i for i in shared if self._is_written_sum(i)}
        return stored | self._after_products() if self.rules.writes_after_products else stored

    def _is_repeated(self, i: int) -> bool:
        """Whether an instruction is a concatenation or a difference that every reader computes."""
        if self._name(i) == "concatenate" and self.rules.repeats_concatenations:
            return not any(self._needs_memory(reader) for reader in self.readers[i])
        if not self.rules.repeats_differences or self._name(i) != "subtract":
            return False
        operands = self.graph.instructions[i].operands
        return sum(not self._is_generated(tensor) for tensor in operands) == 1

    def _is_written_sum(self, i: int) -> bool:
        """Whether an instruction is a sum of the forward pass that is never duplicated."""
        instruction = self.graph.instructions[i]
        is_sum = instruction.name == "add" and instruction.phase == "forward"
        dtype = self.graph.tensors[instruction.results[0]].dtype
        return self.rules.writes_sums and is_sum and "float" in dtype

    def _is_sliced_gradient(self, i: int) -> bool:
        """Whether an instruction is the summed gradient of a concatenation: readers take slices."""
        instruction = self.graph.instructions[i]
        readers = self.readers[i]
        is_sum = instruction.name == "add" and instruction.phase == "backward"
        return is_sum and len(readers) > 1 and all(self._name(r) == "slice" for r in readers)

    def _after_products(self) -> set[int]:
        """Elementwise instructions with several readers that alone read the result of a product.

        They may be the last of a chain. The product computes them.
        """
        in_product: set[int] = set()
        """Products, and instructions that one computes."""
        last = set()
        for i, sources in enumerate(self.producers):
            if self._name(i) in PRODUCTS:
                in_product.add(i)
            elif self.fusible[i] and any(self._continues(s, i, in_product) for s in sources):
                in_product.add(i)
                if len(self.readers[i]) > 1:
                    last.add(i)
        return last

    def _continues(self, source: int, reader: int, in_product: Set[int]) -> bool:
        """Whether a product computes an instruction behind `source`, which nothing else reads."""
        return (
            source in in_product
            and len(self.readers[source]) == 1
            and self.elements[source] == self.elements[reader]
        )

    def _gathered(self) -> set[int]:
        """Producers with several readers that are gathers, or computed from one that only they
        read: no reader gathers again."""
        from_gather: set[int] = set()
        for i, sources in enumerate(self.producers):
            has_gathered = any(
                source in from_gather and len(self.readers[source]) == 1 for source in sources
            )
            if self._name(i) == "gather" or (has_gathered and self.fusible[i]):
                from_gather.add(i)
        return {i for i in from_gather if len(self.readers[i]) > 1}

    def _long_chains(self) -> set[int]:
        """Producers with several readers that take many instructions to compute again, as erf."""
        lengths: list[int] = []
        long_chains = set()
        for i, sources in enumerate(self.producers):
            length = 1 + max((lengths[source] for source in sources), default=0)
            if not self.fusible[i] or self._name(i) in STORED:
                length = 0
            elif length > self.rules.longest_chain and len(self.readers[i]) > 1:
                long_chains.add(i)
            lengths.append(length)
        return long_chains

    def _compares_rows(self, reader: int) -> bool:
        """Whether a reader is a reduction with several results: a maximum and its position."""
        if reader == OUTSIDE:
            return False
        instruction = self.graph.instructions[reader]
        return instruction.name == "reduce" and len(instruction.results) > 1

    def _ends_row_kernel(self, i: int) -> bool:
        """Whether an instruction reads a whole row and its sum, as the division of a softmax."""
        return any(self._comes_from_row_sum(source) for source in self.producers[i])

    def _comes_from_row_sum(self, source: int) -> bool:
        """Whether a value is a sum over a row of this device, in another shape."""
        while self._name(source) in SHAPES and self.producers[source]:
            source = self.producers[source][0]
        is_row_sum = self._name(source) == "reduce" and self.fusible[source]
        return is_row_sum and source not in self.split_rows and self._has_short_rows(source)

    def _has_short_rows(self, reduction: int) -> bool:
        """Whether a kernel may compute the rows of a reduction whole."""
        operand, *_ = self.graph.instructions[reduction].operands
        most = self.rules.longest_row * self.elements[reduction]
        return self.graph.tensors[operand].size <= most

    def _name(self, i: int) -> str:
        return self.graph.instructions[i].name if i != OUTSIDE else ""

    def _needs_memory(self, reader: int) -> bool:
        """Whether a reader reads its operands from memory."""
        return reader == OUTSIDE or self._name(reader) in self.alone

    def _gathers(self, instruction: int) -> bool:
        """Whether an instruction reads several tensors of its rank and more than it writes."""
        tensors = self.graph.tensors
        operands = self.graph.instructions[instruction].operands
        full_operands = 0
        for tensor in operands:
            is_full_rank = len(tensors[tensor].shape) >= self.rank[instruction]
            if is_full_rank and not self._is_generated(tensor):
                full_operands += 1
        bytes_read = sum(tensors[tensor].nbytes for tensor in dict.fromkeys(operands))
        return full_operands > 1 and bytes_read > self.nbytes[instruction]

    def _is_generated(self, tensor: int) -> bool:
        """Whether a tensor is a constant, an iota or a broadcast."""
        if tensor not in self.producer:
            return False
        name = self.graph.instructions[self.producer[tensor]].name
        return name in GENERATED

    def _is_absorbed(
        self,
        producer: int,
        reader: int,
        single: set[int],
    ) -> bool:
        """Whether all paths from a producer to one of its readers can be fused into that reader.

        Where products compute their operands, the reader itself decides.
        """
        if reader == OUTSIDE:
            return False
        if self.rules.fuses_operands:
            return self._fits(producer, reader)
        sources = {reader}
        stack = [reader]
        while stack:
            later = {source for source in self.producers[stack.pop()] if source > producer}
            stack += later - sources
            sources |= later
        on_path = {producer}
        for i in sorted(sources):
            if not on_path.isdisjoint(self.producers[i]):
                on_path.add(i)
        for i in sources & on_path:
            for source in self.producers[i]:
                if source not in on_path:
                    continue
                if source != producer and source in single:
                    return False
                if not self._fits(source, i):
                    return False
        return True

    def _fits(self, producer: int, reader: int) -> bool:
        """Whether a producer may be pulled into one reader, taken by itself."""
        name = self.graph.instructions[reader].name
        if not self.fusible[producer] or name in self.alone:
            return False
        if name == "reduce" and not self.fusible[reader]:
            return False
        if not self.expensive[producer]:
            return True
        return len(self.readers[producer]) == 1 and not self._spreads(reader, producer)


def kernel_reads(graph: OperatorGraph, fused: Fusion) -> Mapping[int, Mapping[int, list[Reader]]]:
    """Root of a kernel -> its `reads`."""
    return _kernel_reads(IdentityKey(graph), IdentityKey(fused))


@lru_cache(maxsize=4)
def _kernel_reads(
    graph: IdentityKey[OperatorGraph], fused: IdentityKey[Fusion]
) -> dict[int, dict[int, list[Reader]]]:
    return {root: reads(graph.value, kernel) for root, kernel in fused.value.kernels.items()}


def unwritten_products(graph: OperatorGraph, fused: Fusion) -> frozenset[int]:
    """Results of products that one elementwise kernel reads, which the product computes as well."""
    return _unwritten_products(IdentityKey(graph), IdentityKey(fused))


@lru_cache(maxsize=2)
def _unwritten_products(
    graph_key: IdentityKey[OperatorGraph], fused_key: IdentityKey[Fusion]
) -> frozenset[int]:
    graph, fused = graph_key.value, fused_key.value
    readers: dict[int, list[int]] = defaultdict(list)
    for root, tensors in kernel_reads(graph, fused).items():
        for tensor in tensors:
            readers[tensor].append(root)
    producer = producers(graph)
    results = set()
    for tensor, roots in readers.items():
        source = producer.get(tensor, -1)
        if source < 0 or graph.instructions[source].name not in PRODUCTS or len(roots) > 1:
            continue
        names = {graph.instructions[i].name for i in fused.kernels[roots[0]]}
        written = graph.instructions[roots[0]].results[0]
        is_whole = graph.tensors[written].size == graph.tensors[tensor].size
        if is_whole and names.isdisjoint(ALONE):
            results.add(tensor)
    carried = {tensor for loop in graph.loops for tensors in loop.carried for tensor in tensors}
    return frozenset(results) - carried - {*graph.outputs}


def reads(graph: OperatorGraph, kernel: Sequence[int]) -> dict[int, list[Reader]]:
    """Tensor that a kernel reads from memory -> its readers.

    A reader is a pair (instruction, operand position).
    """
    computed = {tensor for i in kernel for tensor in graph.instructions[i].results}
    readers: dict[int, list[Reader]] = defaultdict(list)
    for i in kernel:
        for position, tensor in enumerate(graph.instructions[i].operands):
            if tensor not in computed:
                readers[tensor].append((i, position))
    return dict(readers)
