"""Seconds of collectives on a machine, by the closed formulas of communication libraries.

Every algorithm costs `latency + seconds_per_byte * nbytes` (a line). A library takes the fastest
algorithm for the message size, so the time of a collective is the lowest of its lines.
Consequences: the time is concave in the bytes, more bytes are never faster, more bandwidth is never
slower, and arrays of sizes cost one expression.

    n      bytes (see `collective_seconds`)
    p      participants at one level;  P  in the whole group;  g  of the group in one part of a
    level alpha  latency of a level's links;  beta  seconds per byte of a device when all devices
    send at
           once

One level, with all devices of all levels sending at once (each link carries the traffic of all
devices that share it, so beta = shared_by / bandwidth):

- all_gather, reduce_scatter: `ceil(log2 p) alpha + (p-1)/p n beta` by recursive doubling, halving
  or Bruck where any participant reaches any other (switch, tree, bus). `(p-1) alpha + (p-1)/p n
  beta` by a ring. Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations
  in MPICH", IJHPCA 2005, sections 4.1 and 4.4.
- all_reduce: a reduce_scatter, then an all_gather (Rabenseifner; the ring of Patarasuk and Yuan,
  JPDC 2009). For short messages recursive doubling, `ceil(log2 p) (alpha + n beta)`, with two more
  steps where p is no power of two (Thakur et al., section 4.5).
- all_to_all: pairwise, `(p-1) alpha + (p-1)/p n beta`. For short messages Bruck, `ceil(log2 p)
  (alpha + n/2 beta)` (Thakur et al., section 4.3). On a ring or mesh a byte crosses several links:
  `_detour`.
- collective_permute: `alpha + n beta`.

Several levels:

- Hierarchical: a reduce_scatter inside, the outer collective on the 1/g shard, an all_gather
  inside.
- One flat ring through all levels (NCCL): `2 (P-1) max alpha + 2 (P-1)/P n max(beta/g)`. The
  slowest link sets the pace, and a part's link is crossed once, with the links of g members side by
  side.
- NCCL's double binary tree (Sanders, Speck, Traeff 2009): `2 sum(ceil(log2 p) alpha) + 2 n
  max(beta/g)`.
- On d dims of a torus or mesh the message is cut into d pieces. Each piece takes the dims in
  another order, so that all links work: beta / d (Jain and Sabharwal, "Optimal Bucket Algorithms
  for Large MPI Collectives on Torus Interconnects", ICS 2010). An all_to_all crosses every dim with
  `(p-1)/p n` bytes over `_detour` links, all dims at once. The order of dims makes no difference.

Not here: the arithmetic of reductions, the kernel overhead (`Machine.overhead`), overlap, and the
collectives that a backend emits. A group smaller than a ring or torus level counts as neighbours
without the wrap-around link.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple, overload

import numpy as np

from partita.errors import MachineError
from partita.machine.machine import Machine
from partita.machine.parts import Level

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute")

Group = tuple[tuple[int, int], ...]
"""Participants: (level index, number of its parts) pairs, outer to inner. Their product is the size
of the group."""


class Line(NamedTuple):
    """Time of one algorithm, linear in the bytes."""

    latency: float
    """Seconds."""
    per_byte: float
    """Seconds per byte."""

    def then(self, other: Line, share: float = 1.0) -> Line:
        """This algorithm, followed by another on `share` of the bytes."""
        return Line(self.latency + other.latency, self.per_byte + share * other.per_byte)


class _Link(NamedTuple):
    """The links of one level for a group. Letters as in the module docstring."""

    p: int
    alpha: float
    beta: float
    reaches_all: bool
    """Whether a participant reaches any other in one step."""
    detour: float
    """Links that a byte to a random participant crosses, in units of a device's links."""
    inside: int
    """g: the group's participants in one part."""


