"""The compiler's own word on a planned step, next to what was planned; and the step next to itself on one device.

`verify` reads the compiled program before anything has run: memory, collectives, FLOPs. `compare_steps` runs one step twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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
from partita.execute.program import PlannedStep
from partita.units import format_bytes, format_flops

TOLERANCE = 0.01
"""Collectives of a kind differ where their bytes do by more than this part of all planned ones."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one kind of collective moves per device and step, and the layers where the two accounts differ most."""

    kind: str
    planned: int
    emitted: int
    layers: tuple[tuple[str, int, int], ...] = ()
    """(layer path, planned, emitted), largest difference first; empty where the totals agree."""


@dataclass(frozen=True)
class Verification:
    """The compiler's figures for one device, against the device and the plan. `ok` where the collectives are the planned ones."""

    peak_bytes: int
    capacity_bytes: int | None
    traffic: tuple[Traffic, ...]
    compiled_flops: float | None
    planned_flops: float | None
    notes: tuple[str, ...] = ()
    """What else was compared, as lines."""

    @property
    def measured(self) -> dict[str, Any]:
        """The compiler's figures of a device as a report takes them: peak bytes, bytes by collective, FLOPs where they are counted."""
        found: dict[str, Any] = {
            "peak_bytes": self.peak_bytes,
            "traffic_bytes": {t.kind: t.emitted for t in self.traffic},
        }
        return found if self.compiled_flops is None else found | {"flops": self.compiled_flops}

    @property
    def ok(self) -> bool:
        return not any(t.layers for t in self.traffic)

    def __str__(self) -> str:
        of = f" of {format_bytes(self.capacity_bytes)}" if self.capacity_bytes else ""
        lines = [f"memory by the compiler: {format_bytes(self.peak_bytes)}{of} a device"]
        for t in self.traffic:
            lines.append(
                f"{t.kind}: {format_bytes(t.planned)} planned, {format_bytes(t.emitted)} emitted"
            )
            lines += [
                f"  {path or '(no layer)'}: {format_bytes(a)} planned, {format_bytes(b)} emitted"
                for path, a, b in t.layers
            ]
        if not self.traffic:
            lines.append("no collectives, planned or emitted")
        if self.compiled_flops is not None and self.planned_flops is not None:
            lines.append(
                f"work a device: {format_flops(self.planned_flops)} planned, {format_flops(self.compiled_flops)} compiled"
            )
        return "\n".join([*lines, *self.notes])


def verify(
    step: PlannedStep,
    compiled: Any,
    expected: Sequence[Collective],
    capacity_bytes: int | None,
    flops: float | None,
) -> Verification:
    """What the compiler says of a step. MemoryBudgetError if it needs more than `capacity_bytes` of a device.

    `flops` are those planned for one device. The compiler counts a loop's body once, so a step that computes mostly in loops
    is not compared.
    """
    peak = peak_bytes(compiled)
    if capacity_bytes is not None and peak > capacity_bytes:
        graph, mesh = step.captured.graph, step.plan.mesh
        excess = peak / max(1, memory(graph, mesh, step.layout, detect(mesh.size).backend).peak)
        raise MemoryBudgetError(
            f"The plan '{step.plan.name}' for {step.plan.graph} needs {format_bytes(peak)} of memory on every device by the "
            f"compiler's account, and a device has {format_bytes(capacity_bytes)}. Use a smaller batch, more devices, or a plan "
            "that splits variables (ZeRO-3).",
            excess,
        )
    cost = compiled.cost_analysis() or {}
    graph = step.captured.graph
    in_loops = sum(x.flops * x.trips for x in graph.instructions if x.trips > 1)
    counted = cost.get("flops") if in_loops <= 0.01 * graph.flops else None
    return Verification(
        peak, capacity_bytes, _traffic(expected, emitted(compiled.as_text())), counted, flops
    )


