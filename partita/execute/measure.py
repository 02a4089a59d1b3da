"""Measured seconds of steps on the local devices: compiled, warmed up, timed in turns, medians."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from partita.capture.jax_functions import Captured
from partita.execute.processes import meet
from partita.execute.program import runnable_step
from partita.plans.plan import Plan


class _Running(NamedTuple):
    """A compiled step with its values."""

    compiled: Any
    state: Any
    batch: Any


def step_seconds(
    captured: Captured, plans: Mapping[str, Plan], rounds: int = 5
) -> dict[str, float]:
    """Median seconds of a step under each plan; the plans take turns.

    State and batch are constants of the model's shapes, so only the time of a step has a meaning,
    not its result. Several processes begin every step together, and it ends when all have done it:
    without communication they would not wait for each other.
    """
    running = {name: _start(captured, plan) for name, plan in plans.items()}
    times: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(rounds + 1):
        for name, step in running.items():
            meet()
            start = time.perf_counter()
            outputs, state = step.compiled(step.state, step.batch)
            jax.block_until_ready((outputs, state))
            meet()
            if turn > 0:  # the first one warms up
                times[name].append(time.perf_counter() - start)
            running[name] = step._replace(state=state)
    return {name: median(seconds) for name, seconds in times.items()}


def _start(captured: Captured, plan: Plan) -> _Running:
    """The compiled step of a plan with values on the devices."""
    step = runnable_step(captured, plan)
    compiled = step.compile()
    state = step.place_state(_constants(captured.state))
    batch = step.place_batch(_constants(captured.batch))
    return _Running(compiled, state, batch)


def _constants(shapes: Any) -> Any:
    """Arrays of these shapes: 0 for whole numbers, 0.01 for others."""
    return jax.tree.map(_constant, shapes)


def _constant(shape: Any) -> np.ndarray:
    value = 0.01 if np.issubdtype(shape.dtype, np.inexact) else 0
    return np.full(shape.shape, value).astype(shape.dtype)
