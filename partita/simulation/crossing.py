"""Transfers between operators that are placed on different slices: their kinds, seconds and bytes.

A value goes over the links of the axes on which its two operators are placed differently:

    at(i) -> at(j)        transfer
    at(i) -> all slices   scatter if the reader splits over the axis, else broadcast
    split -> at(j)        gather (a replicated value is on slice j already)

Before that it is resharded, where it is, to the reader's sharding over the other axes. A gather or
scatter takes the time of an all-gather (binomial trees, as in `machine.collectives`); a broadcast
the smaller time of a tree of transfers and of a scatter with an all-gather (van de Geijn).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

from partita.cost.moves import Placement, move_seconds
from partita.cost.operator_terms import Move
from partita.plans.layout import Sharding
from partita.simulation.groups import DeviceGroups, Slices, index_of


@dataclass(frozen=True)
class Crossing:
    """The axes on which two operators are placed differently, by kind of transfer."""

    transfer: tuple[int, ...] = ()
    scatter: tuple[int, ...] = ()
    broadcast: tuple[int, ...] = ()
    gather: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[int, ...]:
        return (*self.transfer, *self.scatter, *self.broadcast, *self.gather)

    @staticmethod
    def of(
        home: Slices,
        reader: Slices,
        source: Sharding,
        target: Sharding,
    ) -> Crossing:
        """The crossing of a value from `home` to `reader`, whose dims are sharded as `source` and
        then as `target`.
        """
        source_axes = set(chain.from_iterable(source))
        target_axes = set(chain.from_iterable(target))
        axes: dict[str, list[int]] = defaultdict(list)
        for axis in sorted({*home, *reader}):
            if axis in home and axis in reader:
                if home[axis] != reader[axis]:
                    axes["transfer"].append(axis)
            elif axis in home:
                axes["scatter" if axis in target_axes else "broadcast"].append(axis)
            elif axis in source_axes:
                axes["gather"].append(axis)
        return Crossing(**{kind: tuple(numbers) for kind, numbers in axes.items()})

    def seconds(self, placement: Placement, nbytes: float) -> float:
        """Seconds of the transfers of a value that has `nbytes` on a device with all of it along
        these axes.
        """
        seconds = 0.0
        if self.transfer:
            group = placement.group(self.transfer)
            seconds = placement.seconds("collective_permute", nbytes, group)
        for axes in (self.scatter, self.gather):
            if axes:
                seconds += placement.seconds("all_gather", nbytes, placement.group(axes))
        if self.broadcast:
            group = placement.group(self.broadcast)
            levels = (placement.shard_count(self.broadcast) - 1).bit_length()
            tree = levels * placement.seconds("collective_permute", nbytes, group)
            scatter_and_gather = 2 * placement.seconds("all_gather", nbytes, group)
            seconds += min(tree, scatter_and_gather)
        return seconds

    def traffic(self, placement: Placement, nbytes: float) -> dict[str, float]:
        """Kind of transfer -> bytes over links."""
        traffic = {
            "transfer": nbytes if self.transfer else 0.0,
            "scatter": nbytes * (1 - 1 / placement.shard_count(self.scatter)),
            "gather": nbytes * (1 - 1 / placement.shard_count(self.gather)),
            "broadcast": nbytes * (placement.shard_count(self.broadcast) - 1),
        }
        return {kind: sent_bytes for kind, sent_bytes in traffic.items() if sent_bytes}


@dataclass(frozen=True)
class PlacedMove:
    """A move between two operators with its shardings, and the crossing if they are placed
    differently.
    """

    move: Move
    source: Sharding
    target: Sharding
    crossing: Crossing

    @staticmethod
    def of(
        move: Move,
        home: Slices,
        reader: Slices,
        source: Sharding,
        target: Sharding,
    ) -> PlacedMove:
        """The move of a value from an operator on slices `home` to one on `reader`."""
        source_dims = _dims(move, source)
        target_dims = _dims(move, target)
        crossing = Crossing.of(home, reader, source_dims, target_dims)
        return PlacedMove(move, source, target, crossing)

    @property
    def crosses(self) -> bool:
        """Whether the value goes between devices of different slices."""
        return bool(self.crossing.axes)

    @property
    def reshard_axes(self) -> set[int]:
        """The axes over which devices of the same slices communicate."""
        return reshard_axes(self.move, self.source, self.target) - set(self.crossing.axes)

    def crossing_bytes(self, placement: Placement) -> float:
        """Bytes that cross, on a device with all of the value along the crossing's axes."""
        target_axes = chain.from_iterable(_dims(self.move, self.target))
        split_axes = [axis for axis in target_axes if axis not in self.crossing.axes]
        return self.move.trips * self.move.nbytes / placement.shard_count(split_axes)

    def crossing_seconds(self, placement: Placement) -> float:
        """Seconds of the transfers between slices; 0 if nothing crosses."""
        if not self.crosses:
            return 0.0
        return self.crossing.seconds(placement, self.crossing_bytes(placement))

    def crossing_traffic(self, placement: Placement) -> dict[str, float]:
        """Kind of transfer -> bytes over links."""
        return self.crossing.traffic(placement, self.crossing_bytes(placement))

    def reshard_seconds(self, placement: Placement) -> float:
        """Seconds of resharding over the axes that the value does not cross."""
        if not self.crosses:
            return move_seconds(
                self.move,
                placement,
                self.source,
                self.target,
            )
        gathered = placement.shard_count(self.crossing.gather)
        local_move = replace(self.move, nbytes=int(self.move.nbytes / gathered), share=1)
        source = self._without_crossing(self.source)
        target = self._without_crossing(self.target)
        return move_seconds(local_move, placement, source, target)

    def _without_crossing(self, sharding: Sharding) -> Sharding:
        """The sharding without crossed axes of its dims.

        Pending sums stay: they are reduced at home unless the reader adds to them.
        """
        dims = []
        for dim in _dims(self.move, sharding):
            dims.append(tuple(axis for axis in dim if axis not in self.crossing.axes))
        return (*dims, *_sums(self.move, sharding))


