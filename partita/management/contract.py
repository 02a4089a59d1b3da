"""The contract between a running training and its manager.

`execute.steps.StepRunner` runs the steps and fulfils `Training`; it asks a `Manager` before and
after each step, and when a process is lost. A manager fulfils three methods:

    before_step(training, key, state, batch)            may change the plan or the shares
    after_step(training, key, state, batch, seconds)    may take notes
    lost(training, state, error) -> state               goes on without the lost, or raises

All processes call them at the same steps with equal arguments, so a decision that depends on one
process (its times) goes through `training.group.exchanged` first. Several managers are one:
`managers.Managers` asks them in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from partita.errors import LostProcessError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.management.program_table import ProgramTable
from partita.plans.plan import Plan

PlanFor = Callable[[OperatorGraph, Plan, int], Plan]
"""Called with a captured step, the plan so far and a number of devices."""


class Group(Protocol):
    """The processes that train together, as this one sees them."""

    @property
    def alive(self) -> tuple[int, ...]:
        """The numbers of the live processes, the longest there first."""
        ...

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        ...

    def devices_of(self, processes: Sequence[int]) -> int:
        """Number of devices of some processes."""
        ...

    def exchanged(self, name: str, value: str) -> list[str]:
        """The values of all live processes, in their order; all call it at the same point.

        LostProcessError if one is lost meanwhile.
        """
        ...

    def leave_lost(self, seconds: float) -> dict[int, str]:
        """Goes on without the processes that are newly lost: their numbers, and the cause of each.

        Waits for the launcher's word, at most some seconds; empty without it.
        """
        ...

    def has_news(self) -> bool:
        """Whether the launcher has reported a loss that this process has not left yet."""
        ...

    def returned(self) -> int:
        """Number of all losses and returns so far, if the last ones are returns of processes that
        were started again and not taken in; else 0."""
        ...

    def alive_after(self, number: int) -> tuple[int, ...]:
        """The live processes once a number of losses and returns is followed."""
        ...


class Training(Protocol):
    """A training under way."""

    name: str
    step: int
    """Steps that are done: the number of the coming one. All processes count alike."""
    plan: Plan | None
    """None where it trains on one device."""
    compile_seconds: float
    """Time that the last compilation of a step took in this process."""

    @property
    def group(self) -> Group:
        """The processes that train together."""
        ...

    def graph(self, key: Hashable) -> OperatorGraph:
        """The captured step for a key: a set of shapes of state and batch."""
        ...

    def machine(self, devices: int | None = None) -> Machine:
        """The machine of all live devices, or of some, as described and measured before."""
        ...

    def is_evaluation(self, key: Hashable) -> bool:
        """Whether a step evaluates or predicts: it counts and is repeated as a step, and has no
        plan of its own."""
        ...

    def change(self, plan: Plan) -> None:
        """Trains by another plan, for all live devices, from the next step on.

        Programs are compiled at their first use, the state moves then.
        """
        ...

    def change_members(self, plan_for: PlanFor) -> None:
        """Trains by a new plan after a loss, for all live devices, from the next step on.

        A training whose first step is not yet compiled is planned anew.
        """
        ...

    @property
    def can_grow(self) -> bool:
        """Whether a process that was started again can be taken in."""
        ...

    def grow(self, event: int, plan: Plan, leaves: Sequence[np.ndarray]) -> None:
        """Trains with all processes that are there after a number of losses and returns, by a plan
        for their devices, from this state on."""
        ...

    table: ProgramTable
    """Programs for states of the machine that may come, and plans that managers search; a change
    of members forgets those that have become useless."""

    @property
    def host_is_idle(self) -> bool:
        """Whether a compilation beside a step is free: devices are not the host's cores."""
        ...

    def prepare(self, key: Hashable, plan_for: PlanFor, beside: bool = False) -> None:
        """Compiles a step for the loss of any one other process, so that `change_members` finds it
        ready: now, or beside the training."""
        ...

    def prepare_plan(self, key: Hashable, plan: Plan) -> None:
        """Compiles a step for a plan, beside the training, so that `change` finds it ready; nothing
        for the present plan."""
        ...

    def device_processes(self, key: Hashable) -> tuple[int, ...]:
        """The process of each device of a step's mesh, in its order."""
        ...

    def has_shares(self, key: Hashable) -> bool:
        """Whether the step for a key is compiled for shares, under the present plan."""
        ...

    def prepare_shares(self, key: Hashable) -> int:
        """Compiles the step for a key for any shares; gives the number of microbatches.

        PlanError with the reason for a plan or a step that has no shares, MemoryBudgetError where
        it does not fit.
        """
        ...

    def begin_shares(self, key: Hashable) -> bool:
        """Has `prepare_shares` compiled beside the training; whether that is done."""
        ...

    def change_shares(self, shares: Sequence[int] | None) -> None:
        """Gives each device its number of microbatches from the next step on; None for even parts.

        Steps that are not compiled for shares have even parts, and a new plan begins with them.
        """
        ...

    def execute(self, key: Hashable, state: Any, batch: Any) -> tuple[Any, Any]:
        """(outputs, state) of a step, run for the manager: the training does not count it."""
        ...

    def leaves(self, state: Any) -> list[Any]:
        """The arrays of a state, in order."""
        ...

    def with_leaves(self, state: Any, leaves: Sequence[Any]) -> Any:
        """A state of the same structure with other arrays, of any device or of NumPy."""
        ...

    def to_host(self, state: Any) -> list[np.ndarray]:
        """Copies of the leaves of a state in host memory; all processes call it together."""
        ...

    def own_copy(self, leaf: Any) -> np.ndarray | None:
        """A copy of an array that this process has whole; None for another one."""
        ...

    def batch_copy(self, batch: Any) -> Any:
        """A batch in host memory, to be run again. Its arrays are this process's own, but for views
        of arrays that a training was given."""
        ...


class Manager(Protocol):
    """Decides between the steps of a training."""

    def before_step(self, training: Training, key: Hashable, state: Any, batch: Any) -> None:
        """Called when a step's program is ready. A LostProcessError leads to `lost`."""
        ...

    def after_step(
        self, training: Training, key: Hashable, state: Any, batch: Any, seconds: float
    ) -> None:
        """Called with the new state, and the seconds that the step took in this process."""
        ...

    def lost(self, training: Training, state: Any, error: LostProcessError) -> Any:
        """The state before the interrupted step, for the live processes; raises `error` if the
        training cannot go on.

        `state` is the one given to the step. Its arrays may be gone.
        """
        ...
