"""Kernels that a compiler joins: several results from one pass over the same values.

XLA:GPU fuses siblings, which read the same tensor, and a producer with a consumer although others
read the producer's result as well (its pass MultiOutputFusion). A joined kernel reads a tensor
once, and does not read its own results. Batch normalization reads its input once for both
moments, and once for both sums of its backward pass.

Kernels are joined if they pass over equally many elements and neither needs the other's result.
A light value that all its readers compute themselves (PriorityFusion, which runs before) is no
result that they need: they read its operands. Kernels of rows, as of a softmax, are not joined,
because another emitter (Triton's) makes them.

The libraries of products add a bias to the result before they write it (CudnnFusedConvRewriter,
GemmRewriter).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import lru_cache

from partita.cost.fusion import ALONE, FREE, Fusion, kernel_reads
from partita.cost.laid_out_fusion import collective_borders
from partita.graph.flat import HEAVY, LIBRARY_CALLS, PRODUCTS, Reader
from partita.graph.operator_graph import (
    IdentityKey,
    OperatorGraph,
    constant_tensors,
    is_repeated,
    producers,
)
from partita.plans.layout import Layout

SEPARATE = {
    "while",
    "case",
    "if",
    "optimization_barrier",
    "scatter",
    "select_and_scatter",
    "dynamic_update_slice",
    "concatenate",
    "transpose",
    "rng_bit_generator",
    *HEAVY,
    *LIBRARY_CALLS,
}
"""Roots of kernels that are not joined."""
MOVING = {*ALONE, *SEPARATE, "reduce", "gather", "slice", "dynamic_slice", "reverse", "pad"}
"""Instructions whose kernels read other elements of an operand than they write."""
SPREADING = {"broadcast_in_dim", "reshape", "convert"}
"""Instructions that bring a bias to the shape and dtype of a product."""
Roots = list[int]


@dataclass(frozen=True)
class Joined:
    """The kernels of a graph that are a part of another kernel."""

    saved: frozenset[tuple[int, int]]
    """(root of a kernel, tensor) of the reads from memory that joining saves."""
    parts: Mapping[int, int]
    """Root of a kernel that is not launched by itself -> an earlier root of its joined kernel."""
    biases: frozenset[int]
    """Roots of the kernels that a product's library replaces."""

    def start(self, root: int) -> int:
        """The earliest root of the joined kernel of a root."""
        while root in self.parts:
            root = self.parts[root]
        return root


NONE_JOINED = Joined(frozenset(), {}, frozenset())


def joined_kernels(graph: OperatorGraph, fused: Fusion) -> Joined:
    """The kernels that are joined."""
    return _joined_kernels(IdentityKey(graph), IdentityKey(fused))


@lru_cache(maxsize=2)
def _joined_kernels(
    graph_key: IdentityKey[OperatorGraph], fused_key: IdentityKey[Fusion]
) -> Joined:
    graph, fused = graph_key.value, fused_key.value
    reads_of = kernel_reads(graph, fused)
    biases = _bias_kernels(graph, fused, reads_of)
    read_by = {root: frozenset(tensors) for root, tensors in reads_of.items()}
    return _Joiner(graph, fused, read_by, biases).joined()


def computed_together(
    graph: OperatorGraph, layout: Layout, fused: Fusion
) -> tuple[tuple[int, ...], ...]:
    """The roots that one kernel computes, in groups of at least two.

    An operand that depends on no argument joins none, because each kernel computes its own part of
    it.
    """
    return _computed_together(IdentityKey(graph), IdentityKey(layout), IdentityKey(fused))


@lru_cache(maxsize=2)
def _computed_together(
    graph_key: IdentityKey[OperatorGraph],
    layout_key: IdentityKey[Layout],
    fused_key: IdentityKey[Fusion],
) -> tuple[tuple[int, ...], ...]:
    graph, fused = graph_key.value, fused_key.value
    reads_of = kernel_reads(graph, fused)
    read_by = light_reads(graph, layout_key.value, fused)
    apart = {root for root in fused.kernels if computes_rows(graph, fused, root)}
    apart |= _bias_kernels(graph, fused, reads_of)
    return _Joiner(graph, fused, read_by, apart).together()


