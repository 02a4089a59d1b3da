"""A step in which device groups do different things: operators on slices of mesh axes, or devices
that differ.

An operator runs in the groups on its slices: `at(i)` on an axis is slice i, any other use of the
axis is all slices. So operators on different slices run at the same time, as branches in parallel,
once their operands have arrived. A collective is one task of all groups that take part, and begins
when the last of them has reached it. Values between operators on different slices cross as in
`crossing`. The links out of a group and those into it are resources; transfers between groups take
turns on them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, product

import numpy as np

from partita.cost.collectives import collectives
from partita.cost.evaluate import PARTS, OperatorCost, compute_source, operator_costs
from partita.cost.memory import PeakMemory, memory
from partita.cost.moves import Placement
from partita.cost.operator_terms import Reduction
from partita.cost.predict import OperatorPrediction, Prediction, build_prediction, with_energy
from partita.cost.storage import storage_axes
from partita.cost.terms import Terms, cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.layout import (
    Layout,
    Read,
    label_sharding,
    layout_of,
    operator_assignments,
)
from partita.plans.pipeline import is_one_program
from partita.plans.plan import Mesh, Plan
from partita.simulation.base import SimulatedStep
from partita.simulation.crossing import Crossing, PlacedMove, Route, reshard_axes, routes
from partita.simulation.engine import Times, run
from partita.simulation.groups import DeviceGroups, Slices, folded, slices_of, unfolded
from partita.simulation.spans import GroupTimes, timeline_of
from partita.simulation.structure import Slot, Structure, step_structure
from partita.simulation.tasks import (
    BETWEEN,
    KERNELS,
    LINKS,
    GroupTask,
    StepTasks,
    group_step_tasks,
    slot_seconds,
)
from partita.simulation.timeline import Timeline

MoveKey = tuple[int, int, str, str]
"""(home operator, reading operator, phase of the value, phase of the reading)."""


@dataclass(frozen=True, eq=False)
class PlacedStep(SimulatedStep):
    """A step of a plan without microbatches and rematerialization, by device groups."""

    graph: OperatorGraph
    machine: Machine
    plan: Plan
    terms: Terms
    assignments: Sequence[Mapping[int, tuple[int, ...]]]
    """[operator]: factor -> the mesh axes that split it."""
    slices: Sequence[Slices]
    """[operator]: the slices on which it is placed."""
    fold: bool = True
    """Whether equal devices share a group."""

    @staticmethod
    def of(
        graph: OperatorGraph,
        machine: Machine,
        plan: Plan,
        terms: Terms | None = None,
        fold: bool = True,
    ) -> PlacedStep:
        """The step of a checked plan.

        Without `fold` every device has a group: the same result for more work.
        """
        return PlacedStep(
            graph=graph,
            machine=machine,
            plan=plan,
            terms=terms or cost_terms(graph, machine.backend),
            assignments=operator_assignments(graph, plan),
            slices=slices_of(graph, plan),
            fold=fold,
        )

    @cached_property
    def layout(self) -> Layout:
        """Sharding of every tensor."""
        return layout_of(self.graph, self.plan)

    @cached_property
    def _splits(self) -> Layout:
        """The assignments alone, which seconds depend on."""
        return Layout((), (), tuple(dict(a) for a in self.assignments))

    @cached_property
    def structure(self) -> Structure:
        """The slots of the step, in the order of issue."""
        return step_structure(
            self.graph,
            self.terms,
            any(self.slices),
        )

    @cached_property
    def placement(self) -> Placement:
        """The mesh on the machine's links."""
        return Placement(self.machine, self.plan.mesh)

    @cached_property
    def costs(self) -> list[OperatorCost]:
        """[operator]: its cost on the devices where it runs."""
        return self._costs_on(self.machine)

    def _costs_on(self, machine: Machine) -> list[OperatorCost]:
        """[operator]: its cost on a machine.

        Axes on which it is placed have no links for it: it stores and sends nothing over them. Its
        collectives share links with the slices on which others are placed, which may send at the
        same time. Operators on all slices wait for it, since they use its devices too.
        """
        by_axes: dict[tuple[int, ...], list[OperatorCost]] = {}
        costs = []
        for o, slices in enumerate(self.slices):
            axes = tuple(sorted(slices))
            if axes not in by_axes:
                mesh = _without_links(self.plan.mesh, axes)
                placement = Placement(machine.with_senders(self._senders(axes)), mesh)
                in_pieces = not is_one_program(self.plan)
                by_axes[axes] = operator_costs(
                    self.terms, placement, self._splits, self.plan, in_pieces
                )
            costs.append(by_axes[axes][o])
        return costs

    def _senders(self, axes: Sequence[int]) -> list[float]:
        """Per level, the fraction of the devices inside a part on which operators are placed.

        `axes` are those of one operator; only slices of these axes are counted.
        """
        mesh = self.plan.mesh
        fractions = []
        for level in range(len(self.machine.levels)):
            inside = [number for number in axes if mesh.axes[number].level > level]
            positions = [range(mesh.sizes[number]) for number in inside]
            occupied: set[tuple[int, ...]] = set()
            for slices in self.slices:
                if not slices.keys().isdisjoint(inside):
                    choices = [
                        [slices[number]] if number in slices else positions[n]
                        for n, number in enumerate(inside)
                    ]
                    occupied.update(product(*choices))
            fractions.append(len(occupied) / math.prod(map(len, positions)) if inside else 1.0)
        return fractions

    @cached_property
    def moves(self) -> dict[MoveKey, list[PlacedMove]]:
        """The moves of every slot of kind "move"."""
        moves: dict[MoveKey, list[PlacedMove]] = defaultdict(list)
        for edge in self.terms.edges:
            source = label_sharding(edge.source, self.assignments[edge.home])
            target = label_sharding(edge.target, self.assignments[edge.reader])
            home = self.slices[edge.home]
            reader = self.slices[edge.reader]
            key = (edge.home, edge.reader, edge.phase, edge.read_phase)
            moves[key].append(PlacedMove.of(edge, home, reader, source, target))
        return moves

    def _moves_of(self, slot: Slot) -> list[PlacedMove]:
        return self.moves[slot.operator, slot.reader, slot.phase, slot.read_phase]

    @cached_property
    def collective_axes(self) -> list[tuple[int, ...]]:
        """[slot]: the axes over which its collectives are."""
        return [tuple(sorted(self._collective_axes(slot))) for slot in self.structure.slots]

    def _collective_axes(self, slot: Slot) -> set[int]:
        axes: set[int] = set()
        if slot.kind == "move":
            for move in self._moves_of(slot):
                axes |= move.reshard_axes
        elif slot.kind == "sum":
            axes |= self._reduced_axes(slot)
        elif slot.kind == "exchange":
            axes |= self._reduced_axes(slot) | self._exchanged_axes(slot)
        elif slot.kind == "gather":
            axes |= self._gathered_axes(slot)
        return axes

    def _reduced_axes(self, slot: Slot) -> set[int]:
        """The axes of the reductions of a slot: of gradients in a sum, of the phase's other values
        in an exchange.
        """
        axes: set[int] = set()
        for reduction in self.terms.operators[slot.operator].reductions:
            if _belongs_to(reduction, slot):
                for factor in reduction.reduced:
                    axes.update(self.assignments[slot.operator].get(factor, ()))
        return axes

    def _exchanged_axes(self, slot: Slot) -> set[int]:
        """The axes of the halos and of the moves inside an operator, in the phase of a slot."""
        operator_terms = self.terms.operators[slot.operator]
        assignment = self.assignments[slot.operator]
        axes: set[int] = set()
        for halo in operator_terms.halos:
            if halo.phase == slot.phase:
                axes.update(assignment.get(halo.split, ()))
        for move in operator_terms.moves:
            if move.phase == slot.phase:
                source = label_sharding(move.source, assignment)
                target = label_sharding(move.target, assignment)
                axes |= reshard_axes(move, source, target)
        return axes

    def _gathered_axes(self, slot: Slot) -> set[int]:
        """The axes over which an operator's variables may be stored."""
        mesh = _without_links(self.plan.mesh, self.slices[slot.operator])
        axes: set[int] = set()
        for stored in self.terms.operators[slot.operator].stored:
            storage = storage_axes(
                stored,
                mesh,
                self.assignments[slot.operator],
            )
            if storage is not None:
                axes.update(storage[1])
        return axes

    @cached_property
    def groups(self) -> DeviceGroups:
        """The device groups of the step."""
        kinds = self.machine.device_kinds()
        mesh = self.plan.mesh
        if not self.fold:
            return unfolded(mesh, kinds or [0] * mesh.size)
        together: set[frozenset[int]] = set()
        if kinds:  # devices of a kind may wait for different kinds
            together |= {frozenset(axes) for axes in self.collective_axes}
            for moves in self.moves.values():
                together |= {frozenset(move.crossing.axes) for move in moves}
        return folded(mesh, kinds, self.slices, together)

    @cached_property
    def seconds_of_kind(self) -> Mapping[int, np.ndarray]:
        """Kind of device -> [slot]: seconds, without moves between different slices."""
        local_edges = []
        for moves in self.moves.values():
            local_edges += [move.move for move in moves if not move.crosses]
        seconds = {}
        for kind in set(self.groups.kinds):
            machine = self.machine.of_kind(kind)
            costs = self.costs if machine is self.machine else self._costs_on(machine)
            seconds[kind] = slot_seconds(
                self.structure, costs, local_edges, self.placement, self._splits
            )
        return seconds

    @cached_property
    def group_tasks(self) -> list[list[GroupTask]]:
        """[slot]: the tasks of the device groups."""
        all_groups = tuple(range(self.groups.count))
        operator_groups = [self.groups.groups_on(slices) for slices in self.slices]
        collective_groups: dict[tuple[object, ...], list[tuple[int, ...]]] = {}
        group_tasks = []
        for n, slot in enumerate(self.structure.slots):
            if slot.kind == "join":
                group_tasks.append([GroupTask(all_groups, 0.0, BETWEEN, all_groups)])
                continue
            if slot.kind == "compute":
                group_tasks.append(self._compute_tasks(n, operator_groups[slot.operator]))
                continue
            moves = self._moves_of(slot) if slot.kind == "move" else []
            crosses = any(move.crosses for move in moves)
            link_seconds = self._link_seconds(n)
            axes = self.collective_axes[n] if link_seconds > 0 or crosses else ()
            slices = self.slices[slot.operator]
            key = (axes, *sorted(slices.items()))
            if key not in collective_groups:
                collective_groups[key] = self.groups.collective_groups(axes, slices)
            together = collective_groups[key]
            if not crosses:
                tasks = [GroupTask(groups, link_seconds, LINKS, groups) for groups in together]
                group_tasks.append(tasks)
                continue
            tasks = self._crossing_tasks(slot, moves, link_seconds, together)
            if not all(move.crosses for move in moves):
                homes = set(operator_groups[slot.operator])
                staying = [g for g in operator_groups[slot.reader] if g in homes]
                tasks += [GroupTask((group,), 0.0, BETWEEN, (group,)) for group in staying]
            group_tasks.append(tasks)
        return group_tasks

    def _link_seconds(self, slot: int) -> float:
        """Seconds of a slot that communicates. Links are the same for all kinds of devices."""
        return float(self.seconds_of_kind[self.groups.kinds[0]][slot])

    def _compute_tasks(self, slot: int, operator_groups: Iterable[int]) -> list[GroupTask]:
        """The kernels of a slot, one task per group."""
        tasks = []
        for group in operator_groups:
            seconds = float(self.seconds_of_kind[self.groups.kinds[group]][slot])
            tasks.append(GroupTask((group,), seconds, KERNELS, (group,)))
        return tasks

    def _crossing_tasks(
        self,
        slot: Slot,
        moves: Sequence[PlacedMove],
        link_seconds: float,
        together: Sequence[tuple[int, ...]],
    ) -> list[GroupTask]:
        """The tasks of a move between different slices: the reshard at home, then the transfers,
        each crossing in one.
        """
        crossing_bytes: dict[Crossing, float] = defaultdict(float)
        reshard_seconds = []
        for move in moves:
            if move.crosses:
                crossing_bytes[move.crossing] += move.crossing_bytes(self.placement)
                reshard_seconds.append(move.reshard_seconds(self.placement))
        home_seconds = link_seconds + sum(reshard_seconds)
        tasks = []
        if home_seconds > 0:
            tasks = [GroupTask(groups, home_seconds, LINKS) for groups in together]
        for crossing, nbytes in crossing_bytes.items():
            seconds = crossing.seconds(self.placement, nbytes)
            for route in self._routes(slot.operator, slot.reader, crossing):
                tasks.append(
                    GroupTask(
                        groups=route.homes,
                        seconds=seconds if route.remote else 0.0,
                        stream=BETWEEN,
                        reached=route.reached,
                        links_out=route.links_out,
                        links_in=route.links_in,
                    )
                )
        return tasks

    def _routes(
        self,
        home: int,
        reader: int,
        crossing: Crossing,
    ) -> dict[Route, int]:
        return routes(
            self.groups,
            self.slices[home],
            self.slices[reader],
            crossing,
        )

    @property
    def lower_bound_seconds(self) -> float:
        """Compute seconds of the busiest group: no step is shorter.

        For equal devices; needs no simulation.
        """
        busy = [0.0] * self.groups.count
        for slices, cost in zip(self.slices, self.costs, strict=True):
            for group in self.groups.groups_on(slices):
                busy[group] += float(cost.compute[0])
        return max(busy)

    @property
    def path_seconds(self) -> float:
        """Seconds of the longest row of kernels that wait for each other: no step is shorter.

        For equal devices; needs no simulation.
        """
        ends: list[float] = []
        for slot, before in zip(self.structure.slots, self.structure.before, strict=True):
            end = max((ends[source] for source in before), default=0.0)
            if slot.kind == "compute":
                seconds = self.costs[slot.operator].parts()[PARTS.index(("compute", slot.phase)), 0]
                end += float(seconds) * slot.share
            ends.append(end)
        return max(ends, default=0.0)

    @property
    def busy_seconds(self) -> float:
        """Seconds of the busiest stream or link of all groups: no step is shorter.

        A collective blocks kernels for a part of its time. Needs no simulation.
        """
        visible = 1 - self.machine.backend.overlap
        busy: dict[tuple[str, int], float] = defaultdict(float)
        for task in chain.from_iterable(self.group_tasks):
            for group in task.groups:
                if task.stream == KERNELS:
                    busy["kernels", group] += task.seconds
                elif task.stream == LINKS:
                    busy["kernels", group] += task.seconds * visible
                    busy["links", group] += task.seconds
            for group in task.links_out:
                busy["out", group] += task.seconds
            for group in task.links_in:
                busy["in", group] += task.seconds
        return max(busy.values(), default=0.0)

    @cached_property
    def tasks(self) -> StepTasks:
        """The tasks of all device groups."""
        return group_step_tasks(
            self.structure,
            self.group_tasks,
            self.machine.backend.overlap,
        )

    @cached_property
    def times(self) -> Times:
        """Start and end of every task."""
        return run(self.tasks.tasks)

    @property
    def seconds(self) -> float:
        return self.times.seconds

    @cached_property
    def traffic(self) -> dict[str, float]:
        """Kind of collective or transfer -> bytes that all devices together send in a step."""
        traffic: dict[str, float] = defaultdict(float)
        for _, kind, nbytes in self._operator_traffic:
            traffic[kind] += nbytes
        return dict(sorted(traffic.items()))

    @cached_property
    def _operator_traffic(self) -> list[tuple[int, str, float]]:
        """(operator, kind, bytes that all devices send): collectives first, then transfers between
        slices.
        """
        device_counts = self.groups.device_counts
        operator_devices = []
        for slices in self.slices:
            groups = self.groups.groups_on(slices)
            operator_devices.append(sum(device_counts[group] for group in groups))
        local_reads = tuple(read for read in self.layout.reads if not self._crosses(read))
        layout = replace(self.layout, reads=local_reads)
        traffic = []
        for collective in collectives(
            self.graph,
            self.plan.mesh,
            layout,
            self.machine.backend,
            in_pieces=not is_one_program(self.plan),
        ):
            nbytes = float(collective.total * operator_devices[collective.operator])
            traffic.append((collective.operator, collective.kind, nbytes))
        for (home, reader, _, _), moves in self.moves.items():
            for move in moves:
                if not move.crosses:
                    continue
                route_counts = self._routes(home, reader, move.crossing)
                count = sum(n for route, n in route_counts.items() if route.remote)
                for kind, nbytes in move.crossing_traffic(self.placement).items():
                    traffic.append((reader, kind, nbytes * count))
        return traffic

    def _crosses(self, read: Read) -> bool:
        """Whether a tensor is read on other slices than its home's."""
        home = self.graph.home[read.tensor]
        if home < 0 or read.operator < 0:
            return False
        source = self.layout.shardings[read.tensor]
        crossing = Crossing.of(
            self.slices[home],
            self.slices[read.operator],
            source,
            read.target,
        )
        return bool(crossing.axes)

    @cached_property
    def group_names(self) -> list[str]:
        """[group]: the name of its devices for people."""
        kinds = self.machine.kinds
        names = []
        for group in range(self.groups.count):
            words = [self.groups.name(group)]
            if kinds:
                words.append(kinds[self.groups.kinds[group]].key)
            name = " ".join(word for word in words if word)
            names.append(f"{name} ({group})" if name in names else name)
        return names

    def members(self, group: int) -> frozenset[int]:
        """The operators that run in a group."""
        operators = []
        for o, slices in enumerate(self.slices):
            if group in self.groups.groups_on(slices):
                operators.append(o)
        return frozenset(operators)

    @cached_property
    def memories(self) -> list[PeakMemory]:
        """[group]: peak memory of a device: the variables and values of its operators, and values
        received in the forward pass.
        """
        by_members: dict[frozenset[int], PeakMemory] = {}
        memories = []
        for group in range(self.groups.count):
            members = self.members(group)
            if members not in by_members:
                by_members[members] = self._memory(members)
            memories.append(by_members[members])
        return memories

    def _memory(self, members: frozenset[int]) -> PeakMemory:
        """Peak memory of a device that runs these operators."""
        mesh = self.plan.mesh
        backend = self.machine.backend
        device_bytes = self.machine.memory_bytes
        if len(members) == len(self.slices):
            return memory(self.graph, mesh, self.layout, backend, device_bytes=device_bytes)
        local_reads = []
        for read in self.layout.reads:
            if read.operator in members and self.graph.home[read.tensor] in members:
                local_reads.append(read)
        layout = replace(self.layout, reads=tuple(local_reads))
        peak_memory = memory(self.graph, mesh, layout, backend, members, device_bytes)
        received = self._received_bytes(members)
        return replace(
            peak_memory,
            peak=peak_memory.peak + received,
            activations=peak_memory.activations + received,
            course=peak_memory.course + received,
        )

    def _received_bytes(self, members: frozenset[int]) -> int:
        """Bytes of forward values that a device with these operators receives from other slices,
        each once.
        """
        by_tensor: dict[int, float] = {}
        for edge in self.terms.edges:
            arrives = edge.reader in members and edge.home not in members
            if arrives and edge.phase == "forward":
                target = label_sharding(edge.dims[1], self.assignments[edge.reader])
                shards = self.placement.shard_count(list(chain.from_iterable(target)))
                nbytes = edge.nbytes / shards
                by_tensor[edge.tensor] = max(by_tensor.get(edge.tensor, 0.0), nbytes)
        return int(sum(by_tensor.values()))

    @property
    def fullest(self) -> int:
        """The group whose devices use the largest fraction of their memory."""
        fractions = []
        for kind, peak_memory in zip(self.groups.kinds, self.memories, strict=True):
            fractions.append(peak_memory.peak / self.machine.of_kind(kind).memory_bytes)
        return int(np.argmax(fractions))

    @property
    def peak_bytes(self) -> int:
        return self.memories[self.fullest].peak

    def prediction(self) -> Prediction:
        """The prediction of the step.

        Memory is that of the fullest group; traffic and FLOPs are means over devices.
        """
        devices = self.plan.devices
        fullest = self.fullest
        traffic = {kind: round(nbytes / devices) for kind, nbytes in self.traffic.items()}
        prediction = build_prediction(
            self.plan,
            self.machine,
            operators=self._operator_predictions(),
            memory=self.memories[fullest],
            traffic=traffic,
            flops=self._flops(),
            seconds=self.seconds,
            kind=self.groups.kinds[fullest],
        )
        return with_energy(
            prediction,
            self.machine,
            self.terms,
            self.placement,
            self.assignments,
            [self._device_fraction(o) for o in range(len(self.slices))],
            self.plan,
        )

    def _device_fraction(self, operator: int) -> float:
        """The fraction of the devices that run an operator."""
        return 1 / self.placement.shard_count(tuple(self.slices[operator]))

    def _operator_predictions(self) -> list[OperatorPrediction]:
        sent_bytes = [0.0] * len(self.slices)
        for o, _, nbytes in self._operator_traffic:
            sent_bytes[o] += nbytes / self.plan.devices
        move_seconds = [0.0] * len(self.slices)
        for (_, reader, _, _), moves in self.moves.items():
            for move in moves:
                crossing_seconds = move.crossing_seconds(self.placement)
                move_seconds[reader] += crossing_seconds + move.reshard_seconds(self.placement)
        operators = []
        for o, cost in enumerate(self.costs):
            source = compute_source(
                self.terms.operators[o],
                self.placement,
                self.assignments[o],
            )
            operators.append(
                OperatorPrediction(
                    name=self.graph.operators[o].name,
                    compute=float(cost.compute[0]),
                    activations=float(cost.activations[0]),
                    gradients=float(cost.gradients[0]),
                    moves=move_seconds[o],
                    nbytes=float(cost.nbytes[0]),
                    traffic=int(sent_bytes[o]),
                    source=source,
                )
            )
        return operators

    def _flops(self) -> float:
        """FLOPs of a device, the mean over all."""
        flops = 0.0
        for o, operator_terms in enumerate(self.terms.operators):
            assignment = self.assignments[o]
            device_fraction = self._device_fraction(o)
            operator_flops = 0.0
            for work in operator_terms.work:
                axes = list(
                    chain.from_iterable(assignment.get(factor, ()) for factor in work.factors)
                )
                operator_flops += work.flops * work.trips / self.placement.shard_count(axes)
            flops += device_fraction * operator_flops
        return flops

    def timeline(self) -> Timeline:
        names = self.group_names if self.groups.count > 1 else [""]
        group_times = GroupTimes(
            self.structure,
            self.tasks,
            self.times,
            names,
            self.fullest,
        )
        return timeline_of(
            self.graph,
            self.machine,
            self.plan,
            self.prediction(),
            group_times,
        )


def _belongs_to(reduction: Reduction, slot: Slot) -> bool:
    """Whether a slot does a reduction: sums those of gradients, an exchange all others of its
    phase.
    """
    of_gradient = reduction.parameter >= 0 and reduction.trips == 1
    if slot.kind == "sum":
        return of_gradient
    return not of_gradient and reduction.phase == slot.phase


def _without_links(mesh: Mesh, axes: Iterable[int]) -> Mesh:
    """The mesh without links along these axes."""
    unlinked = set(axes)
    if not unlinked:
        return mesh
    mesh_axes = []
    for number, axis in enumerate(mesh.axes):
        mesh_axes.append(replace(axis, level=-1) if number in unlinked else axis)
    return Mesh(tuple(mesh_axes))
