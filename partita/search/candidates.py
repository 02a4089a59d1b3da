"""The choices that a search looks at, per operator.

Axes of one level of the machine are alike, so a choice is a number of axes per use (a factor, or replicate) and level, and the
axes are dealt out in one fixed order of uses (sample first, on the slowest axes; replicate last). Operators then agree on
which axis does what wherever they agree on how many, and 6 equal axes with 6 uses are 462 choices instead of 46,656. On large
meshes a choice has fewer uses, and axes are dealt out several at a time. Choices of baselines are added whatever they are, so that a search can
never end above a baseline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations

from partita.graph.operator_graph import OperatorGraph
from partita.plans.check import illegal_reason
from partita.plans.pipeline import sample_factor
from partita.plans.plan import Mesh

ORDER = "SAPR"
LIMIT = 150
"""Choices per operator above which fewer uses, or larger portions of axes, are allowed."""
PORTIONS = ((4, 1), (3, 1), (2, 1), (3, 2), (2, 2), (2, 3), (2, 64), (1, 64))
"""(uses, axes dealt out together), from many choices to few."""

Choice = tuple[int, ...]
"""Per mesh axis, the factor that it splits, -1 where the operator is replicated."""


def candidates(
    graph: OperatorGraph,
    operator: int,
    mesh: Mesh,
    extra: Iterable[Choice] = (),
    limit: int = LIMIT,
) -> list[Choice]:
    """The choices of an operator on a mesh, without repetition; the first is to replicate it everywhere."""
    factors = sorted(
        graph.operators[operator].factors, key=lambda f: (ORDER.index(graph.factors[f].kind), f)
    )
    uses = [*factors, -1]
    everything, sizes = [-1] * len(mesh.axes), {f: graph.factors[f].size for f in factors}
    for number, axis in enumerate(mesh.axes):
        samples = sample_factor(graph, operator, {}, axis.size) if axis.level < 0 else -1
        if samples >= 0:
            everything[number] = samples
            sizes[samples] //= axis.size
    found: dict[Choice, None] = {tuple(everything): None}
    for most, portion in PORTIONS:
        here = dict(found)
        for choice in _dealt(mesh, uses, everything, sizes, most, portion):
            here[choice] = None
            if len(here) > limit and most > 1:
                break
        else:
            found = here
            break
    for choice in extra:
        found[choice] = None
    return [
        choice
        for choice in found
        if illegal_reason(graph, operator, names_of(graph, mesh, choice), mesh) is None
    ]


def _dealt(
    mesh: Mesh, uses: list[int], start: list[int], sizes: Mapping[int, int], most: int, portion: int
) -> Iterator[Choice]:
    """All choices with at most `most` uses, dealt to the axes of each level in the order of uses, `portion` axes at a time."""
    levels: dict[tuple[int, int], list[int]] = {}
    for number, axis in enumerate(mesh.axes):
        if axis.level >= 0:
            levels.setdefault((axis.level, axis.size), []).append(number)
    groups = list(levels.values())

    def deal(
        level: int, choice: list[int], chosen: tuple[int, ...], left: dict[int, int]
    ) -> Iterator[Choice]:
        if level == len(groups):
            yield tuple(choice)
            return
        axes = groups[level]
        size = mesh.axes[axes[0]].size
        for counts in _compositions(len(axes), len(chosen), portion):
            rest, fits = dict(left), True
            for use, count in zip(chosen, counts, strict=True):
                if use >= 0 and count:
                    if rest[use] % size**count:
                        fits = False
                        break
                    rest[use] //= size**count
            if fits:
                dealt = [
                    use for use, count in zip(chosen, counts, strict=True) for _ in range(count)
                ]
                for a, use in zip(axes, dealt, strict=True):
                    choice[a] = use
                yield from deal(level + 1, choice, chosen, rest)

    for count in range(1, min(most, len(uses)) + 1):
        for chosen in combinations(uses, count):
            yield from deal(0, list(start), chosen, {f: sizes[f] for f in chosen if f >= 0})


def _compositions(total: int, parts: int, portion: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `parts` multiples of `portion`, zeros allowed; what is over goes to one of them.

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
    found: dict[int, tuple[int, ...]] = {}
    for axis, factor in enumerate(choice):
        if factor >= 0:
            found[factor] = (*found.get(factor, ()), axis)
    return found


def choice_of(graph: OperatorGraph, operator: int, mesh: Mesh, named: Mapping[str, str]) -> Choice:
    """A plan's choice for an operator, {axis name: factor name}, as numbers."""
    by_name = {graph.factors[f].name: f for f in graph.operators[operator].factors}
    return tuple(by_name[named[a.name]] if a.name in named else -1 for a in mesh.axes)


def names_of(graph: OperatorGraph, mesh: Mesh, choice: Choice) -> dict[str, str]:
    """A choice as a plan writes it."""
    return {a.name: graph.factors[f].name for a, f in zip(mesh.axes, choice, strict=True) if f >= 0}
