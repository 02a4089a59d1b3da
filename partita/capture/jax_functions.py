"""Captures any jittable training step `step(state, batch) -> (anything, new_state)` as an OperatorGraph with its program text."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax import export

from partita.capture import stablehlo
from partita.errors import CaptureError
from partita.graph.check import check
from partita.graph.grouping import group
from partita.graph.operator_graph import Argument, OperatorGraph


@dataclass(frozen=True)
class Leaf:
    """What one leaf of the state is: its path and role; for an optimizer slot, the parameter that it belongs to."""

    path: str
    role: Literal["parameter", "optimizer", "state", "batch"]
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

    graph: OperatorGraph
    text: Text
    state: Any
    batch: Any


def capture_step(
    step: Callable[[Any, Any], Any],
    state: Any,
    batch: Any,
    leaves: Sequence[Leaf | str],
    name: str = "step",
    batch_size: int = 0,
    inputs: Sequence[Leaf] | None = None,
) -> Captured:
    """The step as an OperatorGraph. `state` and `batch` are pytrees of shapes; `leaves` describes the leaves of `state` in order.

    The step must return `(outputs, new_state)` with `new_state` shaped like `state`. Nothing is allocated or run. Where a leaf
    is only a path, its role is read from the program. `inputs` describes the leaves of `batch`, if they are not all batch.
    """
    try:
        exported = export.export(jax.jit(step), disabled_checks=_CHECKS)(state, batch)
    except Exception as error:
        raise CaptureError(
            f"The training step of '{name}' cannot be captured: {_reason(error)}"
        ) from error
    source = stablehlo.prepare(exported.mlir_module_serialized)
    program = stablehlo.read(source)
    state_count = len(jax.tree.leaves(state))
    output_count = len(program.outputs)
    read = dict(zip(exported.module_kept_var_idx, program.inputs, strict=True))
    results = dict(enumerate(program.outputs[output_count - state_count :]))
    if inputs is None:
        paths = [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(batch)[0]
        ]
        inputs = [Leaf("batch" + path, "batch") for path in paths]
    described = _described(leaves, program, read, results)
    arguments = [
        Argument(leaf.path, leaf.role, read[i], results[i], leaf.parameter)
        for i, leaf in enumerate(described)
        if i in read
    ]
    arguments += [
        Argument(leaf.path, leaf.role, read[state_count + i])
        for i, leaf in enumerate(inputs)
        if state_count + i in read
    ]
    graph = group(
        name,
        program.tensors,
        program.instructions,
        program.loops,
        arguments,
        program.outputs,
        batch_size,
        program.notes,
    )
    return Captured(check(graph), Text.of(exported, source), state, batch)


def _described(
    leaves: Sequence[Leaf | str],
    program: stablehlo.Program,
    read: dict[int, int],
    results: dict[int, int],
) -> list[Leaf]:
    """Leaves with their roles. One that is only a path is a parameter if the loss depends on it and its new value on a gradient;
    an optimizer slot, of the parameter of that shape whose path ends most like its own, if only the update reads it; else state.
    """
    if all(isinstance(leaf, Leaf) for leaf in leaves):
        return [leaf for leaf in leaves if isinstance(leaf, Leaf)]
    phases: dict[int, set[str]] = defaultdict(set)
    trained: set[int] = set()
    """Tensors that depend on a gradient."""
    for x in program.instructions:
        for t in x.operands:
            phases[t].add(x.phase)
    for loop in program.loops:  # nested loops come inner first
        for before, inside, _, _ in loop.carried:
            phases[before] |= phases[inside]
    known = -1
    while known < len(trained):
        known = len(trained)
        for x in program.instructions:
            if x.phase == "backward" or trained.intersection(x.operands):
                trained.update(x.results)
        for (
            loop
        ) in program.loops:  # what a loop gives back is named apart from what its body yields
            for before, inside, yielded, after in loop.carried:
                if trained & {before, inside, yielded}:
                    trained |= {inside, after}
    any_gradient = bool(trained)
    found: list[Leaf] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Leaf):
            found.append(leaf)
            continue
        shape = program.tensors[read[i]].shape if i in read else ()
        floating = i in read and program.tensors[read[i]].dtype.startswith(
            ("float", "bfloat", "complex")
        )
        role: Any = "state"
        if shape and floating and (not any_gradient or results[i] in trained):
            role = "parameter" if not any_gradient or phases[read[i]] - {"update"} else "optimizer"
        found.append(Leaf(leaf, role))
    parameters = [
        (leaf.path, program.tensors[read[i]].shape)
        for i, leaf in enumerate(found)
        if leaf.role == "parameter"
    ]
    for i, leaf in enumerate(found):
        if leaf.role == "optimizer" and leaf.parameter is None:
            alike = [path for path, shape in parameters if shape == program.tensors[read[i]].shape]
            ends = [_common_end(path, leaf.path) for path in alike]
            owner = alike[ends.index(max(ends))] if alike else None
            found[i] = dataclasses.replace(leaf, parameter=owner)
    return found


def _common_end(left: str, right: str) -> int:
    """How many parts two paths have in common at their end.

    >>> _common_end("params/dense/kernel", "opt_state/0/mu/dense/kernel")
    2
    """
    pairs = zip(reversed(left.split("/")), reversed(right.split("/")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


_CHECKS = [export.DisabledSafetyCheck.custom_call("Qr"), export.DisabledSafetyCheck.platform()]


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
