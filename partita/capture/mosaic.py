"""Kernels that Pallas compiles for TPUs (Mosaic): their grid, and the same kernel on a smaller one.

A kernel runs once per point of a grid. Functions of the grid's coordinates say which block of each
operand and result a run sees. A coordinate that only numbers blocks of one element in one dim, in
these functions and nowhere else, is an independent loop over that dim: `jax.vmap` adds such
coordinates for the batch, and attention has one for heads. It may be split over devices, each with
a smaller grid.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax._src import tpu_custom_call
from jax._src.interpreters import mlir as jax_mlir
from jax.extend.mlir import ir

from partita.graph.operator_graph import DimFactors


@dataclass(frozen=True)
class KernelGrid:
    """The grid of a kernel, and the dims that its coordinates number."""

    bounds: tuple[int, ...]
    windows: tuple[DimFactors, ...]
    """Per operand and result, per dim the independent coordinate that numbers its elements."""

    @property
    def independent(self) -> set[int]:
        """The independent coordinates."""
        return {factor for dims in self.windows for dim in dims for factor in dim}


def grid_of(config: str, ranks: Sequence[int]) -> KernelGrid | None:
    """The grid of a kernel with this configuration, None if it is written in another way.

    `ranks` are those of the operands and results.
    """
    body = json.loads(config).get("custom_call_config", {}).get("body")
    if body is None:
        return None
    with _context():
        try:
            module = ir.Module.parse(base64.b64decode(body))
            functions = {_text(op, "sym_name"): op.operation for op in module.body}
            kernel = next(iter(functions.values()))
            bounds = tuple(ir.DenseI64ArrayAttr(kernel.attributes["iteration_bounds"]))
            free = _unused_arguments(kernel, len(bounds))
            prefetched = ir.IntegerAttr(kernel.attributes["scalar_prefetch"]).value
            parameters = list(ir.ArrayAttr(kernel.attributes["window_params"]))
        except (ir.MLIRError, KeyError, ValueError):
            return None
        windows: list[DimFactors] = [((),) * rank for rank in ranks[:prefetched]]
        for parameter in map(ir.DictAttr, parameters):
            name = ir.FlatSymbolRefAttr(parameter["transform_indices"]).value
            sizes = list(ir.DenseI64ArrayAttr(parameter["window_bounds"]))
            numbered, others = _coordinates(functions[name], sizes, len(bounds))
            free -= others
            windows.append(numbered)
    if [len(window) for window in windows] != list(ranks):
        return None
    kept = tuple(tuple(tuple(f for f in dim if f in free) for dim in window) for window in windows)
    return KernelGrid(bounds, kept)


def with_bounds(config: str, ways: Mapping[int, int]) -> str:
    """The configuration of the kernel with some coordinates of its grid divided."""
    value = json.loads(config)
    with _context():
        module = ir.Module.parse(base64.b64decode(value["custom_call_config"]["body"]))
        kernel = next(iter(module.body)).operation
        bounds = list(ir.DenseI64ArrayAttr(kernel.attributes["iteration_bounds"]))
        for coordinate, count in ways.items():
            bounds[coordinate] //= count
        kernel.attributes["iteration_bounds"] = ir.DenseI64ArrayAttr.get(bounds)
        buffer = io.BytesIO()
        module.operation.write_bytecode(buffer, desired_version=0)
    value["custom_call_config"]["body"] = base64.b64encode(buffer.getvalue()).decode()
    return json.dumps(value)


def _context() -> Any:
    """An MLIR context that reads kernels."""
    context = jax_mlir.make_ir_context()
    dialect: Any = tpu_custom_call
    dialect.tpu.register_dialect(context)
    context.allow_unregistered_dialects = True
    return context


def _text(op: Any, key: str) -> str:
    return ir.StringAttr(op.operation.attributes[key]).value


def _unused_arguments(function: Any, count: int) -> set[int]:
    """Those of the first arguments of a function that nothing in it reads."""
    arguments = list(function.regions[0].blocks[0].arguments)[:count]
    return {n for n, argument in enumerate(arguments) if not list(argument.uses)}


def _coordinates(function: Any, sizes: Sequence[int], count: int) -> tuple[DimFactors, set[int]]:
    """The coordinates that a function of blocks returns as they are, for dims with blocks of one
    element, and those that it reads in another way."""
    block = function.regions[0].blocks[0]
    arguments = list(block.arguments)[:count]
    returned = list(list(block)[-1].operation.operands)
    numbered = []
    simple_uses = [0] * count
    for value, size in zip(returned, sizes, strict=True):
        factors: tuple[int, ...] = ()
        if size == 1 and value in arguments:
            factors = (arguments.index(value),)
            simple_uses[factors[0]] += 1
        numbered.append(factors)
    others = {
        n for n, argument in enumerate(arguments) if len(list(argument.uses)) != simple_uses[n]
    }
    return tuple(numbered), others
