"""Costs of operators in a pipeline: the additive problem of a shape, and the estimate of its step.

The step of a shape is about `passes` times one microbatch plus the work once a step. So seconds and
bytes of a state are weighted sums of its figures, and the exact search of `search.elimination`
applies. Its states are then divided into stages (`search.pipeline_division`), which gives an
estimate of the step and a lower bound of its simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from partita.cost.evaluate import PARTS
from partita.cost.moves import Group, group_of
from partita.graph.operator_graph import Label
from partita.plans.layout import label_sharding
from partita.plans.pipeline import most_in_flight
from partita.plans.plan import Mesh
from partita.plans.schema import SCHEDULES
from partita.search.base import Problem
from partita.search.candidates import assignment_of
from partita.search.network import CostNetwork
from partita.search.pipeline_cuts import Cuts, CutValue
from partita.search.pipeline_division import Division, OperatorFigures, PipelineShape, Runs

EAGER = "eager-1f1b"
LEAST_GAIN = 0.01
"""Relative gain of a schedule over one that needs less memory, at least."""


@dataclass(frozen=True)
class Estimate:
    """The estimated step of a shape whose operators are in given states."""

    seconds: float
    lower_bound: float
    """Seconds if everything hides that can."""
    runs: Runs


class ShapeCosts:
    """The costs of the operators inside a stage, in a shape. Equal operators share figures."""

    def __init__(
        self,
        network: CostNetwork,
        shape: PipelineShape,
        stored_share: float = 1.0,
    ) -> None:
        """`stored_share`: share of activations that a compiler stores, and does not recompute."""
        self.network = network
        self.shape = shape
        self.stored_share = stored_share
        self.exposed_share = 1 - network.placement.machine.backend.overlap
        shared: dict[int, OperatorFigures] = {}
        self.figures: list[OperatorFigures] = []
        for operator, kind in enumerate(network.problem.kinds):
            if kind not in shared:
                shared[kind] = self._figures(operator)
            self.figures.append(shared[kind])

    def _figures(self, operator: int) -> OperatorFigures:
        """Figures by state of an operator."""
        network = self.network
        row = dict(zip(PARTS, network.parts[operator], strict=True))
        # Parameters that are stored split (ZeRO-3) are gathered for each microbatch, others once.
        gather_forward = row["gather", "forward"] * self.exposed_share
        gather_backward = row["gather", "backward"] * self.exposed_share
        gather_once = row["gather", "update"] * self.exposed_share
        sums = network.sums[operator]
        if self.shape.microbatches == 1:
            added = 0.0
            summed = row["sum", "backward"] * self.exposed_share
        else:
            added = sums.adding + sums.repeated * self.exposed_share
            summed = sums.waiting
        once = row["compute", "update"] + row["exchange", "update"] + summed + gather_once
        compute = row["compute", "forward"] + gather_forward
        exchange = row["exchange", "forward"]
        backward_compute = row["compute", "backward"] + gather_backward + added
        backward_exchange = row["exchange", "backward"]
        forward = compute + exchange
        exposed_forward = compute + self.exposed_share * exchange
        read_again = np.where(row["gather", "backward"] > 0, gather_forward, 0.0)
        exposed_exchange = self.exposed_share * backward_exchange
        activations = network.activations[operator]
        variables = network.problem.nbytes[operator] - activations
        return OperatorFigures(
            microbatch=forward + backward_compute + backward_exchange,
            forward=forward,
            exposed=exposed_forward + backward_compute + exposed_exchange,
            exposed_forward=exposed_forward,
            repeated=forward - read_again,
            exposed_repeated=exposed_forward - read_again,
            once=once,
            fixed=variables + network.gradients[operator],
            activations=activations * self.stored_share,
        )

    def problem(self) -> Problem:
        """Seconds of all stages together in a step of this shape, and bytes of all stages.

        Activations count once per microbatch in flight, and not at all if they are rematerialized.
        """
        shape = self.shape
        in_flight = 0.0 if shape.rematerialize else shape.in_flight
        extra_forward = shape.forward_passes - 1
        problem = self.network.problem
        seconds: dict[int, np.ndarray] = {}
        nbytes: dict[int, np.ndarray] = {}
        for kind, figures in zip(problem.kinds, self.figures, strict=True):
            if kind not in seconds:
                microbatch = figures.microbatch + extra_forward * figures.repeated
                seconds[kind] = microbatch * shape.passes + figures.once
                nbytes[kind] = figures.fixed + figures.activations * in_flight
        tables: dict[int, np.ndarray] = {}
        for ends, kind in problem.table_kinds.items():
            if kind not in tables:
                tables[kind] = problem.tables[ends] * shape.passes
        return replace(
            problem,
            seconds=[seconds[kind] for kind in problem.kinds],
            nbytes=[nbytes[kind] for kind in problem.kinds],
            tables={ends: tables[kind] for ends, kind in problem.table_kinds.items()},
        )

    def estimate(
        self,
        mesh: Mesh,
        cuts: Cuts,
        states: Sequence[int],
        limit_bytes: float,
    ) -> Estimate | None:
        """The estimated step in these states, None if no division fits in `limit_bytes`."""
        begins = np.array([0, *(end + 1 for end in cuts.ends)])
        figures = self._in_states(states).by_run(begins)
        hops = self._hop_seconds(mesh, cuts, states)
        entering = [0.0, *self._shard_bytes(cuts.stored, states)]
        best: Estimate | None = None
        for schedule in self._schedules():
            waiting = hops if schedule == SCHEDULES[0] else [0.0] * len(hops)
            runs = Runs(self.shape, figures, entering, waiting, schedule)
            division = runs.divide(limit_bytes)
            if division is None:
                continue
            estimate = self._step(figures, runs, division, hops)
            if best is None or estimate.seconds < best.seconds * (1 - LEAST_GAIN):
                best = estimate
        return best

    def _schedules(self) -> Sequence[str]:
        """The schedules of a shape, the one that needs least memory first.

        More forward passes first pay only if backward passes come back before the last of them.
        """
        ahead = most_in_flight(EAGER, self.shape.microbatches, self.shape.stages - 1)
        if self.shape.stages > 1 and ahead < self.shape.microbatches:
            return SCHEDULES[0], EAGER
        return SCHEDULES[:1]

    def _in_states(self, states: Sequence[int]) -> OperatorFigures:
        """Figures by operator, moves between operators included."""
        columns = {}
        for name in OperatorFigures.__annotations__:
            values = []
            for figures, state in zip(self.figures, states, strict=True):
                by_state = getattr(figures, name)
                values.append(by_state[state])
            columns[name] = np.array(values)
        for (one, other), table in self.network.problem.tables.items():
            seconds = table[states[one], states[other]]
            columns["microbatch"][other] += seconds
            columns["exposed"][other] += seconds * self.exposed_share
        return OperatorFigures(**columns)

    def _step(
        self,
        figures: OperatorFigures,
        runs: Runs,
        division: Division,
        hops: Sequence[float],
    ) -> Estimate:
        """The step of a division.

        With "1f1b": fill, the pace of the slowest stage, and drain. With more forward passes first:
        the passes in their order.
        """
        rematerialized = np.zeros(runs.count)
        rematerialized[list(division.rematerialized)] = 1.0
        begins = [0, *(end + 1 for end in division.ends[:-1])]
        run_seconds = figures.microbatch + rematerialized * figures.repeated
        run_exposed = figures.exposed + rematerialized * figures.exposed_repeated
        stage_seconds = np.add.reduceat(run_seconds, begins)
        exposed = np.add.reduceat(run_exposed, begins)
        once = np.add.reduceat(figures.once, begins)
        others = self.shape.microbatches - 1
        entering = np.array([hops[begin] for begin in begins])
        if division.schedule == SCHEDULES[0]:
            # A stage has no microbatch to spare while one is on its way.
            stage_seconds = stage_seconds + np.append(entering[1:], 0.0)
            pace = (others * stage_seconds + once).max()
            seconds = float(stage_seconds.sum() + pace)
        else:
            forward = np.add.reduceat(figures.forward, begins)
            later = range(len(begins) - 1, -1, -1)
            counts = [most_in_flight(division.schedule, others + 1, number) for number in later]
            passes = forward, stage_seconds - forward, entering / 2, np.array(counts)
            seconds = float((last_ends(*passes, others + 1) + once).max())
        # A stage begins after those before it have passed one microbatch on. They take the last one
        # back while it updates its variables.
        exposed_forward = np.add.reduceat(figures.exposed_forward, begins)
        earlier_forward = np.cumsum(exposed_forward) - exposed_forward
        earlier = np.cumsum(exposed) - exposed
        ends = (others + 1) * exposed + np.maximum(earlier, earlier_forward + once)
        return Estimate(seconds, float(ends.max()), runs)

    def _hop_seconds(
        self,
        mesh: Mesh,
        cuts: Cuts,
        states: Sequence[int],
    ) -> list[float]:
        """Per run, seconds in which a microbatch is sent to it and its gradient back."""
        links = group_of(tuple(range(self.shape.axes)), mesh)
        forward = [0.0, *self._shard_bytes(cuts.forward, states)]
        backward = [0.0, *self._shard_bytes(cuts.backward, states)]
        seconds = []
        for forward_bytes, backward_bytes in zip(forward, backward, strict=True):
            one_way = self._send_seconds(forward_bytes, links)
            other_way = self._send_seconds(backward_bytes, links)
            seconds.append(one_way + other_way)
        return seconds

    def _send_seconds(
        self,
        nbytes: float,
        links: Group,
    ) -> float:
        return self.network.placement.seconds("collective_permute", nbytes, links)

    def _shard_bytes(
        self,
        cuts: Sequence[list[CutValue]],
        states: Sequence[int],
    ) -> list[float]:
        """Per cut, bytes of its values on one device, of one microbatch."""
        placement = self.network.placement
        counts: dict[tuple[int, Label], int] = {}
        totals = []
        for values in cuts:
            total = 0.0
            for operator, label, nbytes in values:
                key = (operator, label)
                if key not in counts:
                    choice = self.network.choice(operator, states[operator])
                    sharding = label_sharding(label, assignment_of(choice))
                    axes = [axis for dim in sharding for axis in dim]
                    counts[key] = placement.shard_count(axes)
                total += nbytes / counts[key]
            totals.append(total)
        return totals


@njit(cache=True)
def last_ends(forward, backward, hops, in_flight, microbatches):
    """[stage]: end of the last backward pass, where each stage reads the one before it.

    A stage first runs `in_flight` forward passes, then backward and forward passes in turn.
    `forward`, `backward` and `hops` are seconds: of a pass, and of a microbatch from the stage
    before.
    """
    stages = len(forward)
    ends = np.zeros((2, stages, microbatches))
    done = np.zeros((2, stages), np.int64)
    time = np.zeros(stages)
    while done[1].min() < microbatches:
        for s in range(stages):
            while done[1, s] < microbatches:
                ahead = min(microbatches, done[1, s] + in_flight[s])
                phase = 0 if done[0, s] < ahead else 1
                n = done[phase, s]
                other = s - 1 if phase == 0 else s + 1
                ready = 0.0
                if 0 <= other < stages:
                    if done[phase, other] <= n:
                        break
                    ready = ends[phase, other, n] + hops[max(s, other)]
                seconds = forward[s] if phase == 0 else backward[s]
                time[s] = max(time[s], ready) + seconds
                ends[phase, s, n] = time[s]
                done[phase, s] += 1
    return time
