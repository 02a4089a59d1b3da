"""The order of dims that a gather gives to a tensor, and the kernels that keep it (XLA:GPU).

A gather over devices makes the gathered dim the major one (GpuLayoutAssignment). Elementwise
kernels of the gathered tensor compute in this order, unless they also read a gradient that a
product computed. A product reads a copy in its own order. So:

- A sum, as for the gradient of a bias, reads the gathered tensor and computes the elementwise
  values again.
- A mask that these kernels share is written if reading its operands in each takes longer.
- The sum over a batch is one over the minor dims, whose many blocks have the whole bandwidth of the
  memory, so no difference from a mean is written for it (`cost.differences`).
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from partita.cost.collectives import local_bytes
from partita.cost.differences import BANDWIDTH, LAUNCH_SECONDS
from partita.cost.fusion import ALONE, STORED, Fusion, Kernel, kernel_reads, reads
from partita.graph.flat import Reader
from partita.graph.operator_graph import ITEMSIZE, OperatorGraph, producers
from partita.plans.layout import Layout, Read, Sharding
from partita.plans.plan import Mesh


def is_gathered(layout: Layout, read: Read) -> bool:
    """Whether a read gathers dims, none of them the first."""
    gathers = gathered_dims(layout.shardings[read.tensor], read.target)
    return any(gathers) and not gathers[0]


def is_moved(layout: Layout, read: Read) -> bool:
    """Whether devices read parts of a tensor that others have."""
    return any(gathered_dims(layout.shardings[read.tensor], read.target))


def gathered_dims(own: Sharding, target: Sharding) -> list[bool]:
    """Per dim, whether a device that has `own` and reads `target` reads parts that others have."""
    return [axes != wide[: len(axes)] for axes, wide in zip(own, target, strict=True)]


def gathered_reads(layout: Layout) -> set[Reader]:
    """The reads of gathered tensors: instruction, operand position."""
    return {r for read in layout.reads if is_gathered(layout, read) for r in read.readers}


def kernels_of_gathers(layout: Layout, fused: Fusion) -> set[int]:
    """Roots of the kernels that read a gathered tensor."""
    readers = {reader for reader, _ in gathered_reads(layout) if reader >= 0}
    return {root for reader in readers for root in fused.computed_in[reader]}


def with_gathered_sums(
    graph: OperatorGraph, layout: Layout, fused: Fusion
) -> tuple[Fusion, set[Kernel]]:
    """(all kernels, those that sums compute as well): elementwise ones of a gathered gradient."""
    gathered = {read.tensor for read in layout.reads if is_gathered(layout, read)}
    if not gathered:
        return fused, set()
    kernels = dict(fused.kernels)
    computed_in = [set(roots) for roots in fused.computed_in]
    computed_again: set[Kernel] = set()
    producer = producers(graph)
    for root, read in kernel_reads(graph, fused).items():
        if graph.instructions[root].name != "reduce":
            continue
        for tensor, readers in read.items():
            source = producer.get(tensor, -1)
            is_whole = layout.targets.keys().isdisjoint(readers)
            if source not in fused.kernels or not is_whole:
                continue
            kernel = fused.kernels[source]
            if _keeps_order(graph, layout, gathered, kernel):
                computed_again.add(kernel)
                kernels[root] = tuple(sorted({*kernels[root], *kernel}))
                for i in kernel:
                    computed_in[i].add(root)
    fused = Fusion(kernels, tuple(tuple(sorted(roots)) for roots in computed_in))
    return fused, computed_again


def written_masks(
    graph: OperatorGraph, layout: Layout, mesh: Mesh, fused: Fusion, kernels: Set[Kernel]
) -> set[int]:
    """Comparisons of kernels that are written, because reading their operands in each of the
    kernels that compute them takes longer."""
    written = set()
    for kernel in kernels:
        for i in kernel:
            instruction = graph.instructions[i]
            count = len(fused.computed_in[i])
            if instruction.name != "compare" or count < 2:
                continue
            mask_bytes = _local_bytes(graph, layout, mesh, instruction.results[0])
            operands = reads(graph, _part(graph, kernel, i))
            operand_bytes = sum(_local_bytes(graph, layout, mesh, tensor) for tensor in operands)
            saved_bytes = (count - 1) * operand_bytes - (count + 1) * mask_bytes
            if saved_bytes > LAUNCH_SECONDS * BANDWIDTH:
                written.add(i)
    return written


def _part(graph: OperatorGraph, kernel: Kernel, last: int) -> Kernel:
    """The instructions of a kernel that one of them needs, and itself."""
    producer = producers(graph)
    part = {last}
    for i in reversed(kernel):
        if i in part:
            part.update(producer.get(tensor, -1) for tensor in graph.instructions[i].operands)
    return tuple(sorted(part.intersection(kernel)))


def _local_bytes(graph: OperatorGraph, layout: Layout, mesh: Mesh, tensor: int) -> int:
    """Bytes of a device's shard."""
    value = graph.tensors[tensor]
    itemsize = ITEMSIZE.get(value.dtype, 4)
    return local_bytes(value.shape, itemsize, layout.shardings[tensor], mesh.sizes)


def _keeps_order(
    graph: OperatorGraph, layout: Layout, gathered: Set[int], kernel: Sequence[int]
) -> bool:
    """Whether an elementwise kernel of the backward pass computes in the order of a gather."""
    instructions = [graph.instructions[i] for i in kernel]
    if instructions[-1].phase != "backward":
        return False
    if any(x.name in ALONE or x.name in STORED for x in instructions):
        return False
    written = graph.tensors[instructions[-1].results[0]].size
    producer = producers(graph)
    has_gathered = False
    for tensor, readers in reads(graph, kernel).items():
        source = producer.get(tensor, -1)
        is_small = graph.tensors[tensor].size < written
        if is_small or source < 0 or graph.instructions[source].phase != "backward":
            continue
        if tensor not in gathered or layout.targets.keys().isdisjoint(readers):
            return False
        has_gathered = True
    return has_gathered