def _traffic(expected: Sequence[Collective], found: Sequence[Any]) -> tuple[Traffic, ...]:
    planned: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    seen: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for c in expected:
        planned[c.kind][c.path] += c.nbytes * c.trips
    for e in found:
        seen[e.kind][e.path] += e.nbytes * e.trips
    everything = sum(sum(by_path.values()) for by_path in planned.values())
    result = []
    for kind in sorted({*planned, *seen}):
        a, b = planned[kind], seen[kind]
        totals = sum(a.values()), sum(b.values())
        layers = [(p, a.get(p, 0), b.get(p, 0)) for p in {*a, *b} if a.get(p, 0) != b.get(p, 0)]
        layers.sort(key=lambda x: (-abs(x[1] - x[2]), x[0]))
        differ = abs(totals[0] - totals[1]) > TOLERANCE * everything
        result.append(Traffic(kind, *totals, tuple(layers[:3]) if differ else ()))
    return tuple(result)


def check_compiled(
    step: PlannedStep, compiled: Any, state: Any = None, batch: Any = None
) -> Verification:
    """The standard check of every planned step before it first runs: `verify` against the devices at hand."""
    graph, mesh = step.captured.graph, step.plan.mesh
    machine = detect(mesh.size)
    expected = collectives(graph, mesh, step.layout, machine.backend)
    flops = local_flops(graph, mesh, step.layout, machine.backend)
    return verify(step, compiled, expected, machine.memory_bytes, flops)


def check_and_compare(step: PlannedStep, compiled: Any, state: Any, batch: Any) -> Verification:
    """The standard check, and one step run both on one device and as planned: the largest differences as notes."""
    found = check_compiled(step, compiled)
    differences = sorted(
        compare_steps(step.captured, step, state, batch), key=lambda d: -d.relative
    )
    said = f"one step on one device and as planned: {len(differences)} values compared, largest differences"
    return replace(found, notes=(said, *(f"  {d}" for d in differences[:5])))


@dataclass(frozen=True)
class Difference:
    """How far a value of the planned step is from the same one on one device: largest absolute, and relative to its scale."""

    name: str
    absolute: float
    relative: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.absolute:.2g} absolute, {self.relative:.2g} of its largest value"
        )


def compare_steps(
    captured: Captured, step: PlannedStep, state: Any, batch: Any
) -> list[Difference]:
    """One step on one device and one as planned, from the same state and batch (both left as they are).

    One Difference for each log (loss, metrics) and each variable after the step, in the order of the program.
    """
    state, batch = jax.tree.map(lambda x: np.array(x, copy=True), (state, batch))
    device = step.mesh.devices.flat[0]
    one = jax.jit(captured.text.call)(jax.device_put(state, device), jax.device_put(batch, device))
    one = jax.tree.map(np.array, one)
    planned = jax.tree.map(np.array, step.step(step.place_state(state), step.place_batch(batch)))
    names = _state_names(captured)
    found = []
    for i, ((path, left), right) in enumerate(
        zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(planned), strict=True)
    ):
        first = len(jax.tree.leaves(one)) - len(names)
        name = (
            names[i - first] if i >= first else "".join(str(getattr(k, "key", k)) for k in path[1:])
        )
        found.append(_difference(name, left, right))
    return found


def _state_names(captured: Captured) -> list[str]:
    """The path of every leaf of the state; of those that the step does not read, their position."""
    names = [f"state {i}" for i in range(len(jax.tree.leaves(captured.state)))]
    kept = [i for i in captured.text.module_kept_var_idx if i < len(names)]
    of_state = [a.path for a in captured.graph.arguments if a.role != "batch"]
    for i, name in zip(kept, of_state, strict=True):
        names[i] = name
    return names


def _difference(name: str, left: np.ndarray, right: np.ndarray) -> Difference:
    a, b = (np.asarray(x, dtype=np.float64) for x in (left, right))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    absolute = float(np.max(np.where(same, 0.0, np.abs(a - b)), initial=0.0))
    scale = float(np.max(np.abs(a), initial=0.0, where=np.isfinite(a)))
    return Difference(name, absolute, absolute / scale if scale else absolute)
