"""Captures any jittable training step `step(state, batch) -> (anything, new_state)` as a Graph with its program text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax import export

from partita.capture import stablehlo
from partita.errors import CaptureError
from partita.graph.graph import Argument, Graph, check
from partita.graph.grouping import group


@dataclass(frozen=True)
class Leaf:
    """What one leaf of the state is: its path and role; for an optimizer slot, the parameter that it belongs to."""

    path: str
    role: Literal["parameter", "optimizer", "state"]
    parameter: str | None = None


@dataclass(frozen=True)
class Text(export.Exported):
    """An exported program whose module is MLIR bytecode of our own making instead of a portable artifact."""

    @staticmethod
    def of(exported: export.Exported, bytecode: bytes) -> Text:
        fields = {f.name: getattr(exported, f.name) for f in dataclasses.fields(exported)}
        return Text(**{**fields, "mlir_module_serialized": bytecode})

    def mlir_module(self, serialized: bool = True) -> Any:
        """The module as text, or (for the lowering of a call) parsed in the current MLIR context."""
        if serialized:
            with stablehlo.context():
                return str(stablehlo.parse(self.mlir_module_serialized))
        return stablehlo.parse(self.mlir_module_serialized)


@dataclass(frozen=True)
class Captured:
    """A captured step: the graph to plan, and the program text that execution will annotate."""

    graph: Graph
    text: Text
    state: Any
    batch: Any


def capture_step(
    step: Callable[[Any, Any], Any], state: Any, batch: Any, leaves: Sequence[Leaf], name: str = "step", batch_size: int = 0
) -> Captured:
    """The step as a Graph. `state` and `batch` are pytrees of shapes; `leaves` describes the leaves of `state` in order.

    The step must return `(outputs, new_state)` with `new_state` shaped like `state`. Nothing is allocated or run.
    """
    try:
        exported = export.export(jax.jit(step), disabled_checks=_CHECKS)(state, batch)
    except Exception as error:
        raise CaptureError(f"The training step of '{name}' cannot be captured: {_reason(error)}") from error
    source = stablehlo.prepare(exported.mlir_module_serialized)
    program = stablehlo.read(source)
    state_count = len(jax.tree.leaves(state))
    output_count = len(program.outputs)
    inputs = dict(zip(exported.module_kept_var_idx, program.inputs, strict=True))
    results = dict(enumerate(program.outputs[output_count - state_count :]))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(batch)[0]]
    arguments = [
        Argument(leaf.path, leaf.role, inputs[i], results[i], leaf.parameter) for i, leaf in enumerate(leaves) if i in inputs
    ]
    arguments += [
        Argument("batch" + path, "batch", inputs[state_count + i]) for i, path in enumerate(paths) if state_count + i in inputs
    ]
    graph = group(
        name, program.tensors, program.instructions, program.loops, arguments, program.outputs, batch_size, program.notes
    )
    return Captured(check(graph), Text.of(exported, source), state, batch)


_CHECKS = [export.DisabledSafetyCheck.custom_call("Qr"), export.DisabledSafetyCheck.platform()]


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
