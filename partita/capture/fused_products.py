"""Fused projections as one product per slice, on accelerators.

A product whose columns are sliced (query, key and value of one matrix; gate and up of a gated
layer) cannot be split by columns: a device's share of all columns is no share of each slice. So

    slice(x W + b)                 becomes   x slice(W) + slice(b)
    concatenate(g, h) W^T          becomes   g slice(W)^T + h slice(W)^T
    x^T concatenate(g, h)          becomes   concatenate(x^T g, x^T h)

and devices exchange parts of weights instead of activations. A weight is sliced before it is
converted, so that one kernel does both, and its gradients are joined in the update. Gradients of
several products with a weight are added before they are joined.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.extend.mlir import ir

from partita.capture.instructions import dot_dims
from partita.capture.names import layer_path, location_name, phase_of
from partita.capture.stablehlo import elements_of, main_block, producer_of, short

DOT = "stablehlo.dot_general"
SLICE = "stablehlo.slice"
CONCATENATE = "stablehlo.concatenate"
PAD = "stablehlo.pad"
ADD = "stablehlo.add"
CONVERT = "stablehlo.convert"
BROADCAST = "stablehlo.broadcast_in_dim"
REDUCE = "stablehlo.reduce"
ELEMENTWISE = (ADD, CONVERT)
REARRANGING = (CONVERT, "stablehlo.transpose", "stablehlo.optimization_barrier")
"""Operations between a parameter and a product that reads it."""

Range = tuple[int, int]
"""First index, and one past the last."""


def split_fused_products(module: ir.Module) -> None:
    """Rewrites all fused projections of a module."""
    _Splitter(main_block(module)).run()


class _Splitter:
    """Rewrites the fused projections of a block."""

    def __init__(self, block: ir.Block) -> None:
        self.block = block
        self.slices: dict[tuple[Any, int, Range], Any] = {}
        """(weight, dim, range) -> that range of it."""

    def run(self) -> None:
        """Rewrites forward products first: the gradients of these alone are rewritten."""
        sliced = [operation.operands[0] for operation in self._operations(SLICE)]
        for value in dict.fromkeys(sliced):
            self._split_forward(value)
        if not self.slices:
            return
        for operation in self._operations(ADD):
            _join_pads(operation)
        for operation in self._operations(CONCATENATE):
            if self._is_fused_gradient(operation):
                self._distribute(operation)
        for operation in self._operations(ADD):
            _add_before_joining(operation)
        weights = self._weights()
        for weight in weights:
            _erase_unread(weight, weights)

    def _weights(self) -> dict[Any, None]:
        """The weights that are sliced, in order."""
        return dict.fromkeys(weight for weight, _, _ in self.slices)

    def _operations(self, name: str) -> list[Any]:
        return [op.operation for op in self.block if op.operation.name == name]

    # ---- the forward pass

    def _split_forward(self, value: Any) -> None:
        """Splits the products that compute a value, if all its readers are slices along a dim of
        their weights."""
        slices = [use.owner for use in value.uses]
        cut = _cut_of(slices, value.type.shape)
        if cut is None or not all(map(_is_forward, slices)):
            return
        if not _reads_weights(value, cut.dim, len(slices)):
            return
        for operation in sorted(slices, key=lambda one: _slice_range(one, cut.dim)):
            part = self._part(value, cut.dim, _slice_range(operation, cut.dim), operation)
            operation.results[0].replace_all_uses_with(part)
            operation.erase()
        _erase_unread(value, self._weights())

    def _part(self, value: Any, dim: int, part: Range, reader: Any) -> Any:
        """A range of a value along a dim, computed in front of a reader."""
        operation = producer_of(value)
        size = part[1] - part[0]
        if _reads_weights(value, dim, sum(1 for _ in value.uses)):
            operands = list(operation.operands)
            if operation.name == DOT:
                side, operand_dim = _free_operand(operation, dim)
                weight = operands[side]
                operands[side] = _weight_part(weight, operand_dim, part, reader)
                self.slices[weight, operand_dim, part] = operands[side]
            else:
                operands = [self._part(operand, dim, part, reader) for operand in operands]
            return _resized(operation, operands, dim, size, reader)
        if operation is not None and operation.name == BROADCAST:
            dims = list(ir.DenseI64ArrayAttr(operation.attributes["broadcast_dimensions"]))
            source = operation.operands[0]
            if dim in dims and source.type.shape[dims.index(dim)] > 1:
                source = _slice(source, dims.index(dim), part, operation, reader)
            return _resized(operation, [source], dim, size, reader)
        return _slice(value, dim, part, reader, reader)

    # ---- the backward pass

    def _is_fused_gradient(self, concatenation: Any) -> bool:
        """Whether a concatenation is the gradient of a product that was split, and all its readers
        can be split too."""
        dim = _dimension(concatenation)
        value = concatenation.results[0]
        if not _is_distributable(value, dim):
            return False
        products = [use.owner for use in value.uses if use.owner.name == DOT]
        contracting = []
        for product in products:
            side = 0 if product.operands[0] == value else 1
            weight_dim = _contracted_with(product, side, dim)
            if weight_dim >= 0:
                contracting.append((product.operands[1 - side], weight_dim))
        return bool(contracting) and all(
            (weight, weight_dim, part) in self.slices
            for weight, weight_dim in contracting
            for part in _ranges(concatenation)
        )

    def _distribute(self, concatenation: Any) -> None:
        """Replaces the readers of a concatenation by readers of its parts."""
        dim = _dimension(concatenation)
        value = concatenation.results[0]
        for reader in [use.owner for use in value.uses]:
            side = 0 if reader.operands[0] == value else 1
            if reader.name == DOT and _contracted_with(reader, side, dim) >= 0:
                result = self._sum_of_products(reader, side, concatenation)
            else:
                result = _joined_results(reader, side, concatenation)
            is_converted = reader.name == CONVERT
            reader.results[0].replace_all_uses_with(result)
            reader.erase()
            joined = producer_of(result)
            if is_converted:
                self._distribute(joined)
            elif joined.name == CONCATENATE:
                _move_to_update(result)
        _erase_unread(value)

    def _sum_of_products(self, product: Any, side: int, concatenation: Any) -> Any:
        """A product that contracts a concatenated dim, as the sum of the products of the parts."""
        other = product.operands[1 - side]
        other_dim = _contracted_with(product, side, _dimension(concatenation))
        total = None
        for part, place in zip(concatenation.operands, _ranges(concatenation), strict=True):
            operands = [part, part]
            operands[1 - side] = self.slices[other, other_dim, place]
            one = _clone(product, operands, product.results[0].type, product)
            if total is None:
                total = one
                continue
            addition = ir.Operation.create(
                ADD,
                results=[one.type],
                operands=[total, one],
                loc=product.location,
                ip=ir.InsertionPoint(product),
            )
            total = addition.results[0]
        return total


# ---- slices in the forward pass


def _is_forward(operation: Any) -> bool:
    """Whether an operation is of the forward pass, or repeats it (`jax.checkpoint`)."""
    name = location_name(operation)
    return phase_of(name) == "forward" or "rematted_computation" in name


def _weight_part(weight: Any, dim: int, part: Range, product: Any) -> Any:
    """A range of a weight for a product."""
    conversion = producer_of(weight)
    if conversion is None or conversion.name != CONVERT:
        return _slice(weight, dim, part, product, product)
    whole = _slice(conversion.operands[0], dim, part, conversion, product)
    return _resized(conversion, [whole], dim, part[1] - part[0], product)


@dataclass(frozen=True)
class _Cut:
    """A dim in consecutive parts."""

    dim: int
    ranges: tuple[Range, ...]

    @property
    def covers(self) -> bool:
        """Whether each part begins where the last one ends, the first one at 0."""
        ends = [0, *(end for _, end in self.ranges)]
        return all(first == end for (first, _), end in zip(self.ranges, ends, strict=False))


def _cut_of(slices: Sequence[Any], shape: Sequence[int]) -> _Cut | None:
    """The cut of a value by slices, None if they do not cut one dim in consecutive parts."""
    if len(slices) < 2 or any(operation.name != SLICE for operation in slices):
        return None
    dims = set()
    for operation in slices:
        if any(step != 1 for step in ir.DenseI64ArrayAttr(operation.attributes["strides"])):
            return None
        sizes = operation.results[0].type.shape
        dims.update(dim for dim, size in enumerate(shape) if sizes[dim] != size)
    if len(dims) != 1:
        return None
    (dim,) = dims
    ranges = tuple(sorted(_slice_range(operation, dim) for operation in slices))
    cut = _Cut(dim, ranges)
    return cut if cut.covers and ranges[-1][1] == shape[dim] else None


def _slice_range(operation: Any, dim: int) -> Range:
    first = ir.DenseI64ArrayAttr(operation.attributes["start_indices"])[dim]
    end = ir.DenseI64ArrayAttr(operation.attributes["limit_indices"])[dim]
    return first, end


def _reads_weights(value: Any, dim: int, uses: int) -> bool:
    """Whether a value is a product with a weight, a dim of which is the value's dim, or is added up
    or converted from one.

    `uses`: number of reads of the value by those that are replaced: no other may read it.
    """
    operation = producer_of(value)
    if operation is None or sum(1 for _ in value.uses) != uses:
        return False
    if operation.name in ELEMENTWISE:
        return any(_reads_weights(operand, dim, 1) for operand in operation.operands)
    if operation.name != DOT:
        return False
    side, _ = _free_operand(operation, dim)
    return side >= 0 and _is_parameter(operation.operands[side])


# ---- gradients in the backward pass


def _join_pads(addition: Any) -> None:
    """Replaces the sum of padded values that fill a dim, as slices have it for a gradient, by a
    concatenation."""
    pads = _added_pads(addition.results[0], addition)
    if pads is None or phase_of(location_name(addition)) != "backward":
        return
    shape = list(addition.results[0].type.shape)
    places = []
    for pad in pads:
        place = _pad_place(pad)
        if place is None:
            return
        places.append((place, pad.operands[0]))
    places.sort(key=lambda one: one[0])
    dims = {dim for (dim, _), _ in places}
    cut = _Cut(min(dims), tuple(part for (_, part), _ in places))
    if len(dims) > 1 or not cut.covers or cut.ranges[-1][1] != shape[cut.dim]:
        return
    parts = [part for _, part in places]
    joined = _concatenate(parts, cut.dim, addition.results[0].type, addition)
    addition.results[0].replace_all_uses_with(joined)
    _erase_unread(addition.results[0])


def _added_pads(value: Any, reader: Any) -> list[Any] | None:
    """The pads whose sum a value is, None if it is another one or is read elsewhere."""
    operation = producer_of(value)
    if operation is None:
        return None
    if operation is not reader and sum(1 for _ in value.uses) != 1:
        return None
    if operation.name == PAD:
        return [operation]
    if operation.name != ADD:
        return None
    pads = []
    for operand in operation.operands:
        added = _added_pads(operand, reader)
        if added is None:
            return None
        pads += added
    return pads


def _pad_place(pad: Any) -> tuple[int, Range] | None:
    """(dim, range) of a value in its padded form, None unless zeros surround it in one dim."""
    zero = elements_of(pad.operands[1])
    if zero is None or np.any(np.asarray(zero)):
        return None
    low = list(ir.DenseI64ArrayAttr(pad.attributes["edge_padding_low"]))
    high = list(ir.DenseI64ArrayAttr(pad.attributes["edge_padding_high"]))
    if any(ir.DenseI64ArrayAttr(pad.attributes["interior_padding"])):
        return None
    dims = [dim for dim, padding in enumerate(zip(low, high, strict=True)) if any(padding)]
    if len(dims) != 1 or min(low[dims[0]], high[dims[0]]) < 0:
        return None
    (dim,) = dims
    return dim, (low[dim], low[dim] + pad.operands[0].type.shape[dim])


def _is_distributable(value: Any, dim: int) -> bool:
    """Whether all readers of a concatenation can read its parts."""
    for use in value.uses:
        reader = use.owner
        if reader.name == DOT:
            side = 0 if reader.operands[0] == value else 1
            batch, _ = dot_dims(reader, ("lhs", "rhs")[side])
            if dim in batch or reader.operands[0] == reader.operands[1]:
                return False
        elif reader.name == REDUCE:
            if dim in ir.DenseI64ArrayAttr(reader.attributes["dimensions"]):
                return False
            if len(reader.results) > 1:
                return False
        elif reader.name != CONVERT or not _is_distributable(reader.results[0], dim):
            return False
    return True


def _joined_results(reader: Any, side: int, concatenation: Any) -> Any:
    """The result of a reader that keeps a concatenated dim, as the concatenation of the results for
    the parts."""
    dim = _dimension(concatenation)
    result_dim = _kept_dim(reader, side, dim)
    results = []
    for part in concatenation.operands:
        operands = list(reader.operands)
        operands[side] = part
        size = part.type.shape[dim]
        results.append(_resized(reader, operands, result_dim, size, reader))
    return _concatenate(results, result_dim, reader.results[0].type, reader)


def _move_to_update(gradient: Any) -> None:
    """Gives the operation of a joined gradient, and conversions of it, a name of the update."""
    operation = producer_of(gradient)
    path = layer_path(location_name(operation))
    operation.location = ir.Location.name(f"{path}/{short(operation.name)}")
    for use in gradient.uses:
        if use.owner.name == CONVERT:
            _move_to_update(use.owner.results[0])


def _add_before_joining(addition: Any) -> None:
    """Replaces the sum of two joined gradients of a weight by one that joins the sums of the parts.

    A weight of several products (an unrolled recurrent layer) has such sums. Devices sum each part
    once, because no concatenation is between its products and the sum.
    """
    left, right = map(_joined_gradient, addition.operands)
    if left is None or right is None or phase_of(location_name(addition)) != "backward":
        return
    dim = _dimension(left)
    if dim != _dimension(right) or _ranges(left) != _ranges(right):
        return
    result = addition.results[0]
    sums = []
    for pair in zip(left.operands, right.operands, strict=True):
        parts = []
        for part, operand in zip(pair, addition.operands, strict=True):
            conversion = producer_of(operand)
            if conversion.name == CONVERT:
                kind = _with_size(operand.type, dim, part.type.shape[dim])
                part = _clone(conversion, [part], kind, addition)
            parts.append(part)
        sums.append(_clone(addition, parts, parts[0].type, addition))
    total = _concatenate(sums, dim, result.type, addition)
    producer_of(total).location = left.location
    result.replace_all_uses_with(total)
    _erase_unread(result)


def _joined_gradient(value: Any) -> Any:
    """The concatenation that only this value is, or is converted from; None for another value."""
    operation = producer_of(value)
    if operation is not None and operation.name == CONVERT and _is_read_once(value):
        value = operation.operands[0]
        operation = producer_of(value)
    if operation is None or operation.name != CONCATENATE or not _is_read_once(value):
        return None
    return operation if phase_of(location_name(operation)) == "update" else None


def _is_read_once(value: Any) -> bool:
    return sum(1 for _ in value.uses) == 1


def _kept_dim(reader: Any, side: int, dim: int) -> int:
    """The dim of a reader's result that a dim of its operand becomes."""
    if reader.name == CONVERT:
        return dim
    if reader.name == REDUCE:
        reduced = list(ir.DenseI64ArrayAttr(reader.attributes["dimensions"]))
        return dim - sum(1 for one in reduced if one < dim)
    return _result_dims(reader, side)[dim]