def light_reads(
    graph: OperatorGraph, layout: Layout, fused: Fusion
) -> Mapping[int, frozenset[int]]:
    """Root -> the tensors that its kernel reads if readers compute light values themselves.

    Light values are missing as roots.
    """
    return _light_reads(IdentityKey(graph), IdentityKey(layout), IdentityKey(fused))


@lru_cache(maxsize=2)
def _light_reads(
    graph_key: IdentityKey[OperatorGraph],
    layout_key: IdentityKey[Layout],
    fused_key: IdentityKey[Fusion],
) -> Mapping[int, frozenset[int]]:
    graph, fused = graph_key.value, fused_key.value
    barriers, ends = collective_borders(graph, layout_key.value)
    moved = {graph.instructions[reader].operands[position] for reader, position in barriers}
    moved.update(tensor for i in ends for tensor in graph.instructions[i].results)
    return _without_light(graph, fused, kernel_reads(graph, fused), moved)


def _without_light(
    graph: OperatorGraph,
    fused: Fusion,
    reads_of: Mapping[int, Mapping[int, list[Reader]]],
    moved: Set[int],
) -> dict[int, frozenset[int]]:
    """Root -> the tensors that its kernel reads if readers compute light values themselves.

    Light values are missing as roots. PriorityFusion fuses a kernel into all of its readers if
    these then move no more tensors of its size than with its result in memory. An operand that a
    reader reads anyway counts once. Collectives read and write the tensors `moved` in memory.
    """
    stored = {*graph.outputs, *moved}
    remaining = {root: frozenset(tensors) for root, tensors in reads_of.items()}
    readers: dict[int, set[int]] = defaultdict(set)
    for root, tensors in remaining.items():
        for tensor in tensors:
            readers[tensor].add(root)

    for root in sorted(fused.kernels, reverse=True):
        names = {graph.instructions[i].name for i in fused.kernels[root]}
        result = graph.instructions[root].results[0]
        reading = readers[result]
        reading_names = {graph.instructions[reader].name for reader in reading}
        if result in stored or not reading or not names.isdisjoint(MOVING):
            continue
        if not reading_names.isdisjoint({*ALONE, *SEPARATE}):
            continue
        size = graph.tensors[result].nbytes
        operands = remaining[root]
        whole = {tensor for tensor in operands if graph.tensors[tensor].nbytes >= size}
        read_again = sum(len(whole - remaining[reader]) for reader in reading)
        if read_again > len(whole) + 1 + len(reading):
            continue
        for reader in reading:
            remaining[reader] = remaining[reader] - {result} | operands
        for tensor in operands:
            readers[tensor] |= reading
            readers[tensor].discard(root)
        del remaining[root]
    return remaining


def computes_rows(graph: OperatorGraph, fused: Fusion, root: int) -> bool:
    """Whether a kernel sums rows and writes more than the sums."""
    names = [graph.instructions[i].name for i in fused.kernels.get(root, ())]
    return "reduce" in names and names[-1] != "reduce"


def joined_times(
    graph: OperatorGraph, layout: Layout, fused: Fusion
) -> list[tuple[tuple[int, ...], int]]:
    """(roots that one kernel computes, root at which that runs).

    That is the first of its roots after all its operands.
    """
    producer = producers(graph)
    times = []
    for roots in computed_together(graph, layout, fused):
        sources = {
            producer.get(tensor, -1)
            for root in roots
            for tensor in kernel_reads(graph, fused)[root]
        }
        ready = max(sources.difference(roots), default=-1)
        times.append((roots, next(root for root in roots if root > ready)))
    return times


