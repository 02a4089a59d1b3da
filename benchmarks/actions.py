"""Random actions of a manager in `fit` against never acting: other plans, other shares.

    python benchmarks/actions.py                  # 3 models x 5 seeds, 20 actions each
    python benchmarks/actions.py --models mlp --seeds 1 --actions 6

Each training runs on 4 devices of one process. Before a random half of its steps the manager changes
the plan, the shares, or goes back to even shares. Reported: the largest difference of a loss from a
training that never acts, and of one by another plan that never acts: the noise of two plans.
"""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")

import argparse
import random
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import keras
import numpy as np

from partita.capture.jax_functions import Captured
from partita.errors import LostProcessError, PlanError
from partita.keras.fit import attach, attached
from partita.management.contract import Training
from partita.management.shares import shares_of
from partita.plans.baselines import BASELINES
from partita.plans.plan import Mesh, Plan

PLANS = ("data parallel", "ZeRO-1", "tensor parallel", "ZeRO-3")
BATCH = 64
LIMIT = 1e-5


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
    return np.random.default_rng(0).standard_normal((BATCH * 8, *shape)).astype("float32")


MODELS: dict[str, Callable[[], tuple[keras.Model, np.ndarray]]] = {
    "mlp": mlp,
    "convolutions": convolutions,
    "attention": attention,
}


class RandomActions:
    """A manager that acts at random."""

    def __init__(self, seed: int, actions: int) -> None:
        self.draw = random.Random(seed)
        self.left = actions
        self.counts = {"plan": 0, "shares": 0, "even": 0}

    def before_step(self, training: Training, key: Hashable, state: Any, batch: Any) -> None:
        """Acts before half of the steps."""
        if self.left == 0 or self.draw.random() < 0.5:
            return
        action = self.draw.choice(("plan", "shares", "shares", "even"))
        if action == "plan":
            plan = plan_for(training.graph(key), self.draw.choice(PLANS))
            training.change(plan)
        elif action == "even":
            training.change_shares(None)
        elif not self._share(training, key):
            return
        self.left -= 1
        self.counts[action] += 1

    def _share(self, training: Training, key: Hashable) -> bool:
        """Gives devices random shares; False for a plan that has none."""
        try:
            count = 16 if training.has_shares(key) else training.prepare_shares(key)
        except PlanError:
            return False
        speeds = [self.draw.choice((0.0, 0.2, 0.5, 1.0)) for _ in range(3)]
        training.change_shares(shares_of([1.0, *speeds], count))
        return True

    def after_step(
        self, training: Training, key: Hashable, state: Any, batch: Any, seconds: float
    ) -> None:
        """Takes no notes."""

    def lost(self, training: Training, state: Any, error: LostProcessError) -> Any:
        """Cannot go on."""
        raise error


def plan_for(graph: Any, name: str) -> Plan:
    return BASELINES[name](graph, "host", Mesh.of((2, 2)))


def losses(name: str, plan: str, manager: RandomActions | None, steps: int) -> list[float]:
    """The losses of a training, a step each."""
    keras.utils.set_random_seed(0)
    model, x = MODELS[name]()
    y = np.random.default_rng(1).standard_normal((len(x), 8)).astype("float32")
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")

    def planner(captured: Captured, error: Any = None) -> Plan:
        return plan_for(captured.graph, plan)

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

    epochs = -(-steps * BATCH // len(x))
    model.fit(x, y, BATCH, epochs, verbose=0, shuffle=False, callbacks=[Losses()])
    return values


def largest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--actions", type=int, default=20)
    given = parser.parse_args()
    worst = 0.0
    steps = 3 * given.actions
    for name in given.models.split(","):
        straight = losses(name, PLANS[0], None, steps)
        noise = largest(losses(name, PLANS[2], None, steps), straight)
        for seed in range(given.seeds):
            manager = RandomActions(seed, given.actions)
            difference = largest(losses(name, PLANS[0], manager, steps), straight)
            worst = max(worst, difference)
            counts = ", ".join(f"{count} {action}" for action, count in manager.counts.items())
            print(f"{name}, seed {seed}: {counts}: {difference:.1e} (two plans: {noise:.1e})")
    print(f"largest difference of a loss: {worst:.1e}")
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
