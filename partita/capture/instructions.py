"""Facts of one StableHLO instruction: sharding rule, FLOPs, windows.

Also the dims of products and convolutions.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import sdy

from partita.capture.custom_calls import call_flops, call_rule, check_call
from partita.graph.operator_graph import DimFactors, Rule, Tensor, Window

TRANSCENDENTAL = {
    "exponential",
    "exponential_minus_one",
    "log",
    "log_plus_one",
    "logistic",
    "power",
    "sqrt",
    "rsqrt",
    "cbrt",
    "tanh",
    "sine",
    "cosine",
    "tan",
    "atan2",
    "erf",
    "erf_inv",
}
FREE = {
    "constant",
    "iota",
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "bitcast_convert",
    "slice",
    "concatenate",
    "pad",
    "reverse",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "get_tuple_element",
    "tuple",
    "return",
    "optimization_barrier",
    "copy",
    "while",
    "case",
    "if",
    "sort",
    "custom_call",
    "create_token",
    "dynamic_reshape",
    "get_dimension_size",
}
"""Instructions without FLOPs."""


def integer_constant(constant: Any) -> int | None:
    """The value of a constant that is one integer, else None."""
    kind = constant.results[0].type
    if list(kind.shape) or str(kind.element_type) not in ("i32", "i64", "ui32"):
        return None
    return int(np.asarray(ir.DenseElementsAttr(constant.attributes["value"])).item())


def adds(operation: Any, name: str) -> bool:
    """Whether elements that meet in a result are added up."""
    if name not in ("reduce", "reduce_window", "scatter", "select_and_scatter"):
        return True
    body = operation.regions[-1].blocks[0]
    return [op.operation.name for op in body] == ["stablehlo.add", "stablehlo.return"]


def full_precision(operation: Any) -> bool:
    """Whether a product asks for the highest precision."""
    if "precision_config" not in operation.attributes:
        return False
    return "HIGHEST" in str(operation.attributes["precision_config"])


def integer_attribute(operation: Any, key: str) -> int:
    """An integer attribute, 1 by default."""
    return int(operation.attributes[key]) if key in operation.attributes else 1


def _list_attribute(
    operation: Any,
    key: str,
    length: int,
) -> list[int]:
    """A list of integers, ones by default."""
    if key not in operation.attributes:
        return [1] * length
    return list(ir.DenseI64ArrayAttr(operation.attributes[key]))


def _padding(operation: Any, rank: int) -> list[tuple[int, int]]:
    """(low, high) padding per dim, zeros by default."""
    if "padding" not in operation.attributes:
        return [(0, 0)] * rank
    values = np.asarray(ir.DenseIntElementsAttr(operation.attributes["padding"]))
    return [(int(low), int(high)) for low, high in values.reshape(-1, 2)]


# ---- rules


def rule_of(
    operation: Any,
    name: str,
    operands: list[Tensor],
    results: list[Tensor],
    shardy_rules: dict[Any, Rule],
) -> Rule | None:
    """The sharding rule of an instruction, None if it has none.

    It is Shardy's, corrected for scatters. `shardy_rules` caches Shardy's by their attribute:
    thousands of instructions have the same.
    """
    if operation.name == "stablehlo.custom_call":
        check_call(operation)
    if "sdy.sharding_rule" in operation.attributes:
        attribute = operation.attributes["sdy.sharding_rule"]
        if attribute not in shardy_rules:
            shardy_rules[attribute] = _shardy_rule(attribute)
        rule = shardy_rules[attribute]
        if name == "select_and_scatter":
            return _select_and_scatter_rule(operation, operands, rule)
        if name == "scatter":
            return _scatter_rule(operation, operands, rule)
        if name == "convolution" and integer_attribute(operation, "batch_group_count") > 1:
            return _batch_grouped_rule(operation, rule)
        if name == "reduce" and not _has_all_reduce(operation):
            return dataclasses.replace(rule, reduction=(), gathered=rule.gathered + rule.reduction)
        return rule
    if operation.name == "stablehlo.custom_call":
        return call_rule(operation, operands, results)
    if name == "iota":
        return Rule(results[0].shape, (), (_identity(len(results[0].shape)),))
    shaped = [tensor for tensor in operands + results if tensor.shape]
    if (name in FREE and name != "optimization_barrier") or not shaped:
        return None
    shape = shaped[0].shape
    if any(tensor.shape != shape for tensor in shaped):
        return None
    # CHLO's element-wise functions, which Shardy meets only when they are expanded.
    mapping = _identity(len(shape))
    return Rule(
        shape,
        tuple(mapping if tensor.shape else () for tensor in operands),
        tuple(mapping if tensor.shape else () for tensor in results),
    )


def _batch_grouped_rule(operation: Any, rule: Rule) -> Rule:
    """The rule of a convolution with groups of samples, whose result's samples are not split.

    XLA aborts the process where they are: the image has them inside each group.
    """
    samples = rule.results[0][convolution_dims(operation)["out"][0]]
    return dataclasses.replace(rule, gathered=tuple(sorted({*rule.gathered, *samples})))


def _has_all_reduce(operation: Any) -> bool:
    """Whether XLA can combine the results of a reduction over devices.

    It has no all-reduce of bits of integers, nor of a computation of the user's own
    (`lax.reduce(x, -jnp.inf, jnp.logaddexp, (0,))`), unless there are several results.
    """
    if len(operation.results) > 1:
        return True
    names = [op.operation.name.removeprefix("stablehlo.") for op in operation.regions[0].blocks[0]]
    combined = {"add", "multiply", "maximum", "minimum"}
    if str(operation.results[0].type.element_type) == "i1":
        combined |= {"and", "or"}
    return len(names) == 2 and names[0] in combined


def _identity(rank: int) -> DimFactors:
    """The mapping of every dim to a factor of its own."""
    return tuple((dim,) for dim in range(rank))


def _shardy_rule(attribute: Any) -> Rule:
    """Shardy's rule in an attribute."""
    rule = sdy.OpShardingRuleAttr(attribute)
    return Rule(
        tuple(rule.factor_sizes),
        _shardy_mappings(rule.operand_mappings),
        _shardy_mappings(rule.result_mappings),
        tuple(rule.reduction_factors),
        tuple(rule.permutation_factors),
        tuple(rule.need_replication_factors),
    )


