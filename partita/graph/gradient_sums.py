"""The gradients of weights that are used several times: partial gradients that are added up.

An LSTM of 40 steps reads its weights 40 times, and its backward pass adds up 40 products for each. Where samples are split, every product is itself a
sum over devices. Adding is linear, so the products of a device are added first, and the sum over devices is made once: each addition works
on values that are still to be summed. Only what is added right away can wait so: products, scatters and sums, and additions of these. Convolutions
cannot: XLA's partitioner sums the weight gradient of one that is split in space before it looks whether it should.

Here: which additions those are. Which of them wait under a plan is in `cost.partial`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from partita.graph.operator_graph import Instruction, Loop

SUMMING = {"dot_general", "scatter", "reduce"}
PASSING = {"reshape", "transpose", "convert", "negate", "copy"}


@dataclass(frozen=True, slots=True)
class Sum:
    """A gradient that is added up: the additions in program order, the last of which makes it, and the instructions that make what is added."""

    additions: tuple[int, ...]
    leaves: tuple[int, ...]


def gradient_sums(
    instructions: Sequence[Instruction], loops: Sequence[Loop], outputs: Collection[int]
) -> list[Sum]:
    """Every gradient of a weight that is the sum of two or more others, each a sum itself. What is added has no other reader."""
    producer = {t: i for i, x in enumerate(instructions) for t in x.results}
    readers: dict[int, list[int]] = defaultdict(list)
    for i, x in enumerate(instructions):
        for t in x.operands:
            readers[t].append(i)
    carried = {t for loop in loops for values in loop.carried for t in values}
    inside = {i for loop in loops for i in range(*loop.body)}
    elsewhere = {*outputs, *carried}
    alone = lambda t: len(readers[t]) == 1 and t not in elsewhere  # noqa: E731
    part: dict[int, Sum] = {}
    """Of what a leaf or an addition makes: the sum that it is."""
    for i, x in enumerate(instructions):
        if x.phase != "backward" or i in inside or len(x.results) != 1:
            continue
        if _is_leaf(x, instructions, producer):
            part[x.results[0]] = Sum((), (i,))
        elif (
            x.name == "add"
            and x.operands[0] != x.operands[1]
            and all(t in part and alone(t) for t in x.operands)
        ):
            a, b = (part[t] for t in x.operands)
            part[x.results[0]] = Sum(
                (*sorted((*a.additions, *b.additions)), i), (*a.leaves, *b.leaves)
            )
    added = {
        t for found in part.values() for i in found.additions[-1:] for t in instructions[i].operands
    }
    whole = [found for t, found in part.items() if found.additions and t not in added]
    return [found for found in whole if _is_gradient(instructions, readers, found.additions[-1])]


def _is_leaf(x: Instruction, instructions: Sequence[Instruction], producer: dict[int, int]) -> bool:
    """Whether an instruction adds up, and nothing but what it reads: a scatter adds to its first operand, which must be blank."""
    if x.name not in SUMMING or not x.adds or x.rule is None or not x.rule.reduction:
        return False
    start = producer.get(x.operands[0])
    return (
        x.name != "scatter"
        or start is not None
        and instructions[start].name in ("constant", "broadcast_in_dim")
    )


def _is_gradient(
    instructions: Sequence[Instruction], readers: dict[int, list[int]], addition: int
) -> bool:
    """Whether only the update reads the result, or what passes it on or adds to it."""
    waiting, seen = [addition], set()
    while waiting:
        for t in instructions[waiting.pop()].results:
            for r in readers[t]:
                x = instructions[r]
                if x.phase == "update" or r in seen:
                    continue
                if x.name != "add" and x.name not in PASSING:
                    return False
                seen.add(r)
                waiting.append(r)
    return True
