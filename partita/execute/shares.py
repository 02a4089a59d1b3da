"""Unequal shares of a batch: each device runs its own number of microbatches of one program.

The step is one SPMD program. A loop over microbatches runs inside `shard_map`; its trip count is
data of the device. It has no collective. After it the sums of all devices are added up, and one
update follows. So shares change from one step to the next without compilation, and the result is
that of the plain step to rounding. The prices: every device holds the whole batch, and small
microbatches compute less efficiently than a device's whole part.

For plans that split samples only, with or without ZeRO-1, and steps that are sums over samples
(`execute.sample_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from partita.capture.jax_functions import Captured
from partita.errors import MemoryBudgetError, PlanError
from partita.execute.annotate import Annotator
from partita.execute.devices import detect
from partita.execute.emitted import peak_bytes
from partita.execute.piece_text import aval, piece_text
from partita.execute.process_arrays import put
from partita.execute.program import PlannedStep, check_one_program, planned_step
from partita.execute.sample_sums import SampleSums, sample_sums
from partita.execute.sharding import named_sharding
from partita.execute.verification import Verification
from partita.management.shares import microbatch_count, shares_of
from partita.plans.plan import Plan
from partita.units import format_bytes


@dataclass(frozen=True)
class SharesStep:
    """A step with a number of microbatches per device: `step(state, batch) -> (outputs, state)`.

    It takes and gives the state as the plain step does.
    """

    plain: PlannedStep
    sums: SampleSums
    shares: tuple[int, ...]
    """Per device of the mesh, in its order."""
    step: Any
    """The jitted step for any shares."""

    @property
    def captured(self) -> Captured:
        """The captured step."""
        return self.plain.captured

    @property
    def plan(self) -> Plan:
        """The plan of the plain step."""
        return self.plain.plan

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """All devices."""
        return self.plain.mesh

    @property
    def state_shardings(self) -> Any:
        """A sharding for every leaf of the state: those of the plain step."""
        return self.plain.state_shardings

    def with_shares(self, shares: Sequence[int]) -> SharesStep:
        """The step with other shares, by the same program.

        PlanError unless they are whole numbers from 0 that add up to the microbatches.
        """
        total = self.sums.part_count
        is_whole = all(isinstance(n, int) and n >= 0 for n in shares)
        if len(shares) != self.mesh.size or not is_whole or sum(shares) != total:
            raise PlanError(
                f"The shares {':'.join(map(str, shares))} are not {self.mesh.size} whole numbers "
                f"from 0 that add up to {total} microbatches: give one per device."
            )
        return replace(self, shares=tuple(shares))

    def place_state(self, state: Any) -> Any:
        """The state on the devices, as the step takes it."""
        return put(state, self.state_shardings)

    def place_batch(self, batch: Any) -> Any:
        """The batch and the shares on the devices, as the step takes them."""
        return put(batch, _replicated(self.mesh)), self._ranges

    @cached_property
    def _ranges(self) -> Any:
        """(first microbatch, number of microbatches), a number per device each."""
        ends = np.cumsum(self.shares)
        counts = np.array(self.shares, np.int32)
        firsts = (ends - counts).astype(np.int32)
        return put((firsts, counts), NamedSharding(self.mesh, _per_device(self.mesh)))

    def compile(self) -> Any:
        """The compiled step, for any shares."""
        captured = self.captured
        count = jax.ShapeDtypeStruct((self.mesh.size,), np.int32)
        return self.step.lower(captured.state, (captured.batch, (count, count))).compile()


def shares_step(
    captured: Captured,
    plan: Plan,
    devices: Sequence[Any] | None = None,
    microbatches: int | None = None,
    donate: bool = True,
) -> SharesStep:
    """The captured step with equal shares, ready to compile for devices (default: JAX's).

    Args:
        microbatches: Of the batch; by default `microbatch_count`.
        donate: Whether the step reuses the memory of the old state, which is then gone.

    Raises:
        PlanError: The plan splits more than samples, or the step is no sum over samples.
    """
    _check_plan(captured, plan)
    count = microbatches or microbatch_count(captured.graph.batch_size, plan.devices)
    sums = sample_sums(captured, count)
    plain = planned_step(captured, plan, devices, donate)
    mesh = plain.mesh
    replicated = _replicated(mesh)
    batch_shardings = jax.tree.map(lambda _: replicated, captured.batch)
    ranges = NamedSharding(mesh, _per_device(mesh))
    step = jax.jit(
        _Program(plain, sums).run,
        in_shardings=(plain.state_shardings, (batch_shardings, (ranges, ranges))),
        out_shardings=(None, plain.state_shardings),
        donate_argnums=0 if donate else (),
    )
    return SharesStep(plain, sums, shares_of([1.0] * mesh.size, count), step)


def check_shares(step: SharesStep, compiled: Any) -> Verification:
    """The memory of a compiled step with shares.

    MemoryBudgetError if it needs more than a local device has.
    """
    peak = peak_bytes(compiled)
    capacity = detect(step.mesh.size).memory_bytes
    if capacity is not None and peak > capacity:
        raise MemoryBudgetError(
            f"Shares of {step.captured.graph.name} need {format_bytes(peak)} of memory on every "
            f"device by the compiler's count, and a device has {format_bytes(capacity)}: each "
            "holds the whole batch. Use a smaller batch."
        )
    return Verification(peak, capacity, (), None, None)


def _check_plan(captured: Captured, plan: Plan) -> None:
    """PlanError unless a plan splits samples only, and stores whole variables."""
    check_one_program(plan)
    graph = captured.graph
    if plan.devices < 2:
        raise PlanError(f"The plan '{plan.name}' uses one device, so there are no shares.")
    for number, operator in enumerate(graph.operators):
        for axis, name in plan.choices.get(operator.name, {}).items():
            factor = graph.factor(number, name)
            if factor is None or graph.factors[factor].kind != "S":
                raise PlanError(
                    f"The plan '{plan.name}' splits '{operator.name}' by {name} over axis {axis}, "
                    "so devices need each other inside a microbatch and have no shares. Use data "
                    "parallelism or ZeRO-1."
                )
    for path, storage in plan.storage.items():
        if storage.zero > 2:
            raise PlanError(
                f"The plan '{plan.name}' stores '{path}' in parts (ZeRO-3), so devices need each "
                "other inside a microbatch and have no shares. Use data parallelism or ZeRO-1."
            )


class _Program:
    """The function of a step with shares."""

    def __init__(self, plain: PlannedStep, sums: SampleSums) -> None:
        self.plain = plain
        self.sums = sums
        flow = sums.flow
        text = plain.captured.text
        annotator = Annotator(flow.graph, plain.plan.mesh, plain.layout, partial={})
        self.rest = piece_text(text, flow, sums.rest, "rest", annotator)
        self.givens = piece_text(text, flow, sums.givens, "givens", None)
        self.samples = piece_text(sums.part_text, sums.part_flow, sums.samples, "samples", None)
        self.leaf_of = dict(enumerate(text.module_kept_var_idx))

    def run(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """`step(state, (batch, (firsts, counts))) -> (outputs, state)`."""
        leaves, (firsts, counts) = batch
        leaves = jax.tree.leaves((state, leaves))
        values = {t: leaves[self.leaf_of[t]] for t in self.sums.flow.roles}
        values |= self._results(self.sums.givens, self.givens, values)
        given = self.sums.given
        inputs = {t: values[given.get(t, t)] for t in self.sums.samples.reads}
        mesh = self.plain.mesh
        per_device = _per_device(mesh)
        totals = jax.shard_map(
            self._local_sums,
            mesh=mesh,
            in_specs=(PartitionSpec(), per_device, per_device),
            out_specs=per_device,
            check_vma=False,
        )(inputs, firsts, counts)
        for t, total in zip(self.sums.sums, totals, strict=True):
            values[t] = self._summed(t, total)
        values |= self._results(self.sums.rest, self.rest, values)
        results = [values[t] for t in self.sums.flow.graph.outputs]
        return jax.tree.unflatten(self.plain.captured.text.out_tree, results)

    def _results(self, piece: Any, text: Any, values: dict[int, Any]) -> dict[int, Any]:
        """The values that a piece gives."""
        if not piece.gives:
            return {}
        results = text.call([values[t] for t in piece.reads])
        return dict(zip(piece.gives, results, strict=True))

    def _local_sums(self, inputs: dict[int, Any], firsts: Any, counts: Any) -> list[Any]:
        """The sums over a device's microbatches, each with a dim of size 1 in front."""
        sums = self.sums
        tensors = sums.part_flow.graph.tensors

        def add_microbatch(number: Any, totals: list[Any]) -> list[Any]:
            arguments = []
            for t in sums.samples.reads:
                value = inputs[t]
                if value.shape != tensors[t].shape:
                    size = tensors[t].shape[0]
                    value = jax.lax.dynamic_slice_in_dim(value, number * size, size)
                arguments.append(value)
            results = self.samples.call(arguments)
            return [a + b.astype(a.dtype) for a, b in zip(totals, results, strict=True)]

        zeros = []
        for t in sums.samples.gives:
            shape = aval(tensors[t])
            zeros.append(jnp.zeros(shape.shape, _sum_dtype(shape.dtype)))
        totals = jax.lax.fori_loop(firsts[0], firsts[0] + counts[0], add_microbatch, zeros)
        return [total[None] for total in totals]

    def _summed(self, tensor: int, totals: Any) -> Any:
        """The sum over devices, with the plan's sharding of the tensor."""
        graph = self.sums.flow.graph
        plain = self.plain
        sharding = plain.layout.shardings[tensor]
        total = totals.sum(0).astype(aval(graph.tensors[tensor]).dtype)
        on_mesh = named_sharding(sharding, plain.plan.mesh, plain.mesh)
        return jax.lax.with_sharding_constraint(total, on_mesh)


def _sum_dtype(dtype: Any) -> Any:
    """The dtype in which values are added up: at least float32 for floating-point ones."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        return jnp.float32
    return dtype


def _replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _per_device(mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Dim 0 over all devices."""
    return PartitionSpec(mesh.axis_names)
