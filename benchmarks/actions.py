"""Random actions of a manager in `fit` against never acting: other plans, other shares, and with
several processes fewer and more of them.

    python benchmarks/actions.py                  # 3 models x 5 seeds, 20 actions each
    python benchmarks/actions.py --models mlp --seeds 1 --actions 6
    python benchmarks/actions.py --processes 3    # half an hour: a process is killed, and comes back
    python benchmarks/actions.py --processes 3 --first 7   # goes on with the 8th training

Each training runs on 4 devices of one process, or on one device of each process. Before a random half
of its steps the manager changes the plan, the shares, or goes back to even shares. With several
processes it also kills one of them, and takes it in again some steps later. Reported: the largest
difference of a loss from a training that never acts, and of one by another plan that never acts: the
noise of two plans; with several processes also whether each batch was seen once by the callbacks of
all, and whether a `partita.Checkpoint` has saved the last epoch.
"""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np

import partita
from partita.capture.jax_functions import Captured
from partita.errors import LostProcessError, PlanError
from partita.execute import members
from partita.keras.fit import attach, attached
from partita.management.contract import Manager, Training
from partita.management.decisions import DecisionLog
from partita.management.managers import Managers
from partita.management.shares import shares_of
from partita.management.survival import Survival
from partita.plans.baselines import BASELINES
from partita.plans.plan import Mesh, Plan, mesh_for

PLANS = ("data parallel", "ZeRO-1", "tensor parallel", "ZeRO-3")
BATCH = 48
BATCHES = 8
"""Of an epoch."""
LIMIT = 1e-5
DEVICES, PROCESSES = 4, 3
MOST_LOSSES = 5
"""Gloo lets three processes meet six times."""
RETURN_SECONDS = 300
"""Time limit for a process to come back."""


def mlp() -> tuple[keras.Model, np.ndarray]:
    layers = [keras.layers.Dense(64, activation="tanh") for _ in range(3)]
    return keras.Sequential([keras.Input((32,)), *layers, keras.layers.Dense(8)]), vectors((32,))


def convolutions() -> tuple[keras.Model, np.ndarray]:
    layers = [
        keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
        keras.layers.AveragePooling2D(2),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(8),
    ]
    return keras.Sequential([keras.Input((8, 8, 4)), *layers]), vectors((8, 8, 4))


def attention() -> tuple[keras.Model, np.ndarray]:
    inputs = keras.Input((8, 16))
    x = keras.layers.MultiHeadAttention(4, 4)(inputs, inputs)
    x = keras.layers.LayerNormalization()(x + inputs)
    outputs = keras.layers.Dense(8)(keras.layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs), vectors((8, 16))


