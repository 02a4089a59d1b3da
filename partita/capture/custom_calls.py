"""Custom calls as instructions of the graph: kernels of libraries that StableHLO does not describe.

cuDNN's fused attention and its recurrent layers get the facts that a product has: a name, a
sharding rule, FLOPs. The rule of attention splits batch and heads. Positions stay whole, because
a query reads all keys. The rule of a recurrent layer splits the batch. A call that carries its own
rule (`jax.experimental.custom_partitioning`) is split by that. Any other call is replicated.

The local calls of a split one are written by `execute.local_calls`.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from jax.extend.mlir import ir

from partita.capture.mosaic import grid_of
from partita.capture.stablehlo import producer_of
from partita.errors import CaptureError
from partita.graph.flat import EDGE_KERNELS
from partita.graph.operator_graph import DimFactors, Rule, Tensor

ATTENTION = "fused_attention"
RECURRENCE = "recurrence"
KERNEL = "pallas_kernel"
BACKWARD_FLOPS = 2.5
"""FLOPs of the backward pass of fused attention over those of the forward pass.

Five products instead of two: it computes the scores again (FlashAttention-2, arXiv:2307.08691).
"""
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Kernel of JAX's splash attention -> its products. The two of the backward pass each compute the
scores again."""
EDGE_PREFIX = "partita_gnn_"
"""Begin of the targets of kernels over the edges of a graph (`gnn.kernels`)."""
EDGE_FLOPS = {
    "edge_sum": 1,
    "edge_largest": 1,
    "edge_largest_back": 1,
    "edge_attend": 7,
    "edge_attend_by_destination": 11,
    "edge_attend_by_source": 12,
    "edge_attend_dropped": 7,
    "edge_attend_dropped_by_destination": 11,
    "edge_attend_dropped_by_source": 12,
}
"""Kernel over edges -> FLOPs of an edge for each element of the row that it reads.

Attention: two for the sum of both rows and its slope, two for the product with a, one for adding
that up, and two for the weighted sum; its gradients compute the scores again.
"""
RECURRENT_DESCRIPTOR = struct.Struct("<iiiiifiiQQ")
"""jaxlib's descriptor of a recurrent layer, see `Recurrence`."""


def target_of(operation: Any) -> str:
    """The name of the function that a custom call calls."""
    return ir.StringAttr(operation.attributes["call_target_name"]).value


def call_name(operation: Any) -> str:
    """The name of a custom call's instruction in a graph."""
    target = target_of(operation)
    if target.startswith("__cudnn$fmha"):
        return ATTENTION
    if target.startswith("cudnn_rnn"):
        return RECURRENCE
    if target == "tpu_custom_call":
        return ATTENTION if _splash_products(operation) else KERNEL
    edge_kernel = "edge_" + target.removeprefix(EDGE_PREFIX)
    if target.startswith(EDGE_PREFIX) and edge_kernel in EDGE_KERNELS:
        return edge_kernel
    return "custom_call"


def check_call(operation: Any) -> None:
    """CaptureError for a custom call that XLA does not compile in a program for several devices."""
    if target_of(operation) == "ApproxTopK":
        raise CaptureError(
            "The step calls lax.approx_max_k or approx_min_k, which XLA does not compile in a "
            "program for several devices: use lax.top_k."
        )


def call_rule(operation: Any, operands: list[Tensor], results: list[Tensor]) -> Rule | None:
    """The sharding rule of a custom call without one of its own, None if it cannot be split."""
    name = call_name(operation)
    if target_of(operation) == "tpu_custom_call":
        return _grid_rule(operation, operands, results)
    if name == ATTENTION:
        return Attention.of(operation).rule(operation, operands, results)
    if name == RECURRENCE:
        return Recurrence.of(operation).rule(operands, results)
    if name in EDGE_KERNELS:
        return _parts_rule(operands, results)
    return None


def call_flops(operation: Any) -> float:
    """FLOPs of a custom call, 0 for one that is not known."""
    name = call_name(operation)
    if target_of(operation) == "tpu_custom_call":
        return _splash_flops(operation)
    if name == ATTENTION:
        return Attention.of(operation).flops
    if name == RECURRENCE:
        return Recurrence.of(operation).flops
    if name in EDGE_KERNELS:
        return _edge_flops(operation, name)
    return 0.0


