"""Seconds of a collective on a machine, from the closed formulas that communication libraries are built on.

Every algorithm costs `latency + seconds_per_byte * nbytes` (a line), and a library takes the algorithm that is best at
the size at hand: a collective's time is the lowest of its lines. So a time is concave in the bytes, more bytes are
never faster, more bandwidth is never slower, and arrays of sizes cost one expression.

    n      bytes (see `collective_seconds`)
    p      participants at one level;  P  in the whole group;  g  of the group in one part of a level
    alpha  latency of a level's links;  beta  seconds per byte of a device when all devices send at once

One level, all levels' devices sending at once (each link carries the traffic of all devices that share it, so
beta = shared_by / bandwidth):

- all_gather, reduce_scatter: `ceil(log2 p) alpha + (p-1)/p n beta` by recursive doubling, halving or Bruck where anyone
  reaches anyone (switch, tree, bus); `(p-1) alpha + (p-1)/p n beta` by a ring. Thakur, Rabenseifner, Gropp,
  "Optimization of Collective Communication Operations in MPICH", IJHPCA 2005, sections 4.1 and 4.4.
- all_reduce: a reduce_scatter, then an all_gather (Rabenseifner; the ring of Patarasuk and Yuan, JPDC 2009), or for
  short messages recursive doubling, `ceil(log2 p) (alpha + n beta)`, two more steps where p is no power of two
  (Thakur et al., section 4.5).
- all_to_all: pairwise, `(p-1) alpha + (p-1)/p n beta`, or for short messages Bruck, `ceil(log2 p) (alpha + n/2 beta)`
  (Thakur et al., section 4.3). On a ring or mesh a byte crosses several links: `_detour`.
- collective_permute: `alpha + n beta`.

Several levels:

- hierarchical: reduce_scatter inside, the collective between on the 1/g shard, all_gather inside.
- one flat ring through all levels (NCCL): `2 (P-1) max alpha + 2 (P-1)/P n max(beta/g)`: the slowest link sets the pace
  and a part's link is crossed once, with g members' links side by side; and NCCL's double binary tree (Sanders, Speck,
  Traeff 2009): `2 sum(ceil(log2 p) alpha) + 2 n max(beta/g)`.
- on d dims of a torus or mesh the message is cut in d, each piece taking the dims in another order, so that all links
  work: beta / d (Jain and Sabharwal, "Optimal Bucket Algorithms for Large MPI Collectives on Torus Interconnects",
  ICS 2010).

Not here: the arithmetic of reductions, the kernel overhead (`Machine.overhead`), overlap, and what the backend emits.
A group smaller than a ring or torus level is taken to be neighbours, without the wrap-around link.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple, overload

import numpy as np

from partita.errors import MachineError
from partita.machine.machine import Level, Machine

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute")

Group = tuple[tuple[int, int], ...]
"""The participants: (level index, how many parts of it) pairs, outer to inner; their product is the group's size."""


class _Line(NamedTuple):
    """The time of one algorithm: seconds, and seconds per byte."""

    latency: float
    per_byte: float

    def then(self, other: _Line, share: float = 1.0) -> _Line:
        """This, then the other on `share` of the bytes."""
        return _Line(self.latency + other.latency, self.per_byte + share * other.per_byte)


class _Link(NamedTuple):
    """What a group sees of one level."""

    p: int
    alpha: float
    beta: float
    anyone: bool  # reaches any other participant in one step
    detour: float  # links that a byte to a random participant crosses, in units of a device's links
    inside: int  # g, the group's participants in one part


@overload
def collective_seconds(machine: Machine, kind: str, nbytes: float, group: Group) -> float: ...
@overload
def collective_seconds(
    machine: Machine, kind: str, nbytes: np.ndarray, group: Group
) -> np.ndarray: ...
def collective_seconds(machine: Machine, kind: str, nbytes: Any, group: Group) -> Any:
    """Seconds of one collective while every other group of the machine's devices runs the same one.

    nbytes: bytes of the gathered result for all_gather, else of one device's operand; a number or an array of them.
    group: (level index, parts) pairs, outer to inner. No bytes, or one participant, take no time.
    """
    lines = collective_lines(machine.levels, kind, group)
    if isinstance(nbytes, np.ndarray):
        times = np.min([line.latency + line.per_byte * nbytes for line in lines], axis=0)
        return np.where(nbytes > 0, times, 0.0)
    return (
        float(min(line.latency + line.per_byte * nbytes for line in lines)) if nbytes > 0 else 0.0
    )


