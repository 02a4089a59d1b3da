"""Layers of a plan as a page shows them, and the folding of repeated blocks into one.

`layers_of` reads a plan; `fold` groups consecutive layers into blocks of equal rounds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from partita.plans.plan import Plan, choice_text

EXCHANGE = ("activations", "gradients", "moves")
"""Causes of a layer's exchange time."""
UNFOLDED = 16
"""Number of layers up to which each is shown separately."""
SIMILAR = 1.5
"""Largest ratio of two layers' seconds in a folded block."""
LONGEST_BLOCK = 64
"""Largest number of layers in a round."""

Stored = tuple[tuple[int, tuple[str, ...]], ...]
"""Storage of a layer's variables: (ZeRO stage, axes) each."""


@dataclass(frozen=True)
class Layer:
    """A layer of a plan: its splits by axis, the storage of its variables, and its predicted
    cost.
    """

    name: str
    text: str
    choice: Mapping[str, str]
    stored: Stored = ()
    cost: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compute(self) -> float:
        return self.cost.get("compute", 0.0)

    @property
    def exchange(self) -> float:
        return sum(self.cost.get(cause, 0.0) for cause in EXCHANGE)

    @property
    def seconds(self) -> float:
        return self.compute + self.exchange


Block = list[Sequence[Layer]]
"""Equal rounds of one or several layers each."""


def layers_of(plan: Plan) -> list[Layer]:
    """The layers of a plan in its order."""
    costs = plan.why.get("operators", {})
    stored = _storage_by_layer(plan)
    layers = []
    for name, choice in plan.choices.items():
        text = choice_text(choice, plan.mesh)
        layers.append(Layer(name, text, choice, stored.get(name, ()), costs.get(name, {})))
    return layers


def _storage_by_layer(plan: Plan) -> dict[str, Stored]:
    storage_by_layer: dict[str, dict[tuple[int, tuple[str, ...]], None]] = {}
    for path, storage in plan.storage.items():
        owner = owner_of(path, plan)
        if owner is not None:
            storage_by_layer.setdefault(owner, {})[storage.zero, storage.axes] = None
    return {name: tuple(stored) for name, stored in storage_by_layer.items()}


def owner_of(path: str, plan: Plan) -> str | None:
    """The layer with the longest name that a variable's path begins with."""
    owners = [name for name in plan.choices if path.startswith(name.split(":")[0] + "/")]
    return max(owners, key=len, default=None)


def fold(layers: Sequence[Layer]) -> list[Block]:
    """The layers in order, as blocks of equal rounds.

    Rounds are equal if their layers have the same splits, similar times, and names that differ
    by one number.

    >>> names = ["in", *(f"{part}_{i}" for i in range(9) for part in ("up", "down")), "out"]
    >>> blocks = fold([Layer(name, "", {}) for name in names])
    >>> [(len(rounds), [layer.name for layer in rounds[0]]) for rounds in blocks]
    [(1, ['in']), (9, ['up_0', 'down_0']), (1, ['out'])]
    """
    blocks: list[Block] = []
    start = 0
    while start < len(layers):
        period, times = _repetition(layers, start) if len(layers) > UNFOLDED else (1, 1)
        end = start + period * times
        blocks.append([layers[first : first + period] for first in range(start, end, period)])
        start = end
    return blocks


def _repetition(layers: Sequence[Layer], start: int) -> tuple[int, int]:
    """(period, times) of the repetition at `start` that saves most rows; (1, 1) below three."""
    best = (1, 1)
    for period in range(1, min(LONGEST_BLOCK, (len(layers) - start) // 2) + 1):
        times = 1
        while _rounds_equal(layers, start, start + times * period, period):
            times += 1
        if period * (times - 1) > max(2, best[0] * (best[1] - 1)):
            best = (period, times)
    return best


def _rounds_equal(
    layers: Sequence[Layer],
    first: int,
    second: int,
    period: int,
) -> bool:
    if second + period > len(layers):
        return False
    return all(_equal(layers[first + i], layers[second + i]) for i in range(period))


def _equal(a: Layer, b: Layer) -> bool:
    if a.choice != b.choice or a.stored != b.stored:
        return False
    if max(a.seconds, b.seconds) > SIMILAR * min(a.seconds, b.seconds):
        return False
    parts_a = a.name.split("/")
    parts_b = b.name.split("/")
    if len(parts_a) != len(parts_b):
        return False
    pairs = zip(parts_a, parts_b, strict=True)
    return all(_without_a_number(x) & _without_a_number(y) for x, y in pairs)


@cache
def _without_a_number(name: str) -> set[str]:
    """The name, and the name without each of its numbers. A number after a colon stays.

    >>> sorted(_without_a_number("conv2_block10_conv:1"))
    ['conv2_block10_conv:1', 'conv2_block_conv:1', 'conv_block10_conv:1']
    """
    numbers = re.finditer(r"(?<![:\d])_?\d+", name)
    return {name, *(name[: match.start()] + name[match.end() :] for match in numbers)}