# ---- kernels over the edges of a graph


def _parts_rule(operands: list[Tensor], results: list[Tensor]) -> Rule | None:
    """The sharding rule of a kernel over the edges of several parts of a graph.

    Dim 0 counts parts, and may be split. None for the kernel of one graph.
    """
    ids = operands[2]
    if len(ids.shape) < 2:
        return None
    by_operand = tuple(_first_dim(operand) for operand in operands)
    by_result = tuple(_first_dim(result) for result in results)
    return Rule((ids.shape[0],), by_operand, by_result)


def _first_dim(tensor: Tensor) -> DimFactors:
    """The dims of an array whose dim 0 is indexed by factor 0."""
    return ((0,), *[()] * (len(tensor.shape) - 1))


def _edge_flops(operation: Any, name: str) -> float:
    """FLOPs of a kernel over edges: some for each element of the row that an edge reads."""
    ids = operation.operands[2].type.shape
    row = operation.operands[EDGE_KERNELS[name][0]].type.shape[len(ids) :]
    return float(EDGE_FLOPS[name] * math.prod(ids) * math.prod(row))


# ---- attention


@dataclass(frozen=True)
class Attention:
    """A call of cuDNN's fused attention, forward or backward."""

    config: dict[str, Any]
    """Its backend configuration, as JAX writes it."""
    is_backward: bool
    has_bias: bool
    has_dropout: bool
    is_float8: bool
    batch: int
    heads: int
    kv_heads: int
    """Heads of keys and values; each serves `heads / kv_heads` heads of queries."""
    queries: int
    keys: int
    depth: int
    """Elements of a query and a key in one head."""
    value_depth: int

    @staticmethod
    def of(operation: Any) -> Attention:
        """The attention that a custom call of cuDNN computes."""
        target = target_of(operation)
        text = ir.StringAttr(operation.attributes["backend_config"]).value
        config = json.loads(text)["cudnn_fmha_backend_config"]
        is_backward = "Backward" in target
        batch, heads, queries, keys = map(int, config["intermediate_tensor_shape"]["dimensions"])
        key, value = (list(operation.operands[n].type.shape) for n in (1, 2))
        heads_dim = _heads_dim(config, is_backward)
        return Attention(
            config=config,
            is_backward=is_backward,
            has_bias="Bias" in target,
            has_dropout="Dropout" in target,
            is_float8="F8" in target,
            batch=batch,
            heads=heads,
            kv_heads=key[heads_dim],
            queries=queries,
            keys=keys,
            depth=key[3],
            value_depth=value[3],
        )

    @property
    def heads_dim(self) -> int:
        """The dim of queries, keys and values that counts heads."""
        return _heads_dim(self.config, self.is_backward)

    @property
    def is_split(self) -> bool:
        """Whether batch and heads may be split.

        Not so for packed sequences and paged keys, whose offsets count over all samples, and for
        float8, whose scales are maxima over all heads.
        """
        is_packed = self.config.get("max_seg_per_batch", 1) > 1
        return not (is_packed or self.config.get("is_paged_attention", False) or self.is_float8)

    @property
    def flops(self) -> float:
        """FLOPs of both products, half of them where a query sees only the keys before it."""
        keys: float = self.keys
        if "CAUSAL" in self.config["mask_type"]:
            keys /= 2
        window = self.config.get("sliding_window_length", 0)
        if window:
            keys = min(keys, window)
        pairs = self.batch * self.heads * self.queries * keys
        forward = 2.0 * pairs * (self.depth + self.value_depth)
        return forward * BACKWARD_FLOPS if self.is_backward else forward

    def rule(self, operation: Any, operands: list[Tensor], results: list[Tensor]) -> Rule | None:
        """The sharding rule: batch, key heads and query heads per key head may be split."""
        if not self.is_split:
            return None
        names = _AttentionFactors(self)
        query, key, value, out = names.arrays(heads_first=self.heads_dim == 1)
        statistics = ((names.batch,), names.heads, (names.query,))
        tail = list(operands[3:])
        operand_dims = [query, key, value]
        if self.is_backward:
            operand_dims += [statistics, out]
            tail = tail[2:]
        if self.has_bias:
            operand_dims.append(names.bias(tail.pop(0)))
        if self.is_backward:
            operand_dims.append(out)
            tail = tail[1:]
        operand_dims += [((names.batch,),) for _ in tail]
        result_query, result_key, result_value, result_out = names.arrays(heads_first=True)
        if not self.is_backward:
            result_dims = [result_out, statistics][: len(results) - 1]
        else:
            result_dims = [result_query, result_key, result_value]
            result_dims += [names.bias(result) for result in results[3:-1]]
        reduction: set[int] = set()
        for value, dims in zip(operation.results, result_dims, strict=False):
            if list(value.uses):
                reduction |= names.missing(dims)
        result_dims.append(_unsplit(results[-1]))
        return Rule(
            names.sizes,
            tuple(operand_dims),
            tuple(result_dims),
            tuple(sorted(reduction)),
            gathered=names.whole,
        )


