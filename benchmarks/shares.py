"""A process that becomes slow in the middle of `fit`, and work that moves away from it.

    python benchmarks/shares.py                       # needs root: a quota of the cpu controller
    python benchmarks/shares.py --quota 0.5 --steps 60
    python benchmarks/shares.py --calm 2000           # no event: actions, and CPU time by --manage
    python benchmarks/shares.py --slow 10000          # a slow process is not taken for a hung one
    python benchmarks/shares.py --slow 300 --batch 512

Two processes train a small network as `partita run --processes 2 --manage=ready --plan dp`, each on a core
of its own. Process 1 puts itself under a quota (period 10 ms) after some steps, and takes it away
after as many more. Reported: median seconds of a step before, with the quota and even shares, after
the change, and after the quota; the decisions. Without --manage the same run shows what is saved.

With --calm no quota is set; the CPU time of a step with --manage is compared with one without, in
runs that take turns.

With --slow process 1 stays under the quota for a number of steps: reported are processes that were
killed although they did not hang, wrong names, and the steps after which it was named, and after
which shares were even again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limits import control_groups, with_limits

SCRIPT = """
import json, os, sys, time
from pathlib import Path

import jax
import keras
import numpy as np
from limits import enter, limit_cores

steps, quota, batch, width = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
group = Path(sys.argv[5])
slow = int(sys.argv[6]) if len(sys.argv) > 6 else 0


class Clock(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seconds, self.losses, self.cpu = [], [], []
        self.count = 0
        self.is_slow = jax.process_index() == 1 and quota < 1

    def on_train_batch_begin(self, batch, logs=None):
        if self.is_slow and self.count in (steps, steps + (slow or steps)):
            limit_cores(group, quota if self.count == steps else None)
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)
        self.cpu.append(time.process_time())
        self.losses.append(float(logs["loss"]))
        self.count += 1


if quota < 1 and jax.process_index() == 1:
    enter(group, os.getpid())
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cores[jax.process_index() % len(cores)]})
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x = rng.standard_normal((batch * 16, width)).astype("float32")
y = np.tanh(x[:, :10])
layers = [keras.layers.Dense(2 * width, activation="tanh") for _ in range(2)]
model = keras.Sequential([keras.Input((width,)), *layers, keras.layers.Dense(10)])
model.compile(keras.optimizers.SGD(0.02), "mse")
clock = Clock()
count = 2 * steps + (slow or steps) if quota < 1 else steps
model.fit(
    x, y, batch_size=batch, epochs=-(-count // 16), shuffle=False, verbose=0,
    callbacks=[clock],
)
result = {"seconds": clock.seconds, "losses": clock.losses, "cpu": clock.cpu}
Path(f"times-{jax.process_index()}.json").write_text(json.dumps(result))
"""
WARM_UP = 5
"""Steps at the beginning of a phase that do not count."""
SETTLED = 20
"""Steps after which a change of speed has been answered."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quota", type=float, default=0.3, help="part of a core")
    parser.add_argument("--steps", type=int, default=60, help="of a phase")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--calm", type=int, default=0, help="steps of a run without an event")
    parser.add_argument("--slow", type=int, default=0, help="steps under the quota")
    parser.add_argument("--turns", type=int, default=3, help="runs of each kind with --calm")
    given = parser.parse_args()
    size = [str(given.batch), str(given.width)]
    if given.calm:
        return calm(given.calm, given.turns, size)
    with control_groups("cpu", 1) as (group,):
        if given.slow:
            return slow(given.slow, given.quota, size, group)
        plain, _ = train([str(given.steps), str(given.quota), *size, str(group)], manage=False)
        managed, decisions = train([str(given.steps), str(given.quota), *size, str(group)])
    for decision in decisions:
        print(f"  step {decision['step']}: {decision['sentence']}")
    show(plain, managed, given.steps, given.quota)
    return 0


