"""The choices that a search considers, per operator.

Axes of one level of the machine are alike. A choice is therefore a number of axes per use (a
factor, or replication) and level, and the axes are dealt out in one fixed order of uses: sample
factors first, on the slowest axes; replication last. Operators then agree on the use of each axis
wherever they agree on the numbers, and 6 equal axes with 6 uses are 462 choices instead of 46,656.

On large meshes a choice has fewer uses, and axes are dealt out several at a time. The choices of
baselines are always added, so a search never ends above a baseline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from partita.graph.operator_graph import OperatorGraph
from partita.plans.check import illegal_reason
from partita.plans.pipeline import sample_factor
from partita.plans.plan import Mesh

ORDER = "SAPR"
LIMIT = 160
"""Choices per operator above which fewer uses, or larger portions of axes, are allowed."""
PORTIONS = ((4, 1), (3, 1), (2, 1), (3, 2), (2, 2), (2, 3), (2, 64), (1, 64))
"""(uses, axes dealt out together), from many choices to few. The few axes of the innermost level
are dealt out one by one: tensor parallelism over 2, 4 or 8 devices of a node differs most."""
FEW_AXES = 3

REPLICATE = -1

Choice = tuple[int, ...]
"""Per mesh axis, the factor that it splits, REPLICATE for none."""


def candidates(
    graph: OperatorGraph,
    operator: int,
    mesh: Mesh,
    extra: Iterable[Choice] = (),
    limit: int = LIMIT,
) -> list[Choice]:
    """The distinct choices of an operator on a mesh; the first replicates it everywhere."""
    dealer = _dealer(graph, operator, mesh)
    choices: dict[Choice, None] = {tuple(dealer.start): None}
    for uses, portion in PORTIONS:
        larger = dict(choices)
        complete = True
        for choice in dealer.choices(uses, portion):
            larger[choice] = None
            if len(larger) > limit and uses > 1:
                complete = False
                break
        if complete:
            choices = larger
            break
    for choice in extra:
        choices[choice] = None
    return [
        choice
        for choice in choices
        if illegal_reason(graph, operator, names_of(graph, mesh, choice), mesh) is None
    ]


def are_dealt_singly(graph: OperatorGraph, operator: int, mesh: Mesh, limit: int = LIMIT) -> bool:
    """Whether axes are dealt out one by one: the candidates have all choices of two uses."""
    choices = set()
    for choice in _dealer(graph, operator, mesh).choices(2, 1):
        choices.add(choice)
        if len(choices) >= limit:
            return False
    return True


def _dealer(graph: OperatorGraph, operator: int, mesh: Mesh) -> _Dealer:
    def rank(factor: int) -> tuple[int, int]:
        return ORDER.index(graph.factors[factor].kind), factor

    factors = sorted(graph.operators[operator].factors, key=rank)
    sizes = {f: graph.factors[f].size for f in factors}
    start = [REPLICATE] * len(mesh.axes)
    for number, axis in enumerate(mesh.axes):
        if axis.level >= 0:
            continue
        samples = sample_factor(graph, operator, {}, axis.size)
        if samples >= 0:
            start[number] = samples
            sizes[samples] //= axis.size
    levels: dict[tuple[int, int], list[int]] = {}
    for number, axis in enumerate(mesh.axes):
        if axis.level >= 0:
            key = (axis.level, axis.size)
            levels.setdefault(key, []).append(number)
    return _Dealer(
        mesh=mesh,
        start=start,
        uses=[*factors, REPLICATE],
        sizes=sizes,
        levels=list(levels.values()),
    )


@dataclass(frozen=True)
class _Dealer:
    """Deals the axes of each level out to uses, in the order of uses."""

    mesh: Mesh
    start: Sequence[int]
    """The choice in which axes without a level have their use, and all others replicate."""
    uses: Sequence[int]
    sizes: Mapping[int, int]
    """Size of each factor that axes can still split."""
    levels: Sequence[Sequence[int]]
    """Axes of equal level and size."""

    def choices(self, max_uses: int, portion: int) -> Iterator[Choice]:
        """All choices with at most `max_uses` uses, `portion` axes at a time."""
        for count in range(1, min(max_uses, len(self.uses)) + 1):
            for uses in combinations(self.uses, count):
                sizes = {use: self.sizes[use] for use in uses if use != REPLICATE}
                yield from self._deal(0, list(self.start), uses, sizes, portion)

    def _deal(
        self,
        level: int,
        choice: list[int],
        uses: tuple[int, ...],
        sizes: Mapping[int, int],
        portion: int,
    ) -> Iterator[Choice]:
        """Choices that agree with `choice` on the axes of the levels before `level`."""
        if level == len(self.levels):
            yield tuple(choice)
            return
        axes = self.levels[level]
        axis_size = self.mesh.axes[axes[0]].size
        is_innermost = 0 < level == len(self.levels) - 1
        if is_innermost and len(axes) <= FEW_AXES and len(uses) <= 2:
            portion = 1
        for counts in _compositions(len(axes), len(uses), portion):
            remaining = _divided(sizes, uses, counts, axis_size)
            if remaining is None:
                continue
            axis = iter(axes)
            for use, count in zip(uses, counts, strict=True):
                for _ in range(count):
                    choice[next(axis)] = use
            yield from self._deal(level + 1, choice, uses, remaining, portion)


def _divided(
    sizes: Mapping[int, int],
    uses: Sequence[int],
    counts: Sequence[int],
    axis_size: int,
) -> dict[int, int] | None:
    """Sizes of factors after `counts` axes split each; None if one is no multiple."""
    remaining = dict(sizes)
    for use, count in zip(uses, counts, strict=True):
        if use == REPLICATE:
            continue
        parts = axis_size**count
        if remaining[use] % parts:
            return None
        remaining[use] //= parts
    return remaining


def _compositions(total: int, parts: int, portion: int) -> Iterator[tuple[int, ...]]:
    """All ordered sums of `parts` multiples of `portion`, zeros allowed, that give `total`.

    The remainder of `total` goes to one of them.

    >>> list(_compositions(3, 2, 2))
    [(3, 0), (2, 1), (0, 3)]
    """
    if parts == 1:
        yield (total,)
        return
    for first in sorted({total, *range(0, total, portion)}, reverse=True):
        for rest in _compositions(total - first, parts - 1, portion):
            yield (first, *rest)


def assignment_of(choice: Choice) -> dict[int, tuple[int, ...]]:
    """Factor -> axes of a choice."""
    axes: dict[int, tuple[int, ...]] = {}
    for axis, factor in enumerate(choice):
        if factor >= 0:
            axes[factor] = (*axes.get(factor, ()), axis)
    return axes


def choice_of(
    graph: OperatorGraph,
    operator: int,
    mesh: Mesh,
    named: Mapping[str, str],
) -> Choice:
    """A plan's choice for an operator, {axis name: factor name}, as numbers."""
    factors = graph.operators[operator].factors
    by_name = {graph.factors[f].name: f for f in factors}
    choice = []
    for axis in mesh.axes:
        factor = named.get(axis.name)
        choice.append(REPLICATE if factor is None else by_name[factor])
    return tuple(choice)


def names_of(graph: OperatorGraph, mesh: Mesh, choice: Choice) -> dict[str, str]:
    """A choice in the form of a plan, {axis name: factor name}."""
    names = {}
    for axis, factor in zip(mesh.axes, choice, strict=True):
        if factor >= 0:
            names[axis.name] = graph.factors[factor].name
    return names
