"""Seconds that steps really take on the devices at hand: compiled, warmed up, timed in turns, medians."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import jax
import numpy as np

from partita.capture.jax_functions import Captured
from partita.execute.processes import meet
from partita.execute.program import PlannedStep, planned_step
from partita.plans.plan import Plan


def step_seconds(
    captured: Captured, plans: Mapping[str, Plan], rounds: int = 5
) -> dict[str, float]:
    """Median seconds of a step under each plan, on random state and data, the plans taking turns.

    Shapes alone are needed of the model: state and batch are made up here (ones and zeros), so a step's time is what is
    measured, not its result. Several processes begin every step together, and it ends when all have done it: where nothing
    is sent, they do not wait for each other.
    """
    running: dict[str, tuple[PlannedStep, Any, Any, Any]] = {}
    for name, plan in plans.items():
        step = planned_step(captured, plan)
        compiled = step.lower().compile()
        running[name] = (
            step,
            compiled,
            step.place_state(_made(captured.state)),
            step.place_batch(_made(captured.batch)),
        )
    times: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(rounds + 1):
        for name, (step, compiled, state, batch) in running.items():
            meet()
            start = time.perf_counter()
            outputs, state = compiled(state, batch)
            jax.block_until_ready((outputs, state))
            meet()
            if turn:
                times[name].append(time.perf_counter() - start)
            running[name] = (step, compiled, state, batch)
    return {name: median(t) for name, t in times.items()}


def _made(shapes: Any) -> Any:
    """Arrays of the given shapes: zeros for whole numbers, small values for others."""
    return jax.tree.map(
        lambda s: np.full(s.shape, 0.01 if np.issubdtype(s.dtype, np.inexact) else 0).astype(
            s.dtype
        ),
        shapes,
    )
