"""Runs that lose a process at a random moment of `fit`, and go on: `partita run --restarts`.

    python benchmarks/restarts.py                # 50 kills, about half an hour
    python benchmarks/restarts.py --kills 5 --signal STOP

A run of several processes trains a small network for some epochs. At a random moment of its training
a random process gets SIGKILL, or SIGSTOP: it hangs then. Reported: runs that ended with the history
of an uninterrupted run, and seconds from the signal to the next finished batch, start of Python and
compilation in them.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from partita.files.folders import temporary_folder

SCRIPT = """
import json, os, time
from pathlib import Path

import keras
import numpy as np

EPOCHS = 24


class Clock(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.01)
        number = os.environ["JAX_PROCESS_ID"]
        with open(f"batches-{number}", "a") as file:
            file.write(f"{os.getpid()} {time.time()}\\n")


x = np.random.default_rng(0).normal(size=(160, 32)).astype("float32")
layers = [keras.layers.Dense(64, activation="tanh"), keras.layers.Dense(4)]
model = keras.Sequential([keras.Input((32,)), *layers])
model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
history = model.fit(x, x[:, :4], batch_size=16, epochs=EPOCHS, verbose=0, callbacks=[Clock()])
print(json.dumps(history.history["loss"]))
"""
TRAINING_SECONDS = 2.5
"""Length of the training, about: the moments of the signals are drawn from it."""
TOLERANCE = 1e-5
TIMEOUT = 600
FOLDERS = ExitStack()
"""The folders of all runs, removed at the end."""
atexit.register(FOLDERS.close)


@dataclass(frozen=True)
class Result:
    """A run that lost a process."""

    is_equal: bool
    """Whether the history is that of an uninterrupted run."""
    seconds: float
    """From the signal to the next finished batch."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--signal", choices=["KILL", "STOP"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    _, run = start(SCRIPT, _options(given.processes))
    straight = losses(finish(run)[0])
    results = []
    for number in range(given.kills):
        moment = draw.uniform(0.0, TRAINING_SECONDS)
        victim = draw.randrange(given.processes)
        result = lose(
            given.processes, victim, moment, signal.Signals[f"SIG{given.signal}"], straight
        )
        results.append(result)
        state = "equal" if result.is_equal else "DIFFERS"
        print(f"{number}: process {victim} after {moment:.2f} s: {state}, {result.seconds:.1f} s")
    equal = sum(result.is_equal for result in results)
    median = statistics.median(result.seconds for result in results)
    print(f"{equal} of {len(results)} went on to the same history; median {median:.1f} s")
    return 0 if equal == len(results) else 1


def lose(
    processes: int, victim: int, moment: float, number: signal.Signals, straight: list[float]
) -> Result:
    """A run in which a process gets a signal `moment` seconds after its first batch."""
    folder, run = start(SCRIPT, _options(processes))
    path = folder / f"batches-{victim}"
    while not path.exists() or not path.read_text().strip():
        time.sleep(0.005)
    time.sleep(moment)
    process_id = int(path.read_text().split()[0])
    sent = time.time()
    os.kill(process_id, number)
    history = losses(finish(run)[0])
    later = [float(line.split()[1]) for line in path.read_text().splitlines() if line.split()[1:]]
    seconds = min((time for time in later if time > sent), default=sent) - sent
    is_equal = len(history) == len(straight) and all(
        abs(a - b) <= TOLERANCE * abs(b) for a, b in zip(history, straight, strict=True)
    )
    return Result(is_equal, seconds)


def _options(processes: int) -> list[str]:
    return ["--quiet", "--processes", str(processes), "--restarts", "1"]


def start(script: str, options: Sequence[str]) -> tuple[Path, subprocess.Popen[str]]:
    """A new folder with a script, and its run by `partita run` with these options."""
    folder = FOLDERS.enter_context(temporary_folder("partita-losses-"))
    (folder / "train.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "partita", "run", *options, "train.py"]
    environment = {**os.environ, "PARTITA_SEED": "5"}
    pipe = subprocess.PIPE
    run = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )
    return folder, run


def finish(run: subprocess.Popen[str]) -> tuple[str, str]:
    """The standard output and error of a run."""
    output, errors = run.communicate(timeout=TIMEOUT)
    if run.returncode:
        print(f"a run ended with code {run.returncode}:\n{errors}", file=sys.stderr)
    return output, errors


def losses(output: str) -> list[float]:
    """The losses that the script prints last; empty if there are none."""
    lines = [line for line in output.splitlines() if line.startswith("[") and "." in line]
    return json.loads(lines[-1]) if lines else []


if __name__ == "__main__":
    sys.exit(main())
