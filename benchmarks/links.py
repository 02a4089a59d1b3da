"""A link that becomes slow in the middle of `fit`, and the plan that is taken then.

    python benchmarks/links.py                    # needs root and iproute2: a network of its own
    python benchmarks/links.py --before 1gbit --after 200mbit --steps 80
    python benchmarks/links.py --steps 40 --managed-steps 4000   # a run of some minutes

Two processes train a network with large dense layers as `partita run --processes 2 --plan dp`, in a
network namespace whose loopback is shaped. Process 0 lowers the rate after some steps. Reported: the
decisions, median seconds of a step before, with the slow link, and after the change of plan, with
and without --manage, and the share of the managed run that is lost against a clairvoyant, who takes the
other plan with the first slow step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from limits import network
from shares import managed_run

SCRIPT = """
import json, sys, time
from pathlib import Path

import jax
import keras
import numpy as np
from limits import shape_loopback

steps, rate, width, last = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])


class Clock(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seconds, self.losses = [], []

    def on_train_batch_begin(self, batch, logs=None):
        if len(self.seconds) == steps and jax.process_index() == 0:
            shape_loopback(rate)
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)
        self.losses.append(float(logs["loss"]))


keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x = rng.standard_normal((64 * 16, width)).astype("float32")
layers = [keras.layers.Dense(width, activation="tanh") for _ in range(3)]
model = keras.Sequential([keras.Input((width,)), *layers, keras.layers.Dense(10)])
model.compile(keras.optimizers.SGD(0.02), "mse")
clock = Clock()
model.fit(
    x, np.tanh(x[:, :10]), batch_size=64, epochs=-(-last // 16), shuffle=False, verbose=0,
    callbacks=[clock],
)
if jax.process_index() == 0:
    Path("times-0.json").write_text(json.dumps({"seconds": clock.seconds, "losses": clock.losses}))
"""
WARM_UP = 5
"""Steps at the beginning of a phase that do not count."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default="1gbit", help="rate of the link")
    parser.add_argument("--after", default="200mbit")
    parser.add_argument("--steps", type=int, default=48, help="before the change, and half after")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument(
        "--managed-steps", type=int, help="of the managed run; as the other if unset"
    )
    given = parser.parse_args()
    runs = {}
    for manage in (False, True):
        runs[manage], decisions = train(given, manage)
        for decision in decisions:
            print(f"  step {decision['step']}: {decision['sentence']}")
    last = len(runs[True]["seconds"])
    switches = [d["step"] for d in decisions if d["action"] == "switch"]
    changed = switches[0] + WARM_UP if switches else last - WARM_UP
    phases = {
        f"{given.before}, dp": (False, range(WARM_UP, given.steps)),
        f"{given.after}, dp": (False, range(given.steps + WARM_UP, 3 * given.steps)),
        f"{given.after}, managed": (True, range(changed, last)),
    }
    medians = {}
    for name, (manage, numbers) in phases.items():
        medians[name] = statistics.median(runs[manage]["seconds"][n] for n in numbers)
        print(f"{name}: {medians[name] * 1e3:.0f} ms")
    if switches:
        slow = runs[True]["seconds"][given.steps : switches[0]]
        lost = sum(slow) - len(slow) * medians[f"{given.after}, managed"]
        whole = sum(runs[True]["seconds"])
        print(f"{len(slow)} slow steps lose {lost:.1f} s: {lost / whole:.1%} of {whole:.0f} s")
    pairs = zip(runs[False]["losses"], runs[True]["losses"], strict=False)
    print(f"largest difference of a loss: {max(abs(a - b) for a, b in pairs):.1e}")
    return 0 if switches else 1


def train(given: argparse.Namespace, manage: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the times of process 0, the decisions) of a run in a network of its own."""
    last = 3 * given.steps
    if manage and given.managed_steps:
        last = given.managed_steps
    arguments = [str(given.steps), given.after, str(given.width), str(last)]
    with network(given.before) as inside:
        return managed_run(SCRIPT, arguments, "--manage" if manage else "", inside)


if __name__ == "__main__":
    sys.exit(main())
