"""A flat program with its producers and readers, and the classes of its instructions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from partita.graph.clones import originals
from partita.graph.operator_graph import (
    CONDITIONALS,
    Argument,
    Instruction,
    Loop,
    OperatorGraph,
    Tensor,
    carried_tensors,
    per_graph,
)

Reader = tuple[int, int]
"""An instruction and the position of the operand that it reads. Instruction -1: the result of the
step at that position."""
EDGE_KERNELS = {
    "edge_sum": (7,),
    "edge_largest": (3,),
    "edge_largest_back": (3, 4),
    "edge_attend": (4,),
    "edge_attend_by_destination": (4,),
    "edge_attend_by_source": (5, 7, 8, 9),
    "edge_attend_dropped": (4, 7),
    "edge_attend_dropped_by_destination": (4, 7),
    "edge_attend_dropped_by_source": (5, 8, 12, 13, 14),
}
"""Kernel over the edges of a graph -> its operands of which it reads a row for every edge. Operand
2 has the number of such a row for each edge. See `gnn.kernels`."""
HEAVY = {
    *EDGE_KERNELS,
    "dot_general",
    "convolution",
    "gather",
    "reduce_window",
    "sort",
    "fft",
    "cholesky",
    "triangular_solve",
    "custom_call",
    "fused_attention",
    "recurrence",
    "pallas_kernel",
    "select_and_scatter",
    "scatter",
    "top_k",
}
"""Instructions that make an operator in the forward pass."""
PRODUCTS = {"dot_general", "convolution"}
"""Instructions that multiply and sum two tensors."""
LIBRARY_CALLS = {"fused_attention", "recurrence", "pallas_kernel"}
"""Kernels of a library that compute what many instructions would."""
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
"""Instructions that only rearrange their first operand."""
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
    "fused_attention": "attention",
    "pallas_kernel": "kernel",
    **dict.fromkeys(EDGE_KERNELS, "aggregation"),
}
"""Kind of an operator by its heavy instruction; by default the instruction's name."""
RESHAPING = {"reshape", "bitcast_convert"}
"""Instructions that merge or split dims."""
CONTRACTING = {"dot_general", "convolution", "gather"}
"""Instructions whose reduction factors have the kind R."""


