"""Link loads of a network on chip against 16 published measurements of Wormhole.

    python benchmarks/manage_grid.py [--rounds 60]

12 or 48 Tensix tiles each read or write 1 MiB at one of 12 DRAM channels, over either network, with
the pairs placed by hand or drawn at random (tt-isa-documentation at 3930471, DRAMTile). A channel
gives 22.3 GB/s alone. Nothing is fitted. Three tiles lead to a pair of channels, and the source
does not say which one was addressed; here it is drawn for the random pairs.

A random rate is the mean over draws. `alone` assumes channels without any network.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.machine import Grid, load
from partita.machine.routing import Message, Tile, link_loads

GIGA = 1e9
NBYTES = float(1 << 20)
CHANNEL = 22.3 * GIGA
CHANNELS = 12
DRAM_TILES = (
    ((0, 0), (0, 1), (0, 11)),
    ((0, 5), (0, 6), (0, 7)),
    ((5, 0), (5, 1), (5, 11)),
    ((5, 2), (5, 9), (5, 10)),
    ((5, 3), (5, 4), (5, 8)),
    ((5, 5), (5, 6), (5, 7)),
)
"""Per pair of channels, the tiles that lead to it (public SoC descriptors)."""
COLUMNS = (1, 2, 3, 4, 6, 7, 8, 9)
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 10, 11)
TENSIX = tuple(Tile(column, row) for column in COLUMNS for row in ROWS)


@dataclass(frozen=True)
class Measured:
    """Published rates, GB/s."""

    tiles: int
    network: int
    writes: bool
    placed: float
    random: float

    def __str__(self) -> str:
        verb = "writes" if self.writes else "reads"
        return f"{self.tiles} tiles, network {self.network}, {verb}"


MEASURED = (
    Measured(12, 0, False, 265.5, 189.8),
    Measured(12, 1, False, 265.3, 82.1),
    Measured(48, 0, False, 267.5, 200.3),
    Measured(48, 1, False, 267.5, 78.2),
    Measured(12, 0, True, 261.3, 56.5),
    Measured(12, 1, True, 262.0, 154.5),
    Measured(48, 0, True, 263.7, 52.3),
    Measured(48, 1, True, 256.2, 133.7),
)
Pair = tuple[Tile, Tile, int]
"""A Tensix tile, a DRAM tile, and its channel."""


def placed_pairs(grid: Grid, tiles: int, writes: bool) -> list[Pair]:
    """Each channel at a tile of its own, with its Tensix tiles next to it in the same row."""
    pairs: list[Pair] = []
    used: set[Tile] = set()
    towards_target = 1 if grid.direction == "up" else -1
    step = -towards_target if writes else towards_target
    for channel in range(CHANNELS):
        choices = [Tile(*tile) for tile in DRAM_TILES[channel // 2]]
        dram = next(tile for tile in choices if tile not in used and tile.row not in (0, 6))
        used.add(dram)
        for hop in range(1, tiles // CHANNELS + 1):
            column = (dram.column + step * hop) % grid.columns
            pairs.append((Tile(column, dram.row), dram, channel))
    return pairs


def random_pairs(generator: np.random.Generator, tiles: int) -> list[Pair]:
    """Different Tensix tiles, channels in equal parts, and any tile of a channel."""
    chosen = generator.permutation(len(TENSIX))[:tiles]
    channels = generator.permutation(np.repeat(np.arange(CHANNELS), tiles // CHANNELS))
    pairs: list[Pair] = []
    for tile, channel in zip(chosen, channels, strict=True):
        dram = Tile(*DRAM_TILES[channel // 2][generator.integers(3)])
        pairs.append((TENSIX[tile], dram, int(channel)))
    return pairs


def rate(grid: Grid, pairs: Sequence[Pair], writes: bool) -> float:
    """Bytes per second of all pairs, by the most loaded link or channel."""
    messages = []
    channel_bytes = dict.fromkeys(range(CHANNELS), 0.0)
    for tensix, dram, channel in pairs:
        source, target = (tensix, dram) if writes else (dram, tensix)
        messages.append(Message(source, target, NBYTES))
        channel_bytes[channel] += NBYTES
    seconds = max(link_loads(grid, messages).values()) / grid.bandwidth
    seconds = max(seconds, max(channel_bytes.values()) / CHANNEL)
    return len(pairs) * NBYTES / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=60, help="draws of random pairs")
    rounds = parser.parse_args().rounds
    grids = load("wormhole-n150").grids
    generator = np.random.default_rng(0)
    placed_errors = []
    random_errors = []
    alone_errors = []
    print("GB/s                            placed: measured, model   random: measured, model")
    for case in MEASURED:
        grid = grids[case.network]
        pairs = placed_pairs(grid, case.tiles, case.writes)
        placed = rate(grid, pairs, case.writes) / GIGA
        draws = []
        for _ in range(rounds):
            pairs = random_pairs(generator, case.tiles)
            draws.append(rate(grid, pairs, case.writes) / GIGA)
        random = float(np.mean(draws))
        placed_errors.append(abs(placed / case.placed - 1))
        random_errors.append(abs(np.log(random / case.random)))
        alone_errors.append(abs(np.log(CHANNELS * CHANNEL / GIGA / case.random)))
        print(
            f"{case!s:32}        {case.placed:7.1f} {placed:7.1f}           "
            f"{case.random:7.1f} {random:7.1f}"
        )
    print(f"placed: mean error {np.mean(placed_errors):.1%}, worst {max(placed_errors):.1%}")
    for name, errors in (("random", random_errors), ("alone", alone_errors)):
        mean = np.exp(np.mean(errors))
        print(f"{name}: a factor of {mean:.2f} in the mean, {np.exp(max(errors)):.2f} at worst")


if __name__ == "__main__":
    main()
