"""Optional parts of a search (stages, placement, proofs), whose failure never ends it.

An unexpected exception of an optional part becomes one sentence in the notes of the plan. Ctrl-C
and errors of the user (`PartitaError`) keep their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from partita.errors import PartitaError
from partita.simulation.base import SimulatedStep


@dataclass(frozen=True)
class OptionalPart:
    """An optional part of a search: its name in messages, and the option that skips it."""

    name: str
    skip: str

    def run(self, action: Callable[[], None]) -> tuple[str, ...]:
        """Runs the part. A note about an unexpected failure, none if it ended well."""
        try:
            action()
        except PartitaError:
            raise
        except Exception as error:  # the plan so far stays valid, whatever went wrong
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return (
                f"the search for {self.name} failed, and its plan so far was used "
                f"({text}). Use {self.skip} to skip it.",
            )
        return ()


STAGES = OptionalPart("pipeline stages", "--no-stages")
PLACEMENT = OptionalPart("placement", "--no-stages")
PROOF = OptionalPart("a proof", "--search mcmc")


class BestStep:
    """The last of a sequence of ever faster steps; None before the first."""

    def __init__(self) -> None:
        self.step: SimulatedStep | None = None

    def follow(self, steps: Iterator[SimulatedStep]) -> None:
        """Keeps each step as it comes. Ctrl-C ends the sequence with the best step so far."""
        try:
            for step in steps:
                self.step = step
        except KeyboardInterrupt:
            pass