def _shardy_mappings(attributes: Sequence[Any]) -> tuple[DimFactors, ...]:
    mappings = []
    for attribute in attributes:
        dims = sdy.TensorMappingAttr(attribute).dim_mappings
        mappings.append(tuple(tuple(sdy.DimMappingAttr(dim).factor_indices) for dim in dims))
    return tuple(mappings)


def _select_and_scatter_rule(
    operation: Any,
    operands: list[Tensor],
    rule: Rule,
) -> Rule:
    """The rule of the backward pass of pooling by maximum.

    Shardy names the dims of operand and source apart. Where windows and strides have equal length,
    a part of the source belongs to a part of the operand, and they are one factor. Elsewhere XLA
    would exchange halos of both, back and forth, so these dims stay whole.
    """
    windows = pooling_windows(operation, operands[0].shape)
    source_factor: dict[int, int] = {}
    """Factor of the operand -> that of the source."""
    whole = set(rule.gathered) | set(rule.halo)
    mappings = zip(windows, rule.operands[0], rule.operands[1], strict=True)
    for dim, (window, operand_dim, source_dim) in enumerate(mappings):
        is_aligned = (
            window.step == window.reach
            and window.low == 0
            and window.size == window.count * window.step
        )
        if is_aligned and operand_dim != source_dim and operands[1].shape[dim] > 1:
            source_factor[operand_dim[0]] = source_dim[0]
            whole -= {operand_dim[0], source_dim[0]}

    def merged(mapping: DimFactors) -> DimFactors:
        return tuple(tuple(source_factor.get(f, f) for f in dim) for dim in mapping)

    return dataclasses.replace(
        rule,
        operands=tuple(merged(mapping) for mapping in rule.operands),
        results=tuple(merged(mapping) for mapping in rule.results),
        halo=tuple(source_factor.values()),
        gathered=tuple(sorted(whole)),
    )


