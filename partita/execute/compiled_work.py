"""FLOPs, fusions and estimated cycles of a compiled program, counted in its text.

XLA:GPU counts no FLOPs, and the others count a loop's body once. The counting is XLA's
(HloCostAnalysis), as for a captured step: products count as 2, element-wise operations as 1,
transcendentals and moves as 0. Products and convolutions that the compiler gave to cuBLAS and cuDNN
count by their shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.execute.emitted import SCATTERING, chain_of
from partita.execute.hlo import HloModule, HloShape, Visit

ELEMENTWISE = {
    "abs",
    "add",
    "and",
    "ceil",
    "clamp",
    "compare",
    "convert",
    "divide",
    "floor",
    "is-finite",
    "maximum",
    "minimum",
    "multiply",
    "negate",
    "not",
    "or",
    "popcnt",
    "remainder",
    "round-nearest-afz",
    "round-nearest-even",
    "select",
    "shift-left",
    "shift-right-arithmetic",
    "shift-right-logical",
    "sign",
    "subtract",
    "xor",
}
"""Operations that count 1 per element."""
FMHA_FORWARD = 2
"""Matrix products of a fused attention: scores, and their products with the values."""
FMHA_BACKWARD = 5


@dataclass(frozen=True)
class CompiledWork:
    """Work of one device in a run of a compiled program."""

    flops: float
    product_flops: float
    """Of matrix products, convolutions and attention."""
    fusions: int
    """Kernels that the compiler fused."""
    cycles: float
    """Estimated by XLA:TPU, 0 by others."""


def work_of(module: HloModule) -> CompiledWork:
    """The work of a compiled program, loops with their trip counts."""
    products = 0.0
    others = 0.0
    fusions = 0
    cycles = 0.0
    chains: set[tuple[str, int]] = set()
    for visit in module.visits():
        if _is_repeated(visit, chains):
            continue
        products += product_flops(module, visit) * visit.trips
        others += _other_flops(module, visit) * visit.trips
        if not visit.is_fused:
            fusions += visit.instruction.opcode == "fusion"
            estimate = re.search(r'"estimated_cycles":"(\d+)"', visit.instruction.line)
            cycles += int(estimate[1]) * visit.trips if estimate else 0
    return CompiledWork(products + others, products, fusions, cycles)


def _is_repeated(visit: Visit, chains: set[tuple[str, int]]) -> bool:
    """Whether an asynchronous collective was counted before, by its chain. Adds its chain."""
    chain = chain_of(visit.instruction)
    if not chain:
        return False
    key = (chain, visit.trips)
    was_counted = key in chains
    chains.add(key)
    return was_counted


def product_flops(module: HloModule, visit: Visit) -> float:
    """FLOPs of a matrix product, a convolution or an attention; 0 for other instructions."""
    instruction = visit.instruction
    line = instruction.line
    if instruction.opcode == "dot":
        contracted = _listed(r"lhs_contracting_dims=\{([\d,]*)\}", line)
        return _dot_flops(module.operand_shapes(visit), instruction.shapes, contracted)
    if instruction.opcode == "convolution":
        image, kernel = module.operand_shapes(visit)[:2]
        return _convolution_flops(line, image, kernel, instruction.shapes[0])
    if instruction.opcode != "custom-call":
        return 0.0
    target = re.search(r'custom_call_target="([^"]*)"', line)
    name = target[1] if target else ""
    if name.startswith("__cublas$"):
        contracted = _listed(r'lhs_contracting_dimensions":\s*\[([\d", ]*)\]', line)
        return _dot_flops(module.operand_shapes(visit), instruction.shapes, contracted)
    if name.startswith("__cudnn$conv"):
        first, second = module.operand_shapes(visit)[:2]
        result = instruction.shapes[0]
        if name.startswith("__cudnn$convBackwardInput"):
            return _convolution_flops(line, result, second, first)
        if name.startswith("__cudnn$convBackwardFilter"):
            return _convolution_flops(line, first, result, second)
        return _convolution_flops(line, first, second, result)
    if name.startswith("__cudnn$fmha"):
        return _attention_flops(name, line, module.operand_shapes(visit))
    if name.startswith("cudnn_rnn"):
        is_backward = "bwd" in name
        operands = instruction.shapes if is_backward else module.operand_shapes(visit)
        return _recurrence_flops(is_backward, instruction.shapes, operands[3])
    return 0.0


def _listed(pattern: str, line: str) -> list[int]:
    """The integers of a list in a line."""
    match = re.search(pattern, line)
    return [int(number) for number in re.findall(r"\d+", match[1])] if match else []


def _dot_flops(
    operands: Sequence[HloShape], results: Sequence[HloShape], contracted: Sequence[int]
) -> float:
    inner = math.prod(operands[0].dims[dim] for dim in contracted)
    return 2.0 * results[0].size * inner


def _convolution_flops(line: str, image: HloShape, kernel: HloShape, out: HloShape) -> float:
    """FLOPs of a convolution, without products with padding or with holes of a dilated input.

    XLA:TPU writes matrix products as convolutions too, their batch dims as spatial ones.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    assert labels is not None, "XLA writes the dims of every convolution"
    window = re.search(r"window=\{([^}]*)\}", line)
    settings = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial_dims = sorted(label for label in labels[1] if label.isdigit())
    pairs = 1
    for position, label in enumerate(spatial_dims):
        pairs *= _pairs(
            settings,
            position,
            image.dims[labels[1].index(label)],
            kernel.dims[labels[2].index(label)],
            out.dims[labels[3].index(label)],
        )
    batch = out.dims[labels[3].index("b")]
    features = out.dims[labels[3].index("f")]
    return 2.0 * pairs * batch * features * kernel.dims[labels[2].index("i")]


