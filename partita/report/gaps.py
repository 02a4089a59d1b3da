"""The gaps of a plan: its distance to the lower bound of the plans that can run, and of the larger
space.
"""

from __future__ import annotations

from typing import NamedTuple

from partita.plans.pipeline import is_one_program, is_placed
from partita.plans.plan import Plan

PROVED = 1e-6
"""Relative gap below which a plan is proved best."""
USELESS_GAP = 1.0
"""Relative gap from which a lower bound proves nothing useful."""


class Gaps(NamedTuple):
    """Excess of a plan over lower bounds, relative; None where there is no bound."""

    runnable: float | None
    """Over the bound of plans that can run. None for a plan that cannot run."""
    staged: float | None
    """Over the bound of plans with pipeline stages too, and with placement if the plan has it."""
    space: str = "stages"
    """The parts of plans that the second bound has and the first one has not."""


def gaps_of(plan: Plan) -> Gaps:
    """The gaps of a plan by its own prediction."""
    to_runnable = _gap(plan, "bound_seconds") if is_one_program(plan) else None
    space = "stages and placement" if is_placed(plan) else "stages"
    return Gaps(to_runnable, _gap(plan, "staged_bound_seconds"), space)


def _gap(plan: Plan, key: str) -> float | None:
    seconds = plan.predicted.get("seconds")
    bound = plan.predicted.get(key)
    return seconds / bound - 1 if seconds and bound else None