def _scatter_rule(
    operation: Any,
    operands: list[Tensor],
    rule: Rule,
) -> Rule:
    """The rule of a scatter, whose scattered dims must stay whole if there is only one index.

    XLA's partitioner writes the wrong rows there if the operand has just been split (seen on jax
    0.10.2, CPU: `x.at[5].set(v)` with x constrained to be split by rows). With two indices or more
    it is right.
    """
    scattered = re.search(
        r"scatter_dims_to_operand_dims = \[([\d, ]*)\]",
        str(operation.attributes["scatter_dimension_numbers"]),
    )
    if scattered is None:
        return rule
    updates = len(operands) - 1
    indices = updates // 2
    index_length = len(scattered.group(1).split(","))
    if operands[indices].size > index_length:
        return rule
    updated = {factor for dim in rule.operands[updates] for factor in dim}
    whole = tuple(
        factor
        for dim in rule.operands[0]
        for factor in dim
        if factor not in updated and factor not in rule.gathered
    )
    return dataclasses.replace(rule, gathered=rule.gathered + whole)


# ---- FLOPs


def flops_of(
    operation: Any,
    name: str,
    operands: list[Tensor],
    results: list[Tensor],
) -> float:
    """FLOPs by XLA's counting (HloCostAnalysis).

    Products count as 2, element-wise operations as 1, transcendentals and moves as 0.
    """
    if name == "dot_general":
        _, contracted = dot_dims(operation, "lhs")
        inner = math.prod(operands[0].shape[dim] for dim in contracted)
        return 2.0 * results[0].size * inner
    if name == "convolution":
        return _convolution_flops(operation, operands, results)
    if name == "reduce":
        result_size = sum(result.size for result in results)
        return float(sum(operand.size for operand in operands[: len(results)]) - result_size)
    if name == "reduce_window":
        result_size = sum(result.size for result in results)
        return float(result_size * (_window_size(operation) - 1))
    if name == "select_and_scatter":
        return float(operands[1].size * _window_size(operation))
    if name == "scatter":
        return float(operands[-1].size)
    if operation.name == "stablehlo.custom_call":
        return call_flops(operation)
    if name in FREE or name in TRANSCENDENTAL or name.startswith("rng") or not results:
        return 0.0
    return float(results[0].size)


def _window_size(operation: Any) -> int:
    """Elements of a pooling window."""
    return math.prod(ir.DenseI64ArrayAttr(operation.attributes["window_dimensions"]))