def joined_ends(graph: OperatorGraph, layout: Layout, fused: Fusion) -> dict[int, int]:
    """Result of a joined kernel that some kernel reads -> the root at which the joined one runs.

    All its results are in memory then.
    """
    read = {tensor for tensors in kernel_reads(graph, fused).values() for tensor in tensors}
    ends = {}
    for roots, time in joined_times(graph, layout, fused):
        results = {tensor for root in roots for tensor in graph.instructions[root].results}
        ends.update(dict.fromkeys(results & read, time))
    return ends


def _bias_kernels(
    graph: OperatorGraph,
    fused: Fusion,
    reads_of: Mapping[int, Mapping[int, list[Reader]]],
) -> frozenset[int]:
    """Roots of the kernels that only add a bias to a product, which its library does.

    A bias is a vector along the minor dim. Products of one operand that are merged
    (`FusionRules.merges_products`) leave theirs to another kernel, and so does a product with
    other readers.
    """
    producer = producers(graph)
    readers: dict[int, Roots] = defaultdict(list)
    for root in fused.kernels:
        for tensor in reads_of[root]:
            readers[tensor].append(root)
    roots = []
    for root, kernel in fused.kernels.items():
        names = [graph.instructions[i].name for i in kernel]
        computing = [name for name in names if name not in SPREADING]
        if computing != ["add"] or graph.instructions[root].name not in ("add", "reshape"):
            continue
        operands = sorted(reads_of[root], key=lambda tensor: len(graph.tensors[tensor].shape))
        if len(operands) != 2 or len(graph.tensors[operands[0]].shape) > 1:
            continue
        product = producer.get(operands[1], -1)
        is_product = product >= 0 and graph.instructions[product].name in PRODUCTS
        if (
            is_product
            and readers[operands[1]] == [root]
            and not _is_merged(graph, readers, product)
        ):
            roots.append(root)
    return frozenset(roots)


def _is_merged(graph: OperatorGraph, readers: Mapping[int, Roots], product: int) -> bool:
    """Whether a matrix product reads an operand that other matrix products read first, too."""
    operand = graph.instructions[product].operands[0]
    alike = 0
    for reader in readers[operand]:
        instruction = graph.instructions[reader]
        alike += instruction.name == "dot_general" and instruction.operands[0] == operand
    return alike > 1


