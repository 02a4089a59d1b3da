"""The format of plan files: which keys a plan has, and which values they take.

Works on plain JSON values. `check_plan_json` names the first key that is wrong and its allowed
values. `plans.plan` builds a Plan from a value that passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from partita.errors import PlanError

SCHEMA = 1
SCHEDULES = ("1f1b", "gpipe")
"""Orders of microbatches, the default first."""

_TYPES: dict[str, type] = {
    "schema": int,
    "graph": str,
    "machine": str,
    "mesh": dict,
    "operators": dict,
    "name": str,
    "batch_size": int,
    "storage": dict,
    "predicted": dict,
    "notes": list,
    "why": dict,
    "microbatches": int,
    "schedule": str,
    "recompute": list,
    "target": str,
}
_REQUIRED = ("schema", "graph", "machine", "mesh", "operators")
_TYPE_NAMES = {str: "a text", dict: "an object", int: "a whole number", list: "a list"}
_COST_KEYS = ("compute", "activations", "gradients", "moves", "bytes")
"""Figures of one operator that a search writes for `partita explain`."""


def check_plan_json(value: Any, where: str) -> None:
    """Raise PlanError if a JSON value is no plan. `where` names the plan in messages."""
    if not isinstance(value, dict):
        raise PlanError(f"{where} is not a JSON object: a plan starts with '{{'.")
    _check_keys(value, where)
    _check_predicted(value.get("predicted", {}), where)
    _check_why(value.get("why", {}), f"{where}, why")
    _check_pipeline(value, where)
    for axis, entry in value["mesh"].items():
        _check_axis(entry, f"{where}, mesh.{axis}")
    axes = tuple(value["mesh"])
    for operator, text in value["operators"].items():
        parse_choice(text, axes, f"{where}, operators.{operator}")
    for path, entry in value.get("storage", {}).items():
        _check_storage(entry, axes, f"{where}, storage.{path}")


def parse_choice(
    text: Any,
    axes: Iterable[str],
    where: str,
) -> dict[str, str]:
    """A choice, axis -> factor, from its text ("S:a,b P:c" or "replicate")."""
    if not isinstance(text, str):
        raise PlanError(f'{where}: needs a text like "S:a,b P:c" or "replicate", not {text!r}.')
    choice: dict[str, str] = {}
    if text == "replicate":
        return choice
    for part in text.split():
        factor, colon, names = part.partition(":")
        if not colon or not names:
            raise PlanError(f'{where}: {part!r} is not factor:axes, e.g. "S:a,b".')
        for axis in names.split(","):
            _check_axis_name(axis, axes, where)
            if axis in choice:
                raise PlanError(
                    f"{where}: axis {axis!r} is used twice, for {choice[axis]} and {factor}."
                )
            choice[axis] = factor
    return choice


def _check_keys(value: Mapping[str, Any], where: str) -> None:
    for key in value:
        if key not in _TYPES:
            allowed = ", ".join(sorted(_TYPES))
            raise PlanError(f"{where} has an unknown key {key!r}. Allowed: {allowed}.")
    for key in _REQUIRED:
        if key not in value:
            raise PlanError(f"{where} lacks the key {key!r}.")
    if value["schema"] != SCHEMA:
        raise PlanError(
            f"{where} has schema {value['schema']!r}; this version of Partita reads {SCHEMA}. "
            "Plan again."
        )
    for key, given in value.items():
        if not isinstance(given, _TYPES[key]):
            type_name = _TYPE_NAMES[_TYPES[key]]
            raise PlanError(f"{where}, {key}: needs {type_name}, not {given!r}. Plan again.")


def _check_predicted(predicted: Mapping[str, Any], where: str) -> None:
    for key in ("seconds", "peak_bytes"):
        if key in predicted and not isinstance(predicted[key], (int, float)):
            raise PlanError(
                f"{where}, predicted.{key}: needs a number, not {predicted[key]!r}. Plan again."
            )


def _check_why(why: Mapping[str, Any], where: str) -> None:
    for kind in ("operators", "baselines"):
        if not isinstance(why.get(kind, {}), dict):
            raise PlanError(f"{where}.{kind}: needs an object, not {why[kind]!r}. Plan again.")
    for name, entry in why.get("baselines", {}).items():
        if not _has_numbers(entry, ("seconds",)):
            raise PlanError(
                f"{where}.baselines.{name}: needs the number of seconds, not {entry!r}. Plan again."
            )
    for name, entry in why.get("operators", {}).items():
        if not _is_explanation(entry):
            raise PlanError(
                f"{where}.operators.{name}: is damaged. Plan again, or delete 'why' from the plan: "
                "it runs without."
            )


def _is_explanation(entry: Any) -> bool:
    """Whether an entry has the costs of an operator and of its alternatives."""
    if not _has_numbers(entry, _COST_KEYS):
        return False
    alternatives = entry.get("alternatives")
    if not isinstance(alternatives, list):
        return False
    for alternative in alternatives:
        if not _has_numbers(alternative, ("seconds", "bytes")):
            return False
        if not isinstance(alternative.get("choice"), str):
            return False
    return True


def _has_numbers(entry: Any, keys: Iterable[str]) -> bool:
    if not isinstance(entry, dict):
        return False
    return all(isinstance(entry.get(key), (int, float)) for key in keys)


def _check_pipeline(value: Mapping[str, Any], where: str) -> None:
    microbatches = value.get("microbatches", 1)
    if microbatches < 1:
        raise PlanError(f"{where}, microbatches: needs a number from 1 on, not {microbatches}.")
    schedule = value.get("schedule", SCHEDULES[0])
    if schedule not in SCHEDULES:
        allowed = " or ".join(map(repr, SCHEDULES))
        raise PlanError(f"{where}, schedule: needs {allowed}, not {schedule!r}.")
    for run in value.get("recompute", ()):
        is_pair = isinstance(run, list) and len(run) == 2
        if not is_pair or not all(isinstance(name, str) for name in run):
            raise PlanError(
                f'{where}, recompute: needs pairs of operators ["first", "last"], not {run!r}.'
            )


def _check_axis(entry: Any, where: str) -> None:
    is_axis = (
        isinstance(entry, dict)
        and isinstance(entry.get("size", 0), int)
        and isinstance(entry.get("level", 0), int)
        and entry.get("size", 0) >= 2
    )
    if not is_axis:
        raise PlanError(f'{where}: needs {{"size": at least 2, "level": number}}, not {entry!r}.')


def _check_storage(
    entry: Any,
    axes: Iterable[str],
    where: str,
) -> None:
    is_storage = (
        isinstance(entry, dict)
        and set(entry) == {"dim", "axes", "zero"}
        and entry["zero"] in (1, 2, 3)
        and isinstance(entry["dim"], int)
    )
    if not is_storage:
        raise PlanError(f'{where}: needs {{"dim", "axes", "zero": 1, 2 or 3}}, not {entry!r}.')
    for axis in entry["axes"]:
        _check_axis_name(axis, axes, where)


def _check_axis_name(
    axis: str,
    axes: Iterable[str],
    where: str,
) -> None:
    if axis not in axes:
        raise PlanError(f"{where}: there is no axis {axis!r}; the mesh has {', '.join(axes)}.")
