"""The differences between two plans, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from partita.plans.plan import Plan, choice_text, mesh_text, offload_text, runs_text
from partita.units import format_bytes, format_seconds


def diff(left: Plan, right: Plan) -> list[str]:
    """The differences between two plans, one line each; empty for plans that run alike."""
    return list(_differences(left, right))


def _differences(left: Plan, right: Plan) -> Iterator[str]:
    if left.mesh != right.mesh:
        has_levels = left.mesh.sizes == right.mesh.sizes
        yield f"mesh: {_mesh(left, has_levels)} -> {_mesh(right, has_levels)}"
    digests = {left.machine_digest, right.machine_digest}
    if left.machine != right.machine:
        yield f"machine: {left.machine} -> {right.machine}"
    elif len(digests) == 2 and "" not in digests:
        yield f"machine: {left.machine} -> the same with other numbers"
    yield from _changed_entries(_choice_texts(left), _choice_texts(right))
    yield from _changed_entries(_storage_texts(left), _storage_texts(right))
    if left.microbatches != right.microbatches:
        yield f"microbatches: {left.microbatches} -> {right.microbatches}"
    has_microbatches = left.microbatches > 1 or right.microbatches > 1
    if left.schedule != right.schedule and has_microbatches:
        yield f"schedule: {left.schedule} -> {right.schedule}"
    if left.recompute != right.recompute:
        yield f"rematerialized: {runs_text(left.recompute)} -> {runs_text(right.recompute)}"
    if left.offload != right.offload:
        before, after = (offload_text(plan.offload) for plan in (left, right))
        yield f"offloaded: {before} -> {after}"
    for key, format_figure in (("seconds", format_seconds), ("peak_bytes", format_bytes)):
        before = left.predicted.get(key)
        after = right.predicted.get(key)
        if before is not None and after is not None and before != after:
            title = key.replace("_", " ")
            yield f"predicted {title}: {format_figure(before)} -> {format_figure(after)}"


def _mesh(plan: Plan, has_levels: bool) -> str:
    """The mesh of a plan, with the network level of every axis on request."""
    if not has_levels:
        return mesh_text(plan.mesh)
    return " x ".join(f"{a.name}={a.size} (level {a.level})" for a in plan.mesh.axes)


def _changed_entries(left: Mapping[str, Any], right: Mapping[str, Any]) -> Iterator[str]:
    for name in {**left, **right}:
        before = left.get(name, "absent")
        after = right.get(name, "absent")
        if before != after:
            yield f"{name}: {before} -> {after}"


def _choice_texts(plan: Plan) -> dict[str, str]:
    return {name: choice_text(choice, plan.mesh) for name, choice in plan.choices.items()}


def _storage_texts(plan: Plan) -> dict[str, str]:
    texts = {}
    for path, storage in plan.storage.items():
        axes = ",".join(storage.axes)
        texts[path] = f"ZeRO-{storage.zero} dim {storage.dim} over {axes}"
    return texts