class Route(NamedTuple):
    """A transfer between device groups: the groups that hold the value, those that it reaches, and
    the links that it occupies.
    """

    homes: tuple[int, ...]
    reached: tuple[int, ...]
    links_out: tuple[int, ...] = ()
    links_in: tuple[int, ...] = ()

    @property
    def remote(self) -> bool:
        """Whether the value goes over links."""
        return bool(self.links_in)


def routes(
    groups: DeviceGroups,
    home: Slices,
    reader: Slices,
    crossing: Crossing,
) -> dict[Route, int]:
    """Route -> number of equal ones, over all devices, for a crossing from `home` to `reader`."""
    axes = [axis for axis in groups.axes if axis in crossing.axes]
    common = {axis: position for axis, position in home.items() if axis not in axes}
    common |= {axis: position for axis, position in reader.items() if axis not in axes}
    home_index = index_of(axes, home)
    reader_index = index_of(axes, reader)
    counts: dict[Route, int] = defaultdict(int)
    for row in groups.rows(axes, common):
        homes = set(row[home_index].reshape(-1).tolist())
        readers = set(row[reader_index].reshape(-1).tolist())
        for route in _routes_of_row(homes, readers, crossing):
            counts[route] += groups.devices_per_entry
    return counts


def _routes_of_row(
    homes: set[int],
    readers: set[int],
    crossing: Crossing,
) -> Iterable[Route]:
    if crossing.gather:
        yield Route(
            _ordered(homes), _ordered(readers), _ordered(homes - readers), _ordered(readers)
        )
        return
    remote = _ordered(readers - homes)
    if remote:
        yield Route(
            _ordered(homes),
            remote,
            _ordered(homes),
            remote,
        )
    for group in readers & homes:
        yield Route((group,), (group,))


def _ordered(groups: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(groups))


def reshard_axes(
    move: Move,
    source: Sharding,
    target: Sharding,
) -> set[int]:
    """The axes over which a reshard communicates: those of dims that change, and those of pending
    sums.
    """
    if source == target:
        return set()
    axes: set[int] = set()
    for before, after in zip(
        _dims(move, source),
        _dims(move, target),
        strict=True,
    ):
        if before != after:
            axes.update(before, after)
    for dim in _sums(move, source):
        axes.update(dim)
    return axes


def _dims(move: Move, sharding: Sharding) -> Sharding:
    """The sharding of a moved tensor's dims, without its pending sums."""
    return sharding[: len(sharding) - move.sums]


def _sums(move: Move, sharding: Sharding) -> Sharding:
    """The axes of a moved tensor's pending sums."""
    return sharding[len(sharding) - move.sums :]