def _heads_dim(config: dict[str, Any], is_backward: bool) -> int:
    """The dim of queries that counts heads: 1, or 2 where positions come first."""
    product = "bmm2_grad_gemm2" if is_backward else "bmm1"
    return int(config[f"{product}_dot_dimension_numbers"]["lhs_batch_dimensions"][1])


class _AttentionFactors:
    """The factors of attention's iteration space, by number, and the dims that they index."""

    batch, kv_heads, group, query, key, depth, value_depth = range(7)
    whole = (query, key, depth, value_depth)
    """Factors that stay whole."""

    def __init__(self, attention: Attention) -> None:
        self.sizes = (
            attention.batch,
            attention.kv_heads,
            attention.heads // attention.kv_heads,
            attention.queries,
            attention.keys,
            attention.depth,
            attention.value_depth,
        )
        self.heads = self._indexing(self.kv_heads, self.group)

    def _indexing(self, *factors: int) -> tuple[int, ...]:
        """Those of some factors that are larger than 1."""
        return tuple(factor for factor in factors if self.sizes[factor] > 1)

    def arrays(self, heads_first: bool) -> tuple[DimFactors, DimFactors, DimFactors, DimFactors]:
        """The dims of queries, keys, values and the output."""
        return (
            self._array(self.heads, self.query, self.depth, heads_first),
            self._array(self._indexing(self.kv_heads), self.key, self.depth, heads_first),
            self._array(self._indexing(self.kv_heads), self.key, self.value_depth, heads_first),
            self._array(self.heads, self.query, self.value_depth, heads_first),
        )

    def _array(
        self, heads: tuple[int, ...], position: int, element: int, heads_first: bool
    ) -> DimFactors:
        middle = (heads, (position,)) if heads_first else ((position,), heads)
        return ((self.batch,), *middle, (element,))

    def bias(self, bias: Tensor) -> DimFactors:
        """The dims of a bias or a mask; those of size 1 are the same for all samples or heads."""
        dims = ((self.batch,), self.heads, (self.query,), (self.key,))
        return tuple(dim if size > 1 else () for dim, size in zip(dims, bias.shape, strict=True))

    def missing(self, dims: DimFactors) -> set[int]:
        """The factors of batch and heads that do not index these dims.

        Where they are split, each device has a part of the sum.
        """
        indexed = {factor for dim in dims for factor in dim}
        return {self.batch, *self.heads} - indexed


# ---- kernels of Pallas for TPUs


def _grid_rule(operation: Any, operands: list[Tensor], results: list[Tensor]) -> Rule | None:
    """The sharding rule of a kernel: the independent coordinates of its grid may be split.

    Not those by which a result that is read is not numbered: each device would have a part of it.
    """
    tensors = [*operands, *results]
    config = ir.StringAttr(operation.attributes["backend_config"]).value
    grid = grid_of(config, [len(tensor.shape) for tensor in tensors])
    if grid is None:
        return None
    result_windows = grid.windows[len(operands) :]
    split = grid.independent
    for value, window in zip(operation.results, result_windows, strict=True):
        if list(value.uses):
            split &= {factor for dim in window for factor in dim}
    for tensor, window in zip(tensors, grid.windows, strict=True):
        for size, dim in zip(tensor.shape, window, strict=True):
            split -= {factor for factor in dim if grid.bounds[factor] != size}
    if not split:
        return None
    dims = [tuple(tuple(f for f in dim if f in split) for dim in w) for w in grid.windows]
    return Rule(grid.bounds, tuple(dims[: len(operands)]), tuple(dims[len(operands) :]))