def show(plain: dict[str, Any], managed: dict[str, Any], steps: int, quota: float) -> None:
    """Prints the median seconds of a step in every phase."""
    phases = {
        "full speed": range(WARM_UP, steps),
        f"process 1 at {quota:.0%}": range(steps + SETTLED, 2 * steps),
        "full speed again": range(2 * steps + SETTLED, 3 * steps),
    }
    first = 1.0
    for name, numbers in phases.items():
        texts = []
        for label, run in (("even", plain), ("managed", managed)):
            seconds = statistics.median(run["seconds"][n] for n in numbers)
            if not texts and numbers.start == WARM_UP:
                first = seconds
            texts.append(f"{label} {seconds * 1e3:.1f} ms ({seconds / first:.2f} x)")
        print(f"{name}: {', '.join(texts)}")
    ideal = 2 / (1 + quota)
    differences = zip(plain["losses"], managed["losses"], strict=True)
    largest = max(abs(a - b) for a, b in differences)
    print(f"ideal shares: {ideal:.2f} x; largest difference of a loss: {largest:.1e}")


def slow(steps: int, quota: float, size: list[str], group: Path) -> int:
    """Prints the decisions of a long run with a slow process."""
    begin, end = 2 * SETTLED, 2 * SETTLED + steps
    arguments = [str(begin), str(quota), *size, str(group), str(steps)]
    times, decisions = train(arguments)
    kills = sum(decision["action"] == "shrink" for decision in decisions)
    names = [decision for decision in decisions if decision.get("slow")]
    wrong = [each for each in names if set(each["slow"]) != {"1"} or not begin < each["step"]]
    changes = [decision for decision in decisions if decision["action"] == "shares"]
    even = [each["step"] - end for each in changes if not each["shares"] and each["step"] > end]
    for decision in decisions:
        print(f"  step {decision['step']}: {decision['sentence']}")
    before = statistics.median(times["seconds"][WARM_UP:begin])
    during = statistics.median(times["seconds"][begin + SETTLED : end])
    named = f"named after {names[0]['step'] - begin} steps" if names else "not named"
    again = f"even again after {even[0]} steps" if even else "not even again"
    print(
        f"{kills} kills, {len(wrong)} wrong names, {len(changes)} changes of shares in {steps} "
        f"steps with process 1 at {quota:.0%} of a core; {named}, {again}; a step took "
        f"{before * 1e3:.1f} ms, then {during * 1e3:.1f} ms ({during / before:.1f} x)"
    )
    return 1 if kills or wrong else 0


def calm(steps: int, turns: int, size: list[str]) -> int:
    """Prints the actions and the CPU time of runs in which nothing happens."""
    cpu: dict[bool, list[float]] = {False: [], True: []}
    actions = 0
    for turn in range(2 * turns):
        manage = turn % 2 == 1
        times, decisions = train([str(steps), "1", *size, "none"], manage=manage)
        spent = times["cpu"][-1] - times["cpu"][WARM_UP]
        cpu[manage].append(spent / (len(times["cpu"]) - 1 - WARM_UP))
        actions += sum(decision["action"] == "shares" for decision in decisions)
    without, with_manager = (statistics.median(cpu[manage]) for manage in (False, True))
    print(f"{actions} actions in {turns} runs of {steps} steps")
    print(
        f"CPU time of a step: {without * 1e3:.2f} ms without, {with_manager * 1e3:.2f} ms with "
        f"--manage: {with_manager / without - 1:+.2%}"
    )
    return 0 if actions == 0 else 1


def train(arguments: list[str], manage: bool = True) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the times of process 0, the decisions) of a run."""
    return managed_run(SCRIPT, arguments, "--manage=ready" if manage else "")


def managed_run(
    script: str, arguments: Sequence[str], manage: str, inside: Sequence[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the times of process 0, the decisions) of a script that two processes run.

    `manage` is the option of `partita run`, if any; `inside` is a command that runs another one.
    """
    with tempfile.TemporaryDirectory(prefix="partita-shares-") as name:
        folder = Path(name)
        (folder / "train.py").write_text(script, encoding="utf-8")
        command = [sys.executable, "-m", "partita", "run", "--quiet", "--processes", "2"]
        command += ["--devices", "2", "--plan", "dp"]
        if manage:
            command += [manage, "--decisions", "decisions.jsonl"]
        done = subprocess.run(
            [*inside, *command, "train.py", *arguments],
            cwd=folder,
            env={**with_limits(), "NPROC": "1", "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"the run failed:\n{done.stdout}{done.stderr}")
        times = json.loads((folder / "times-0.json").read_text())
        log = folder / "decisions.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return times, [json.loads(line) for line in lines]


if __name__ == "__main__":
    sys.exit(main())
