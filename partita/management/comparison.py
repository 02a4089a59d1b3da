"""Policies side by side on a simulated machine, each against the clairvoyant oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from partita.machine import Machine
from partita.management.hardware import (
    HIDDEN_EFFICIENCY,
    NOT_AS_DESCRIBED,
    Assumptions,
    Deviation,
    Hardware,
    hardware_of,
)
from partita.management.power import PowerRun, run_policy
from partita.management.program import Program, school_programs
from partita.management.registry import LEARNED, POLICIES, RunContext
from partita.management.schedule import best_schedule
from partita.management.school import LearnedPolicy, train_policy
from partita.management.workload import Workload, workload_of

HARDWARE: dict[str, Deviation] = {
    "as described": HIDDEN_EFFICIENCY,
    "not as described": NOT_AS_DESCRIBED,
}
"""The simulated hardware of the two tables."""


@dataclass(frozen=True, kw_only=True)
class PolicyComparison:
    """Runs of a program on simulated hardware under several policies."""

    program: str
    machine: str
    hardware: str
    """One of `HARDWARE`."""
    steps: int
    flops: float
    """Of the run."""
    runs: tuple[PowerRun, ...]
    oracle: PowerRun
    status: str
    """Status of the least certain figure that seconds depend on, for instance "recalled"."""
    power_status: str
    """Status of the least certain figure of power and heat."""
    simulated: Hardware = field(repr=False)
    """The hardware of the runs, with its settings."""

    def regret(self, run: PowerRun) -> float:
        """Relative excess of E x T over the oracle's."""
        return run.energy_delay / self.oracle.energy_delay - 1

    def flops_per_joule(self, run: PowerRun) -> float:
        """Performance per watt, FLOP/s per watt."""
        return self.flops / run.joules

    def to_json(self) -> dict[str, Any]:
        rows = []
        for run in self.runs:
            figures = {"regret": self.regret(run), "flops_per_joule": self.flops_per_joule(run)}
            rows.append({**run.to_json(), **figures})
        return {
            "program": self.program,
            "machine": self.machine,
            "hardware": self.hardware,
            "steps": self.steps,
            "status": self.status,
            "power_status": self.power_status,
            "policies": rows,
        }


def compare_policies(
    program: Program,
    machine: Machine,
    policies: Sequence[str],
    *,
    steps: int | None = None,
    seed: int = 1,
    assumptions: Assumptions | None = None,
    programs: Sequence[Program] | None = None,
    learned: LearnedPolicy | None = None,
) -> list[PolicyComparison]:
    """Runs of a program under policies, on hardware as described and not as described.

    Args:
        steps: Training steps of the run. Default: enough for half a minute.
        seed: Of the kernels' efficiencies, which policies do not know.
        programs: To train learned policies on. Default: `school_programs`.
        learned: A trained policy for the machine. Default: one trained on the programs.

    Raises:
        PlanError: The trained policy is for another machine.
        MachineError: Power figures are missing, or there is one operating point.
    """
    hardware = hardware_of(machine, assumptions)
    if learned is not None:
        learned.check(hardware)
    if programs is None:
        programs = school_programs()
    if learned is None and not set(LEARNED).isdisjoint(policies):
        learned = train_policy(hardware, programs)
    described = workload_of(program, hardware)
    passes = described.passes
    if steps is not None:
        passes = max(1, round(steps / described.steps_per_pass))
        described = workload_of(program, hardware, passes)
    schedule = best_schedule(described)
    comparisons = []
    for name, deviation in HARDWARE.items():
        real = workload_of(program, hardware.deviating(deviation), passes, seed)
        context = RunContext(described, schedule, real, tuple(programs), learned)
        comparisons.append(_comparison(name, context, policies))
    return comparisons


def _comparison(name: str, context: RunContext, policies: Sequence[str]) -> PolicyComparison:
    real: Workload = context.real
    machine = real.hardware.machine
    oracle = run_policy(real, POLICIES["oracle"](context))
    runs = []
    for policy in policies:
        if policy == "oracle":
            runs.append(oracle)
        else:
            runs.append(run_policy(real, POLICIES[policy](context)))
    return PolicyComparison(
        program=real.name,
        machine=machine.name,
        hardware=name,
        steps=real.steps,
        flops=real.passes * sum(snippet.flops for snippet in real.snippets),
        runs=tuple(runs),
        oracle=oracle,
        status=machine.weakest_status(),
        power_status=machine.weakest_power_status(),
        simulated=real.hardware,
    )