class _Joiner:
    """Kernels with the tensors that they read, and their ancestors as sets of bits."""

    def __init__(
        self,
        graph: OperatorGraph,
        fused: Fusion,
        read_by: Mapping[int, frozenset[int]],
        apart: Set[int],
    ) -> None:
        """`read_by`: root -> tensors that its kernel reads. `apart`: roots that are not joined."""
        self.graph = graph
        self.kernels = fused.kernels
        self.reads = read_by
        self.apart = apart
        self.producer = {
            tensor: root for root in read_by for tensor in graph.instructions[root].results
        }
        self.bit = {root: 1 << n for n, root in enumerate(sorted(read_by))}
        self.ancestors: dict[int, int] = {}
        # A forward value computed again waits, behind a barrier, for the pass before it.
        passed = 0
        """The last product of the backward pass, with its ancestors."""
        for root in sorted(read_by):
            instruction = graph.instructions[root]
            found = passed if is_repeated(graph, root) else 0
            for tensor in self.reads[root]:
                source = self.producer.get(tensor)
                if source is not None and source < root:
                    found |= self.bit[source] | self.ancestors[source]
            self.ancestors[root] = found
            if instruction.phase == "backward" and instruction.name in PRODUCTS:
                passed = found | self.bit[root]

    def joined(self) -> Joined:
        """The reads that siblings share, and those of a producer's result in its own kernel."""
        saved: set[tuple[int, int]] = set()
        start_of: dict[int, int] = {}
        """Kernel that is a part -> one that it is a part of."""
        for tensor, start, parts in self._siblings():
            saved.update((root, tensor) for root in parts)
            start_of.update((root, start) for root in parts if root not in start_of)
        joined = Joined(frozenset(), start_of, frozenset(self.apart))
        for tensor, whole in self._whole_readers().items():
            saved.update((root, tensor) for root in _repeated(whole, joined))
        return replace(joined, saved=frozenset(saved))

    def _siblings(self) -> Iterator[tuple[int, int, Roots]]:
        """(tensor, root, parts): the kernel of the root computes the parts too, which read the
        tensor."""
        for tensor, whole in self._whole_readers().items():
            for group in self._independent(whole):
                starts = [self.producer[tensor]] if self._joins_producer(tensor, group) else []
                start, *parts = [*starts, *group]
                yield tensor, start, parts

    def _whole_readers(self) -> dict[int, Roots]:
        """Tensor -> the kernels that read it and pass over as many elements."""
        readers: dict[int, Roots] = defaultdict(list)
        for root in sorted(self.reads):
            elements = self._passes_over(root)
            for tensor in self.reads[root]:
                if elements == self.graph.tensors[tensor].size > 0:
                    readers[tensor].append(root)
        return readers

    def together(self) -> tuple[tuple[int, ...], ...]:
        """The roots of joined kernels, those that share a computed tensor or an argument.

        Kernels that would wait for their own results are not joined.
        """
        constants = constant_tensors(self.graph)
        links: dict[int, int] = {}
        """Kernel that is a part -> one that it is a part of."""
        for tensor, start, parts in self._siblings():
            if tensor not in constants:
                links.update((root, start) for root in parts if root not in links)
        group_of: dict[int, Roots] = {}
        for root in sorted(links):
            start = links[root]
            group = group_of.setdefault(start, [start])
            trips = {self.graph.instructions[one].trips for one in (root, start)}
            if len(trips) == 1 and self._is_free([*group, root]):
                group.append(root)
                group_of[root] = group
        groups = {id(group): tuple(group) for group in group_of.values()}
        return tuple(group for group in groups.values() if len(group) > 1)

    def _is_free(self, roots: Roots) -> bool:
        """Whether no result needs another one as a sum, or through another kernel."""
        needed = 0
        for root in roots:
            for tensor in self.reads[root]:
                source = self.producer.get(tensor)
                if source is None:
                    continue
                if source not in roots or self.graph.instructions[source].name == "reduce":
                    needed |= self.bit[source] | self.ancestors[source]
        return not any(needed & self.bit[root] for root in roots)

    def _passes_over(self, root: int) -> int:
        """Elements that a kernel passes over, 0 if it is not joined."""
        instruction = self.graph.instructions[root]
        if root in self.apart or instruction.name in SEPARATE or instruction.name in FREE:
            return 0
        tensors = list(instruction.results)
        for i in self.kernels[root]:
            if self.graph.instructions[i].name == "reduce":
                tensors += self.graph.instructions[i].operands
        return max(self.graph.tensors[tensor].size for tensor in tensors)

    def _independent(self, roots: Roots) -> list[Roots]:
        """Groups of kernels of which none needs another's result."""
        groups: list[Roots] = []
        for root in roots:
            for group in groups:
                if not any(self.ancestors[root] & self.bit[other] for other in group):
                    group.append(root)
                    break
            else:
                groups.append([root])
        return groups

    def _joins_producer(self, tensor: int, group: Roots) -> bool:
        """Whether a tensor is computed by the kernel of its readers.

        They must need it directly only, not through other kernels as well.
        """
        source = self.producer.get(tensor)
        size = self.graph.tensors[tensor].size
        if source is None or self._passes_over(source) != size:
            return False
        if self.graph.instructions[source].name == "reduce":
            return False
        for root in group:
            others = self.reads[root] - {tensor}
            for other in others:
                between = self.producer.get(other)
                if between is not None and self.ancestors[between] & self.bit[source]:
                    return False
        return True


def _repeated(roots: Roots, joined: Joined) -> Roots:
    """Of kernels that read a tensor, those that are parts of a kernel with an earlier one."""
    starts: set[int] = set()
    repeated = []
    for root in roots:
        start = joined.start(root)
        if start in starts:
            repeated.append(root)
        starts.add(start)
    return repeated