class FlatProgram:
    """The instructions of a step in program order, with producers and readers of all tensors."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        instructions: Sequence[Instruction],
        loops: Sequence[Loop],
        arguments: Sequence[Argument],
    ) -> None:
        self.tensors = tensors
        self.instructions = instructions
        self.loops = loops
        self.arguments = arguments
        self.producer: dict[int, int] = {}
        """Tensor -> its instruction; a loop for values carried into its body."""
        self.readers: dict[int, list[int]] = defaultdict(list)
        """Tensor -> instructions that read it; also a loop for values that its body yields."""
        for index, instruction in enumerate(instructions):
            for tensor in instruction.results:
                self.producer[tensor] = index
            for tensor in instruction.operands:
                self.readers[tensor].append(index)
        for loop in loops:
            for _, inside, yielded, _ in loop.carried:
                self.producer.setdefault(inside, loop.instruction)
                self.readers[yielded].append(loop.instruction)
        self.constants = constant_results(instructions, loops)
        """Tensors that depend on no argument (a causal mask). XLA folds them."""
        self.loop_of = _outermost_loops(loops)
        """Instruction -> number of the outermost loop around it."""
        self.captured = _captured(instructions, loops)
        """Conditional -> the tensors from outside that its branches read or yield."""
        self.originals = originals(instructions, self.loop_of)
        """Rematerialized tensor -> the tensor of the forward pass that it repeats."""

    def base(self, tensor: int) -> int:
        """The tensor that `tensor` merely rearranges."""
        while tensor in self.producer:
            instruction = self.instructions[self.producer[tensor]]
            if instruction.name not in SHAPE_ONLY or not instruction.operands:
                break
            tensor = instruction.operands[0]
        return tensor

    def is_scalar(self, tensor: int) -> bool:
        """Whether a tensor has no dims."""
        return not self.tensors[tensor].shape

    def reads(self, index: int) -> tuple[int, ...]:
        """The tensors that an instruction reads, those of a conditional in its branches too."""
        return self.instructions[index].operands + self.captured.get(index, ())

    def is_barrier(self, index: int) -> bool:
        """Whether an instruction only keeps the compiler from moving others across it."""
        return self.instructions[index].name == "optimization_barrier"

    def producer_phase(self, tensor: int) -> str | None:
        """The phase in which a tensor is computed, None for an argument."""
        if tensor not in self.producer:
            return None
        return self.instructions[self.producer[tensor]].phase

    def loop_around(self, index: int) -> int | None:
        """The instruction of the outermost loop around an instruction, None outside loops."""
        if index not in self.loop_of:
            return None
        return self.loops[self.loop_of[index]].instruction

    def top_level(self, phase: str) -> list[int]:
        """Instructions of a phase outside all loops."""
        indices = []
        for index, instruction in enumerate(self.instructions):
            if instruction.phase == phase and index not in self.loop_of:
                indices.append(index)
        return indices

    def outermost(self, indices: Iterable[int]) -> list[int]:
        """The instructions, each inside a loop replaced by the outermost loop around it."""
        replaced = []
        for index in indices:
            loop = self.loop_around(index)
            replaced.append(index if loop is None else loop)
        return replaced

    def is_heavy(self, index: int) -> bool:
        """Whether an instruction has enough work to make an operator."""
        instruction = self.instructions[index]
        if all(tensor in self.constants for tensor in instruction.results):
            return False
        if instruction.name == "while":
            return self._has_heavy_body(index)
        if instruction.name == "gather":
            is_lookup = len(self.tensors[instruction.operands[0]].shape) > 1
            return is_lookup and self.tensors[instruction.results[0]].size > 1
        if instruction.name == "custom_call":
            return any(len(self.tensors[tensor].shape) > 1 for tensor in instruction.results)
        return instruction.name in HEAVY

    def _has_heavy_body(self, index: int) -> bool:
        for loop in self.loops:
            if loop.instruction != index:
                continue
            if any(self.instructions[i].name in HEAVY for i in range(*loop.body)):
                return True
        return False


def constant_results(instructions: Sequence[Instruction], loops: Sequence[Loop]) -> set[int]:
    """Tensors computed from no argument and not carried by a loop."""
    carried = carried_tensors(loops)
    constants: set[int] = set()
    for instruction in instructions:
        if carried & set(instruction.results):
            continue
        if all(tensor in constants for tensor in instruction.operands):
            constants.update(instruction.results)
    return constants


def _captured(
    instructions: Sequence[Instruction], loops: Sequence[Loop]
) -> dict[int, tuple[int, ...]]:
    captured: dict[int, tuple[int, ...]] = {}
    for loop in loops:
        if instructions[loop.instruction].name not in CONDITIONALS:
            continue
        inside = {tensor for i in range(*loop.body) for tensor in instructions[i].results}
        tensors: dict[int, None] = {}
        for i in range(*loop.body):
            tensors.update(dict.fromkeys(instructions[i].operands))
        tensors.update(dict.fromkeys(yielded for _, _, yielded, _ in loop.carried))
        captured[loop.instruction] = tuple(tensor for tensor in tensors if tensor not in inside)
    return captured


def _outermost_loops(loops: Sequence[Loop]) -> dict[int, int]:
    loop_of = {}
    # By length of the body: the outermost loop comes last and replaces the others.
    by_length = sorted(range(len(loops)), key=lambda n: loops[n].body[1] - loops[n].body[0])
    for number in by_length:
        for index in range(*loops[number].body):
            loop_of[index] = number
    return loop_of


def transposes(instruction: Instruction) -> bool:
    """Whether an instruction transposes its operands first, and so computes them once more.

    The weight gradient of a convolution does: it sums away the batch, dim 0 of its first operand.
    """
    rule = instruction.rule
    if instruction.name != "convolution" or rule is None:
        return False
    return any(factor in rule.reduction for factor in rule.operands[0][0])


def dilates_operand(instruction: Instruction) -> bool:
    """Whether an instruction is a weight gradient over a dilated operand, that of a transposed
    convolution."""
    return transposes(instruction) and any(window.base > 1 for _, window in instruction.windows)


@per_graph
def readers_of(graph: OperatorGraph) -> dict[int, tuple[Reader, ...]]:
    """Tensor -> its readers, of results and values that loops yield as (-1, 0)."""
    readers: dict[int, list[Reader]] = defaultdict(list)
    for i, instruction in enumerate(graph.instructions):
        for position, tensor in enumerate(instruction.operands):
            readers[tensor].append((i, position))
    yielded = [tensor for loop in graph.loops for _, _, tensor, _ in loop.carried]
    for tensor in (*graph.outputs, *yielded):
        readers[tensor].append((-1, 0))
    return {tensor: tuple(places) for tensor, places in readers.items()}