def vectors(shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((BATCH * BATCHES, *shape)).astype("float32")


MODELS: dict[str, Callable[[], tuple[keras.Model, np.ndarray]]] = {
    "mlp": mlp,
    "convolutions": convolutions,
    "attention": attention,
}


class RandomActions:
    """A manager that acts at random.

    With a `survival` it also shrinks and grows the group. What it does depends on the seed and the
    step alone, so that all processes do the same, one that comes back too.
    """

    def __init__(self, seed: int, actions: int, survival: Survival | None = None) -> None:
        self.seed = seed
        self.actions = actions
        self.survival = survival
        self.counts = {"plan": 0, "shares": 0, "even": 0, "shrink": 0, "grow": 0}
        self._last_step = -1

    def before_step(self, training: Training, key: Hashable, state: Any, batch: Any) -> None:
        """Acts before half of the steps."""
        step = training.step
        if step <= self._last_step:
            return
        self._last_step = step
        self.draw = random.Random(f"{self.seed} {step}")
        last = 3 * self.actions - 1
        whole = len(training.group.alive) == PROCESSES
        if self.survival is not None and not whole and step == last - 1:
            self._grow(training)
            self.counts["grow"] += 1
            return
        if step >= last - 1 or self.draw.random() < 1 / 3:
            return
        actions = ["plan", "shares", "shares", "even"]
        if self.survival is not None:
            if not whole:
                actions.append("grow")
            elif members.generation() < 2 * MOST_LOSSES:
                actions.append("shrink")
        action = self.draw.choice(actions)
        if action == "plan":
            plan = plan_for(training.graph(key), self.draw.choice(PLANS), devices(training))
            training.change(plan)
        elif action == "even":
            training.change_shares(None)
        elif action == "shares" and not self._share(training, key):
            return
        elif action == "shrink":
            self._shrink(training)
        elif action == "grow":
            self._grow(training)
        self.counts[action] += 1

    def _shrink(self, training: Training) -> None:
        """Kills a process, in the middle of a step of the others."""
        victim = (self.seed + members.generation() // 2) % PROCESSES
        if os.environ["JAX_PROCESS_ID"] == str(victim):
            os.kill(os.getpid(), signal.SIGKILL)

    def _grow(self, training: Training) -> None:
        """Waits for the process that comes back: it is taken in before the next step."""
        assert self.survival is not None
        end = time.monotonic() + RETURN_SECONDS
        while not training.group.returned() and time.monotonic() < end:
            time.sleep(0.01)
        self.survival.snapshot_at(training.step + 1)

    def _share(self, training: Training, key: Hashable) -> bool:
        """Gives devices random shares; False for a plan that has none."""
        try:
            if not training.has_shares(key):
                self._microbatches = training.prepare_shares(key)
            count = self._microbatches
        except PlanError:
            return False
        speeds = [self.draw.choice((0.0, 0.2, 0.5, 1.0)) for _ in range(devices(training) - 1)]
        training.change_shares(shares_of([1.0, *speeds], count))
        return True

    def after_step(
        self, training: Training, key: Hashable, state: Any, batch: Any, seconds: float
    ) -> None:
        """Takes no notes."""

    def lost(self, training: Training, state: Any, error: LostProcessError) -> Any:
        """Cannot go on."""
        raise error


def devices(training: Training) -> int:
    return training.group.devices_of(training.group.alive)


def plan_for(graph: Any, name: str, count: int) -> Plan:
    return BASELINES[name](graph, "host", Mesh.of((2, 2)) if count == 4 else mesh_for((count,)))


def losses(
    name: str, plan: str, manager: Manager | None, steps: int, folder: Path | None = None
) -> list[float]:
    """The losses of a training, a step each: on 4 devices, or, with checkpoints in a folder, on a
    device of each process."""
    count = 4 if folder is None else PROCESSES
    keras.utils.set_random_seed(0)
    model, x = MODELS[name]()
    y = np.random.default_rng(1).standard_normal((len(x), 8)).astype("float32")
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")

    def planner(captured: Captured, error: Any = None) -> Plan:
        return plan_for(captured.graph, plan, count)

    attach(model, planner, report=lambda line: None)
    fit = attached(model)
    assert fit is not None
    fit.runner.manager = manager
    values = []

    class Losses(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.model.reset_metrics()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            values.append(float(logs["loss"]))

    callbacks: list[keras.callbacks.Callback] = [Losses()]
    if folder is not None:
        callbacks.append(partita.Checkpoint(folder / "kept"))
    epochs = epochs_of(steps)
    model.fit(x, y, BATCH, epochs, verbose=0, shuffle=False, callbacks=callbacks)
    return values


def epochs_of(steps: int) -> int:
    """Epochs with at least a number of steps."""
    return -(-steps // BATCHES)


def largest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def run_in_processes(name: str, seed: int, actions: int) -> tuple[list[float], dict[str, int]]:
    """(the losses, numbers of actions) of a training in several processes; all must have seen the
    same ones."""
    with tempfile.TemporaryDirectory(prefix="partita-actions-") as folder:
        command = [sys.executable, "-m", "partita", "run", "--quiet", "--manage"]
        command += ["--processes", str(PROCESSES), "--devices", str(PROCESSES)]
        command += ["--restarts", "50", __file__, "--inside", folder, "--models", name]
        command += ["--seeds", str(seed), "--actions", str(actions)]
        environment = {**os.environ, "PARTITA_SEED": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed}: the run failed:\n{done.stdout}{done.stderr}")
        values = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
        saved = [int(path.name) for path in Path(folder, "kept").iterdir() if path.name.isdigit()]
    assert max(saved) == epochs_of(3 * actions) - 1, "the last epoch is saved"
    assert len(values) == PROCESSES, "each process ends"
    assert all(value["losses"] == values[0]["losses"] for value in values), "all saw the same"
    most = max(values, key=lambda value: sum(value["counts"].values()))
    return values[0]["losses"], most["counts"]


def inside(folder: Path, name: str, seed: int, actions: int) -> None:
    """A training of this process with the others."""
    survival = Survival(DecisionLog(lambda line: print(line, file=sys.stderr)))
    manager = RandomActions(seed, actions, survival)
    values = losses(name, PLANS[0], Managers([survival, manager]), 3 * actions, folder)
    result = {"losses": values, "counts": manager.counts}
    (folder / f"{os.environ['JAX_PROCESS_ID']}.json").write_text(json.dumps(result))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--actions", type=int, default=20)
    parser.add_argument("--processes", type=int, choices=(1, PROCESSES), default=1)
    parser.add_argument("--first", type=int, default=0, help="trainings that were made before")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside is not None:
        inside(given.inside, given.models, given.seeds, given.actions)
        return 0
    jax.config.update("jax_num_cpu_devices", DEVICES)
    worst = 0.0
    steps = 3 * given.actions
    for number, name in enumerate(given.models.split(",")):
        first = given.first - number * given.seeds
        if first >= given.seeds:
            continue
        straight = losses(name, PLANS[0], None, steps)
        noise = largest(losses(name, PLANS[2], None, steps), straight)
        for seed in range(max(0, first), given.seeds):
            if given.processes > 1:
                values, counted = run_in_processes(name, seed, given.actions)
            else:
                manager = RandomActions(seed, given.actions)
                values, counted = losses(name, PLANS[0], manager, steps), manager.counts
            difference = largest(values, straight)
            worst = max(worst, difference)
            counts = ", ".join(f"{count} {action}" for action, count in counted.items())
            text = f"{name}, seed {seed}: {counts}: {difference:.1e} (two plans: {noise:.1e})"
            print(text, flush=True)
    print(f"largest difference of a loss: {worst:.1e}")
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
