"""Places of a manycore's groups of devices on its grid, and the cost of results between them.

A group is a rectangle of tiles. The results of an operator lie in the tiles that run it, in equal
parts, and the next operator reads them there: each active tile sends equal parts to all active
tiles. The link loads of this traffic (`machine.routing`) give seconds and joules of a byte for
every set of active groups. Results that cross from one snippet to the next are counted like those
within: they are few of many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from partita.machine import Grid, Machine
from partita.machine.routing import Message, Tile, grid_joules, link_loads

Permutation = tuple[int, ...]
"""[group]: the group that takes its place."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Groups of devices on a grid."""

    grid: Grid
    groups: tuple[tuple[Tile, ...], ...]
    """[group]: its tiles."""
    _costs: dict[tuple[bool, ...], tuple[float, float]] = field(default_factory=dict, repr=False)

    @cached_property
    def symmetries(self) -> tuple[Permutation, ...]:
        """Permutations of the groups that reflections of the grid give, that of no reflection
        first. Reflections change the traffic of a grid whose links lead one way."""
        identity = tuple(range(len(self.groups)))
        if self.grid.direction != "both":
            return (identity,)
        last_column = self.grid.columns - 1
        last_row = self.grid.rows - 1
        reflections: list[Callable[[Tile], Tile]] = [
            lambda tile: Tile(last_column - tile.column, tile.row),
            lambda tile: Tile(tile.column, last_row - tile.row),
            lambda tile: Tile(last_column - tile.column, last_row - tile.row),
        ]
        numbers = {frozenset(tiles): number for number, tiles in enumerate(self.groups)}
        permutations = [identity]
        for reflection in reflections:
            images = [frozenset(reflection(tile) for tile in tiles) for tiles in self.groups]
            if all(image in numbers for image in images):
                permutations.append(tuple(numbers[image] for image in images))
        return tuple(permutations)

    def byte_costs(self, active: Sequence[int]) -> tuple[float, float]:
        """Seconds and joules of a byte of results that groups exchange.

        active: [group], active devices; all devices of a group exchange results, or none.
        """
        key = max(tuple(active[group] > 0 for group in order) for order in self.symmetries)
        if key not in self._costs:
            tiles = [
                tile for group, tiles in enumerate(self.groups) if key[group] for tile in tiles
            ]
            part = 1.0 / len(tiles) ** 2
            messages = []
            for source in tiles:
                messages += [Message(source, target, part) for target in tiles if target != source]
            loads = link_loads(self.grid, messages)
            seconds = max(loads.values(), default=0.0) / self.grid.bandwidth
            self._costs[key] = seconds, grid_joules(self.grid, messages) or 0.0
        return self._costs[key]


def placement_of(machine: Machine, size: int) -> Placement | None:
    """The groups of `size` consecutive devices on a machine's first grid.

    None without a grid of a tile per device, or if rectangles of `size` tiles do not fill it.
    """
    if not machine.grids:
        return None
    grid = machine.grids[0]
    if grid.columns * grid.rows != machine.devices:
        return None
    widths = []
    for width in range(1, size + 1):
        height = size // width
        if width * height == size and grid.columns % width == 0 and grid.rows % height == 0:
            widths.append(width)
    if not widths:
        return None
    width = min(widths, key=lambda width: abs(width - size // width))
    height = size // width
    groups = []
    for top in range(0, grid.rows, height):
        for left in range(0, grid.columns, width):
            tiles = [Tile(left + x, top + y) for y in range(height) for x in range(width)]
            groups.append(tuple(tiles))
    return Placement(grid, tuple(groups))
