"""Runs that lose a process at a random moment of `fit`, and go on in the same processes:
`partita run --manage=ready`.

    python benchmarks/survive.py                       # 50 kills, half an hour on a quiet host
    python benchmarks/survive.py --losses 20 --signal STOP
    python benchmarks/survive.py --first 30            # goes on with the 31st
    python benchmarks/survive.py --calm 300            # no loss: CPU time of a step by survival

A run of three processes trains a network for some epochs. At a random moment of its training a
random process gets SIGKILL, or SIGSTOP: it hangs then. Reported: runs that ended with the history of
an uninterrupted run and with each batch seen once by callbacks, and seconds from the signal to the
next finished batch, which ends the longest pause of a survivor.

With --calm a training is played in this process: batches of 4096 samples of 266 numbers, 12 variables
of 0.5 MB, steps of 92 ms that compute nothing. Reported is the CPU time of snapshots and notes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import jax
import numpy as np
from restarts import TOLERANCE, finish, losses, start

from partita.execute.steps import LiveGroup, StepRunner
from partita.management.decisions import DecisionLog
from partita.management.survival import Survival

SCRIPT = """
import json, os, time

import keras
import numpy as np

EPOCHS = {epochs}
file = open("batches-" + os.environ["JAX_PROCESS_ID"], "a", buffering=1)


class Clock(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.02)
        file.write(str(os.getpid()) + " " + str(time.time()) + "\\n")


x, y = np.random.default_rng(0).normal(size=(2, 240, 128)).astype("float32")
layers = [keras.layers.Dense(1024, activation="tanh"), keras.layers.Dense(4)]
model = keras.Sequential([keras.Input((128,)), *layers])
model.compile(keras.optimizers.SGD(0.02, momentum=0.9), "mse")
history = model.fit(x, y[:, :4], batch_size=48, epochs=EPOCHS, verbose=0, callbacks=[Clock()])
print(json.dumps(history.history["loss"]))
"""
EPOCHS = 12
BATCHES = 5
"""Batches of an epoch."""
SOURCES = ("shuffled", "in order", "generator")
STEP_SECONDS = 0.092
"""Of a played step."""


@dataclass(frozen=True)
class Result:
    """A run that lost a process."""

    is_equal: bool
    """Whether the history is that of an uninterrupted run, and no callback ran twice."""
    difference: float
    """The largest relative difference of a loss."""
    seconds: float
    """From the signal to the end of the longest pause between two batches of a survivor."""
    output: str


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", type=int, default=50)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="losses that were made before")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--calm", type=int, default=0, help="steps without a loss")
    given = parser.parse_args()
    if given.first >= given.losses:
        parser.error(f"--first {given.first} leaves none of --losses {given.losses}")
    if given.calm:
        for source in SOURCES:
            print(f"{source}: {survival_seconds(source, given.calm) / STEP_SECONDS:.2%} of a step")
        return 0
    draw = random.Random(given.seed)
    folder, run = _start(given.processes, given.epochs)
    straight = losses(finish(run)[0])
    batches = BATCHES * given.epochs
    results = []
    for number in range(given.losses):
        batch = draw.randrange(1, batches - 2)
        pause = draw.uniform(0.0, 0.05)
        victim = draw.randrange(given.processes)
        if number < given.first:
            continue
        result = lose(given, victim, batch, pause, straight)
        results.append(result)
        state = "equal" if result.is_equal else f"DIFFERS\n{result.output}"
        print(
            f"{number}: process {victim} after batch {batch} and {pause * 1e3:.0f} ms: {state}, "
            f"{result.seconds:.2f} s, losses {result.difference:.0e} off",
            flush=True,
        )
    equal = sum(result.is_equal for result in results)
    seconds = sorted(result.seconds for result in results)
    print(
        f"{equal} of {len(results)} went on to the same history; median "
        f"{statistics.median(seconds):.2f} s, longest {seconds[-1]:.2f} s"
    )
    return 0 if equal == len(results) else 1


def lose(
    given: argparse.Namespace, victim: int, batch: int, pause: float, straight: list[float]
) -> Result:
    """A run in which a process gets a signal some time after it has finished a batch."""
    folder, run = _start(given.processes, given.epochs)
    path = folder / f"batches-{victim}"
    while run.poll() is None and len(_lines(path)) < batch:
        time.sleep(0.002)
    time.sleep(pause)
    sent = time.time()
    os.kill(int(_lines(path)[0].split()[0]), signal.Signals[f"SIG{given.signal}"])
    output, errors = finish(run)
    history = losses(output)
    counts = []
    ends = []
    for number in range(given.processes):
        times = [float(line.split()[1]) for line in _lines(folder / f"batches-{number}")]
        if number != victim:
            counts.append(len(times))
            ends.append(_end_of_pause(times, sent))
    difference = float("inf")
    if len(history) == len(straight):
        pairs = zip(history, straight, strict=True)
        difference = max(abs(a - b) / abs(b) for a, b in pairs)
    once = all(count == BATCHES * given.epochs for count in counts)
    is_equal = once and difference <= TOLERANCE
    return Result(is_equal, difference, max(ends) - sent, output + errors[-3000:])


class PlayedGroup:
    """Two processes, of which the other one answers as this one."""

    alive = (0, 1)
    is_first = True

    def exchanged(self, name: str, value: str) -> list[str]:
        return [value, value]

    def returned(self) -> int:
        return 0


def survival_seconds(source: str, steps: int) -> float:
    """CPU time of survival in a played step, after a sixth of the steps to warm up."""
    runner = StepRunner("played")
    runner.group = cast(LiveGroup, PlayedGroup())
    runner.keeps_batches = source != "generator"
    rng = np.random.default_rng(0)
    data = rng.random((16, 4096, 266), np.float32)
    states = []
    for _ in range(4):
        states.append([jax.device_put(rng.random(125_000, np.float32)) for _ in range(12)])
    survival = Survival(DecisionLog())
    seconds = 0.0
    for step in range(steps + steps // 6):
        batch = data[step % 16] if source == "in order" else np.array(data[step % 16])
        start = time.process_time()
        survival.before_step(runner, "step", states[step % 4], batch)
        runner.step += 1
        survival.after_step(runner, "step", states[(step + 1) % 4], batch, STEP_SECONDS)
        if step >= steps // 6:
            seconds += time.process_time() - start
    return seconds / steps


def _end_of_pause(times: list[float], sent: float) -> float:
    """The end of the longest pause between two batches that ends after a moment."""
    pauses = []
    for begin, end in itertools.pairwise(times):
        if end > sent:
            pauses.append((end - max(begin, sent), end))
    return max(pauses, default=(0.0, float("inf")))[1]


def _lines(path: Path) -> list[str]:
    """The complete lines of a file; none if it is not there yet."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _start(processes: int, epochs: int) -> tuple[Path, subprocess.Popen[str]]:
    """A new folder with the script, and its run."""
    options = ["--manage=ready", "--processes", str(processes), "--devices", str(processes)]
    return start(SCRIPT.format(epochs=epochs), [*options, "--plan", "dp"])


if __name__ == "__main__":
    sys.exit(main())
