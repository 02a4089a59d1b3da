"""Policies by name, made for a run."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from partita.errors import PlanError
from partita.manage.policies.base import Policy
from partita.manage.policies.ondemand import Ondemand
from partita.manage.policies.oracle import Oracle
from partita.manage.policies.performance import Performance
from partita.manage.policies.powersave import Powersave
from partita.manage.policies.scheduled import Schedule
from partita.manage.policies.schedutil import Schedutil
from partita.manage.policies.static import Static
from partita.manage.workload import Workload


@dataclass(frozen=True, eq=False)
class RunContext:
    """The knowledge that policies are made of."""

    described: Workload
    """The workload on the hardware as described: known before the run."""
    real: Workload
    """The workload on the hardware that runs it: known to the oracle only."""


POLICIES: dict[str, Callable[[RunContext], Policy]] = {
    "oracle": lambda context: Oracle(context.described, context.real),
    "schedule": lambda context: Schedule(context.described),
    "static": lambda context: Static(context.described),
    "schedutil": lambda context: Schedutil(context.real.hardware),
    "ondemand": lambda context: Ondemand(context.real.hardware),
    "performance": lambda context: Performance(context.real.hardware),
    "powersave": lambda context: Powersave(context.real.hardware),
}
"""Name -> the policy for a run."""


def policy_names(text: str) -> tuple[str, ...]:
    """The policies of a list with commas; "all" names all of them. PlanError for unknown ones."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names == ("all",):
        return tuple(POLICIES)
    for name in names:
        if name not in POLICIES:
            raise _unknown_policy(name, tuple(POLICIES))
    if not names:
        raise PlanError(f"No policy is named: use all, or some of {', '.join(POLICIES)}.")
    return names


def _unknown_policy(name: str, known: Sequence[str]) -> PlanError:
    near = difflib.get_close_matches(name, known, 1)
    meant = f"did you mean '{near[0]}'? " if near else ""
    return PlanError(f"There is no policy '{name}': {meant}Use all, or some of {', '.join(known)}.")