def _pairs(settings: dict[str, str], position: int, image: int, kernel: int, out: int) -> int:
    """Pairs of an output and a kernel position of one dim that meet an element of the input."""

    def setting(name: str, default: str) -> str:
        parts = settings[name].split("x") if name in settings else []
        return parts[position] if position < len(parts) else default

    stride = int(setting("stride", "1"))
    low = int(setting("pad", "0_0").split("_")[0])
    image_dilation = int(setting("lhs_dilate", "1"))
    kernel_dilation = int(setting("rhs_dilate", "1"))
    starts = np.arange(out)[:, None] * stride - low
    positions = starts + np.arange(kernel) * kernel_dilation
    end = (image - 1) * image_dilation + 1
    is_element = (positions % image_dilation == 0) & (positions >= 0) & (positions < end)
    return int(is_element.sum())


def _attention_flops(name: str, line: str, operands: Sequence[HloShape]) -> float:
    """FLOPs of cuDNN's fused attention; half of them where a query sees only the keys before it."""
    scores = _listed(r'intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([\d", ]*)\]', line)
    products = FMHA_BACKWARD if "Backward" in name else FMHA_FORWARD
    visible = 0.5 if re.search(r'mask_type":\s*"[A-Z_]*CAUSAL', line) else 1.0
    return 2.0 * products * visible * math.prod(scores) * operands[0].dims[-1]


def _recurrence_flops(is_backward: bool, results: Sequence[HloShape], weights: HloShape) -> float:
    """FLOPs of a recurrent layer of cuDNN: each weight meets each step of each sample.

    The weights are one array with two biases for each of four gates. The backward pass has two
    products for each of the forward pass.
    """
    batch, steps, _ = results[0].dims
    layers, _, hidden = results[1].dims
    products = weights.size - 8 * layers * hidden
    forward = 2.0 * batch * steps * products
    return 2 * forward if is_backward else forward


def _other_flops(module: HloModule, visit: Visit) -> float:
    """FLOPs of element-wise operations, reductions and the sums of all-reduces."""
    instruction = visit.instruction
    opcode = instruction.opcode
    shapes = instruction.shapes
    if opcode in ELEMENTWISE:
        return float(shapes[0].size)
    if opcode in ("all-reduce", "all-reduce-start"):
        if visit.computation.startswith(SCATTERING):
            return 0.0
        return float(sum(shape.size for shape in shapes))
    if opcode == "reduce":
        operands = module.operand_shapes(visit)[: len(shapes)]
        return float(sum(shape.size for shape in operands) - sum(shape.size for shape in shapes))
    if opcode == "scatter":
        return float(module.operand_shapes(visit)[-1].size)
    if opcode == "reduce-window":
        window = _listed(r"window=\{size=([\dx]*)", instruction.line)
        return _window_sum_flops(shapes[0].dims, window)
    return 0.0


def _window_sum_flops(dims: Sequence[int], window: Sequence[int]) -> float:
    """FLOPs of sums over windows.

    A window of 2 n - 1 elements covers a dim of n wherever it stands. XLA:TPU writes a sum over the
    dim, repeated n times, in this way (of a softmax), and computes it once.
    """
    positions = 1
    summed = 1
    for size, elements in zip(dims, window, strict=True):
        if elements == 2 * size - 1:
            summed *= size
        else:
            positions *= size
            summed *= elements
    return float(positions * (summed - 1))