@overload
def collective_seconds(
    machine: Machine,
    kind: str,
    nbytes: float,
    group: Group,
) -> float: ...
@overload
def collective_seconds(
    machine: Machine,
    kind: str,
    nbytes: np.ndarray,
    group: Group,
) -> np.ndarray: ...
def collective_seconds(
    machine: Machine,
    kind: str,
    nbytes: Any,
    group: Group,
) -> Any:
    """Seconds of one collective while all other groups of the machine run the same one.

    nbytes: bytes of the gathered result for all_gather, else of one device's operand; a number or
    an array. Zero bytes or one participant take no time.
    """
    lines = collective_lines(machine.levels, kind, group)
    if isinstance(nbytes, np.ndarray):
        times = lines[0].latency + lines[0].per_byte * nbytes
        for line in lines[1:]:
            times = np.minimum(times, line.latency + line.per_byte * nbytes)
        return np.where(nbytes > 0, times, 0.0)
    if nbytes <= 0:
        return 0.0
    return float(min(line.latency + line.per_byte * nbytes for line in lines))


@lru_cache(maxsize=1 << 14)
def collective_lines(
    levels: tuple[Level, ...],
    kind: str,
    group: Group,
) -> tuple[Line, ...]:
    """The algorithms for a collective. Its time is the lowest of their lines."""
    if kind not in KINDS:
        raise MachineError(f"'{kind}' is not a collective: use {', '.join(KINDS)}.")
    links = _links(levels, group)
    if not links:
        return (Line(0.0, 0.0),)
    if not any(link.reaches_all for link in links):
        links = _ordered_dims(links)
    if kind == "all_reduce":
        return tuple(_all_reduce(links))
    if kind == "all_to_all":
        return tuple(_all_to_all(links))
    if kind == "collective_permute":
        latency = max(link.alpha for link in links)
        per_byte = max(link.beta * link.detour for link in links)
        return (Line(latency, per_byte),)
    # A reduce_scatter is an all_gather backwards.
    return tuple(_all_gather(links))


def _links(levels: tuple[Level, ...], group: Group) -> list[_Link]:
    """The group's links, outer to inner, without the levels at which it has one participant."""
    indices = [index for index, _ in group]
    assert indices == sorted(set(indices)), f"{group} is not outer to inner"
    links = []
    inside = 1
    for index, p in reversed(group):
        level = levels[index]
        assert 1 <= p <= level.size, f"{p} of {level.size} parts of level '{level.name}'"
        if p > 1:
            devices = math.prod(inner.size for inner in levels[index:])
            links.append(
                _link(
                    level,
                    devices,
                    p,
                    inside,
                )
            )
            inside *= p
    return links[::-1]


def _ordered_dims(links: list[_Link]) -> list[_Link]:
    """The links of a torus or mesh, slowest first: its dims have no order of their own."""
    ordered = []
    inside = 1
    for link in sorted(links, key=lambda link: (link.beta, link.alpha, link.p)):
        ordered.append(link._replace(inside=inside))
        inside *= link.p
    return ordered[::-1]


def _link(
    level: Level,
    devices: int,
    p: int,
    inside: int,
) -> _Link:
    """The links of a level with `devices` devices below it, for p participants."""
    shared_by = devices if level.fabric == "bus" else min(level.shared_by, devices)
    reaches_all = level.fabric in ("switch", "tree", "bus")
    is_closed = reaches_all or (level.fabric in ("ring", "torus") and p == level.size)
    # An open ring has only one of two directions at its ends.
    directions = 1 if is_closed else 2
    return _Link(
        p=p,
        alpha=level.latency,
        beta=shared_by / level.bandwidth * directions,
        reaches_all=reaches_all,
        detour=1.0 if reaches_all else _detour(p),
        inside=inside,
    )


