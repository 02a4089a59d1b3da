"""Training steps that run operator by operator within a budget of device memory, by a memory plan.

Tensors that a plan saves lie in a temporary file ($TMPDIR), or, for an accelerator, in pinned
memory of the host (`hosts`). Features are read from the arrays of the graph. The graph's edges,
weights and the optimizer's state are always on the device. The budget counts arrays, and the
scratch that XLA reports for its programs, but not the memory that a kernel takes inside.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partita.gnn.data.graph import Graph
from partita.gnn.prepare import GraphData, Numbers, data_of
from partita.gnn.runs import TrainingRun
from partita.gnn.spill import hosts
from partita.gnn.spill.groups import GroupedModel, grouped_model, stages_of
from partita.gnn.spill.jobs import Carry, first_carry
from partita.gnn.spill.operators import CompiledStep, ModelShapes, Run, compiled_step, fitted_step
from partita.gnn.spill.plan import Action, MemoryPlan, StepWork, lru_plan, plan_memory
from partita.gnn.spill.tables import joined, split
from partita.gnn.step import StepState, logs_of, state_of, store_state

FIRST_BANDWIDTH = 1e10
"""Bytes per second between host and device before any were measured."""


@dataclass
class Execution:
    """A plan while it is followed, and then its result.

    carry           sums from operator to operator
    device          tensors on the device
    rows            rows of the model's output, of a prediction
    copied_bytes    bytes copied between host and device
    copy_seconds    seconds of these copies
    seconds         seconds of each operator
    """

    carry: Carry
    device: dict[str, Any] = field(default_factory=dict)
    rows: list[np.ndarray] = field(default_factory=list)
    copied_bytes: int = 0
    copy_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


class MemoryRun(TrainingRun):
    """The steps of a built model on a graph, within `budget` bytes of one device."""

    def __init__(
        self, model: Any, graph: Graph, budget: int, importance: Numbers | None = None
    ) -> None:
        stages_of(model)
        self.model = model
        self.graph = graph
        self.digest = graph.digest
        self.budget = budget
        self.importance = importance
        vertex_weights = None if importance is None else importance.values
        data = data_of(graph.as_it_is(), vertex_weights)
        self.data: GraphData = jax.device_put(replace(data, x=None))
        state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state_of(model))
        self.shapes = ModelShapes(model, state, self.data)
        self.host = hosts.host_of(jax.local_devices()[0])
        self.begin = jax.jit(partial(first_carry, model))
        self.fineness, self.training = fitted_step(self.shapes, self._grouped(True), budget)
        self.plan: MemoryPlan = plan_memory(self.work, budget, FIRST_BANDWIDTH)
        self.lru = lru_plan(self.work, budget)
        self.last: Execution | None = None
        self._measured = False
        self._others: dict[str, tuple[CompiledStep, MemoryPlan]] = {}

    @property
    def work(self) -> StepWork:
        """The work of a training step."""
        return self.training.work

    def _grouped(self, training: bool) -> GroupedModel:
        features = self.graph.features
        assert features is not None
        return grouped_model(
            self.model,
            features.shape,
            self.data,
            self.shapes.state,
            training,
        )

    def serves(self, graph: Graph) -> bool:
        """Whether this run is of an equal graph, whose arrays have not changed since."""
        unchanged = self.graph is graph or self.graph.digest == self.digest
        return graph.digest == self.digest and unchanged

    # ------------------------------------------------------------------------------- the contract

    def state(self) -> StepState:
        return state_of(self.model)

    def store(self, state: StepState) -> None:
        store_state(self.model, state)

    def train(self, state: StepState) -> tuple[dict[str, Any], StepState]:
        execution = self._executed(
            self.training,
            self.plan,
            state,
            self.data,
        )
        self.last = execution
        update = self.training.runs["update"].program
        carry = execution.carry
        trainable, optimizer = update(state.optimizer, carry.total, state.trainable)
        logs = logs_of(self.model, carry.loss, carry.counts)
        return logs, StepState(trainable, carry.others, optimizer)

    def evaluate(self, state: StepState, mask: str) -> dict[str, Any]:
        masks = self.data.masks | {"train": self.data.masks[mask]}
        data = replace(self.data, masks=masks, importance=None)
        carry = self._executed(*self._other("evaluate"), state, data).carry
        return logs_of(self.model, carry.loss, carry.counts)

    def predict(self, state: StepState) -> np.ndarray:
        return np.concatenate(self._executed(*self._other("predict"), state, self.data).rows)

    def after_epoch(self, epochs_left: int) -> None:
        """Plans again with rematerialization, once, by the seconds measured in the first step."""
        last = self.last
        if not epochs_left or self._measured or last is None or not last.copied_bytes:
            return
        self._measured = True
        families: dict[str, list[float]] = {}
        for operator in self.work.operators:
            if operator.family.startswith("forward"):
                families.setdefault(operator.family, []).append(last.seconds[operator.name])
        # The first operator of a family also compiles, so that only a median counts.
        medians = {family: statistics.median(seconds) for family, seconds in families.items()}
        operators = [replace(o, seconds=medians.get(o.family)) for o in self.work.operators]
        work = replace(self.work, operators=tuple(operators))
        self.training = replace(self.training, work=work)
        bandwidth = last.copied_bytes / max(last.copy_seconds, 1e-9)
        self.plan = plan_memory(work, self.budget, bandwidth)

    def _other(self, kind: str) -> tuple[CompiledStep, MemoryPlan]:
        """(step, plan) of an evaluation ('evaluate') or a prediction ('predict')."""
        if kind not in self._others:
            step = compiled_step(
                self.shapes,
                self._grouped(False),
                kind,
                self.fineness,
            )
            plan = plan_memory(step.work, self.budget, FIRST_BANDWIDTH)
            self._others[kind] = (step, plan)
        return self._others[kind]

    # --------------------------------------------------------------------------- following a plan

    def _executed(
        self,
        step: CompiledStep,
        plan: MemoryPlan,
        state: StepState,
        data: GraphData,
    ) -> Execution:
        """The result of following a plan, but for the optimizer's update."""
        execution = Execution(self.begin(state.trainable, state.others))
        for action in plan.actions:
            if action.kind == "drop":
                execution.device.pop(action.name).delete()
            elif action.kind in ("load", "save"):
                self._copy(step, action, execution)
            elif action.name != "update":
                began = time.perf_counter()
                self._run(
                    step.runs[action.name],
                    execution,
                    state,
                    data,
                )
                execution.seconds[action.name] = time.perf_counter() - began
        return execution

    def _copy(self, step: CompiledStep, action: Action, execution: Execution) -> None:
        """Copies a tensor between host and device."""
        began = time.perf_counter()
        name = action.name
        if action.kind == "load":
            execution.device[name] = self._loaded(step, name)
        else:
            self.host.save(name, execution.device[name])
        execution.copied_bytes += execution.device[name].nbytes
        execution.copy_seconds += time.perf_counter() - began

    def _loaded(self, step: CompiledStep, name: str) -> Any:
        """A tensor from the host, on the device."""
        position = step.features.get(name)
        if position is None:
            return jax.block_until_ready(self.host.load(name))
        features = self.graph.features
        assert features is not None
        tile = np.asarray(features[position], np.float32)
        return jax.block_until_ready(jnp.array(tile, copy=True))

    def _run(
        self,
        run: Run,
        execution: Execution,
        state: StepState,
        data: GraphData,
    ) -> None:
        """Runs an operator."""
        device = execution.device
        # No name holds the joined tables, so that their memory is free before tiles are split.
        execution.carry, written = run.program(
            execution.carry,
            state.trainable,
            state.others,
            data,
            run.first,
            *joined(run.read_cuts, [device[tile] for tile in run.reads]),
        )
        jax.block_until_ready((execution.carry, written))
        if run.writes:
            tiles: Sequence[Any] = jax.block_until_ready(split(run.write_cuts, written))
            device.update(zip(run.writes, tiles, strict=True))
        else:
            execution.rows += map(np.asarray, written)

    # -------------------------------------------------------------------------------------- facts

    @property
    def moved(self) -> int:
        """Bytes copied between host and device in the last step."""
        return 0 if self.last is None else self.last.copied_bytes

    def facts(self) -> dict[str, Any]:
        """For JSON, in bytes: need, budget and smallest budget.

        Traffic as planned, as it was and of an LRU cache.

        Also the numbers of operators and of rematerializations, and whether the plan is exact.
        """
        return {
            "need": self.work.need(),
            "budget": self.budget,
            "least": self.work.smallest_budget(),
            "traffic": self.plan.traffic,
            "moved": self.moved,
            "lru_traffic": self.lru.traffic,
            "operators": len(self.work.operators),
            "again": sum(action.kind == "rematerialize" for action in self.plan.actions),
            "exact": self.plan.exact,
        }