# ---- dims


def _result_dims(product: Any, side: int) -> dict[int, int]:
    """Free dim of a side of a product -> dim of the result."""
    left_batch, left_contracted = dot_dims(product, "lhs")
    free = []
    for name, operand in zip(("lhs", "rhs"), product.operands, strict=True):
        batch, contracted = dot_dims(product, name)
        dims = range(len(operand.type.shape))
        free.append([dim for dim in dims if dim not in (*batch, *contracted)])
    first = len(left_batch) + (len(free[0]) if side else 0)
    return {dim: first + position for position, dim in enumerate(free[side])}


def _free_operand(product: Any, dim: int) -> tuple[int, int]:
    """(side, dim of the operand) of a free dim of a product's result, (-1, -1) for a batch dim."""
    for side in (0, 1):
        for operand_dim, result_dim in _result_dims(product, side).items():
            if result_dim == dim:
                return side, operand_dim
    return -1, -1


def _contracted_with(product: Any, side: int, dim: int) -> int:
    """The dim of the other side that a product contracts with a dim of one side, -1 if none."""
    _, contracted = dot_dims(product, ("lhs", "rhs")[side])
    _, other = dot_dims(product, ("rhs", "lhs")[side])
    return other[contracted.index(dim)] if dim in contracted else -1


