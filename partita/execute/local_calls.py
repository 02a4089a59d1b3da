"""Split kernels of libraries, written as calls on the parts of one device.

XLA's partitioner cannot split a custom call or a Fourier transform: it would gather the operands.
So a split call becomes a `sdy.manual_computation`, in which each device calls the kernel on its
samples and heads. Results that sum over a split factor (the gradient of a bias, of a recurrent
layer's weights) are all-reduced inside.

XLA:CPU runs Fourier transforms of row-major operands only, but gathers into other layouts (jaxlib
0.10.2). So the layout of their operands is fixed there; XLA:TPU compiles no such program.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.mlir import ir

from partita.capture.custom_calls import ATTENTION, Attention, Recurrence, target_of
from partita.capture.mosaic import with_bounds
from partita.graph.flat import LIBRARY_CALLS
from partita.graph.operator_graph import DimFactors, OperatorGraph, Rule, operand_labels
from partita.plans.layout import Layout, Sharding
from partita.plans.plan import Mesh

FOURIER = "fft"
LOCAL_CALLS = {*LIBRARY_CALLS, FOURIER}
ROW_MAJOR = "LayoutConstraint"
"""XLA's custom call that fixes the layout of a value."""

Axes = tuple[int, ...]
FactorAxes = Mapping[int, Axes]
"""Factor of a rule -> the mesh axes that split it."""


def write_local_calls(
    operations: Mapping[int, Any],
    graph: OperatorGraph,
    mesh: Mesh,
    layout: Layout,
    mesh_name: str,
) -> None:
    """Replaces the split kernels among operations, by instruction, by calls on local parts."""
    for number, operation in operations.items():
        instruction = graph.instructions[number]
        if instruction.name not in LOCAL_CALLS or instruction.rule is None:
            continue
        axes = _factor_axes(graph, number, layout)
        call = operation
        if any(axes.values()):
            writer = _LocalCall(operation, instruction.rule, axes, mesh, mesh_name)
            call = writer.write(instruction.name)
        if instruction.name == FOURIER and graph.target in ("", "cpu"):
            _read_row_major(call)


def _factor_axes(graph: OperatorGraph, number: int, layout: Layout) -> FactorAxes:
    """The mesh axes that split each factor of an instruction's rule."""
    instruction = graph.instructions[number]
    rule = instruction.rule
    assert rule is not None, "the instruction can be split"
    labels = [*operand_labels(graph, number), *(graph.labels[t] for t in instruction.results)]
    assignment = layout.assignments[graph.owner[number]]
    axes: dict[int, Axes] = {}
    for label, dims in zip(labels, (*rule.operands, *rule.results), strict=True):
        for factor, dim in zip(label, dims, strict=True):
            if factor >= 0 and dim:
                axes[dim[0]] = tuple(assignment.get(factor, ()))
    return axes