@lru_cache(maxsize=1 << 14)
def collective_lines(levels: tuple[Level, ...], kind: str, group: Group) -> tuple[_Line, ...]:
    """The algorithms for a collective, each as (latency, seconds per byte); its time is the least of them."""
    if kind not in KINDS:
        raise MachineError(f"'{kind}' is not a collective: use {', '.join(KINDS)}.")
    links = _links(levels, group)
    if not links:
        return (_Line(0.0, 0.0),)
    if kind == "all_reduce":
        return tuple(_all_reduce(links))
    if kind == "all_to_all":
        return tuple(_all_to_all(links))
    if kind == "collective_permute":
        return (
            _Line(
                max(link.alpha for link in links), max(link.beta * link.detour for link in links)
            ),
        )
    return tuple(_all_gather(links))  # a reduce_scatter is an all_gather backwards


def _links(levels: tuple[Level, ...], group: Group) -> list[_Link]:
    """The group's links, outer to inner, without the levels at which it has one participant."""
    assert [index for index, _ in group] == sorted({index for index, _ in group}), (
        f"{group} is not outer to inner"
    )
    links = []
    inside = 1
    for index, p in reversed(group):
        level = levels[index]
        assert 1 <= p <= level.size, f"{p} of {level.size} parts of level '{level.name}'"
        if p == 1:
            continue
        within = math.prod(inner.size for inner in levels[index:])  # devices below one such level
        shared_by = within if level.fabric == "bus" else min(level.shared_by, within)
        anyone = level.fabric in ("switch", "tree", "bus")
        closed = anyone or (level.fabric in ("ring", "torus") and p == level.size)
        beta = (
            shared_by / level.bandwidth * (1 if closed else 2)
        )  # at the open end only one of two directions is left
        links.append(_Link(p, level.latency, beta, anyone, 1.0 if anyone else _detour(p), inside))
        inside *= p
    return links[::-1]


def _detour(p: int) -> float:
    """The mean distance between two of p places on a ring: p floor(p/2) ceil(p/2) hops over p (p-1) pairs."""
    return (p // 2) * ((p + 1) // 2) / (p - 1)


def _steps(link: _Link) -> int:
    return (link.p - 1).bit_length() if link.anyone else link.p - 1


def _gather_one(link: _Link) -> _Line:
    return _Line(_steps(link) * link.alpha, (link.p - 1) / link.p * link.beta)


def _ring(links: list[_Link]) -> _Line:
    """An all_gather by one ring through all levels."""
    size = math.prod(link.p for link in links)
    slowest = max(link.beta / link.inside for link in links)
    return _Line((size - 1) * max(link.alpha for link in links), (size - 1) / size * slowest)


def _all_gather(links: list[_Link]) -> list[_Line]:
    if len(links) == 1:
        return [_gather_one(links[0])]
    inner = links[-1]
    found = [_gather_one(inner).then(outer, 1 / inner.p) for outer in _all_gather(_outside(links))]
    if not any(link.anyone for link in links):
        size = math.prod(link.p for link in links)
        latency = sum(_steps(link) * link.alpha for link in links)
        found.append(
            _Line(latency, (size - 1) / size * max(link.beta for link in links) / len(links))
        )
    return [*found, _ring(links)]


def _all_reduce(links: list[_Link]) -> list[_Line]:
    found = [line.then(line) for line in _all_gather(links)]
    inner = links[-1]
    if len(links) > 1:
        both = _gather_one(inner).then(_gather_one(inner))
        found += [both.then(outer, 1 / inner.p) for outer in _all_reduce(_outside(links))]
        if all(link.anyone for link in links):
            slowest = max(link.beta / link.inside for link in links)
            found.append(_Line(2 * sum(_steps(link) * link.alpha for link in links), 2 * slowest))
    if all(link.anyone for link in links):  # recursive doubling, level by level
        doublings = [_steps(link) + (2 if link.p & (link.p - 1) else 0) for link in links]
        latency = sum(count * link.alpha for count, link in zip(doublings, links, strict=True))
        found.append(
            _Line(
                latency,
                sum(count * link.beta for count, link in zip(doublings, links, strict=True)),
            )
        )
    return found


def _outside(links: list[_Link]) -> list[_Link]:
    """The levels outside the innermost, when only one member of each inner group takes part in each collective."""
    inner = links[-1].p
    return [link._replace(inside=link.inside // inner) for link in links[:-1]]


def _all_to_all(links: list[_Link]) -> list[_Line]:
    size = math.prod(link.p for link in links)
    level_by_level = _Line(
        sum((link.p - 1) * link.alpha for link in links),
        sum((link.p - 1) / link.p * link.beta * link.detour for link in links),
    )
    direct = _Line(
        sum((link.p - 1) * link.inside * link.alpha for link in links),
        sum((link.p - 1) * link.inside / size * link.beta * link.detour for link in links),
    )
    found = [level_by_level, direct]
    if all(link.anyone for link in links):
        found.append(
            _Line(
                sum(_steps(link) * link.alpha for link in links),
                sum(_steps(link) / 2 * link.beta for link in links),
            )
        )
    return found