def _detour(p: int) -> float:
    """Mean distance of two of p places on a ring: p floor(p/2) ceil(p/2) hops, p (p-1) pairs."""
    return (p // 2) * ((p + 1) // 2) / (p - 1)


def _steps(link: _Link) -> int:
    return (link.p - 1).bit_length() if link.reaches_all else link.p - 1


def _size(links: list[_Link]) -> int:
    return math.prod(link.p for link in links)


def _gather_one_level(link: _Link) -> Line:
    return Line(_steps(link) * link.alpha, (link.p - 1) / link.p * link.beta)


def _ring(links: list[_Link]) -> Line:
    """An all_gather by one ring through all levels."""
    size = _size(links)
    slowest = max(link.beta / link.inside for link in links)
    latency = (size - 1) * max(link.alpha for link in links)
    return Line(latency, (size - 1) / size * slowest)


def _all_gather(links: list[_Link]) -> list[Line]:
    inner = links[-1]
    if len(links) == 1:
        return [_gather_one_level(inner)]
    lines = []
    for outer in _all_gather(_outside(links)):
        lines.append(_gather_one_level(inner).then(outer, 1 / inner.p))
    if not any(link.reaches_all for link in links):
        lines.append(_all_dims_at_once(links))
    lines.append(_ring(links))
    return lines


def _all_dims_at_once(links: list[_Link]) -> Line:
    """An all_gather on a torus or mesh: a piece of the message per dim."""
    size = _size(links)
    latency = sum(_steps(link) * link.alpha for link in links)
    slowest = max(link.beta for link in links)
    return Line(latency, (size - 1) / size * slowest / len(links))


def _all_reduce(links: list[_Link]) -> list[Line]:
    lines = [line.then(line) for line in _all_gather(links)]
    inner = links[-1]
    all_reach = all(link.reaches_all for link in links)
    if len(links) > 1:
        around = _gather_one_level(inner).then(_gather_one_level(inner))
        for outer in _all_reduce(_outside(links)):
            lines.append(around.then(outer, 1 / inner.p))
        if all_reach:
            lines.append(_double_binary_tree(links))
    if all_reach:
        lines.append(_recursive_doubling(links))
    return lines


def _double_binary_tree(links: list[_Link]) -> Line:
    slowest = max(link.beta / link.inside for link in links)
    latency = 2 * sum(_steps(link) * link.alpha for link in links)
    return Line(latency, 2 * slowest)


def _recursive_doubling(links: list[_Link]) -> Line:
    """An all_reduce by recursive doubling, level by level."""
    latency = 0.0
    per_byte = 0.0
    for link in links:
        is_power_of_two = link.p & (link.p - 1) == 0
        doublings = _steps(link) + (0 if is_power_of_two else 2)
        latency += doublings * link.alpha
        per_byte += doublings * link.beta
    return Line(latency, per_byte)


def _outside(links: list[_Link]) -> list[_Link]:
    """The links outside the innermost level, for one member of each inner group."""
    inner = links[-1].p
    return [link._replace(inside=link.inside // inner) for link in links[:-1]]


def _all_to_all(links: list[_Link]) -> list[Line]:
    size = _size(links)
    level_by_level = Line(
        sum((link.p - 1) * link.alpha for link in links),
        sum((link.p - 1) / link.p * link.beta * link.detour for link in links),
    )
    direct = Line(
        sum((link.p - 1) * link.inside * link.alpha for link in links),
        sum((link.p - 1) * link.inside / size * link.beta * link.detour for link in links),
    )
    lines = [level_by_level, direct]
    if not any(link.reaches_all for link in links):
        # Dims have no order: no link is an outer one that all traffic shares.
        lines = [level_by_level, _all_to_all_of_dims(links)]
    if all(link.reaches_all for link in links):
        bruck = Line(
            sum(_steps(link) * link.alpha for link in links),
            sum(_steps(link) / 2 * link.beta for link in links),
        )
        lines.append(bruck)
    return lines


def _all_to_all_of_dims(links: list[_Link]) -> Line:
    """An all-to-all on a torus or mesh: a piece of the message per order of the dims.

    Every dim carries all bytes whose two ends differ in it, and all dims work at once.
    """
    latency = sum((link.p - 1) * link.alpha for link in links)
    slowest = max((link.p - 1) / link.p * link.beta * link.detour for link in links)
    return Line(latency, slowest)
