"""Managers of a run: which ones a training gets, and several as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partita.errors import LostProcessError
from partita.management.balance import Balance
from partita.management.contract import Manager, Training
from partita.management.decisions import Decision, DecisionLog
from partita.management.survival import Survival


@dataclass(frozen=True)
class ManageOptions:
    """What a run's managers may do."""

    acts: bool = True
    """Whether they act; else they say what they would do."""
    survive: bool = True
    """Whether a training goes on without lost processes."""
    ready: bool = False
    """Whether the programs for shares, and for the loss of any one process, are compiled before the
    first step."""
    shares: bool = True
    """Whether work moves away from slow processes."""
    log: Path | None = None
    """The file of decisions."""


ManagerFactory = Callable[..., Manager | None]
"""Gives a new manager for a training, by options of its own if it is called with some; or None."""


def new_manager(
    options: ManageOptions,
    say: Callable[[str], None] | None,
    taken: list[Decision] | None = None,
) -> Manager:
    """A manager for one training, whose decisions are added to `taken`."""
    log = DecisionLog(say, options.log, [] if taken is None else taken)
    managers: list[Manager] = []
    if options.survive and options.acts:
        managers.append(Survival(log, options.ready))
    if options.shares:
        managers.append(Balance(log, options.acts, options.ready))
    return Managers(managers)


class Managers:
    """Several managers, asked in turn. `management.contract` states the methods."""

    def __init__(self, managers: Sequence[Manager]) -> None:
        self.managers = tuple(managers)

    def before_step(self, training: Training, key: Hashable, state: Any, batch: Any) -> None:
        """Asks all; about an evaluation only the one that repeats it after a loss."""
        for manager in self._asked(training, key):
            manager.before_step(training, key, state, batch)

    def after_step(
        self, training: Training, key: Hashable, state: Any, batch: Any, seconds: float
    ) -> None:
        """Tells those that were asked."""
        for manager in self._asked(training, key):
            manager.after_step(training, key, state, batch, seconds)

    def _asked(self, training: Training, key: Hashable) -> list[Manager]:
        if not training.is_evaluation(key):
            return list(self.managers)
        return [manager for manager in self.managers if isinstance(manager, Survival)]

    def lost(self, training: Training, state: Any, error: LostProcessError) -> Any:
        """The state of the first one that can go on; raises `error` if none can."""
        for manager in self.managers:
            if isinstance(manager, Survival):
                return manager.lost(training, state, error)
        raise error
