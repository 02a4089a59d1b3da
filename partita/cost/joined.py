"""Kernels that a compiler joins: several results from one pass over the same values.

XLA:GPU fuses siblings, which read the same tensor, and a producer with a consumer although others
read the producer's result as well (its pass MultiOutputFusion). A joined kernel reads a tensor
once, and does not read its own results. Batch normalization reads its input once for both
moments, and once for both sums of its backward pass.

Kernels are joined if they pass over equally many elements and neither needs the other's result.
"""

from __future__ import annotations

import math
from collections import defaultdict

from partita.cost.fusion import FREE, Fusion, reads
from partita.graph.flat import HEAVY, LIBRARY_CALLS
from partita.graph.operator_graph import OperatorGraph

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
Roots = list[int]


def joined_reads(graph: OperatorGraph, fused: Fusion) -> frozenset[tuple[int, int]]:
    """(root of a kernel, tensor) of the reads from memory that joining saves."""
    return _Joiner(graph, fused).saved_reads()


class _Joiner:
    """Kernels with the tensors that they read, and their ancestors as sets of bits."""

    def __init__(self, graph: OperatorGraph, fused: Fusion) -> None:
        self.graph = graph
        self.reads = {root: set(reads(graph, kernel)) for root, kernel in fused.kernels.items()}
        self.producer = {
            tensor: root for root in fused.kernels for tensor in graph.instructions[root].results
        }
        self.bit = {root: 1 << n for n, root in enumerate(sorted(fused.kernels))}
        self.ancestors: dict[int, int] = {}
        for root in sorted(fused.kernels):
            found = 0
            for tensor in self.reads[root]:
                source = self.producer.get(tensor)
                if source is not None and source < root:
                    found |= self.bit[source] | self.ancestors[source]
            self.ancestors[root] = found

    def saved_reads(self) -> frozenset[tuple[int, int]]:
        """The reads that siblings share, and those of a producer's result in its own kernel."""
        readers: dict[int, Roots] = defaultdict(list)
        for root in sorted(self.reads):
            if self._passes_over(root) > 0:
                for tensor in self.reads[root]:
                    readers[tensor].append(root)
        saved: set[tuple[int, int]] = set()
        for tensor, roots in readers.items():
            size = self.graph.tensors[tensor].size
            whole = [root for root in roots if self._passes_over(root) == size]
            for group in self._independent(whole):
                kept = 0 if self._joins_producer(tensor, size, group) else 1
                saved.update((root, tensor) for root in group[kept:])
        return frozenset(saved)

    def _passes_over(self, root: int) -> int:
        """Elements that a kernel passes over, 0 if it is not joined."""
        instruction = self.graph.instructions[root]
        if instruction.name in SEPARATE or instruction.name in FREE:
            return 0
        tensors = instruction.results
        if instruction.name == "reduce":
            tensors = instruction.operands
        return max(math.prod(self.graph.tensors[tensor].shape) for tensor in tensors)

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

    def _joins_producer(self, tensor: int, size: int, group: Roots) -> bool:
        """Whether a tensor is computed by the kernel of its readers.

        They must need it directly only, not through other kernels as well.
        """
        source = self.producer.get(tensor)
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
