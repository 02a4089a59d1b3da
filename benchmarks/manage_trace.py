"""When to change the plan: the rule min(learned wait, ski rental) against a clairvoyant.

    python benchmarks/manage_trace.py --traces 20

Simulated: a device is slow for 60 random times of one law. Staying with the plan takes 1.72 times as
long, the other plan 1.22 times. Prints the mean of the steps lost against the clairvoyant, for three
prices of a change and five laws of the lengths. "ski" is the rule without learning.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from partita.management.plan_table import PlanTable
from partita.management.policies.at_once import AtOnce
from partita.management.policies.never import Never
from partita.management.policies.rule import Rule
from partita.management.policies.waiting import Slowdown, WaitingPolicy
from partita.management.replay import Prices, clairvoyant, replay
from partita.management.traces import MachineState, slow_downs

TIMES = 60
SLOW = MachineState(slow=((0, 0.3),))
TABLE = PlanTable(
    {}, {MachineState(): {"fast": 1.0, "safe": 1.2}, SLOW: {"fast": 1.72, "safe": 1.22}}
)
LAWS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "short": lambda generator: generator.exponential(10.0, TIMES),
    "long": lambda generator: generator.exponential(600.0, TIMES),
    "mixed": lambda generator: np.where(
        generator.random(TIMES) < 0.7,
        generator.exponential(10.0, TIMES),
        generator.exponential(600.0, TIMES),
    ),
    "pareto": lambda generator: 5.0 * (1 + generator.pareto(1.2, TIMES)).clip(max=1000),
    "short, then long": lambda generator: np.concatenate(
        [generator.exponential(10.0, TIMES // 2), generator.exponential(600.0, TIMES // 2)]
    ),
}


class SkiRental(WaitingPolicy):
    """The rule without its learned wait."""

    name = "ski"

    def wait(self, slowdown: Slowdown) -> float:
        return slowdown.change_seconds / slowdown.loss


POLICIES = (Rule, SkiRental, AtOnce, Never)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--traces", type=int, default=20)
    count = parser.parse_args().traces
    print("steps lost against the clairvoyant: " + ", ".join(one.name for one in POLICIES))
    for price in (0.1, 5.0, 60.0):
        prices = Prices(compile=0.0, move=price)
        for law, lengths in LAWS.items():
            lost = []
            for seed in range(count):
                generator = np.random.default_rng(seed)
                pauses = generator.exponential(300.0, TIMES)
                trace = slow_downs(lengths(generator).tolist(), pauses.tolist(), 0, 0.3)
                runs = [replay(trace, TABLE, policy(), prices) for policy in POLICIES]
                best = clairvoyant(trace, TABLE, prices, others=runs)
                lost.append([1 - run.steps / best.steps for run in runs])
            cells = "  ".join(f"{value:6.2%}" for value in np.mean(lost, 0))
            print(
                f"price {price:5.1f} s  {law:18} {cells}   worst rule {max(row[0] for row in lost):.2%}"
            )


if __name__ == "__main__":
    main()
