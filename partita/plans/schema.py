"""The format of plan files: the keys of a plan and their values.

`plan_fields` checks a plain JSON value; `plans.plan` builds a Plan from its result. Whether a plan
fits a graph or a machine is not a question of the format (`plans.check`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from partita.errors import PlanError
from partita.files.reading import FileKind
from partita.files.schema import (
    FieldError,
    flag,
    items,
    mapping,
    number,
    one_of,
    plain,
    row,
    shown,
    table,
    text,
    version,
    whole_number,
)

SCHEMA = 1
SCHEDULES = ("1f1b", "eager-1f1b", "gpipe")
"""Orders of microbatches, the default first."""
MOST_DEVICES = 2**24
"""Devices of the largest mesh."""

PLAN_FILE = FileKind("a plan", "give a file that 'partita plan --save-plan' wrote", PlanError)

_SECONDS = number(0)
_BYTES = mapping(number(0))
_AXIS_NAME = text(80, r"[\w.-]+", "'a', of letters, digits, '_', '.' and '-'")
_AXIS = table({"size": whole_number(2, MOST_DEVICES)}, {"level": whole_number(0, 63)})
_STORAGE = table(
    {
        "dim": whole_number(0, 63),
        "axes": items(text(80), 24, least=1),
        "zero": one_of(1, 2, 3),
    }
)
_PREDICTED = table(
    {},
    {
        "seconds": _SECONDS,
        "seconds_compute": _SECONDS,
        "peak_bytes": _SECONDS,
        "flops": _SECONDS,
        "joules": _SECONDS,
        "bound_seconds": _SECONDS,
        "staged_bound_seconds": _SECONDS,
        "memory_bytes": _BYTES,
        "traffic_bytes": _BYTES,
        "provenance": mapping(text()),
    },
    plain,
)
_ALTERNATIVE = table({"choice": text(), "seconds": number(), "bytes": number()}, {}, plain)
_REASON = table(
    {
        "compute": number(),
        "activations": number(),
        "gradients": number(),
        "moves": number(),
        "bytes": number(),
        "traffic": number(),
        "alternatives": items(_ALTERNATIVE),
    },
    {},
    plain,
)
"""Figures of one operator that a search writes for `partita explain`."""
_BASELINE = table(
    {"seconds": _SECONDS},
    {
        "seconds_compute": _SECONDS,
        "peak_bytes": _SECONDS,
        "traffic_bytes": _BYTES,
        "fits": flag,
    },
    plain,
)
_WHY = table({}, {"operators": mapping(_REASON), "baselines": mapping(_BASELINE)}, plain)
_PLAN = table(
    {
        "schema": version(SCHEMA, "plan again"),
        "graph": text(),
        "machine": text(),
        "mesh": mapping(_AXIS, 24, _AXIS_NAME),
        "operators": mapping(text()),
    },
    {
        "name": text(),
        "batch_size": whole_number(0, 2**40),
        "storage": mapping(_STORAGE),
        "predicted": _PREDICTED,
        "notes": items(text()),
        "why": _WHY,
        "microbatches": whole_number(1, 2**20),
        "schedule": one_of(*SCHEDULES),
        "recompute": items(row(text(), text())),
        "offload": items(text()),
        "machine_digest": text(64, r"[0-9a-f]+", "'2c26b46b68ffc68f'"),
        "target": text(80, r"(cpu|cuda|tpu)(:\d+\.\d+)?", "'cpu', 'cuda' or 'tpu'"),
    },
)


def plan_fields(value: Any) -> dict[str, Any]:
    """The checked fields of a plan, a plain JSON value; operators are parsed choices.

    FieldError names the wrong field.
    """
    fields = _PLAN(value)
    axes = fields["mesh"]
    devices = math.prod(axis["size"] for axis in axes.values())
    if devices > MOST_DEVICES:
        raise FieldError(f"of {devices:,} devices", f"use at most {MOST_DEVICES:,}").inside("mesh")
    choices = {}
    for operator, choice in fields["operators"].items():
        try:
            choices[operator] = parse_choice(choice, axes)
        except FieldError as error:
            raise error.inside(operator).inside("operators") from None
    for path, storage in fields.get("storage", {}).items():
        try:
            _check_storage_axes(storage["axes"], axes)
        except FieldError as error:
            raise error.inside("axes").inside(path).inside("storage") from None
    # Reasons are only shown: they stay lists, as a search wrote them.
    return {**fields, "operators": choices, "why": value.get("why", {})}


def parse_choice(choice: str, axes: Collection[str]) -> dict[str, str]:
    """A choice, axis -> factor, from its text ("S:a,b P:c" or "replicate")."""
    factors: dict[str, str] = {}
    if choice == "replicate":
        return factors
    parts = choice.split()
    if "replicate" in parts:
        raise FieldError(shown(choice), "'replicate' stands alone: it splits no factor")
    for part in parts or [choice]:
        factor, _, names = part.partition(":")
        if not factor or not names:
            raise FieldError(shown(part), 'give factor:axes, as in "S:a,b P:c", or "replicate"')
        for axis in names.split(","):
            _check_axis_name(axis, axes)
            if axis in factors:
                both = f"{factors[axis]} and {factor}"
                raise FieldError(f"{choice!r}, with axis {axis!r} for {both}", "use an axis once")
            factors[axis] = factor
    return factors


def _check_storage_axes(names: Collection[str], axes: Mapping[str, Any]) -> None:
    for name in names:
        _check_axis_name(name, axes)
    if len(set(names)) < len(names):
        raise FieldError(f"{', '.join(names)}", "use an axis once")


def _check_axis_name(axis: str, axes: Collection[str]) -> None:
    if axis not in axes:
        known = ", ".join(axes) or "no axis"
        raise FieldError(f"over the unknown axis {shown(axis)}", f"the mesh has {known}")