def _splash_products(operation: Any) -> int:
    """The number of products in a kernel of splash attention, 0 for another kernel."""
    if "kernel_name" not in operation.attributes:
        return 0
    name = ir.StringAttr(operation.attributes["kernel_name"]).value
    for part, products in SPLASH_PRODUCTS.items():
        if name.startswith(f"splash_mha_{part}") or name.startswith(f"splash_mqa_{part}"):
            return products
    return 0


def _splash_flops(operation: Any) -> float:
    """FLOPs of a kernel of splash attention, without the blocks that its mask leaves out."""
    products = _splash_products(operation)
    if not products:
        return 0.0
    query, key = (list(operation.operands[n].type.shape) for n in (2, 3))
    pairs = math.prod(query[:-1]) * key[-2]
    return 2.0 * products * pairs * query[-1] * _computed_blocks(operation.operands[1])


def _computed_blocks(mask: Any) -> float:
    """The fraction of blocks that a block mask does not leave out, 1 if it is not constant."""
    constant = producer_of(mask)
    if constant is None or constant.name != "stablehlo.constant":
        return 1.0
    blocks = np.asarray(ir.DenseElementsAttr(constant.attributes["value"]))
    return float(np.count_nonzero(blocks) / max(1, blocks.size))


# ---- recurrent layers


@dataclass(frozen=True)
class Recurrence:
    """A call of a recurrent layer of cuDNN (an LSTM), forward or backward."""

    is_backward: bool
    inputs: int
    """Elements of one step of a sequence."""
    hidden: int
    """Elements of the state."""
    layers: int
    batch: int
    steps: int
    dropout: float
    is_bidirectional: int
    allows_tf32: int
    workspace: int
    """Bytes of scratch memory."""
    reserve: int
    """Bytes that the forward pass stores for the backward pass."""

    @staticmethod
    def of(operation: Any) -> Recurrence:
        """The layer that a custom call of jaxlib computes."""
        opaque = ir.DictAttr(operation.attributes["backend_config"])["opaque"]
        values = RECURRENT_DESCRIPTOR.unpack(ir.StringAttr(opaque).value_bytes)
        return Recurrence("bwd" in target_of(operation), *values)

    def descriptor(self) -> bytes:
        """The layer as jaxlib describes it to its kernel."""
        _, *values = astuple(self)
        return RECURRENT_DESCRIPTOR.pack(*values)

    @property
    def flops(self) -> float:
        """FLOPs of the four gates' products; the backward pass has two for each."""
        directions = 2 if self.is_bidirectional else 1
        inputs = self.inputs + (self.layers - 1) * directions * self.hidden
        weights = 4 * self.hidden * directions * (inputs + self.layers * self.hidden)
        forward = 2.0 * self.batch * self.steps * weights
        return 2 * forward if self.is_backward else forward

    def rule(self, operands: list[Tensor], results: list[Tensor]) -> Rule | None:
        """The sharding rule: the batch may be split, with the memory that the backward pass reads.

        None where that memory does not divide by the batch.
        """
        reserve = operands[8] if self.is_backward else results[4]
        if reserve.size % self.batch or self.batch == 1:
            return None
        batch, part = range(2)
        sizes = (self.batch, reserve.size // self.batch)
        sequence: DimFactors = ((batch,), (), ())
        state: DimFactors = ((), (batch,), ())
        stored: DimFactors = ((batch, part),)
        lengths: DimFactors = ((batch,),)
        whole: DimFactors = ((),)
        inputs = (sequence, state, state, whole)
        if not self.is_backward:
            return Rule(sizes, (*inputs, lengths), (sequence, state, state, whole, stored))
        gradients = (sequence, state, state)
        return Rule(
            sizes,
            (*gradients, *inputs, sequence, stored, whole, lengths),
            (*gradients, whole, whole),
            reduction=(batch,),
        )


def _unsplit(tensor: Tensor) -> DimFactors:
    return ((),) * len(tensor.shape)
