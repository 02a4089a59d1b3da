"""Policies by name, made for a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from partita.management.policies.base import Policy
from partita.management.policies.corrected import Corrected
from partita.management.policies.gated import Gated
from partita.management.policies.imitation import Imitation
from partita.management.policies.names import chosen_names
from partita.management.policies.ondemand import Ondemand
from partita.management.policies.oracle import Oracle
from partita.management.policies.performance import Performance
from partita.management.policies.powersave import Powersave
from partita.management.policies.qlearning import QLearning
from partita.management.policies.scheduled import Scheduled
from partita.management.policies.schedutil import Schedutil
from partita.management.policies.static import Static
from partita.management.power import run_policy
from partita.management.program import Program
from partita.management.schedule import Schedule
from partita.management.school import LearnedPolicy
from partita.management.workload import Workload, workload_of

LEARNING_RUNS = 6
"""Of each program, for Q-learning."""


@dataclass(frozen=True, eq=False)
class RunContext:
    """The knowledge that policies are made of."""

    described: Workload
    """The workload on the hardware as described: known before the run."""
    schedule: Schedule
    """The best schedule of the described workload."""
    real: Workload
    """The workload on the hardware that runs it: known to the oracle only."""
    programs: tuple[Program, ...] = ()
    """Programs to train Q-learning on."""
    learned: LearnedPolicy | None = None
    """The trained policy, for those of `LEARNED`."""

    def imitation(self) -> Imitation:
        """The policy that imitates the oracle."""
        assert self.learned is not None
        return Imitation(self.learned.tree, self.described)

    def corrected(self) -> Corrected:
        """The schedule of a description that measurements correct."""
        return Corrected(self.described, self.schedule)

    def gated(self) -> Gated:
        """Imitation that asks the simulator when it is unsure."""
        assert self.learned is not None
        return Gated(self.imitation(), self.schedule, self.learned.ranges)

    def qlearning(self) -> QLearning:
        """Q-learning after some runs of the programs."""
        hardware = self.described.hardware
        policy = QLearning(hardware)
        workloads = [workload_of(program, hardware) for program in self.programs]
        for _ in range(LEARNING_RUNS):
            for workload in workloads:
                run_policy(workload, policy.starting(workload, explore=0.3))
        return policy.starting(self.described, explore=0.05)


POLICIES: dict[str, Callable[[RunContext], Policy]] = {
    "oracle": lambda context: Oracle(context.schedule, context.real),
    "schedule": lambda context: Scheduled(context.schedule),
    "corrected": RunContext.corrected,
    "imitation": RunContext.imitation,
    "gated": RunContext.gated,
    "qlearning": RunContext.qlearning,
    "static": lambda context: Static(context.described),
    "schedutil": lambda context: Schedutil(context.real.hardware),
    "ondemand": lambda context: Ondemand(context.real.hardware),
    "performance": lambda context: Performance(context.real.hardware),
    "powersave": lambda context: Powersave(context.real.hardware),
}
"""Name -> the policy for a run."""


LEARNED = ("imitation", "gated")
"""Policies that need a trained one: from a file, or trained by scikit-learn."""


def policy_names(text: str, has_file: bool = False) -> tuple[str, ...]:
    """The policies of a list with commas. PlanError for unknown ones.

    "all" names all of them, without those that need scikit-learn where it is not installed.
    """
    names = chosen_names(text, tuple(POLICIES), "policy")
    can_learn = has_file or find_spec("sklearn") is not None
    if text.strip() != "all" or can_learn:
        return names
    return tuple(name for name in names if name not in LEARNED)
