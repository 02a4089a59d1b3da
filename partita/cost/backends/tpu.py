"""XLA:TPU, as of libtpu 0.0.52, compiled for v5e slices.

Its matrix unit takes bfloat16. A float32 operand of products alone is converted first, so it is
also resharded in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

from partita.cost.backends.gpu import GpuCompiler
from partita.cost.sums import readers_of
from partita.graph.operator_graph import OperatorGraph
from partita.plans.layout import Reader

PRODUCTS = {"dot_general", "convolution"}
SELECTING = {"reshape", "transpose", "convert", "copy", "gather", "select", "reverse"}
"""Instructions past which a conversion to bfloat16 moves."""


class TpuCompiler(GpuCompiler):
    """XLA:TPU. It moves and narrows sums as XLA:GPU does."""

    def moved_itemsize(self, graph: OperatorGraph, tensor: int, readers: Sequence[Reader]) -> int:
        """Two bytes for operands of products alone, where products run in bfloat16."""
        is_converted = (
            self.backend.float32_products == "bfloat16"
            and graph.tensors[tensor].dtype == "float32"
            and _feeds_products(graph, readers)
        )
        return 2 if is_converted else super().moved_itemsize(graph, tensor, readers)


def _feeds_products(graph: OperatorGraph, readers: Sequence[Reader]) -> bool:
    """Whether products alone read a value, directly or rearranged."""
    inside, outside = _readers_in_loops(graph, readers)
    pending = [reader for reader, _ in (*inside, *outside)]
    visited: set[int] = set()
    while pending:
        reader = pending.pop()
        if reader < 0:
            return False
        instruction = graph.instructions[reader]
        if instruction.name in PRODUCTS or reader in visited:
            continue
        if instruction.name not in SELECTING:
            return False
        visited.add(reader)
        for result in instruction.results:
            pending += [place for place, _ in readers_of(graph).get(result, ())]
    return bool(readers)


def _readers_in_loops(
    graph: OperatorGraph,
    readers: Sequence[Reader],
) -> tuple[list[Reader], list[Reader]]:
    """Readers of values that loops carry unchanged, and the readers that are no such loops."""
    inside = []
    outside = []
    loops = {loop.instruction: loop for loop in graph.loops}
    for reader, position in readers:
        loop = loops.get(reader)
        if loop is None:
            outside.append((reader, position))
            continue
        before = graph.instructions[reader].operands[position]
        for carried, body, yielded, _ in loop.carried:
            if carried != before:
                continue
            if body != yielded:
                outside.append((-1, 0))
            inside += [place for place in readers_of(graph).get(body, ()) if place[0] >= 0]
    return inside, outside
