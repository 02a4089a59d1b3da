"""A link that becomes slow in the middle of `fit`, and the plan that is taken then.

    python benchmarks/links.py                    # needs root and iproute2: a network of its own
    python benchmarks/links.py --before 1gbit --after 200mbit --steps 80

Two processes train a network with large dense layers as `partita run --processes 2 --plan dp`, in a
network namespace whose loopback is shaped. Process 0 lowers the rate after some steps. Reported: the
decisions, and median seconds of a step before, with the slow link, and after the change of plan, with
and without --manage.
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

steps, rate, width = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])


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
    x, np.tanh(x[:, :10]), batch_size=64, epochs=-(-3 * steps // 16), shuffle=False, verbose=0,
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
    given = parser.parse_args()
    runs = {}
    for manage in (False, True):
        runs[manage], decisions = train(given, manage)
        for decision in decisions:
            print(f"  step {decision['step']}: {decision['sentence']}")
    last = 3 * given.steps
    switches = [d["step"] for d in decisions if d["action"] == "switch"]
    changed = switches[0] + WARM_UP if switches else last - WARM_UP
    phases = {
        f"{given.before}, dp": (False, range(WARM_UP, given.steps)),
        f"{given.after}, dp": (False, range(given.steps + WARM_UP, last)),
        f"{given.after}, managed": (True, range(changed, last)),
    }
    for name, (manage, numbers) in phases.items():
        seconds = statistics.median(runs[manage]["seconds"][n] for n in numbers)
        print(f"{name}: {seconds * 1e3:.0f} ms")
    pairs = zip(runs[False]["losses"], runs[True]["losses"], strict=True)
    print(f"largest difference of a loss: {max(abs(a - b) for a, b in pairs):.1e}")
    return 0 if switches else 1


def train(given: argparse.Namespace, manage: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the times of process 0, the decisions) of a run in a network of its own."""
    arguments = [str(given.steps), given.after, str(given.width)]
    with network(given.before) as inside:
        return managed_run(SCRIPT, arguments, "--manage" if manage else "", inside)


if __name__ == "__main__":
    sys.exit(main())