def _dimension(concatenation: Any) -> int:
    return ir.IntegerAttr(concatenation.attributes["dimension"]).value


def _ranges(concatenation: Any) -> tuple[Range, ...]:
    """The ranges of the operands in the result."""
    dim = _dimension(concatenation)
    ranges = []
    first = 0
    for operand in concatenation.operands:
        end = first + operand.type.shape[dim]
        ranges.append((first, end))
        first = end
    return tuple(ranges)


# ---- operations


def _is_parameter(value: Any) -> bool:
    """Whether a value is an argument of the step, rearranged or converted."""
    operation = producer_of(value)
    while operation is not None:
        if operation.name not in REARRANGING:
            return False
        value = operation.operands[list(operation.results).index(value)]
        operation = producer_of(value)
    return True


def _with_size(kind: Any, dim: int, size: int) -> Any:
    """A tensor type with another size of a dim."""
    shape = list(kind.shape)
    shape[dim] = size
    return ir.RankedTensorType.get(shape, kind.element_type)


def _clone(operation: Any, operands: Sequence[Any], kind: Any, reader: Any) -> Any:
    """The result of an operation like another one, of other operands, in front of a reader."""
    copy = operation.clone(ir.InsertionPoint(reader)).operation
    for position, operand in enumerate(operands):
        copy.operands[position] = operand
    copy.results[0].set_type(kind)
    return copy.results[0]


