"""Policies for operating points against a clairvoyant oracle, leave-one-out over seven programs.

    python benchmarks/manage_power.py --machine odroid-xu3 --seeds 10

All figures are simulated. For each program, learned policies are trained on the six others and on
synthetic programs ("imitation seen": on all seven), on the hardware as described. A seed draws the
kernels' efficiencies, which no policy knows. Prints the geometric mean of E x T over the oracle,
its range over seeds, the worst program, the peak temperature, and the processor time of a decision.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from partita.machine import Machine, load
from partita.management.comparison import compare_policies
from partita.management.hardware import hardware_of
from partita.management.program import captured_programs, school_programs
from partita.management.registry import POLICIES
from partita.management.school import train_policy

UNTRAINED = tuple(name for name in POLICIES if name not in ("imitation", "gated", "qlearning"))


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


def measure(machine: Machine, seeds: range, passes: list[str]) -> dict[tuple[str, str], Figures]:
    """(hardware, policy) -> figures."""
    figures: dict[tuple[str, str], Figures] = defaultdict(Figures)
    hardware = hardware_of(machine)
    seen = train_policy(hardware, school_programs())
    for name in passes:
        program = captured_programs()[name]
        others = school_programs(without=name)
        unseen = train_policy(hardware, others)
        for seed in seeds:
            policies = [*UNTRAINED, "imitation", "gated"]
            if seed == 1:
                policies.append("qlearning")  # it trains anew for each run
            runs = compare_policies(
                program, machine, policies, seed=seed, programs=others, learned=unseen
            )
            again = compare_policies(program, machine, ["imitation"], seed=seed, learned=seen)
            for comparison in (*runs, *again):
                for run in comparison.runs:
                    label = f"{run.policy} seen" if comparison in again else run.policy
                    row = figures[comparison.hardware, label]
                    row.regrets[seed].append(float(np.log1p(comparison.regret(run))))
                    row.celsius = max(row.celsius, run.peak_celsius or 0.0)
                    row.decision_seconds.append(run.decision_seconds)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--machine", default="odroid-xu3")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--programs", nargs="+", default=list(captured_programs()))
    arguments = parser.parse_args()
    machine = load(arguments.machine)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    figures = measure(machine, seeds, arguments.programs)
    print("E x T over the oracle: mean, range over seeds, worst program; peak; decision")
    for (hardware, policy), row in figures.items():
        print(f"{hardware:18} {policy:16} {row.row()}")


if __name__ == "__main__":
    main()