class _LocalCall:
    """One kernel, and the split of its factors."""

    def __init__(
        self,
        call: Any,
        rule: Rule,
        axes: FactorAxes,
        mesh: Mesh,
        mesh_name: str,
    ) -> None:
        self.call = call
        self.rule = rule
        self.axes = axes
        self.mesh = mesh
        self.mesh_name = mesh_name

    def write(self, name: str) -> Any:
        """Puts the local call in the place of the call, and gives it."""
        operands = list(self.call.operands)
        results = list(self.call.results)
        computation = ir.Operation.create(
            "sdy.manual_computation",
            results=[value.type for value in results],
            operands=operands,
            attributes={
                "in_shardings": self._shardings(self.rule.operands),
                "out_shardings": self._shardings(self.rule.results),
                "manual_axes": self._manual_axes(),
            },
            regions=1,
            loc=self.call.location,
            ip=ir.InsertionPoint(self.call),
        )
        local_types = [
            self._local_type(value.type, dims)
            for value, dims in zip(operands, self.rule.operands, strict=True)
        ]
        block = computation.regions[0].blocks.append(
            *local_types, arg_locs=[self.call.location] * len(operands)
        )
        with ir.InsertionPoint(block), self.call.location:
            local = self._local_call(name, list(block.arguments))
            yielded = [
                self._summed(value, dims)
                for value, dims in zip(local.results, self.rule.results, strict=True)
            ]
            ir.Operation.create("sdy.return", operands=yielded)
        for value, new in zip(results, computation.results, strict=True):
            value.replace_all_uses_with(new)
        self.call.erase()
        return local

    def _local_call(self, name: str, arguments: list[Any]) -> Any:
        """The kernel on local operands."""
        attributes = dict(self.call.attributes.items())
        attributes.pop("sdy.sharding", None)
        if name in LIBRARY_CALLS:
            attributes["backend_config"] = self._local_config(name)
        types = [
            self._local_type(value.type, dims)
            for value, dims in zip(self.call.results, self.rule.results, strict=True)
        ]
        return ir.Operation.create(
            self.call.name,
            results=types,
            operands=arguments,
            attributes=attributes,
        )

    def _local_config(self, name: str) -> ir.Attribute:
        """The configuration of the kernel for the local sizes."""
        if target_of(self.call) == "tpu_custom_call":
            config = ir.StringAttr(self.call.attributes["backend_config"]).value
            return ir.StringAttr.get(with_bounds(config, self._divisions()))
        if name == ATTENTION:
            return _attention_config(self.call, self._ways)
        return _recurrence_config(self.call, self._ways)

    def _divisions(self) -> dict[int, int]:
        """The number of parts of every split factor."""
        return {factor: self._ways(factor) for factor, axes in self.axes.items() if axes}

    def _ways(self, factor: int) -> int:
        """The number of parts of a factor."""
        return math.prod(self.mesh.sizes[axis] for axis in self.axes.get(factor, ()))

    def _sharding(self, dims: DimFactors) -> Sharding:
        """The mesh axes of each dim: those of its major factor."""
        return tuple(self.axes.get(dim[0], ()) if dim else () for dim in dims)

    def _shardings(self, mappings: Sequence[DimFactors]) -> ir.Attribute:
        texts = []
        for dims in mappings:
            splits = ", ".join(self._names(axes) for axes in self._sharding(dims))
            texts.append(f"<@{self.mesh_name}, [{splits}]>")
        return ir.Attribute.parse(f"#sdy.sharding_per_value<[{', '.join(texts)}]>")

    def _names(self, axes: Sequence[int]) -> str:
        names = ", ".join(f'"{self.mesh.axes[axis].name}"' for axis in axes)
        return "{" + names + "}"

    def _manual_axes(self) -> ir.Attribute:
        """All axes: nothing inside is left to the partitioner."""
        return ir.Attribute.parse(f"#sdy<manual_axes{self._names(range(len(self.mesh.axes)))}>")

    def _local_type(self, whole: Any, dims: DimFactors) -> Any:
        """The type of a device's part of a value."""
        shape = [
            size // math.prod(self.mesh.sizes[axis] for axis in axes)
            for size, axes in zip(whole.shape, self._sharding(dims), strict=True)
        ]
        return ir.RankedTensorType.get(shape, whole.element_type)

    def _summed(self, value: Any, dims: DimFactors) -> Any:
        """A local result, summed over the devices that have parts of the sum."""
        indexed = {factor for dim in dims for factor in dim}
        axes = {
            axis
            for factor in self.rule.reduction
            if factor not in indexed
            for axis in self.axes.get(factor, ())
        }
        if not axes or not math.prod(value.type.shape):
            return value
        groups: Any = _replica_groups(self.mesh, axes)
        total = ir.Operation.create(
            "stablehlo.all_reduce",
            results=[value.type],
            operands=[value],
            attributes={
                "replica_groups": ir.DenseElementsAttr.get(groups),
                "channel_handle": ir.Attribute.parse(
                    "#stablehlo.channel_handle<handle = 1, type = 1>"
                ),
                "use_global_device_ids": ir.UnitAttr.get(),
            },
            regions=1,
        )
        scalar = ir.RankedTensorType.get([], value.type.element_type)
        body = total.regions[0].blocks.append(scalar, scalar)
        with ir.InsertionPoint(body):
            added = ir.Operation.create(
                "stablehlo.add", results=[scalar], operands=list(body.arguments)
            )
            ir.Operation.create("stablehlo.return", operands=list(added.results))
        return total.results[0]


def _replica_groups(mesh: Mesh, axes: set[int]) -> np.ndarray:
    """The groups of devices that differ only along some axes, a row each."""
    devices = np.arange(mesh.size).reshape(mesh.sizes)
    kept = [axis for axis in range(len(mesh.sizes)) if axis not in axes]
    moved = devices.transpose([*kept, *sorted(axes)])
    count = math.prod(mesh.sizes[axis] for axis in axes)
    return np.ascontiguousarray(moved.reshape(-1, count), dtype=np.int64)


def _read_row_major(operation: Any) -> None:
    """Makes an operation read its operand in row-major layout."""
    operand = operation.operands[0]
    rank = len(operand.type.shape)
    layout = ir.Attribute.parse(f"dense<{list(reversed(range(rank)))}> : tensor<{rank}xindex>")
    ordered = ir.Operation.create(
        "stablehlo.custom_call",
        results=[operand.type],
        operands=[operand],
        attributes={
            "call_target_name": ir.StringAttr.get(ROW_MAJOR),
            "operand_layouts": ir.ArrayAttr.get([layout]),
            "result_layouts": ir.ArrayAttr.get([layout]),
        },
        loc=operation.location,
        ip=ir.InsertionPoint(operation),
    )
    operation.operands[0] = ordered.results[0]


def _attention_config(call: Any, ways: Any) -> ir.Attribute:
    """The configuration of attention with its part of the samples and heads."""
    attention = Attention.of(call)
    rule_batch, rule_heads, rule_group = range(3)
    batch = attention.batch // ways(rule_batch)
    heads = attention.heads // (ways(rule_heads) * ways(rule_group))
    config = json.loads(ir.StringAttr(call.attributes["backend_config"]).value)
    shape = config["cudnn_fmha_backend_config"]["intermediate_tensor_shape"]
    shape["dimensions"][:2] = [str(batch), str(heads)]
    return ir.StringAttr.get(json.dumps(config))


def _recurrence_config(call: Any, ways: Any) -> ir.Attribute:
    """The configuration of a recurrent layer with its part of the batch."""
    layer = Recurrence.of(call)
    count = ways(0)
    stored = call.operands[8] if layer.is_backward else call.results[4]
    # cuDNN counts bytes where JAX allocates elements of 4 bytes: the part has room for all of it.
    reserve = 4 * stored.type.shape[0] // count
    local = dataclasses.replace(layer, batch=layer.batch // count, reserve=reserve)
    return ir.DictAttr.get({"opaque": ir.StringAttr.get(local.descriptor())})
