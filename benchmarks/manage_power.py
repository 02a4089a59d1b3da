"""Policies for operating points against a clairvoyant oracle, leave-one-out over seven programs.

    python benchmarks/manage_power.py --machine odroid-xu3 --seeds 10
    python benchmarks/manage_power.py --untrained            # all but learned policies: two minutes
    python benchmarks/manage_power.py --learned              # policies that imitate the oracle

All figures are simulated. For each program, learned policies are trained on the six others and on
synthetic programs ("imitation seen": on all seven), on the hardware as described. A seed draws the
kernels' efficiencies, which no policy knows. Prints the geometric mean of E x T over the oracle,
its range over seeds, the worst program, the peak temperature, and the processor time of a decision.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from partita.machine import Machine, load
from partita.management.comparison import HARDWARE
from partita.management.hardware import Deviation, Hardware, hardware_of
from partita.management.policies.imitation import Imitation
from partita.management.policies.static import Static
from partita.management.power import PowerRun, run_policy
from partita.management.program import captured_programs, school_programs
from partita.management.registry import LEARNED, POLICIES, RunContext
from partita.management.schedule import best_schedule
from partita.management.school import LearnedPolicy, train_policy
from partita.management.workload import workload_of

UNTRAINED = tuple(name for name in POLICIES if name not in (*LEARNED, "qlearning"))


@dataclass
class Figures:
    """Figures of a policy on one hardware, over programs and seeds."""

    regrets: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seed -> log of E x T over the oracle, [program]."""
    celsius: float = 0.0
    decision_seconds: list[float] = field(default_factory=list)

    def row(self) -> str:
        means = [np.exp(np.mean(values)) - 1 for values in self.regrets.values()]
        worst = np.exp(max(max(values) for values in self.regrets.values())) - 1
        return (
            f"{np.mean(means):+7.1%}  {min(means):+7.1%} to {max(means):+7.1%}  {worst:+8.1%}  "
            f"{self.celsius:5.0f} C  {np.median(self.decision_seconds) * 1e6:8.1f} us"
        )


class Case:
    """A program and what is computed once for all seeds."""

    def __init__(self, name: str, hardware: Hardware, seen: LearnedPolicy | None) -> None:
        self.program = captured_programs()[name]
        self.hardware = hardware
        self.described = workload_of(self.program, hardware)
        self.schedule = best_schedule(self.described)
        self.static = Static(self.described)
        self.others = school_programs(without=name)
        self.unseen = None if seen is None else train_policy(hardware, self.others)
        self.seen = seen

    def runs(self, deviation: Deviation, seed: int, names: Sequence[str]) -> dict[str, PowerRun]:
        """Policy -> its run on hardware with a deviation; the oracle first."""
        hardware = self.hardware.deviating(deviation)
        real = workload_of(self.program, hardware, self.described.passes, seed)
        context = RunContext(self.described, self.schedule, real, self.others, self.unseen)
        runs = {}
        for name in names:
            policy = self.static if name == "static" else POLICIES[name](context)
            runs[name] = run_policy(real, policy)
        if self.seen is not None:
            runs["imitation seen"] = run_policy(real, Imitation(self.seen.tree, self.described))
        return runs


def measure(
    machine: Machine, seeds: range, programs: Sequence[str], policies: Sequence[str]
) -> None:
    """Prints the figures of the policies on both hardware after each seed."""
    figures: dict[tuple[str, str], Figures] = defaultdict(Figures)
    hardware = hardware_of(machine)
    trains = any(name in LEARNED for name in policies)
    seen = train_policy(hardware, school_programs()) if trains else None
    cases = [Case(name, hardware, seen) for name in programs]
    for seed in seeds:
        # Q-learning trains anew for each run.
        names = [name for name in policies if name != "qlearning" or seed == seeds[0]]
        for label, deviation in HARDWARE.items():
            for case in cases:
                runs = case.runs(deviation, seed, names)
                for name, run in runs.items():
                    row = figures[label, name]
                    regret = run.energy_delay / runs["oracle"].energy_delay
                    row.regrets[seed].append(float(np.log(regret)))
                    row.celsius = max(row.celsius, run.peak_celsius or 0.0)
                    row.decision_seconds.append(run.decision_seconds)
        print(f"after seed {seed}: mean, range over seeds, worst program; peak; decision")
        for (label, name), row in figures.items():
            print(f"{label:18} {name:16} {row.row()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--machine", default="odroid-xu3")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--untrained", action="store_true", help="train no policies")
    parser.add_argument("--learned", action="store_true", help="only the oracle and its imitations")
    parser.add_argument("--programs", nargs="+", default=list(captured_programs()))
    arguments = parser.parse_args()
    machine = load(arguments.machine)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    policies = UNTRAINED if arguments.untrained else tuple(POLICIES)
    if arguments.learned:
        policies = ("oracle", *LEARNED)
    measure(machine, seeds, arguments.programs, policies)


if __name__ == "__main__":
    main()
