"""The memory of every place over the actions of a step, from the compiler's figures of its pieces.

The compiler sees one piece at a time. Between pieces the values are known: variables, batch, sums
of gradients, values of microbatches in flight. While a piece runs, its temporaries and its new
results come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from partita.execute.dispatch import RunAction, Value
from partita.execute.staged import StepInPieces


class PieceBytes(NamedTuple):
    """Memory of a device that a compiled piece takes beside its arguments, bytes."""

    temporaries: int
    results: int
    """Those that do not take the place of an argument."""


class PlacePeak(NamedTuple):
    """Peak memory of a device of a place, bytes."""

    values: int
    """Variables, batch, sums, and values of microbatches."""
    results: int
    """New results of the piece that runs."""
    temporaries: int
    """Of the piece that runs."""

    @property
    def nbytes(self) -> int:
        """The peak."""
        return sum(self)


def compiled_peaks(
    step: StepInPieces,
    pieces: Sequence[PieceBytes | None],
) -> list[PlacePeak]:
    """Per place its peak memory. Pieces without figures, those of other processes, do not count."""
    return _Memory(step).follow(pieces)


class _Memory:
    """The values in memory, action by action."""

    def __init__(self, step: StepInPieces) -> None:
        self.step = step
        self.alive: dict[Value, int] = {}
        """Value in memory -> its bytes."""
        self.used = [0] * len(step.layouts)
        """[place]: bytes of the values."""
        self.peaks = [PlacePeak(0, 0, 0)] * len(step.layouts)

    def follow(self, pieces: Sequence[PieceBytes | None]) -> list[PlacePeak]:
        dispatch = self.step.dispatch
        for value in (*dispatch.state.values(), *dispatch.batch):
            self._add(value)
        for action in dispatch.actions:
            if isinstance(action, RunAction):
                place = self.step.cut.pieces[action.piece].place
                self._run(action, place, pieces[action.piece])
            else:
                place = action.target.place
                self._add(action.target)
            for value in action.frees:
                self._free(value)
            self._compare(place)
        return self.peaks

    def _run(self, run: RunAction, place: int, piece: PieceBytes | None) -> None:
        for value in run.sums:
            self._add(value)
        if piece is not None:
            self._compare(place, piece.results, piece.temporaries)
        for n in self.step.dispatch.roles[run.piece].donated:
            self._free(run.reads[n])
        for value in run.gives:
            self._add(value)

    def _add(self, value: Value) -> None:
        if value not in self.alive:
            self.alive[value] = self.step.nbytes(value)
            self.used[value.place] += self.alive[value]

    def _free(self, value: Value) -> None:
        self.used[value.place] -= self.alive.pop(value, 0)

    def _compare(self, place: int, results: int = 0, temporaries: int = 0) -> None:
        peak = PlacePeak(self.used[place], results, temporaries)
        self.peaks[place] = max(self.peaks[place], peak, key=lambda peak: peak.nbytes)
