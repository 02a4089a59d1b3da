"""Which devices do the same at the same time: the cells of a plan on a machine.

A device is told apart from another by the slices of the axes on which operators are pinned, and by its kind where a machine's devices
differ. Devices that nothing tells apart are one *cell*, which stands for all of them: a step is simulated once per cell, whatever the number
of devices. Under a plan that pins nothing on a machine of equal devices there is one.

Devices of two kinds may also differ by whom they wait for. So kinds are told apart further until all devices of a cell share every collective
with the same cells (colour refinement; the coarsest such partition is what folding may join). `unfolded` makes every device a cell: the same
times, at the price of as many tasks, which a test holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from partita.graph.operator_graph import OperatorGraph
from partita.plans.plan import Mesh, Plan, placed_slice

Pins = Mapping[int, int]
"""Mesh axis -> the slice of it that an operator lives on."""


@dataclass(frozen=True, eq=False)
class Cells:
    """`number[slices]` is the cell of the devices in these slices of the axes `told`; `kinds[c]` the kind of cell c's devices."""

    mesh: Mesh
    told: tuple[int, ...]
    number: np.ndarray
    kinds: tuple[int, ...] = (0,)

    @property
    def count(self) -> int:
        return len(self.kinds)

    @property
    def devices(self) -> list[int]:
        """How many devices each cell stands for."""
        alike = self.mesh.size // self.number.size
        return (np.bincount(self.number.reshape(-1), minlength=self.count) * alike).tolist()

    def on(self, pins: Pins) -> tuple[int, ...]:
        """The cells that an operator pinned so lives in."""
        return tuple(np.unique(self.number[self._where(pins)]).tolist())

    def groups(self, axes: Iterable[int], pins: Pins) -> list[tuple[int, ...]]:
        """The cells that take part together in a collective over axes of an operator pinned so, group by group."""
        rows = self.rows([a for a in axes if a not in pins], pins)
        return sorted({tuple(sorted(set(row))) for row in rows.reshape(len(rows), -1).tolist()})

    def rows(self, axes: Iterable[int], pins: Pins) -> np.ndarray:
        """[group, slice of each told one of the axes]: the cells of devices that differ only in the slices of these axes."""
        along = [n for n, a in enumerate(self.told) if a in set(axes)]
        first = self.number[self._where(pins)]
        last = tuple(range(first.ndim - len(along), first.ndim))
        return np.moveaxis(first, along, last).reshape(-1, *(first.shape[n] for n in along))

    def _where(self, pins: Pins) -> tuple[slice, ...]:
        return tuple(slice(pins[a], pins[a] + 1) if a in pins else slice(None) for a in self.told)

    def name(self, cell: int) -> str:
        """What a person calls a cell: the slices that all of its devices are in."""
        places = np.argwhere(self.number == cell)
        return " ".join(
            f"{self.mesh.axes[a].name}={i[0]}"
            for a, i in zip(self.told, places.T.tolist(), strict=True)
            if len(set(i)) == 1
        )


def pins_of(graph: OperatorGraph, plan: Plan) -> list[dict[int, int]]:
    """Per operator the axes on which it is pinned, and where."""
    found = []
    for o in graph.operators:
        choice = plan.choices[o.name]
        at = {n: placed_slice(choice.get(axis.name, "")) for n, axis in enumerate(plan.mesh.axes)}
        found.append({n: i for n, i in at.items() if i is not None})
    return found


def one(mesh: Mesh) -> Cells:
    """All devices as one cell."""
    return Cells(mesh, (), np.zeros((), np.int64))


def unfolded(mesh: Mesh, kinds: Sequence[int]) -> Cells:
    """Every device as a cell of its own. `kinds` are those of the machine's devices, in their order."""
    return Cells(
        mesh,
        tuple(range(len(mesh.axes))),
        np.arange(mesh.size).reshape(mesh.sizes),
        tuple(kinds[: mesh.size]),
    )


def folded(
    mesh: Mesh, kinds: Sequence[int], pins: Iterable[Pins], together: Iterable[frozenset[int]]
) -> Cells:
    """The fewest cells for operators pinned so, whose collectives are over the axes `together`. `kinds` as in `unfolded`; empty for equal devices."""
    kind = np.array(kinds[: mesh.size] if len(kinds) else [0] * 1, np.int64)
    pinned = {a for mine in pins for a in mine}
    if not kind.any():  # all alike: slices of pinned axes are all there is to tell apart
        told = tuple(sorted(pinned))
        sizes = [mesh.sizes[a] for a in told]
        return Cells(
            mesh,
            told,
            np.arange(math.prod(sizes)).reshape(sizes),
            (int(kind[0]),) * math.prod(sizes),
        )
    kind = kind.reshape(mesh.sizes)
    differ = {a for a in range(kind.ndim) if np.diff(kind, axis=a).any()}
    told = tuple(sorted(pinned | differ))
    kind = kind[tuple(slice(None) if a in told else 0 for a in range(kind.ndim))]
    number = np.zeros(kind.shape, np.int64)
    for n, a in enumerate(told):
        if a in pinned:
            number = number * mesh.sizes[a] + np.arange(mesh.sizes[a]).reshape(
                [-1 if i == n else 1 for i in range(kind.ndim)]
            )
    cells = Cells(
        mesh,
        told,
        _numbered(np.stack([number.reshape(-1), kind.reshape(-1)], 1)).reshape(kind.shape),
    )
    over = {axes & set(told) for axes in together} - {frozenset()}
    while True:
        columns = [cells.number.reshape(-1)]
        for axes in over:
            place = Cells(mesh, told, np.arange(kind.size).reshape(kind.shape)).rows(axes, {})
            rows = np.sort(cells.rows(axes, {}).reshape(len(place), -1), axis=1)
            again = rows[:, 1:] == rows[:, :-1]
            rows[:, 1:][again] = -1  # who takes part, not how many of them
            column = np.empty(kind.size, np.int64)
            column[place.reshape(-1)] = np.repeat(_numbered(np.sort(rows, axis=1)), rows.shape[1])
            columns.append(column)
        finer = _numbered(np.stack(columns, 1))
        if finer.max() == cells.number.max():
            break
        cells = Cells(mesh, told, finer.reshape(kind.shape))
    _, first = np.unique(cells.number, return_index=True)
    return Cells(mesh, told, cells.number, tuple(kind.reshape(-1)[first].tolist()))


def _numbered(rows: np.ndarray) -> np.ndarray:
    """A number per row, the same for equal rows, in the order in which they first stand."""
    _, first, number = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[number.reshape(-1)]
