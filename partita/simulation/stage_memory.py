"""Peak memory of a pipeline stage, from the pieces that it runs.

A stage stores its variables, the sums of its gradients, the batch, and for every microbatch in
flight the values that its forward piece leaves for its backward piece. While a piece runs, its
results and temporaries come on top. The temporaries are those of the piece as a program of its own
(`cost.memory`). The peak is the largest sum over the pieces.

Values that come from an earlier stage arrive as soon as that stage has computed them. So a stage
holds as many of them as the earlier stage has microbatches in flight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from partita.cost.backends import compiler_of
from partita.cost.memory import ROLES, PeakMemory, memory
from partita.cost.partial import summed_values, sums_over_devices, unsummed
from partita.graph.operator_graph import producers
from partita.machine import Backend
from partita.plans.layout import Layout, shard_bytes
from partita.plans.piece_graph import piece_graph
from partita.plans.pieces import Cut, Piece
from partita.plans.pipeline import (
    PER_LATER_STAGE,
    is_whole_pass,
    most_in_flight,
    stage_count,
)
from partita.plans.plan import Mesh, Plan


class StageMemory(NamedTuple):
    """Peak memory of a device of one stage.

    `microbatch_bytes` of it are those of each microbatch in flight.
    """

    peak: PeakMemory
    microbatch_bytes: float


class _Moment(NamedTuple):
    """Memory of a stage while a piece runs, bytes; variables and batch not included."""

    activations: int
    results: int
    temporaries: int
    operator: str
    gradients: int

    @property
    def nbytes(self) -> int:
        return self.activations + self.results + self.temporaries + self.gradients


@dataclass(frozen=True)
class PieceMemories:
    """The memory of all stages of a cut.

    `mesh` and `layout` are those of one microbatch inside a stage, `device_bytes` the memory of a
    device, by which a compiler decides to compute values again. `content` names the operators
    and splits of a stage; the pieces of stages with equal content have equal temporaries.
    """

    cut: Cut
    plan: Plan
    mesh: Mesh
    layout: Layout
    backend: Backend
    device_bytes: float
    content: Callable[[int], Hashable]

    def stages(self) -> list[StageMemory]:
        """[stage]: peak memory of a device."""
        return [self._stage(stage) for stage in range(len(self.cut.places))]

    # ---------------------------------------------------------------------------------- values

    @cached_property
    def _nbytes(self) -> list[int]:
        return shard_bytes(self.cut.flow.graph, self.mesh, self.layout)

    @cached_property
    def _maker(self) -> dict[int, int]:
        return self.cut.maker()

    @cached_property
    def _readers(self) -> dict[int, list[int]]:
        return self.cut.readers()

    @cached_property
    def _in_flight(self) -> list[int]:
        """[stage]: microbatches whose forward values it stores at once, at most."""
        plan = self.plan
        last = stage_count(plan) - 1
        counts = []
        for stage in range(len(self.cut.places)):
            counts.append(most_in_flight(plan.schedule, plan.microbatches, last - stage))
        return counts

    @cached_property
    def _summed(self) -> frozenset[int]:
        return self.cut.summed if self.plan.microbatches > 1 else frozenset()

    @cached_property
    def _summed_in_pieces(self) -> frozenset[int]:
        """The gradients of a microbatch that devices sum before they are added up."""
        graph, layout = self.cut.flow.graph, self.layout
        producer = producers(graph)
        partial = unsummed(graph, layout, self._summed)
        return frozenset(
            gradient
            for gradient in self._summed - partial.keys()
            if any(
                sums_over_devices(graph, layout, producer[value])
                for value in summed_values(graph, gradient)
            )
        )

    def _size(self, tensors: Sequence[int]) -> int:
        return sum(self._nbytes[t] for t in tensors)

    def _pieces(self, stage: int) -> list[Piece]:
        return [piece for piece in self.cut.pieces if piece.place == stage]

    def _lasting(self, stage: int) -> dict[str, int]:
        """Kind of memory -> bytes during the whole step: variables of the stage, variables of
        others that it reads, its part of the batch.
        """
        nbytes = dict.fromkeys(ROLES.values(), 0)
        read = {t for piece in self._pieces(stage) for t in piece.reads}
        for argument in self.cut.flow.graph.arguments:
            t = argument.tensor
            if argument.role == "batch":
                nbytes["batch"] += self._nbytes[t] * self.plan.microbatches * (t in read)
            elif self.cut.homes[t] == stage or t in read:
                nbytes[ROLES[argument.role]] += self._nbytes[t]
        return nbytes

    def _sums(self, stage: int) -> list[int]:
        """The gradients that a stage adds up over the microbatches, or gives to its update."""
        sums = set()
        for piece in self._pieces(stage):
            if piece.is_repeated:
                sums.update(self.cut.summed.intersection(piece.gives))
        return sorted(sums)

    def _left_for_backward(self, stage: int) -> list[int]:
        """The values that a stage computes forward and reads backward."""
        left = []
        for piece in self._pieces(stage):
            for t in piece.gives if piece.phase == "forward" else ():
                readers = [self.cut.pieces[n] for n in self._readers.get(t, ())]
                is_left = any(r.place == stage and r.phase == "backward" for r in readers)
                if is_left and t not in self.cut.carried:
                    left.append(t)
        return left

    def _received(self, stage: int, phase: str) -> dict[int, list[int]]:
        """Other stage -> the values of one of its microbatches that a stage reads."""
        received: dict[int, set[int]] = defaultdict(set)
        for piece in self._pieces(stage):
            for t in piece.reads if piece.is_repeated else ():
                maker = self.cut.pieces[self._maker[t]] if t in self._maker else piece
                if maker.place != stage and maker.phase == phase:
                    received[maker.place].add(t)
        return {source: sorted(tensors) for source, tensors in received.items()}

    # ------------------------------------------------------------------------------------- peaks

    def _stage(self, stage: int) -> StageMemory:
        lasting = self._lasting(stage)
        kept_bytes = self._size(self._left_for_backward(stage))
        arrived_bytes = 0
        arriving_bytes = 0
        for source, tensors in self._received(stage, "forward").items():
            arrived_bytes += self._size(tensors) * self._in_flight[source]
            arriving_bytes += self._size(tensors)
        moments = [
            self._moment(stage, number, kept_bytes, arrived_bytes)
            for number, piece in enumerate(self.cut.pieces)
            if piece.place == stage
        ]
        largest = max(moments, key=lambda moment: moment.nbytes, default=_Moment(0, 0, 0, "", 0))
        nbytes = sum(lasting.values()) + largest.nbytes
        peak = PeakMemory(
            peak=nbytes,
            **lasting,
            activations=largest.activations,
            gradients=largest.gradients,
            temporaries=largest.results + largest.temporaries,
            operator=largest.operator,
            course=np.array([nbytes]),
            by_operator=np.zeros(0),
        )
        return StageMemory(peak, kept_bytes + arriving_bytes)

    def _moment(
        self,
        stage: int,
        number: int,
        kept_bytes: int,
        arrived_bytes: int,
    ) -> _Moment:
        """The memory of a stage while one of its pieces runs."""
        piece = self.cut.pieces[number]
        flying = self._in_flight[stage]
        if piece.phase == "forward":
            # Its own values for the backward pass are among its results.
            activations = kept_bytes * (flying - 1) + arrived_bytes
        elif piece.phase == "backward":
            received = self._received(stage, "backward").values()
            gradient_bytes = sum(self._size(tensors) for tensors in received)
            activations = kept_bytes * flying + arrived_bytes
            activations += gradient_bytes * self._waiting_gradients(stage)
        else:
            activations = 0
        sums = self._sums(stage)
        replaced = {*self._summed, *self.cut.argument_of}
        results = [t for t in piece.gives if t not in replaced]
        is_sum_stored = piece.phase == "update" or self.plan.microbatches > 1
        temporaries, operator = self._temporaries(number)
        return _Moment(
            activations=activations,
            results=self._size(results),
            temporaries=temporaries,
            operator=operator,
            gradients=self._size(sums) if is_sum_stored else 0,
        )

    def _waiting_gradients(self, stage: int) -> int:
        """Microbatches whose gradients have arrived from later stages, at most.

        With "gpipe" a later stage finishes all backward passes first. With "1f1b" it runs two of
        them before it waits, with "eager-1f1b" four.
        """
        if self.plan.schedule == "gpipe":
            return self.plan.microbatches
        return min(PER_LATER_STAGE[self.plan.schedule] + 1, self._in_flight[stage])

    def _temporaries(self, number: int) -> tuple[int, str]:
        """(bytes of a piece's temporaries, the operator at their peak)."""
        piece = self.cut.pieces[number]
        order = [n for n, other in enumerate(self.cut.pieces) if other.place == piece.place]
        key = (
            self.content(piece.place),
            piece.phase,
            order.index(number),
            len(piece.statements),
            len(piece.reads),
        )
        if key not in self._cache:
            late = self._late_statements(piece)
            runs = self.cut.runs if late else ()
            graph, layout = piece_graph(
                self.cut.flow, piece, self.layout, self._summed, late, runs, self._summed_in_pieces
            )
            peak = memory(graph, self.mesh, layout, self.backend, None, self.device_bytes)
            arguments = peak.parameters + peak.optimizer + peak.state + peak.batch
            nbytes = peak.peak - arguments + self._copied_slots(piece)
            self._cache[key] = nbytes, peak.operator
        return self._cache[key]

    def _copied_slots(self, piece: Piece) -> int:
        """Bytes of the optimizer's slots that a piece copies before it replaces them."""
        if not compiler_of(self.backend).buffers.copied_slots:
            return 0
        roles = self.cut.flow.roles
        replaced = [self.cut.argument_of[t] for t in piece.gives if t in self.cut.argument_of]
        return self._size([t for t in replaced if roles[t] == "optimizer"])

    def _late_statements(self, piece: Piece) -> list[int]:
        """The forward statements that a backward piece repeats, if the compiler delays them."""
        is_delayed = not compiler_of(self.backend).buffers.early_runs
        if not is_delayed or piece.phase != "backward" or is_whole_pass(self.plan):
            return []
        classes = self.cut.flow.classes
        return [k for k in piece.statements if classes[k] == "forward"]

    @cached_property
    def _cache(self) -> dict[Hashable, tuple[int, str]]:
        return {}
