"""A step whose devices do not all do the same: what each cell does of every task, what goes between them, and what each holds.

An operator runs in the cells whose devices its choice names: `at(i)` on an axis is slice i of it, any other use of the axis is all slices. So
operators that are pinned at different slices run at the same time, and branches in parallel, as soon as what they read is there. A collective is one
task of all cells that take part in it, and begins when the last of them has come to it.

Between operators that are pinned otherwise a value goes over the links of the axes on which they differ:

    at(i) -> at(j)       a transfer
    at(i) -> all slices  a scatter where the reader splits over the axis, a broadcast where it does not
    split -> at(j)       a gather; what is whole everywhere is at slice j already

after it has been brought, where it is, to the sharding that the reader wants over the other axes. Gathers and scatters take as long as an all-gather
(binomial trees, as in `machine.collectives`), a broadcast as long as the better of a tree of transfers and a scatter with an all-gather (van de Geijn).
The links out of a cell and those into it are resources, which what goes between cells takes in turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from partita.cost.collectives import collectives
from partita.cost.evaluate import OperatorCost, compute_source, operator_costs, storage_axes
from partita.cost.memory import PeakMemory, memory
from partita.cost.moves import Placement, move_seconds
from partita.cost.predict import OperatorPrediction, Prediction, build_prediction
from partita.cost.terms import Move, Terms, cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.layout import Layout, Sharding, label_sharding, layout_of, operator_assignments
from partita.plans.plan import Mesh, Plan
from partita.simulation.base import SimulatedStep
from partita.simulation.engine import Times, run
from partita.simulation.groups import Cells, Pins, folded, pins_of, unfolded
from partita.simulation.spans import GroupTimes, timeline_of
from partita.simulation.structure import Slot, Structure, structure
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


@dataclass(frozen=True)
class Crossing:
    """How values go from the devices of one operator to those of another: the axes on which they are pinned otherwise, by what is done along them."""

    transfer: tuple[int, ...] = ()
    scatter: tuple[int, ...] = ()
    broadcast: tuple[int, ...] = ()
    gather: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[int, ...]:
        return (*self.transfer, *self.scatter, *self.broadcast, *self.gather)

    @staticmethod
    def of(home: Pins, reader: Pins, source: Sharding, target: Sharding) -> Crossing:
        before, after = ({a for dim in sharding for a in dim} for sharding in (source, target))
        found: dict[str, list[int]] = defaultdict(list)
        for a in sorted({*home, *reader}):
            if a in home and a in reader:
                if home[a] != reader[a]:
                    found["transfer"].append(a)
            elif a in home:
                found["scatter" if a in after else "broadcast"].append(a)
            elif a in before:
                found["gather"].append(a)
        return Crossing(**{kind: tuple(axes) for kind, axes in found.items()})

    def seconds(self, placement: Placement, nbytes: float) -> float:
        """Seconds for values of which a device that has them whole along these axes has so many bytes."""
        group = lambda axes: placement.group(axes)  # noqa: E731
        found = (
            placement.seconds("collective_permute", nbytes, group(self.transfer))
            if self.transfer
            else 0.0
        )
        for axes in (self.scatter, self.gather):
            found += placement.seconds("all_gather", nbytes, group(axes)) if axes else 0.0
        if self.broadcast:
            steps = (placement.shard_count(self.broadcast) - 1).bit_length()
            tree = steps * placement.seconds("collective_permute", nbytes, group(self.broadcast))
            found += min(tree, 2 * placement.seconds("all_gather", nbytes, group(self.broadcast)))
        return found

    def sent(self, placement: Placement, nbytes: float) -> dict[str, float]:
        """Bytes that go over links for that, by what is done."""
        rest = lambda axes: 1 - 1 / placement.shard_count(axes)  # noqa: E731
        found = {
            "transfer": nbytes if self.transfer else 0.0,
            "scatter": nbytes * rest(self.scatter),
            "gather": nbytes * rest(self.gather),
            "broadcast": nbytes * (placement.shard_count(self.broadcast) - 1),
        }
        return {kind: sent for kind, sent in found.items() if sent}


@dataclass(frozen=True)
class PlacedStep(SimulatedStep):
    """A plan on a machine, told apart in cells, with what its parts take."""

    graph: OperatorGraph
    machine: Machine
    plan: Plan
    terms: Terms
    assignments: Sequence[Mapping[int, tuple[int, ...]]]
    """Per operator: factor -> the mesh axes that split it."""
    pins: Sequence[Pins]
    fold: bool = True

    @staticmethod
    def of(
        graph: OperatorGraph,
        machine: Machine,
        plan: Plan,
        terms: Terms | None = None,
        fold: bool = True,
    ) -> PlacedStep:
        """A checked plan, without microbatches and recomputation. Without `fold` every device is a cell: the same, for as much more work."""
        return PlacedStep(
            graph,
            machine,
            plan,
            terms or cost_terms(graph, machine.backend),
            operator_assignments(graph, plan),
            pins_of(graph, plan),
            fold,
        )

    @cached_property
    def layout(self) -> Layout:
        return layout_of(self.graph, self.plan)

    @cached_property
    def step(self) -> Structure:
        return structure(self.graph, self.terms, any(self.pins))

    @cached_property
    def placement(self) -> Placement:
        return Placement(self.machine, self.plan.mesh)

    @cached_property
    def costs(self) -> list[OperatorCost]:
        """Of every operator, on the devices where it is."""
        return self._costs(self.machine)

    def _costs(self, machine: Machine) -> list[OperatorCost]:
        """Axes on which an operator is pinned have no links for it: nothing is stored or sent over them."""
        known: dict[tuple[int, ...], list[OperatorCost]] = {}
        where, found = Layout((), (), tuple(dict(a) for a in self.assignments)), []
        for o, pins in enumerate(self.pins):
            key = tuple(sorted(pins))
            if key not in known:
                known[key] = operator_costs(
                    self.terms, Placement(machine, _without(self.plan.mesh, key)), where, self.plan
                )
            found.append(known[key][o])
        return found

    @cached_property
    def moves(
        self,
    ) -> dict[tuple[int, int, str, str], list[tuple[Move, Sharding, Sharding, Crossing]]]:
        """Per slot of a move, by (home, reader, phase, wanted): its values, how they are split before and after, and how they get there."""
        found: dict[tuple[int, int, str, str], list[tuple[Move, Sharding, Sharding, Crossing]]] = (
            defaultdict(list)
        )
        for m in self.terms.edges:
            source, target = (
                label_sharding(label, self.assignments[o])
                for label, o in ((m.source, m.home), (m.target, m.reader))
            )
            crossing = Crossing.of(
                self.pins[m.home], self.pins[m.reader], _dims(m, source), _dims(m, target)
            )
            found[m.home, m.reader, m.phase, m.read_phase].append((m, source, target, crossing))
        return found

    @cached_property
    def axes(self) -> list[tuple[int, ...]]:
        """Per slot the axes over which its collectives are."""
        return [self._axes(slot) for slot in self.step.slots]

    def _axes(self, slot: Slot) -> tuple[int, ...]:
        if slot.kind in ("join", "compute"):
            return ()
        found: set[int] = set()
        if slot.kind == "move":
            for m, source, target, crossing in self.moves[
                slot.operator, slot.reader, slot.phase, slot.read_phase
            ]:
                found |= _talking(m, source, target) - set(crossing.axes)
            return tuple(sorted(found))
        own, assignment = self.terms.operators[slot.operator], self.assignments[slot.operator]
        mesh = _without(self.plan.mesh, tuple(self.pins[slot.operator]))
        for r in own.reductions if slot.kind in ("exchange", "sum") else ():
            if (r.parameter >= 0 and r.trips == 1) == (slot.kind == "sum") and (
                slot.kind == "sum" or r.phase == slot.phase
            ):
                found |= {a for f in r.reduced for a in assignment.get(f, ())}
        if slot.kind == "exchange":
            found |= {
                a for h in own.halos if h.phase == slot.phase for a in assignment.get(h.split, ())
            }
            for m in own.moves:
                if m.phase == slot.phase:
                    found |= _talking(
                        m,
                        label_sharding(m.source, assignment),
                        label_sharding(m.target, assignment),
                    )
        for s in own.stored if slot.kind == "gather" else ():
            found |= set((storage_axes(s, mesh, assignment) or (0, ()))[1])
        return tuple(sorted(found))

    @cached_property
    def cells(self) -> Cells:
        kinds = self.machine.device_kinds()
        if not self.fold:
            return unfolded(self.plan.mesh, kinds or [0] * self.plan.mesh.size)
        if kinds:
            together = {frozenset(axes) for axes in self.axes} | {
                frozenset(c.axes) for mine in self.moves.values() for *_, c in mine
            }
        else:  # slices of pinned axes are all there is to tell apart
            together = set()
        return folded(self.plan.mesh, kinds, self.pins, together)

    @cached_property
    def seconds_of_kind(self) -> Mapping[int, np.ndarray]:
        """Kind of device -> seconds of every slot, moves between operators that are pinned otherwise left out."""
        stay = [
            m for mine in self.moves.values() for m, _, _, crossing in mine if not crossing.axes
        ]
        return {
            kind: slot_seconds(
                self.step,
                self._costs(self.machine.of_kind(kind)),
                stay,
                self.placement,
                self.layout,
            )
            for kind in set(self.cells.kinds)
        }

    @cached_property
    def shares(self) -> list[list[GroupTask]]:
        """Per slot what the cells do of it."""
        cells, everyone = self.cells, tuple(range(self.cells.count))
        where = [cells.on(pins) for pins in self.pins]
        found: list[list[GroupTask]] = []
        known: dict[tuple[object, ...], list[tuple[int, ...]]] = {}
        for n, slot in enumerate(self.step.slots):
            if slot.kind == "join":
                found.append([GroupTask(everyone, 0.0, BETWEEN, everyone)])
                continue
            seconds = [float(self.seconds_of_kind[kind][n]) for kind in cells.kinds]
            if slot.kind == "compute":
                found.append(
                    [GroupTask((c,), seconds[c], KERNELS, (c,)) for c in where[slot.operator]]
                )
                continue
            pins, on_links = (
                self.pins[slot.operator],
                seconds[0],
            )  # links are the same for all kinds
            moves = (
                self.moves[slot.operator, slot.reader, slot.phase, slot.read_phase]
                if slot.kind == "move"
                else []
            )
            crossings = {crossing: 0.0 for *_, crossing in moves if crossing.axes}
            key = (self.axes[n] if on_links > 0 or crossings else (), *sorted(pins.items()))
            if key not in known:
                known[key] = cells.groups(key[0], pins)  # type: ignore[arg-type]
            groups = known[key]
            if not crossings:
                found.append([GroupTask(group, on_links, LINKS, group) for group in groups])
                continue
            for m, _, target, crossing in moves:
                if crossing.axes:
                    rest = [a for dim in _dims(m, target) for a in dim if a not in crossing.axes]
                    crossings[crossing] += m.trips * m.nbytes / self.placement.shard_count(rest)
            inside = on_links + sum(self._inside(*move) for move in moves)
            first = [GroupTask(group, inside, LINKS) for group in groups] if inside > 0 else []
            found.append(
                first
                + [
                    share
                    for c, nbytes in crossings.items()
                    for share in self._between(slot, c, nbytes)
                ]
            )
            if any(not crossing.axes for *_, crossing in moves):
                found[-1] += [
                    GroupTask((c,), 0.0, BETWEEN, (c,))
                    for c in where[slot.reader]
                    if c in where[slot.operator]
                ]
        return found

    def _inside(self, move: Move, source: Sharding, target: Sharding, crossing: Crossing) -> float:
        """Seconds in which a value is brought to the sharding that its reader wants over axes that it does not cross."""
        if not crossing.axes:
            return 0.0
        count = (
            len(source) - move.sums
        )  # what is still to be summed is summed where it is, unless its reader goes on adding to it
        without = lambda sharding: tuple(
            tuple(a for a in dim if d >= count or a not in crossing.axes)
            for d, dim in enumerate(sharding)
        )  # noqa: E731
        smaller = replace(
            move, nbytes=int(move.nbytes / self.placement.shard_count(crossing.gather))
        )
        return move_seconds(smaller, self.placement, without(source), without(target))

    def _between(self, slot: Slot, crossing: Crossing, nbytes: float) -> list[GroupTask]:
        """What cells do together for one crossing."""
        seconds = crossing.seconds(self.placement, nbytes)
        return [
            GroupTask(
                homes,
                seconds if remote else 0.0,
                BETWEEN,
                reach,
                out if remote else (),
                into if remote else (),
            )
            for homes, reach, out, into, remote, _ in self._ways(
                slot.operator, slot.reader, crossing
            )
        ]

    def _ways(
        self, home: int, reader: int, crossing: Crossing
    ) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, int]]:
        """Per group of devices: (cells at home, cells reached, whose links out, whose links in, whether it goes over links, how many such groups)."""
        ours, theirs, axes = (
            self.pins[home],
            self.pins[reader],
            [a for a in self.cells.told if a in crossing.axes],
        )
        same = {a: i for a, i in ours.items() if a not in axes} | {
            a: i for a, i in theirs.items() if a not in axes
        }
        rows = self.cells.rows(axes, same)
        at = lambda pins: tuple(
            slice(pins[a], pins[a] + 1) if a in pins else slice(None) for a in axes
        )  # noqa: E731
        alike = self.plan.mesh.size // self.cells.number.size
        found: dict[
            tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], bool], int
        ] = defaultdict(int)
        order = lambda cells: tuple(sorted(cells))  # noqa: E731
        for row in rows:
            homes, readers = (set(row[at(pins)].reshape(-1).tolist()) for pins in (ours, theirs))
            if crossing.gather:
                found[
                    order(homes), order(readers), order(homes - readers), order(readers), True
                ] += alike
                continue
            remote = readers - homes
            if remote:
                found[order(homes), order(remote), order(homes), order(remote), True] += alike
            for c in readers & homes:
                found[(c,), (c,), (), (), False] += alike
        return [(*way, count) for way, count in found.items()]

    @property
    def least_seconds(self) -> float:
        """What a device of the busiest cell computes, whatever it waits for: no step is shorter. For equal devices."""
        busy = [0.0] * self.cells.count
        for pins, cost in zip(self.pins, self.costs, strict=True):
            for c in self.cells.on(pins):
                busy[c] += float(cost.compute[0])
        return max(busy)

    @cached_property
    def tasks(self) -> StepTasks:
        return group_step_tasks(self.step, self.shares, self.machine.backend.overlap)

    @cached_property
    def times(self) -> Times:
        return run(self.tasks.tasks)

    @property
    def seconds(self) -> float:
        return self.times.seconds

    @cached_property
    def traffic(self) -> dict[str, float]:
        """Bytes that all devices together send in a step, by kind."""
        found: dict[str, float] = defaultdict(float)
        for _, kind, nbytes in self._sent:
            found[kind] += nbytes
        return dict(sorted(found.items()))

    @cached_property
    def _sent(self) -> list[tuple[int, str, float]]:
        """(operator, kind, bytes of all devices): collectives, and what crosses."""
        devices = self.cells.devices
        on = [sum(devices[c] for c in self.cells.on(pins)) for pins in self.pins]
        stays = replace(
            self.layout,
            reads=tuple(
                r for r in self.layout.reads if not self._crosses(r.tensor, r.operator, r.target)
            ),
        )
        found = [
            (c.operator, c.kind, float(c.total * on[c.operator]))
            for c in collectives(self.graph, self.plan.mesh, stays, self.machine.backend)
        ]
        for (home, reader, _, _), moves in self.moves.items():
            for m, _, target, crossing in moves:
                if crossing.axes:
                    rest = [a for dim in _dims(m, target) for a in dim if a not in crossing.axes]
                    groups = sum(
                        count for *_, remote, count in self._ways(home, reader, crossing) if remote
                    )
                    sent = crossing.sent(
                        self.placement, m.trips * m.nbytes / self.placement.shard_count(rest)
                    )
                    found += [(reader, kind, nbytes * groups) for kind, nbytes in sent.items()]
        return found

    def _crosses(self, tensor: int, reader: int, target: Sharding) -> bool:
        home = self.graph.home[tensor]
        return (
            home >= 0
            and reader >= 0
            and bool(
                Crossing.of(
                    self.pins[home], self.pins[reader], self.layout.shardings[tensor], target
                ).axes
            )
        )

    def name(self, cell: int) -> str:
        """What a person calls the devices of a cell."""
        return self._names[cell]

    @cached_property
    def _names(self) -> list[str]:
        cells, kinds, found = self.cells, self.machine.kinds, []
        for c in range(cells.count):
            words = [cells.name(c), kinds[cells.kinds[c]].key if kinds else ""]
            name = " ".join(word for word in words if word)
            found.append(name if name not in found else f"{name} ({c})")
        return found

    def members(self, cell: int) -> frozenset[int]:
        """The operators that run in a cell."""
        return frozenset(o for o, pins in enumerate(self.pins) if cell in self.cells.on(pins))

    @cached_property
    def memories(self) -> list[PeakMemory]:
        """What a device of each cell holds at its peak: its own operators' variables and values, and what it was sent forward."""
        known: dict[frozenset[int], PeakMemory] = {}
        found = []
        for cell in range(self.cells.count):
            here = self.members(cell)
            if here not in known:
                known[here] = self._memory(here)
            found.append(known[here])
        return found

    def _memory(self, here: frozenset[int]) -> PeakMemory:
        if len(here) == len(self.pins):
            return memory(self.graph, self.plan.mesh, self.layout, self.machine.backend)
        stays = replace(
            self.layout,
            reads=tuple(
                r
                for r in self.layout.reads
                if r.operator in here and self.graph.home[r.tensor] in here
            ),
        )
        own = memory(self.graph, self.plan.mesh, stays, self.machine.backend, here)
        sent: dict[int, float] = {}
        for m in self.terms.edges:
            if m.reader in here and m.home not in here and m.phase == "forward":
                target = label_sharding(m.dims[1], self.assignments[m.reader])
                sent[m.tensor] = max(
                    sent.get(m.tensor, 0.0),
                    m.nbytes / self.placement.shard_count([a for dim in target for a in dim]),
                )
        received = int(sum(sent.values()))
        return replace(
            own,
            peak=own.peak + received,
            activations=own.activations + received,
            course=own.course + received,
        )

    @property
    def fullest(self) -> int:
        """The cell whose devices hold most of what they may at their peak."""
        return int(
            np.argmax(
                [
                    held.peak / self.machine.of_kind(kind).memory_bytes
                    for kind, held in zip(self.cells.kinds, self.memories, strict=True)
                ]
            )
        )

    def prediction(self) -> Prediction:
        """Seconds and bytes of the step. Memory is that of the fullest cell; traffic and FLOPs are means over devices."""
        sent = [0.0] * len(self.pins)
        for o, _, nbytes in self._sent:
            sent[o] += nbytes / self.plan.devices
        crossed = [0.0] * len(self.pins)
        flops = 0.0
        for (_, reader, _, _), moves in self.moves.items():
            for m, source, target, crossing in moves:
                rest = [a for dim in _dims(m, target) for a in dim if a not in crossing.axes]
                over = (
                    crossing.seconds(
                        self.placement, m.trips * m.nbytes / self.placement.shard_count(rest)
                    )
                    if crossing.axes
                    else 0.0
                )
                crossed[reader] += over + (
                    self._inside(m, source, target, crossing)
                    if crossing.axes
                    else move_seconds(m, self.placement, source, target)
                )
        operators = []
        for o, cost in enumerate(self.costs):
            assignment = self.assignments[o]
            part = 1 / self.placement.shard_count(tuple(self.pins[o]))
            flops += part * sum(
                w.flops
                * w.trips
                / self.placement.shard_count([a for f in w.factors for a in assignment.get(f, ())])
                for w in self.terms.operators[o].work
            )
            source = compute_source(self.terms.operators[o], self.placement, assignment)
            operators.append(
                OperatorPrediction(
                    name=self.graph.operators[o].name,
                    compute=float(cost.compute[0]),
                    activations=float(cost.activations[0]),
                    gradients=float(cost.gradients[0]),
                    moves=crossed[o],
                    nbytes=float(cost.nbytes[0]),
                    traffic=int(sent[o]),
                    source=source,
                )
            )
        traffic = {kind: round(nbytes / self.plan.devices) for kind, nbytes in self.traffic.items()}
        return build_prediction(
            self.plan,
            self.machine,
            operators=operators,
            memory=self.memories[self.fullest],
            traffic=traffic,
            flops=flops,
            seconds=self.seconds,
            kind=self.cells.kinds[self.fullest],
        )

    @property
    def peak_bytes(self) -> int:
        return self.memories[self.fullest].peak

    def timeline(self) -> Timeline:
        names = [""]
        if self.cells.count > 1:
            names = [self.name(cell) for cell in range(self.cells.count)]
        group_times = GroupTimes(self.step, self.tasks, self.times, names, self.fullest)
        return timeline_of(self.graph, self.machine, self.plan, self.prediction(), group_times)


def _without(mesh: Mesh, axes: Iterable[int]) -> Mesh:
    """The mesh, these axes without links."""
    gone = set(axes)
    return (
        Mesh(
            tuple(
                replace(axis, level=-1) if n in gone else axis for n, axis in enumerate(mesh.axes)
            )
        )
        if gone
        else mesh
    )


def _dims(move: Move, sharding: Sharding) -> Sharding:
    """How the dims of a moved tensor are split, without what it is still to be summed over."""
    return sharding[: len(sharding) - move.sums]


def _talking(move: Move, source: Sharding, target: Sharding) -> set[int]:
    """The axes over which a move between operators that are pinned alike sends: those of dims that are split otherwise, and those that are summed."""
    if source == target:
        return set()
    pairs = zip(_dims(move, source), _dims(move, target), strict=True)
    return {a for before, after in pairs if before != after for a in (*before, *after)} | {
        a for dim in source[len(source) - move.sums :] for a in dim
    }
