"""Routes and link loads of networks on chip.

A message leaves its tile, goes along one dim and then along the other, and enters its target: a
resource each, besides the links. Links lead to neighbours. In a torus with one direction, messages
go around. The time of several messages at once is that of the most loaded resource, plus the hops
of the longest route. It ignores full buffers, so it is a lower bound where many tiles send to few.

Against 16 measurements of Wormhole (tt-isa-documentation, DRAMTile): 2 % off where the pairs are
placed, a factor of 1.3 where they are random (`benchmarks/manage_grid.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from partita.errors import MachineError
from partita.machine.parts import Grid


class Tile(NamedTuple):
    """Coordinates in a grid."""

    column: int
    row: int


class Link(NamedTuple):
    """A resource of a route: the link that leaves a tile ("east", "west", "south", "north"), or the
    way between a tile and its router ("out", "in")."""

    tile: Tile
    side: str


@dataclass(frozen=True)
class Message:
    """Bytes from a tile to another."""

    source: Tile
    target: Tile
    nbytes: float


def route(grid: Grid, source: Tile, target: Tile) -> list[Link]:
    """The resources of a message, in order. MachineError if a tile is outside the grid, or the
    links do not lead to it."""
    for tile in (source, target):
        if not (0 <= tile.column < grid.columns and 0 <= tile.row < grid.rows):
            raise MachineError(
                f"Tile ({tile.column}, {tile.row}) is outside grid '{grid.name}': it has "
                f"{grid.columns} columns and {grid.rows} rows."
            )
    links = [Link(source, "out")]
    tile = source
    for dim in ("column", "row") if grid.routing == "xy" else ("row", "column"):
        size = grid.columns if dim == "column" else grid.rows
        for position, step in _hops(grid, size, getattr(tile, dim), getattr(target, dim)):
            here = tile._replace(**{dim: position})
            links.append(Link(here, _SIDES[dim, step]))
        tile = tile._replace(**{dim: getattr(target, dim)})
    return [*links, Link(target, "in")]


_SIDES = {
    ("column", 1): "east",
    ("column", -1): "west",
    ("row", 1): "south",
    ("row", -1): "north",
}


def _hops(grid: Grid, size: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Position and step of every hop along a dim."""
    forward = (end - start) % size
    backward = (start - end) % size
    if not grid.closed:
        step = 1 if end >= start else -1
        if start != end and grid.direction == ("down" if step > 0 else "up"):
            raise MachineError(
                f"Grid '{grid.name}' has no route from {start} to {end}: its links lead "
                f"{grid.direction} and it is not closed."
            )
        count = abs(end - start)
    elif grid.direction == "both":
        step = 1 if forward <= backward else -1
        count = min(forward, backward)
    else:
        step = 1 if grid.direction == "up" else -1
        count = forward if step > 0 else backward
    for hop in range(count):
        yield (start + step * hop) % size, step


def link_loads(grid: Grid, messages: Sequence[Message]) -> dict[Link, float]:
    """Bytes that each resource carries."""
    loads: dict[Link, float] = {}
    for message in messages:
        for link in route(grid, message.source, message.target):
            loads[link] = loads.get(link, 0.0) + message.nbytes
    return loads


def grid_seconds(grid: Grid, messages: Sequence[Message]) -> float:
    """Time of messages that are sent at once."""
    if not messages:
        return 0.0
    loads = link_loads(grid, messages)
    longest = max(len(route(grid, message.source, message.target)) for message in messages)
    hops = longest - 2  # without the ways out and in
    return max(loads.values()) / grid.bandwidth + hops * grid.hop_latency


def grid_joules(grid: Grid, messages: Sequence[Message]) -> float | None:
    """Energy of messages; None if the grid has no energy per bit of a hop."""
    if grid.energy_per_bit is None:
        return None
    joules = 0.0
    for message in messages:
        hops = len(route(grid, message.source, message.target)) - 2
        joules += 8 * message.nbytes * hops * grid.energy_per_bit
    return joules
