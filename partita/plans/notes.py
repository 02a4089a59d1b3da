"""Notes on a plan's use of its machine: idle devices, and devices that do the same work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from partita.machine import Machine
from partita.plans.plan import Plan


def with_use_notes(plan: Plan, machine: Machine) -> Plan:
    """The plan with notes on its use of a machine, where devices do no work of their own."""
    added = [note for note in _use_notes(plan, machine) if note not in plan.notes]
    return replace(plan, notes=(*plan.notes, *added)) if added else plan


def _use_notes(plan: Plan, machine: Machine) -> Iterator[str]:
    idle = machine.devices - plan.devices
    count = f"of {machine.devices} devices"
    if idle and not any(count in note for note in plan.notes):
        are_idle = "1 is idle" if idle == 1 else f"{idle} are idle"
        yield f"the plan uses {plan.devices} {count}: {are_idle}"
    split = {name for choice in plan.choices.values() for name in choice}
    unused = [axis for axis in plan.mesh.axes if axis.name not in split]
    if unused and not split:
        yield f"'{plan.name}' splits no operator here: every device computes the whole step"
    elif unused:
        groups = math.prod(axis.size for axis in unused)
        over = ("axis " if len(unused) == 1 else "axes ") + ", ".join(a.name for a in unused)
        yield (
            f"'{plan.name}' splits no operator over {over}: {groups} groups of devices do the same "
            "work"
        )
