"""Captures a JAX training step as an OperatorGraph with its program text.

The step is `step(state, batch) -> (outputs, new_state)`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from jax import export

from partita.capture import stablehlo
from partita.capture.prepare import prepare
from partita.capture.reader import Program, read
from partita.capture.targets import CaptureTarget, choices_for
from partita.errors import CaptureError, PartitaError
from partita.graph.check import check
from partita.graph.grouping import group
from partita.graph.operator_graph import Argument, OperatorGraph

Role = Literal["parameter", "optimizer", "state", "batch"]


@dataclass(frozen=True)
class Leaf:
    """A leaf of the state or of the batch."""

    path: str
    role: Role
    parameter: str | None = None
    """Path of the parameter that an optimizer slot belongs to."""


@dataclass(frozen=True)
class Text(export.Exported):
    """An exported program whose module is our own MLIR bytecode instead of a portable artifact."""

    @staticmethod
    def of(exported: export.Exported, bytecode: bytes) -> Text:
        """An exported program with another module."""
        fields = {f.name: getattr(exported, f.name) for f in dataclasses.fields(exported)}
        fields["mlir_module_serialized"] = bytecode
        return Text(**fields)

    def mlir_module(self, serialized: bool = True) -> Any:
        """The module as text, or for the lowering of a call parsed in the current context."""
        if serialized:
            with stablehlo.context():
                return str(stablehlo.parse(self.mlir_module_serialized))
        return stablehlo.parse(self.mlir_module_serialized)


@dataclass(frozen=True)
class Captured:
    """A captured step: the graph to plan, and the program text that execution annotates."""

    graph: OperatorGraph
    text: Text
    state: Any
    batch: Any
    at_batch_size: Callable[[int], Captured] | None = field(default=None, compare=False, repr=False)
    """Captures the same step at another batch size; None where that is not possible."""


def capture_step(
    step: Callable[[Any, Any], Any],
    state: Any,
    batch: Any,
    leaves: Sequence[Leaf | str],
    name: str = "step",
    batch_size: int = 0,
    inputs: Sequence[Leaf] | None = None,
    target: CaptureTarget | None = None,
) -> Captured:
    """The step as an OperatorGraph. Nothing is allocated or run.

    Args:
        step: Returns `(outputs, new_state)` with `new_state` shaped like `state`.
        state: Pytree of shapes.
        batch: Pytree of shapes.
        leaves: The leaves of `state` in order. The role of a leaf that is only a path is read from
            the program.
        name: Of the graph.
        batch_size: Dim 0 of the batch.
        inputs: The leaves of `batch`, by default all of role "batch".
        target: The platform that will run the step, by default that of the local devices.

    Raises:
        CaptureError: JAX cannot export the step.
    """
    config: Any = jax.config
    if config.jax_disable_jit:
        raise CaptureError(
            f"The training step of '{name}' cannot be captured without compilation. "
            "Unset JAX_DISABLE_JIT (jax_disable_jit)."
        )
    if target is None:
        target = CaptureTarget.local()
    try:
        with choices_for(target):
            exported = export.export(
                jax.jit(step),
                platforms=[target.platform],
                disabled_checks=_CHECKS,
            )(state, batch)
    except Exception as error:
        raise CaptureError(
            f"The training step of '{name}' cannot be captured: {reason(error)}"
        ) from error
    if exported.nr_devices > 1:
        raise CaptureError(
            f"The training step of '{name}' is split over {exported.nr_devices} devices already, "
            "by shard_map, pmap or a sharding constraint. Write it for one device, or over a mesh "
            "of one: Partita splits it."
        )
    source = prepare(exported.mlir_module_serialized, target.platform)
    signature = Signature(
        tuple(leaves),
        tuple(_batch_leaves(batch) if inputs is None else inputs),
        exported.module_kept_var_idx,
    )
    graph = graph_of(source, signature, name, batch_size, target)

    def at_batch_size(samples: int) -> Captured:
        resized = _resized(batch, signature.batch, batch_size, samples)
        return capture_step(step, state, resized, leaves, name, samples, signature.batch, target)

    return Captured(graph, Text.of(exported, source), state, batch, at_batch_size)


@dataclass(frozen=True)
class Signature:
    """The arguments of a step's text: leaves of the state, then of the batch."""

    state: tuple[Leaf | str, ...]
    """The role of a leaf that is only a path is read from the program."""
    batch: tuple[Leaf, ...]
    kept: tuple[int, ...]
    """Positions of the leaves that the text takes, in the order of its arguments."""


def graph_of(
    source: bytes,
    signature: Signature,
    name: str,
    batch_size: int,
    target: CaptureTarget,
) -> OperatorGraph:
    """The graph of a step's prepared text, whose last results are the new state."""
    program = read(source)
    state_count = len(signature.state)
    new_state = program.outputs[len(program.outputs) - state_count :]
    tensor_of = dict(zip(signature.kept, program.inputs, strict=True))
    """Position of an input that the program reads -> tensor."""
    arguments = []
    for i, leaf in enumerate(_with_roles(signature.state, program, tensor_of, new_state)):
        if i in tensor_of:
            argument = Argument(leaf.path, leaf.role, tensor_of[i], new_state[i], leaf.parameter)
            arguments.append(argument)
    for i, leaf in enumerate(signature.batch, start=state_count):
        if i in tensor_of:
            arguments.append(Argument(leaf.path, leaf.role, tensor_of[i]))
    graph = group(
        name,
        program.tensors,
        program.instructions,
        program.loops,
        arguments,
        program.outputs,
        batch_size,
        is_accelerated=target.platform != "cpu",
    )
    notes = tuple(dict.fromkeys(program.notes))
    return check(dataclasses.replace(graph, notes=notes, target=str(target)))


