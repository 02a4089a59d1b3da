"""Training runs: how a model's steps are done on one graph.

`TrainingRun` is the contract that training relies on. `DeviceRun` runs compiled steps over a
prepared graph, on one device or on several, and moves a learned split between epochs
(`SplitMover`). `spill.run.MemoryRun` runs a step operator by operator within a budget of memory.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import jax
import numpy as np

from partita.execute import process_arrays, processes
from partita.execute.steps import unshared
from partita.gnn.kernels import stamp
from partita.gnn.prepare import PreparedGraph, fits, resplit
from partita.gnn.split.learned import Balance
from partita.gnn.split.partition import by_vertices
from partita.gnn.step import (
    CompiledSteps,
    StepState,
    exchanged_bytes,
    of_first_device,
    on_all_devices,
    state_of,
    store_state,
)


class TrainingRun(ABC):
    """The steps of a model on one graph, prepared for its devices."""

    model: Any
    prepared: PreparedGraph

    def state(self) -> StepState:
        """The model's variables where the steps read them."""
        return on_all_devices(unshared(state_of(self.model), ()), self.prepared.devices)

    def store(self, state: StepState) -> None:
        """Puts a state back into the model's variables."""
        store_state(self.model, of_first_device(state, self.prepared.devices))

    @abstractmethod
    def train(self, state: StepState) -> tuple[dict[str, Any], StepState]:
        """(logs, state after) of one training step, finished."""

    @abstractmethod
    def evaluate(self, state: StepState, mask: str) -> dict[str, Any]:
        """Loss and metrics over the vertices of a mask."""

    @abstractmethod
    def predict(self, state: StepState) -> np.ndarray:
        """float32 [vertices, classes]: the output of the model, in the user's numbers."""

    @abstractmethod
    def traffic(self) -> int:
        """Bytes of rows that the devices exchange in a training step, padding included."""

    @abstractmethod
    def after_epoch(self, epochs_left: int) -> None:
        """Learns from the epoch that ended, and prepares for those left."""


class DeviceRun(TrainingRun):
    """Compiled steps over a prepared graph."""

    def __init__(self, model: Any, steps: CompiledSteps, prepared: PreparedGraph) -> None:
        self.model = model
        self.steps = steps
        self.prepared = prepared
        self.mover = None if prepared.sums is None else SplitMover(prepared, prepared.sums)

    def train(self, state: StepState) -> tuple[dict[str, Any], StepState]:
        step = self.steps.train(self.prepared)
        programs = step._cache_size()
        stamp.clear()
        began = time.perf_counter()
        with processes.together("training"):
            logs, state = jax.block_until_ready(step(state, self.prepared.data))
        ended = time.perf_counter()
        if self.mover is not None:
            compiled = step._cache_size() > programs
            self.mover.observe(began, ended, compiled)
        return logs, state

    def evaluate(self, state: StepState, mask: str) -> dict[str, Any]:
        return self.steps.evaluate(self.prepared, mask)(_model_state(state), self.prepared.data)

    def predict(self, state: StepState) -> np.ndarray:
        step = self.steps.predict(self.prepared)
        rows = process_arrays.whole(step(_model_state(state), self.prepared.data))
        return self.prepared.in_given_order(rows)

    def after_epoch(self, epochs_left: int) -> None:
        if self.mover is not None:
            self.prepared = self.mover.moved(self.prepared, epochs_left)

    def traffic(self) -> int:
        if self.prepared.parts is None:
            return 0
        traced = self.steps.train(self.prepared).trace(self.state(), self.prepared.data)
        return exchanged_bytes(traced.jaxpr, self.prepared.devices)


def _model_state(state: StepState) -> StepState:
    """A state without the optimizer's variables, which only training reads."""
    return state._replace(optimizer=[])


class SplitMover:
    """Moves a learned split between epochs when the epochs left pay for it.

    balance             the learner of the parts' times
    making_seconds      seconds of making the parts, the last time
    compiling_seconds   seconds of the last step that was compiled
    """

    def __init__(self, prepared: PreparedGraph, sums: np.ndarray) -> None:
        assert prepared.parts is not None
        points = prepared.parts.points
        even = by_vertices(prepared.numbered, prepared.devices)
        self.balance = Balance(sums, points, [even, (even + points) // 2])
        self.devices = prepared.devices
        self.making_seconds = prepared.placing_seconds
        self.compiling_seconds = 0.0
        self._busy_seconds: np.ndarray | None = None

    def observe(self, began: float, ended: float, compiled: bool) -> None:
        """Takes the times of a step, which began and ended then by `time.perf_counter`.

        A step that was compiled on the way tells the price of compiling, and nothing of the parts.
        """
        if compiled:
            self.compiling_seconds = ended - began
            self._busy_seconds = None
        else:
            self._busy_seconds = stamp.busy(began, ended, self.devices)

    def moved(self, prepared: PreparedGraph, epochs_left: int) -> PreparedGraph:
        """The graph for the next epoch, split at other points if that pays."""
        parts = prepared.parts
        assert parts is not None
        if self._busy_seconds is None:
            return prepared
        busy, making_seconds, compiling_seconds = self._agreed(self._busy_seconds)
        self.balance.measured(busy, parts.rows, parts.edge_capacity)
        if not epochs_left:
            return prepared
        move = self.balance.better(
            epochs_left, making_seconds, compiling_seconds, lambda points: fits(prepared, points)
        )
        if move is None:
            return prepared
        points, other_capacity = move
        after = resplit(prepared, points, None if other_capacity else parts.capacity)
        self.making_seconds = after.placing_seconds
        self.balance.moved(points)
        return after

    def _agreed(self, busy_seconds: np.ndarray) -> tuple[np.ndarray, float, float]:
        """(busy seconds of devices, seconds of making, of compiling), equal in all processes."""
        if processes.alone():
            return busy_seconds, self.making_seconds, self.compiling_seconds
        from jax.experimental import multihost_utils

        # Each process has noted the times of its own devices, and all must decide alike.
        prices = [self.making_seconds, self.compiling_seconds]
        times = np.append(busy_seconds, prices).astype(np.float32)
        gathered = np.asarray(multihost_utils.process_allgather(times), float)
        making_seconds, compiling_seconds = gathered[:, self.devices :].max(axis=0)
        busy_seconds = gathered[:, : self.devices].sum(axis=0)
        return busy_seconds, float(making_seconds), float(compiling_seconds)
