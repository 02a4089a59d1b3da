"""Decisions of managers: a line for people and a line of JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Decision:
    """A change of a running training, with its reason."""

    step: int
    """The step before which it takes effect."""
    action: str
    """"shrink", "grow", "switch", "shares", "prepare", "measured", "stay"."""
    sentence: str
    """The reason and the change, without the step."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and names behind the sentence, for the log."""

    def __str__(self) -> str:
        return f"step {self.step}: {self.sentence}"

    def to_json(self) -> dict[str, Any]:
        """The decision as an object of JSON."""
        head = {"step": self.step, "action": self.action, "sentence": self.sentence}
        return {**head, **self.figures}


@dataclass
class DecisionLog:
    """Takes decisions: keeps them, prints them, and appends them to a file of JSON lines.

    A file that can no longer be written is given up with a sentence: the training goes on.
    """

    say: Callable[[str], None] | None = None
    file: Path | None = None
    taken: list[Decision] = field(default_factory=list)
    """All decisions so far."""

    def add(self, decision: Decision) -> None:
        """Called in the first process alone."""
        self.taken.append(decision)
        if self.say is not None:
            self.say(str(decision))
        if self.file is not None:
            self._append(json.dumps(decision.to_json()) + "\n", self.file)

    def _append(self, line: str, path: Path) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            self.file = None
            if self.say is not None:
                reason = error.strerror or str(error)
                self.say(f"{str(path)!r} takes no more decisions: {reason}. They are printed only.")