def _resized(operation: Any, operands: Sequence[Any], dim: int, size: int, reader: Any) -> Any:
    """The result of an operation like another one, of operands that give a dim another size."""
    return _clone(operation, operands, _with_size(operation.results[0].type, dim, size), reader)


def _slice(value: Any, dim: int, part: Range, named: Any, reader: Any) -> Any:
    """A range of a value, in front of a reader, with the name of an operation."""
    shape = list(value.type.shape)
    starts = [0] * len(shape)
    limits = list(shape)
    starts[dim], limits[dim] = part
    operation = ir.Operation.create(
        SLICE,
        results=[_with_size(value.type, dim, part[1] - part[0])],
        operands=[value],
        attributes={
            "start_indices": ir.DenseI64ArrayAttr.get(starts),
            "limit_indices": ir.DenseI64ArrayAttr.get(limits),
            "strides": ir.DenseI64ArrayAttr.get([1] * len(shape)),
        },
        loc=named.location,
        ip=ir.InsertionPoint(reader),
    )
    return operation.results[0]


def _concatenate(parts: Sequence[Any], dim: int, kind: Any, reader: Any) -> Any:
    operation = ir.Operation.create(
        CONCATENATE,
        results=[kind],
        operands=parts,
        attributes={"dimension": ir.IntegerAttr.get(ir.IntegerType.get_signless(64), dim)},
        loc=reader.location,
        ip=ir.InsertionPoint(reader),
    )
    return operation.results[0]


def _erase_unread(value: Any, kept: Collection[Any] = ()) -> None:
    """Erases the operation of a value that nothing reads, and those of its operands except for
    `kept` ones."""
    operation = producer_of(value)
    if operation is None or any(True for result in operation.results for _ in result.uses):
        return
    operands = list(operation.operands)
    operation.erase()
    for operand in dict.fromkeys(operands):
        if operand not in kept:
            _erase_unread(operand, kept)
