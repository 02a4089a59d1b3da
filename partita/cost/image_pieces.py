"""Convolutions over images that a compiler divides into pieces.

XLA:TPU divides the width of images of few samples, and computes the pieces as samples (its pass
SpaceToBatchConverter). A piece has the columns that its convolution needs, rounded up where the
windows reach into padding, and elementwise instructions pass pieces on. Windows over a divided dim
read their padding.

Not here: the columns of a piece (`cost.backends`), and memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from partita.cost.backends.base import Compiler
from partita.cost.fusion import GENERATED
from partita.graph.flat import transposes
from partita.graph.images import Images, images
from partita.graph.operator_graph import Instruction, OperatorGraph, Window, producers
from partita.plans.layout import Layout, local_shape
from partita.plans.plan import Mesh


def piece_ratios(
    graph: OperatorGraph, mesh: Mesh, layout: Layout, compiler: Compiler
) -> dict[int, float]:
    """Convolution whose images are divided -> its FLOPs over those for whole images."""
    if compiler.image_parts == 1 or not images(graph).convolved:
        return {}
    divider = _Divider(graph, mesh, layout, compiler)
    for i, instruction in enumerate(graph.instructions):
        if instruction.name != "convolution":
            divider.pass_on(instruction)
        elif not transposes(instruction):
            divider.divide(i, instruction)
    for i, instruction in enumerate(graph.instructions):
        if instruction.name == "convolution" and transposes(instruction):
            divider.divide_gradient(i, instruction)
    return divider.ratios


@dataclass
class _Divider:
    """Follows divided images through a graph."""

    graph: OperatorGraph
    mesh: Mesh
    layout: Layout
    compiler: Compiler
    columns: dict[int, int] = field(default_factory=dict)
    """Divided image -> columns of a piece."""
    read_columns: dict[int, int] = field(default_factory=dict)
    """Image that a convolution divides itself -> columns of a piece without its halo."""
    ratios: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.producer = producers(self.graph)
        self.images: Images = images(self.graph)

    def divide(self, i: int, instruction: Instruction) -> None:
        """Adds a convolution other than a weight gradient, if its images are divided."""
        image, result = instruction.operands[0], instruction.results[0]
        window = self._window_over_width(instruction, image)
        if window is None:
            return
        source = self._without_padding(image)
        columns = self.compiler.piece_columns(window, self.columns.get(source))
        if columns is None:
            return
        if source not in self.columns:
            self.read_columns[image] = columns * window.step // window.base
        self.columns[result] = columns
        self._add(i, window, columns)

    def divide_gradient(self, i: int, instruction: Instruction) -> None:
        """Adds a weight gradient, if both of its images are divided, one of them as it comes.

        Of two images of one width, it divides the other one itself.
        """
        image, other = instruction.operands[:2]
        window = self._window_over_width(instruction, image)
        if window is None:
            return
        other_is_divided = other in self.read_columns or other in self.columns
        if image in self.columns and (other_is_divided or window.step == 1):
            self._add(i, window, -(-self.columns[image] * window.base // window.step))
        elif image in self.read_columns and other in self.columns:
            self._add(i, window, self.columns[other])

    def _add(self, i: int, window: Window, columns: int) -> None:
        positions = columns * self.compiler.image_parts
        self.ratios[i] = positions / window.count * window.padding_ratio()

    def pass_on(self, instruction: Instruction) -> None:
        """Divides the result of an elementwise instruction, if its operands are divided."""
        if len(instruction.results) != 1 or instruction.name == "concatenate":
            return
        result = instruction.results[0]
        shape = self.graph.tensors[result].shape
        columns = []
        for tensor in instruction.operands:
            if self.graph.tensors[tensor].shape == shape and not self._is_generated(tensor):
                columns.append(self.columns.get(tensor))
        if columns and None not in columns:
            self.columns[result] = max(count for count in columns if count is not None)

    def _without_padding(self, image: int) -> int:
        """The image that is padded for a convolution, which pads it itself."""
        producer = self.producer.get(image)
        if producer is None or self.graph.instructions[producer].name != "pad":
            return image
        return self.graph.instructions[producer].operands[0]

    def _is_generated(self, tensor: int) -> bool:
        producer = self.producer.get(tensor)
        return producer is not None and self.graph.instructions[producer].name in GENERATED

    def _window_over_width(self, instruction: Instruction, image: int) -> Window | None:
        """The window over the dim that is divided or comes divided, None if a device has enough
        samples."""
        dims = self.images.dims.get(image)
        rule = instruction.rule
        if dims is None or rule is None:
            return None
        sharding = self.layout.shardings[image]
        shape = local_shape(self.graph.tensors[image].shape, sharding, self.mesh.sizes)
        width = max(d for d in range(len(shape)) if d not in dims)
        is_divided = (
            self._without_padding(image) in self.columns
            or self.compiler.image_pieces(shape, dims) != shape
        )
        if sharding[width] or not is_divided:
            return None
        factors = rule.operands[0][width]
        return next((window for factor, window in instruction.windows if factor in factors), None)
