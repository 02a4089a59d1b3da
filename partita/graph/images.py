"""Images of convolutional networks: which tensors a compiler stores with one order of dims.

XLA:TPU tiles the two dims of a convolution's operand and result that have no window: samples and
channels. Instructions that keep the dims of their operands pass an order of dims on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from scipy.cluster.hierarchy import DisjointSet

from partita.graph.flat import Reader, transposes
from partita.graph.operator_graph import DimFactors, Instruction, OperatorGraph, per_graph

LEAST_RANK = 4
"""Dims of images: samples, channels and at least two others."""


class TiledDims(NamedTuple):
    """The dims of an image without a window."""

    samples: int
    channels: int


@dataclass(frozen=True)
class Images:
    """The images of a graph: tensors that convolutions read or write, and those that share their
    order of dims."""

    dims: dict[int, TiledDims]
    """Image -> its dims of samples and channels."""
    group: dict[int, int]
    """Image -> a tensor that stands for all that have its order."""
    divided: frozenset[int]
    """Images whose channels are divided into groups."""
    convolved: tuple[tuple[int, Reader | None], ...]
    """(image, reader) for the images that convolutions read, (image, None) for those they write."""


class _Role(NamedTuple):
    """An image of a convolution."""

    tensor: int
    position: int | None
    """As which operand it is read, None for the result."""
    dims: TiledDims


@per_graph
def images(graph: OperatorGraph) -> Images:
    """The images of a graph."""
    same_order = DisjointSet()
    dims: dict[int, TiledDims] = {}
    convolved: list[tuple[int, Reader | None]] = []
    for i, instruction in enumerate(graph.instructions):
        if instruction.name == "convolution":
            for role in _roles(instruction):
                dims[role.tensor] = role.dims
                reader = None if role.position is None else (i, role.position)
                convolved.append((role.tensor, reader))
                same_order.add(role.tensor)
        else:
            _connect(graph, instruction, same_order)
    group: dict[int, int] = {}
    divided: set[int] = set()
    for image, (samples, channels) in list(dims.items()):
        if image in group:
            continue
        rank = len(graph.tensors[image].shape)
        for tensor in same_order.subset(image):
            group[tensor] = image
            if len(graph.tensors[tensor].shape) == rank:
                dims.setdefault(tensor, TiledDims(samples, channels))
            else:
                divided.add(tensor)
                dims[tensor] = TiledDims(samples, len(graph.tensors[tensor].shape) - 1)
    return Images(dims, group, frozenset(divided), tuple(convolved))


def _connect(graph: OperatorGraph, instruction: Instruction, same_order: DisjointSet) -> None:
    """Gives the operands and results of an instruction that keeps dims the same order."""
    alike = _alike(graph, instruction)
    for tensor in alike:
        same_order.add(tensor)
        same_order.merge(alike[0], tensor)


def _alike(graph: OperatorGraph, instruction: Instruction) -> list[int]:
    """The operands and results of an instruction with the same dims, in the same order.

    A reshape may divide the last dim, as channels into groups.
    """
    rule = instruction.rule
    tensors = [*instruction.operands, *instruction.results]
    if rule is None or not instruction.results:
        return []
    if instruction.name == "reshape":
        shapes = [graph.tensors[tensor].shape for tensor in tensors]
        least = min(map(len, shapes))
        is_kept = least >= LEAST_RANK and len({shape[: least - 1] for shape in shapes}) == 1
        return tensors if is_kept else []
    result = rule.results[0]
    if len(result) < LEAST_RANK:
        return []
    mappings = (*rule.operands, *rule.results)
    return [tensor for tensor, dims in zip(tensors, mappings, strict=True) if dims == result]


def _roles(instruction: Instruction) -> Iterator[_Role]:
    """The images of a convolution: its operand and result, or the operands of a weight gradient.

    None if it has other dims without a window than samples and channels.
    """
    rule = instruction.rule
    if rule is None:
        return
    left, right = rule.operands[:2]
    if transposes(instruction):
        other, kernel, tensor, position = right, rule.results[0], instruction.operands[1], 1
    else:
        other, kernel, tensor, position = rule.results[0], right, instruction.results[0], None
    windowed = {factor for factor, _ in instruction.windows}
    samples = _factors(left) & _factors(other) - _factors(kernel) - windowed
    left_dims = _tiled(left, samples, windowed)
    other_dims = _tiled(other, samples, windowed)
    if left_dims is not None and other_dims is not None:
        yield _Role(instruction.operands[0], 0, left_dims)
        yield _Role(tensor, position, other_dims)


def _factors(mapping: DimFactors) -> set[int]:
    return {factor for factors in mapping for factor in factors}


def _tiled(mapping: DimFactors, samples: set[int], windowed: set[int]) -> TiledDims | None:
    """The dims of an image without a window, None if these are not samples and channels."""
    plain = [d for d, factors in enumerate(mapping) if windowed.isdisjoint(factors)]
    of_samples = [d for d in plain if not samples.isdisjoint(mapping[d])]
    if len(plain) != 2 or len(of_samples) != 1:
        return None
    return TiledDims(of_samples[0], sum(plain) - of_samples[0])
