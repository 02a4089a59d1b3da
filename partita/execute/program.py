"""A plan as a compiled step: the annotated program under `jax.jit`, on a mesh of real devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from partita.capture.jax_functions import Captured, Text
from partita.errors import PlanError
from partita.execute.annotate import annotate
from partita.execute.processes import put
from partita.plans.check import check
from partita.plans.layout import Layout, Sharding, layout_of
from partita.plans.pipeline import runnable
from partita.plans.plan import Mesh, Plan


def device_mesh(mesh: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The plan's logical mesh over real devices, in their order."""
    devices = list(jax.devices() if devices is None else devices)[: mesh.size]
    shape = mesh.sizes or (1,)
    names = tuple(a.name for a in mesh.axes) or ("a",)
    return jax.sharding.Mesh(
        np.array(devices, dtype=object).reshape(shape),
        names,
        axis_types=(AxisType.Auto,) * len(names),
    )


def named(sharding: Sharding, mesh: Mesh, devices: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(
        devices, PartitionSpec(*(tuple(mesh.axes[a].name for a in dim) or None for dim in sharding))
    )


@dataclass(frozen=True)
class PlannedStep:
    """A step that runs as planned: `step(state, batch) -> (outputs, state)`, its state donated."""

    step: Any
    captured: Captured
    plan: Plan
    layout: Layout
    mesh: jax.sharding.Mesh
    state_shardings: Any
    batch_shardings: Any

    def lower(self) -> Any:
        return self.step.lower(self.captured.state, self.captured.batch)

    def place_state(self, state: Any) -> Any:
        return put(state, self.state_shardings)

    def place_batch(self, batch: Any) -> Any:
        return put(batch, self.batch_shardings)


def planned_step(
    captured: Captured, plan: Plan, devices: Sequence[Any] | None = None, donate: bool = True
) -> PlannedStep:
    """The captured step, annotated with the plan and ready to compile for the devices (default: the first ones of JAX).

    `donate`: the step may take the old state's memory for the new one, and the old one is gone after it.
    """
    graph = captured.graph
    check(plan, graph)
    if not runnable(plan):
        raise PlanError(
            f"The plan '{plan.name}' places operators on parts of the machine, or cuts the step into stages, microbatches or recomputed runs, which can be planned and simulated, and not yet run. "
            "Plan for the devices at hand, or with --no-stages."
        )
    where = layout_of(graph, plan)
    mesh = device_mesh(plan.mesh, devices)
    text = Text.of(
        captured.text, annotate(captured.text.mlir_module_serialized, graph, plan.mesh, where)
    )
    position = {kept: n for n, kept in enumerate(text.module_kept_var_idx)}
    leaves, tree = jax.tree.flatten((captured.state, captured.batch))
    shardings = [
        named(where.shardings[position[i]], plan.mesh, mesh)
        if i in position
        else NamedSharding(mesh, PartitionSpec())
        for i in range(len(leaves))
    ]
    state_shardings, batch_shardings = jax.tree.unflatten(tree, shardings)
    step = jax.jit(
        text.call,
        in_shardings=(state_shardings, batch_shardings),
        out_shardings=(None, state_shardings),
        donate_argnums=0 if donate else (),
    )
    return PlannedStep(step, captured, plan, where, mesh, state_shardings, batch_shardings)