def _convolution_flops(
    operation: Any,
    operands: list[Tensor],
    results: list[Tensor],
) -> float:
    """FLOPs of a convolution.

    Products with padding, or with the holes of a dilated input, do not count.
    """
    dims = convolution_dims(operation)
    image = operands[0].shape
    kernel = operands[1].shape
    out = results[0].shape
    pairs = 1
    """Pairs of an output position and a kernel position that meet an element of the input."""
    windows = convolution_window(operation, len(dims["lhs"]) - 2)
    for spatial, window in enumerate(windows, start=2):
        size = image[dims["lhs"][spatial]]
        out_positions = np.arange(out[dims["out"][spatial]])[:, None]
        kernel_positions = np.arange(kernel[dims["rhs"][spatial]])
        position = (
            out_positions * window.stride - window.low + kernel_positions * window.kernel_dilation
        )
        end = (size - 1) * window.input_dilation + 1
        is_element = position % window.input_dilation == 0
        pairs *= int((is_element & (position >= 0) & (position < end)).sum())
    batch = out[dims["out"][0]]
    batch_groups = integer_attribute(operation, "batch_group_count")
    samples = max(1, image[dims["lhs"][0]] // batch_groups // max(1, batch))
    return 2.0 * pairs * batch * out[dims["out"][1]] * kernel[dims["rhs"][1]] * samples


# ---- dims and windows


def dot_dims(operation: Any, side: str) -> tuple[list[int], list[int]]:
    """The batching and the contracting dims of one side ("lhs", "rhs") of a product."""
    text = str(operation.attributes["dot_dimension_numbers"])
    batching = re.search(rf"{side}_batching_dimensions = \[([\d, ]*)\]", text)
    contracting = re.search(rf"{side}_contracting_dimensions = \[([\d, ]*)\]", text)
    return _integers(batching), _integers(contracting)


def _integers(match: re.Match[str] | None) -> list[int]:
    return [int(number) for number in match.group(1).split(",")] if match else []


def convolution_dims(operation: Any) -> dict[str, list[int]]:
    """The dims of a convolution's 'lhs', 'rhs' and 'out'.

    Each lists batch or output, feature or input, then the spatial dims.
    """
    text = str(operation.attributes["dimension_numbers"])
    match = re.search(r"\[([^\]]*)\]x\[([^\]]*)\]->\[([^\]]*)\]", text)
    assert match, text
    dims = {}
    for key, letters, group in (("lhs", "bf", 1), ("rhs", "oi", 2), ("out", "bf", 3)):
        names = [name.strip() for name in match.group(group).split(",")]
        spatial = [names.index(str(n)) for n in range(len(names) - 2)]
        dims[key] = [names.index(letters[0]), names.index(letters[1]), *spatial]
    return dims


class ConvolutionWindow(NamedTuple):
    """The window of a convolution over one spatial dim."""

    stride: int
    low: int
    """Padding before the first element."""
    high: int
    """Padding after the last element."""
    input_dilation: int
    kernel_dilation: int


def convolution_window(operation: Any, rank: int) -> list[ConvolutionWindow]:
    """The windows of a convolution over `rank` spatial dims."""
    strides = _list_attribute(operation, "window_strides", rank)
    padding = _padding(operation, rank)
    input_dilations = _list_attribute(operation, "lhs_dilation", rank)
    kernel_dilations = _list_attribute(operation, "rhs_dilation", rank)
    return [
        ConvolutionWindow(strides[i], *padding[i], input_dilations[i], kernel_dilations[i])
        for i in range(rank)
    ]


def windows_of(
    operation: Any,
    name: str,
    rule: Rule | None,
) -> tuple[tuple[int, Window], ...]:
    """The factors that move a window over a dim of operand 0, with their windows."""
    if rule is None:
        return ()
    windows: dict[int, Window] = {}
    if name == "convolution":
        windows = _convolution_windows(operation, rule)
    elif name in ("reduce_window", "select_and_scatter"):
        shape = tuple(operation.operands[0].type.shape)
        pooling = pooling_windows(operation, shape)
        for factors, window in zip(rule.operands[0], pooling, strict=True):
            if factors and factors[0] in rule.halo:
                windows[factors[0]] = window
    return tuple(sorted(windows.items()))


def _convolution_windows(operation: Any, rule: Rule) -> dict[int, Window]:
    """Factor -> window of a convolution.

    Positions of a window are those of the result. In a weight gradient they are those of the second
    operand: there every element of the result is one place of the window.
    """
    dims = convolution_dims(operation)
    image = list(operation.operands[0].type.shape)
    kernel = list(operation.operands[1].type.shape)
    out = list(operation.results[0].type.shape)
    windows = {}
    rank = len(dims["lhs"]) - 2
    for spatial, window in enumerate(convolution_window(operation, rank), start=2):
        image_dim = dims["lhs"][spatial]
        kernel_dim = dims["rhs"][spatial]
        out_dim = dims["out"][spatial]
        factors = rule.operands[0][image_dim][:1]
        if not factors:
            continue
        if factors == rule.results[0][out_dim][:1]:
            windows[factors[0]] = Window(
                image[image_dim],
                out[out_dim],
                window.stride,
                window.low,
                (kernel[kernel_dim] - 1) * window.kernel_dilation + 1,
                window.input_dilation,
            )
        elif factors == rule.operands[1][kernel_dim][:1]:
            windows[factors[0]] = Window(
                image[image_dim],
                kernel[kernel_dim],
                window.kernel_dilation,
                window.low,
                (out[out_dim] - 1) * window.stride + 1,
                window.input_dilation,
            )
    return windows


def pooling_windows(operation: Any, shape: Sequence[int]) -> list[Window]:
    """Per dim of operand 0, the window of a reduce_window or select_and_scatter."""
    rank = len(shape)
    sizes = _list_attribute(operation, "window_dimensions", rank)
    strides = _list_attribute(operation, "window_strides", rank)
    bases = _list_attribute(operation, "base_dilations", rank)
    dilations = _list_attribute(operation, "window_dilations", rank)
    padding = _padding(operation, rank)
    windows = []
    for dim in range(rank):
        low, high = padding[dim]
        reach = (sizes[dim] - 1) * dilations[dim] + 1
        padded = (shape[dim] - 1) * bases[dim] + 1 + low + high
        count = (padded - reach) // strides[dim] + 1
        windows.append(
            Window(
                shape[dim],
                count,
                strides[dim],
                low,
                reach,
                bases[dim],
            )
        )
    return windows