def _resized(
    batch: Any,
    inputs: Sequence[Leaf],
    batch_size: int,
    samples: int,
) -> Any:
    """Shapes of a batch with another number of samples, where dim 0 are the samples."""
    shapes, tree = jax.tree.flatten(batch)
    resized = []
    for shape, leaf in zip(shapes, inputs, strict=True):
        is_split = leaf.role == "batch" and shape.shape[:1] == (batch_size,)
        dims = (samples, *shape.shape[1:]) if is_split else shape.shape
        resized.append(jax.ShapeDtypeStruct(dims, shape.dtype))
    return jax.tree.unflatten(tree, resized)


def _batch_leaves(batch: Any) -> list[Leaf]:
    """The leaves of a batch with their paths."""
    paths, _ = jax.tree_util.tree_flatten_with_path(batch)
    return [Leaf("batch" + jax.tree_util.keystr(path), "batch") for path, _ in paths]


# ---- roles


def _with_roles(
    leaves: Sequence[Leaf | str],
    program: Program,
    tensor_of: dict[int, int],
    new_state: Sequence[int],
) -> list[Leaf]:
    """Leaves with their roles, which are read from the program for those that are only a path.

    - A parameter: the loss depends on it, and its new value on a gradient.
    - An optimizer slot: only the update reads it, and its new value depends on a gradient. It
      belongs to the parameter of its shape whose path ends most like its own.
    - Else state.
    """
    if all(isinstance(leaf, Leaf) for leaf in leaves):
        return [leaf for leaf in leaves if isinstance(leaf, Leaf)]
    reading = _phases_of_readers(program)
    trained = _trained_tensors(program)
    described: list[Leaf] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Leaf):
            described.append(leaf)
            continue
        role: Role = "state"
        is_trained = not trained or new_state[i] in trained
        if i in tensor_of and is_trained and _is_floating_array(program, tensor_of[i]):
            is_read_before = not trained or reading[tensor_of[i]] - {"update"}
            role = "parameter" if is_read_before else "optimizer"
        described.append(Leaf(leaf, role))
    parameters = [
        (leaf.path, program.tensors[tensor_of[i]].shape)
        for i, leaf in enumerate(described)
        if leaf.role == "parameter"
    ]
    for i, leaf in enumerate(described):
        if leaf.role == "optimizer" and leaf.parameter is None:
            shape = program.tensors[tensor_of[i]].shape
            candidates = [path for path, other in parameters if other == shape]
            parameter = _closest_path(leaf.path, candidates)
            described[i] = dataclasses.replace(leaf, parameter=parameter)
    return described


def _is_floating_array(program: Program, tensor: int) -> bool:
    """Whether a tensor is an array of real or complex numbers."""
    value = program.tensors[tensor]
    return bool(value.shape) and value.dtype.startswith(("float", "bfloat", "complex"))


def _phases_of_readers(program: Program) -> dict[int, set[str]]:
    """Tensor -> the phases of the instructions that read it, inside loops as well."""
    phases: dict[int, set[str]] = defaultdict(set)
    for instruction in program.instructions:
        for tensor in instruction.operands:
            phases[tensor].add(instruction.phase)
    # Nested loops come inner first.
    for loop in program.loops:
        for before, inside, _, _ in loop.carried:
            phases[before] |= phases[inside]
    return phases


def _trained_tensors(program: Program) -> set[int]:
    """The tensors that depend on a gradient."""
    trained: set[int] = set()
    count = -1
    while count < len(trained):
        count = len(trained)
        for instruction in program.instructions:
            if instruction.phase == "backward" or trained.intersection(instruction.operands):
                trained.update(instruction.results)
        # The result of a loop is another tensor than the one that its body yields.
        for loop in program.loops:
            for before, inside, yielded, after in loop.carried:
                if trained & {before, inside, yielded}:
                    trained |= {inside, after}
    return trained


def _closest_path(path: str, candidates: Sequence[str]) -> str | None:
    """The candidate with the longest end in common with a path, None without candidates."""
    return max(candidates, key=lambda candidate: _common_end(candidate, path), default=None)


def _common_end(one: str, other: str) -> int:
    """Number of parts that two paths have in common at their end.

    >>> _common_end("params/dense/kernel", "opt_state/0/mu/dense/kernel")
    2
    """
    count = 0
    for part, other_part in zip(reversed(one.split("/")), reversed(other.split("/")), strict=False):
        if part != other_part:
            break
        count += 1
    return count


IN_LAYER = re.compile(
    r"Exception encountered when calling (\S+)\.call\(\)\.\s+\x1b\[1m(.*?)\x1b\[0m", re.DOTALL
)
"""How Keras writes an error of a layer: the layer's class, then the message in bold letters."""
_CHECKS = [export.DisabledSafetyCheck.custom_call("ALL"), export.DisabledSafetyCheck.platform()]
"""Checks of texts that outlive their release of JAX. Ours do not."""


def reason(error: Exception) -> str:
    """The type and the first line of an error, and the layer of Keras in which it was raised; an
    error of ours is a sentence without its type."""
    if isinstance(error, PartitaError):
        return str(error)
    if "host_callbacks" in str(error):
        return (
            "it calls Python on the host (jax.debug.print, jax.debug.callback, jax.pure_callback, "
            "jax.experimental.io_callback). Remove these calls."
        )
    text = str(error).strip()
    place = ""
    in_layer = IN_LAYER.search(text)
    if in_layer:
        place = f" in {in_layer[1]}"
        text = in_layer[2].strip()
    lines = text.splitlines()
    return f"{type(error).__name__}{place}: {lines[0] if lines else ''}"
