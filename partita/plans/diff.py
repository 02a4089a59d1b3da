"""The differences between two plans, as text."""

from __future__ import annotations

from partita.plans.plan import Plan, mesh_text, runs_text, storage_text
from partita.units import format_bytes, format_seconds


def diff(left: Plan, right: Plan) -> list[str]:
    """What differs between two plans, a line each; empty when they do the same."""
    found = []
    if left.mesh != right.mesh:
        found.append(f"mesh: {mesh_text(left.mesh)} -> {mesh_text(right.mesh)}")
    if left.machine != right.machine:
        found.append(f"machine: {left.machine} -> {right.machine}")
    a, b = left.to_json(), right.to_json()
    for key in ("operators", "storage"):
        for name in [*a[key], *(n for n in b[key] if n not in a[key])]:
            x, y = a[key].get(name, "absent"), b[key].get(name, "absent")
            if x != y:
                found.append(f"{name}: {storage_text(x)} -> {storage_text(y)}")
    for what in ("microbatches", "schedule", "recompute"):
        x, y = getattr(left, what), getattr(right, what)
        if x != y and not (what == "schedule" and left.microbatches == right.microbatches == 1):
            found.append(f"{what}: {runs_text(x)} -> {runs_text(y)}")
    for key, text in (("seconds", format_seconds), ("peak_bytes", format_bytes)):
        x, y = left.predicted.get(key), right.predicted.get(key)
        if x is not None and y is not None and x != y:
            found.append(f"predicted {key.replace('_', ' ')}: {text(x)} -> {text(y)}")
    return found
