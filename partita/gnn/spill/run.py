"""Training steps that run operator by operator within a budget of device memory, by a memory plan.

Tensors that a plan saves lie in a temporary file ($TMPDIR), or, for an accelerator, in pinned
memory of the host (`hosts`). Features are read from the arrays of the graph. The graph's edges,
weights and the optimizer's state are always on the device. The budget counts arrays, and the
scratch that XLA reports for its programs, but not the memory that a kernel takes inside.

Several devices follow one plan, each over the vertices of its part: every device runs the same
operator on the same range of its own rows or columns, and rows of other devices are exchanged
inside of operators.
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
from jax.sharding import NamedSharding, PartitionSpec

from partita.gnn.data.arrays import as_count
from partita.gnn.data.graph import Graph
from partita.gnn.nn.block import AXIS
from partita.gnn.prepare import GraphData, PreparationKey, mesh_of, prepare
from partita.gnn.runs import TrainingRun
from partita.gnn.spill import hosts
from partita.gnn.spill.groups import GroupedModel, grouped_model, stages_of
from partita.gnn.spill.jobs import Carry, first_carry, last_carry
from partita.gnn.spill.operators import CompiledStep, ModelShapes, Run, compiled_step, fitted_step
from partita.gnn.spill.plan import (
    FIRST_BANDWIDTH,
    Action,
    MemoryPlan,
    StepWork,
    lru_plan,
    plan_memory,
)
from partita.gnn.spill.tables import joined, split
from partita.gnn.step import StepState, logs_of, on_each_device, state_of
from partita.units import parse


def _of_one_device(data: GraphData) -> GraphData:
    """The shapes of the data of one device."""
    dims = 0 if data.block.parts == 1 else 1
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[dims:], a.dtype), data)


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


def budget_of(memory: str | int) -> int:
    """Bytes of a memory limit, of a text or a number."""
    if isinstance(memory, str):
        memory = int(parse(memory, "B"))
    return as_count("memory", memory, 1, 'give bytes, or a text such as "4GiB"')


class MemoryRun(TrainingRun):
    """The steps of a built model on a graph, within `budget` bytes of each device.

    The split of the key has vertices in the numbers of the graph, and no split features.
    """

    def __init__(self, model: Any, graph: Graph, budget: int, key: PreparationKey) -> None:
        stages_of(model)
        self.model = model
        self.graph = graph
        self.key = key
        self.budget = budget
        self.prepared = prepare(replace(graph, features=None), key)
        devices = key.split.devices
        self.data: GraphData = self.prepared.data
        state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state_of(model))
        self.shapes = ModelShapes(model, state, _of_one_device(self.data))
        self.host = hosts.host_of(jax.local_devices()[0])
        first, last = partial(first_carry, model, devices), last_carry
        self.begin = jax.jit(on_each_device(first, devices, (False, False), gives_own=True))
        self.end = jax.jit(on_each_device(last, devices, (True, True), gives_own=False))
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

    @property
    def unweighted(self) -> GraphData:
        """The data without weights of vertices, which count in training alone."""
        return replace(self.data, importance=None)

    def _grouped(self, training: bool) -> GroupedModel:
        return grouped_model(
            self.model,
            (self.shapes.data.block.rows, self.graph.feature_count),
            self.shapes.data,
            self.shapes.state,
            training,
        )

    @property
    def devices(self) -> int:
        return self.key.split.devices

    def serves(self, graph: Graph) -> bool:
        """Whether this run is of an equal graph, whose arrays have not changed since."""
        unchanged = self.graph is graph or self.graph.digest == self.key.graph
        return graph.digest == self.key.graph and unchanged

    # ------------------------------------------------------------------------------- the contract

    def train(self, state: StepState) -> tuple[dict[str, Any], StepState]:
        execution = self._executed(self.training, self.plan, state, self.data)
        self.last = execution
        update = self.training.runs["update"].program
        carry = self.end(execution.carry, self.data)
        trainable, optimizer = update(state.optimizer, carry.total, state.trainable)
        logs = logs_of(self.model, carry.loss, carry.counts)
        return logs, StepState(trainable, carry.others, optimizer)

    def evaluate(self, state: StepState, mask: str) -> dict[str, Any]:
        masks = self.data.masks | {"train": self.data.masks[mask]}
        data = replace(self.unweighted, masks=masks)
        execution = self._executed(*self._other("evaluate"), state, data)
        carry = self.end(execution.carry, data)
        return logs_of(self.model, carry.loss, carry.counts)

    def predict(self, state: StepState) -> np.ndarray:
        tiles = self._executed(*self._other("predict"), state, self.unweighted).rows
        return self.prepared.in_given_order(np.concatenate(tiles, axis=-2))

    def traffic(self) -> int:
        runs = self.training.runs
        names = [a.name for a in self.plan.actions if a.kind in ("run", "rematerialize")]
        return sum(runs[name].exchanged_bytes for name in names)

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
            shapes = replace(self.shapes, data=_of_one_device(self.unweighted))
            step = compiled_step(shapes, self._grouped(False), kind, self.fineness)
            plan = plan_memory(step.work, self.budget, FIRST_BANDWIDTH)
            self._others[kind] = (step, plan)
        return self._others[kind]

    # --------------------------------------------------------------------------- following a plan

    def _executed(
        self, step: CompiledStep, plan: MemoryPlan, state: StepState, data: GraphData
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
                self._run(step.runs[action.name], execution, state, data)
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
        execution.copied_bytes += execution.device[name].nbytes // self.devices
        execution.copy_seconds += time.perf_counter() - began

    def _loaded(self, step: CompiledStep, name: str) -> Any:
        """A tensor from the host, on the device."""
        position = step.features.get(name)
        if position is None:
            return jax.block_until_ready(self.host.load(name))
        return jax.block_until_ready(self._features(*position))

    def _features(self, rows: slice, columns: slice) -> Any:
        """A tile of the features, on the devices."""
        assert self.graph.features is not None
        tile = self.prepared.tile(self.graph.features, rows, columns)
        if self.devices == 1:
            return jnp.array(tile, copy=True)
        sharding = NamedSharding(mesh_of(self.devices), PartitionSpec(AXIS))
        return jax.device_put(tile, sharding, may_alias=False)

    def _run(self, run: Run, execution: Execution, state: StepState, data: GraphData) -> None:
        """Runs an operator."""
        device = execution.device
        # No name holds the joined tables, so that their memory is free before tiles are split.
        execution.carry, written = run.program(
            execution.carry,
            (data, joined(run.read_cuts, [device[tile] for tile in run.reads])),
            (state.trainable, state.others, run.first),
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
