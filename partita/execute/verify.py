"""Verification of a planned step: against the compiled program, and against one device.

`verify` compares the plan with the compiled program before the first step: memory, collectives,
FLOPs. `compare_steps` runs one step as planned and on one device, and compares all values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from partita.capture.jax_functions import Captured
from partita.cost.collectives import Collective, collectives
from partita.cost.memory import memory
from partita.cost.work import local_flops
from partita.errors import MemoryBudgetError
from partita.execute.devices import detect
from partita.execute.emitted import emitted, peak_bytes
from partita.execute.process_arrays import whole
from partita.execute.program import PlannedStep, RunnableStep
from partita.execute.staged import StagedStep
from partita.execute.staged_verify import check_staged
from partita.execute.verification import Verification, compared_traffic
from partita.units import format_bytes

Verifier = Callable[[RunnableStep, Any, Any, Any], Verification]
"""Called with a planned step, its compiled program, and the state and batch (not yet placed) of its
first run, which it must leave as they are. Its result is reported; it raises to refuse the step
before anything has run."""
SHOWN_VALUES = 5
"""Values that are listed after a comparison with one device."""
FLOPS_IN_LOOPS = 0.01
"""Largest fraction of FLOPs in loops with which the compiler's count is compared: it counts a
loop's body once.
"""


def verify(
    step: PlannedStep,
    compiled: Any,
    expected: Sequence[Collective],
    capacity_bytes: int | None,
    flops: float | None,
) -> Verification:
    """The compiled program of a step beside the plan. MemoryBudgetError if it needs more than
    `capacity_bytes` of a device.

    `expected` are the planned collectives, `flops` the planned FLOPs of one device. A step that
    computes mostly in loops has no FLOPs to compare, because the compiler counts a loop's body
    once.
    """
    peak = peak_bytes(compiled)
    graph = step.captured.graph
    if capacity_bytes is not None and peak > capacity_bytes:
        mesh = step.plan.mesh
        predicted = memory(graph, mesh, step.layout, detect(mesh.size).backend).peak
        raise MemoryBudgetError(
            f"The plan '{step.plan.name}' for {step.plan.graph} needs {format_bytes(peak)} of "
            f"memory on every device by the compiler's count, and a device has "
            f"{format_bytes(capacity_bytes)}. Use a smaller batch, more devices, or a plan that "
            "splits variables (ZeRO-3).",
            peak / max(1, predicted),
        )
    cost = compiled.cost_analysis() or {}
    loop_flops = sum(x.flops * x.trips for x in graph.instructions if x.trips > 1)
    compiled_flops = None
    if loop_flops <= FLOPS_IN_LOOPS * graph.flops:
        compiled_flops = cost.get("flops")
    return Verification(
        peak_bytes=peak,
        capacity_bytes=capacity_bytes,
        traffic=compared_traffic(expected, emitted(compiled.as_text())),
        compiled_flops=compiled_flops,
        planned_flops=flops,
    )


def check_compiled(
    step: RunnableStep, compiled: Any, state: Any = None, batch: Any = None
) -> Verification:
    """The check of every planned step before its first run: `verify` with the local devices."""
    if isinstance(step, StagedStep):
        return check_staged(step, compiled)
    graph = step.captured.graph
    mesh = step.plan.mesh
    machine = detect(mesh.size)
    expected = collectives(
        graph,
        mesh,
        step.layout,
        machine.backend,
    )
    flops = local_flops(graph, mesh, step.layout, machine.backend)
    return verify(
        step,
        compiled,
        expected,
        machine.memory_bytes,
        flops,
    )


def check_and_compare(
    step: RunnableStep,
    compiled: Any,
    state: Any,
    batch: Any,
) -> Verification:
    """`check_compiled`, and the largest differences of one step as planned and on one device, as
    notes.
    """
    verification = check_compiled(step, compiled)
    differences = compare_steps(step.captured, step, state, batch)
    differences.sort(key=lambda difference: -difference.relative)
    title = (
        f"one step as planned and on one device: {len(differences)} values compared, "
        "largest differences"
    )
    lines = [f"  {difference}" for difference in differences[:SHOWN_VALUES]]
    return replace(verification, notes=(*verification.notes, title, *lines))


@dataclass(frozen=True)
class Difference:
    """The largest difference between a value of the planned step and of one device."""

    name: str
    absolute: float
    relative: float
    """Fraction of the largest value on one device."""

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.absolute:.2g} absolute, {self.relative:.2g} of its largest value"
        )


def compare_steps(
    captured: Captured, step: RunnableStep, state: Any, batch: Any
) -> list[Difference]:
    """The differences of one step on one device and one as planned, from the same state and batch,
    which do not change.

    One for each log (loss, metrics) and each variable after the step, in the order of the program.
    Each process compares with a device of its own, and has the variables of all processes for it.
    """
    state, batch = jax.tree.map(lambda x: np.array(whole(x), copy=True), (state, batch))
    devices = step.mesh.devices.flat
    device = next(d for d in (*devices, *jax.local_devices()) if d in jax.local_devices())
    run_on_one = jax.jit(captured.text.call)
    on_one = run_on_one(jax.device_put(state, device), jax.device_put(batch, device))
    on_one = jax.tree.map(np.array, on_one)
    planned = step.step(step.place_state(state), step.place_batch(batch))
    planned = jax.tree.map(whole, planned)
    leaves = jax.tree_util.tree_flatten_with_path(on_one)[0]
    state_names = _state_names(captured)
    first_state = len(leaves) - len(state_names)
    differences = []
    for i, ((path, expected), actual) in enumerate(
        zip(leaves, jax.tree.leaves(planned), strict=True)
    ):
        if i >= first_state:
            name = state_names[i - first_state]
        else:
            name = "".join(str(getattr(key, "key", key)) for key in path[1:])
        differences.append(_difference(name, expected, actual))
    return differences


def _state_names(captured: Captured) -> list[str]:
    """The path of every leaf of the state; the position of one that the step does not read."""
    names = [f"state {i}" for i in range(len(jax.tree.leaves(captured.state)))]
    read_positions = [i for i in captured.text.module_kept_var_idx if i < len(names)]
    paths = [a.path for a in captured.graph.arguments if a.role != "batch"]
    for i, path in zip(read_positions, paths, strict=True):
        names[i] = path
    return names


def _difference(
    name: str,
    expected: np.ndarray,
    actual: np.ndarray,
) -> Difference:
    expected = np.asarray(expected, dtype=np.float64)
    actual = np.asarray(actual, dtype=np.float64)
    both_nan = np.isnan(expected) & np.isnan(actual)
    equal = (expected == actual) | both_nan
    distance = np.where(equal, 0.0, np.abs(expected - actual))
    absolute = float(np.max(distance, initial=0.0))
    scale = float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
    return Difference(
        name,
        absolute,
        absolute / scale if scale else absolute,
    )
