"""Kernels that XLA:GPU delays: reductions of gradients, and forward values computed again.

Reductions of gradients wait for the end of the backward pass. Its scheduler starts from the end of
the program and fills the time of collectives with kernels on which nothing waits
(LatencyHidingScheduler). Where a device needs no sum over devices, the gradient of a bias or of a
scale is such a kernel, and the values that it reads stay in memory until then.

Two kinds of reductions:

- One that is joined with another kernel runs with it and is not delayed (`cost.joined`). Nothing is
  joined with a kernel of rows, as of a softmax.
- One that sums the result of another one further, as the gradient of a group normalization's scale,
  sums the operand of that other one in one pass (AlgebraicSimplifier), so it reads large values.

A forward value that the backward pass computes again is often joined with the kernel of a gradient
that reads the same tensor, as of an activation function. Then it is in memory beside that gradient.
"""

from __future__ import annotations

from partita.cost.fusion import Fusion, reads
from partita.cost.joined import joined_kernels
from partita.cost.partial import operand_labels, reduced_factors, split_axes
from partita.graph.flat import readers_of
from partita.graph.gradient_sums import PASSING
from partita.graph.operator_graph import Instruction, OperatorGraph, constant_tensors, producers
from partita.plans.layout import Layout


def delayed_reductions(
    graph: OperatorGraph,
    layout: Layout,
    fused: Fusion,
) -> dict[int, set[int]]:
    """Root of a delayed reduction -> the tensors that it reads from memory."""
    late = [i for i in fused.kernels if _is_waited_for_by_updates(graph, layout, i)]
    if not late:
        return {}
    source = producers(graph)
    joined = {
        root
        for root, tensor in joined_kernels(graph, fused).saved
        if not _computes_rows(graph, fused, source.get(tensor, -1))
    }
    delayed = {}
    for root in late:
        if root not in joined:
            first = _first_reduction(graph, source, root)
            delayed[root] = {
                tensor for i in (root, first) for tensor in reads(graph, fused.kernels.get(i, ()))
            }
    return delayed


def joined_repetitions(graph: OperatorGraph, fused: Fusion) -> dict[int, int]:
    """Forward value computed again in the backward pass -> the last root of its joined kernel."""
    # Constants of the backward pass stand anywhere before it.
    constants = constant_tensors(graph)
    backward = (
        i
        for i, x in enumerate(graph.instructions)
        if x.phase == "backward" and not constants.issuperset(x.results)
    )
    first_backward = next(backward, len(graph.instructions))
    repeated = [
        root
        for root in fused.kernels
        if root > first_backward and graph.instructions[root].phase == "forward"
    ]
    if not repeated:
        return {}
    joined = joined_kernels(graph, fused)
    last: dict[int, int] = {}
    """Earliest root of a joined kernel -> its last one."""
    for root in joined.parts:
        start = joined.start(root)
        last[start] = max(last.get(start, start), root)
    ends = {}
    for root in repeated:
        end = last.get(joined.start(root), root)
        ends.update(dict.fromkeys(graph.instructions[root].results, end))
    return ends


def _is_waited_for_by_updates(graph: OperatorGraph, layout: Layout, i: int) -> bool:
    """Whether an instruction is a reduction of the backward pass that no devices sum, and that
    only updates read."""
    instruction = graph.instructions[i]
    if not _adds_up(instruction) or instruction.phase != "backward" or instruction.trips != 1:
        return False
    reduced = reduced_factors(instruction, operand_labels(graph, i))
    if not reduced or split_axes(layout, graph.owner[i], reduced):
        return False
    readers = readers_of(graph).get(instruction.results[0], ())
    while len(readers) == 1 and _passes_on(graph, readers[0][0]):
        result = graph.instructions[readers[0][0]].results[0]
        readers = readers_of(graph).get(result, ())
    return bool(readers) and all(
        reader >= 0 and graph.instructions[reader].phase == "update" for reader, _ in readers
    )


def _passes_on(graph: OperatorGraph, reader: int) -> bool:
    return reader >= 0 and graph.instructions[reader].name in PASSING


def _adds_up(instruction: Instruction) -> bool:
    return instruction.name == "reduce" and instruction.adds and len(instruction.results) == 1


def _computes_rows(graph: OperatorGraph, fused: Fusion, root: int) -> bool:
    """Whether a kernel sums rows and writes more than the sums."""
    names = [graph.instructions[i].name for i in fused.kernels.get(root, ())]
    return "reduce" in names and names[-1] != "reduce"


def _first_reduction(graph: OperatorGraph, source: dict[int, int], root: int) -> int:
    """The reduction whose result another one sums further, -1 if it is none."""
    first = source.get(graph.instructions[root].operands[0], -1)
    while _passes_on(graph, first):
        first = source.get(graph.instructions[first].operands[0], -1)
    return first if first >= 0 and _adds_up(graph.instructions[first]) else -1
