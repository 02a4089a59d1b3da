"""A plan as a compiled step: the annotated program under `jax.jit`, on a mesh of real devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from partita.capture.jax_functions import Captured, Text
from partita.errors import PlanError
from partita.execute.annotate import annotate
from partita.execute.process_arrays import put
from partita.execute.rematerialize import rematerialized_step
from partita.execute.sharding import PINNED_HOST, device_mesh, moved, named_sharding
from partita.execute.staged import StagedStep, staged_step
from partita.graph.operator_graph import OperatorGraph
from partita.plans.check import check
from partita.plans.layout import Layout, Sharding, layout_of
from partita.plans.pipeline import is_one_program
from partita.plans.plan import Plan


@dataclass(frozen=True)
class PlannedStep:
    """A step that runs as planned: `step(state, batch) -> (outputs, state)`."""

    step: Any
    captured: Captured
    plan: Plan
    layout: Layout
    mesh: jax.sharding.Mesh
    state_shardings: Any
    """A sharding for every leaf of the state."""
    batch_shardings: Any
    """A sharding for every leaf of the batch."""
    donates: bool = True
    """Whether a step consumes the old state."""

    def lower(self) -> Any:
        """The lowered step, ready to compile."""
        return self.step.lower(self.captured.state, self.captured.batch)

    def compile(self) -> Any:
        """The compiled step."""
        return self.lower().compile()

    def place_state(self, state: Any) -> Any:
        """The state on the devices, as the step takes it."""
        return put(state, self.state_shardings)

    def place_batch(self, batch: Any) -> Any:
        """The batch on the devices, as the step takes it."""
        return put(batch, self.batch_shardings)


def check_one_program(plan: Plan) -> None:
    """PlanError for a plan that can only run in pieces."""
    if not is_one_program(replace(plan, recompute=())):
        raise PlanError(
            f"The plan '{plan.name}' has placed operators, stages or microbatches, so it runs in "
            "pieces, and is not one program. Plan with --no-stages."
        )


RunnableStep = PlannedStep | StagedStep
"""A step that runs as planned, in one program or in pieces."""


def runnable_step(
    captured: Captured, plan: Plan, devices: Sequence[Any] | None = None, donate: bool = True
) -> RunnableStep:
    """The captured step under any plan, ready to compile for devices (default: the first ones of
    JAX).

    With `donate` the step reuses the memory of the old state, which is then gone.
    """
    check(plan, captured.graph)
    if is_one_program(plan):
        return planned_step(captured, plan, devices, donate)
    return staged_step(captured, plan, devices, donate)


def planned_step(
    captured: Captured, plan: Plan, devices: Sequence[Any] | None = None, donate: bool = True
) -> PlannedStep:
    """The captured step, annotated with a plan without stages and ready to compile for devices
    (default: the first ones of JAX).

    With `donate` the step reuses the memory of the old state, which is then gone. XLA:CPU merges
    the copies of rematerialized operators with their originals; the results are the same.
    """
    check(plan, captured.graph)
    check_one_program(plan)
    captured = rematerialized_step(captured, plan)
    graph = captured.graph
    layout = layout_of(graph, plan)
    mesh = device_mesh(plan.mesh, devices)
    _check_platform(graph, mesh)
    module = captured.text.mlir_module_serialized
    text = Text.of(captured.text, annotate(module, graph, plan.mesh, layout))
    state_shardings, batch_shardings = _argument_shardings(
        captured,
        layout,
        plan,
        mesh,
    )
    host = host_leaves(captured, layout)
    step = jax.jit(
        offloading(text.call, host) if host else text.call,
        in_shardings=(state_shardings, batch_shardings),
        out_shardings=(None, state_shardings),
        donate_argnums=0 if donate else (),
    )
    return PlannedStep(
        step=step,
        captured=captured,
        plan=plan,
        layout=layout,
        mesh=mesh,
        state_shardings=state_shardings,
        batch_shardings=batch_shardings,
        donates=donate,
    )


def leaf_shardings(captured: Captured, layout: Layout) -> list[Sharding]:
    """Shardings of the leaves of state and batch; leaves that the step does not read are
    replicated.
    """
    tensor_of_leaf = {leaf: tensor for tensor, leaf in enumerate(captured.text.module_kept_var_idx)}
    shardings: list[Sharding] = []
    for leaf in range(len(jax.tree.leaves((captured.state, captured.batch)))):
        is_read = leaf in tensor_of_leaf
        shardings.append(layout.shardings[tensor_of_leaf[leaf]] if is_read else ())
    return shardings


def host_leaves(captured: Captured, layout: Layout) -> frozenset[int]:
    """Positions of the leaves of the state that are in the memory of the host."""
    leaves = captured.text.module_kept_var_idx
    return frozenset(leaf for tensor, leaf in enumerate(leaves) if tensor in layout.host)


def offloading(step: Callable[..., Any], host: frozenset[int]) -> Callable[..., Any]:
    """A step whose state has some leaves (positions) in the memory of the host.

    The copies are those of XLA: on a GPU, the update reads old leaves over the link.
    """

    def offloaded_step(state: Any, batch: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(state)
        on_device = moved(leaves, host, jax.memory.Space.Device)
        outputs, new_state = step(jax.tree.unflatten(tree, on_device), batch)
        leaves, tree = jax.tree.flatten(new_state)
        return outputs, jax.tree.unflatten(tree, moved(leaves, host, jax.memory.Space.Host))

    return offloaded_step


def _check_platform(graph: OperatorGraph, mesh: jax.sharding.Mesh) -> None:
    """PlanError if a step was captured for another platform than that of the devices."""
    captured_for = graph.target.partition(":")[0]
    platform = mesh.devices.flat[0].platform
    platform = {"gpu": "cuda"}.get(platform, platform)
    if captured_for and captured_for != platform:
        raise PlanError(
            f"'{graph.name}' was captured for {captured_for}, and the devices here are {platform}: "
            f"capture it with target={platform!r} to run it here."
        )


def _argument_shardings(
    captured: Captured,
    layout: Layout,
    plan: Plan,
    mesh: jax.sharding.Mesh,
) -> tuple[Any, Any]:
    """Shardings of state and batch on a mesh of devices."""
    tree = jax.tree.structure((captured.state, captured.batch))
    shardings = [
        named_sharding(sharding, plan.mesh, mesh) for sharding in leaf_shardings(captured, layout)
    ]
    for leaf in host_leaves(captured, layout):
        shardings[leaf] = shardings[leaf].with_memory_kind(PINNED_HOST)
    return jax.tree.unflatten(tree, shardings)
