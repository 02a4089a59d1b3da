"""What Partita itself costs: starting `partita run` on one device, and a step of `fit` there and
against keras.distribution.

    python benchmarks/overhead.py                # about 6 minutes
    python benchmarks/overhead.py --rounds 9

Processes take turns, one at a time, one thread a device (NPROC=1); medians of their medians.
`start` is from the start of the process to the end of the first batch, compilation and planning in
it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = """
import json, os, sys, time
import keras, numpy as np

where = sys.argv[1]
epochs, steps, units, batch = (int(text) for text in sys.argv[2:6])
if where == "distribution":
    keras.distribution.set_distribution(keras.distribution.DataParallel())
keras.utils.set_random_seed(0)
stack = [keras.layers.Dense(units, activation="relu") for _ in range(3)]
model = keras.Sequential([keras.Input((units,)), *stack, keras.layers.Dense(10)])
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
random = np.random.default_rng(0)
x = random.normal(size=(batch * steps, units)).astype("float32")
y = random.integers(0, 10, batch * steps)


class Clock(keras.callbacks.Callback):
    begun, first, epochs = 0.0, 0.0, []

    def on_train_batch_end(self, batch, logs=None):
        self.first = self.first or time.time()

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((time.perf_counter() - self.begun) / steps)


if where == "parallelize":
    import partita

    partita.parallelize(model, say=lambda text: None, plan=sys.argv[6] if len(sys.argv) > 6 else None)
clock = Clock()
model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0, callbacks=[clock])
later = sorted(clock.epochs[1:] or clock.epochs)
print(json.dumps({"first": clock.first, "step": later[len(later) // 2]}), flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12, help="epochs of a run")
    parser.add_argument("--steps", type=int, default=200, help="steps of an epoch")
    parser.add_argument("--sizes", type=int, default=2, help="sizes of layers in each setting")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(SCRIPT, encoding="utf-8")
        length = [str(given.epochs), str(given.steps)]
        plain = [sys.executable, str(script), "plain", *length]
        run = [
            sys.executable,
            "-m",
            "partita",
            "run",
            "--quiet",
            "--devices",
            "1",
            str(script),
            "--",
            "plain",
            *length,
        ]
        for units, batch in ((128, 64), (512, 128))[: given.sizes if 1 in given.devices else 0]:
            size = [str(units), str(batch)]
            show(
                f"one device, {units} units, batch {batch}",
                turns({"python": plain + size, "partita run": run + size}, 1, folder, given.rounds),
            )
        data_parallel = Path(folder) / "data-parallel.json"
        for units, batch in ((128, 128), (256, 256))[: given.sizes if 2 in given.devices else 0]:
            size = [*length, str(units), str(batch)]
            _data_parallel(units, batch, data_parallel)
            ways = {
                "keras.distribution": [sys.executable, str(script), "distribution", *size],
                "partita, data parallel": [
                    sys.executable,
                    str(script),
                    "parallelize",
                    *size,
                    str(data_parallel),
                ],
                "partita, found": [sys.executable, str(script), "parallelize", *size],
            }
            show(f"two devices, {units} units, batch {batch}", turns(ways, 2, folder, given.rounds))
    return 0


def _data_parallel(units: int, batch: int, path: Path) -> None:
    """Writes the plan of data parallelism, by Partita, for the script's model."""
    code = f"""
import keras
from partita.capture.program import capture_program
from partita.planning import resolve_machine
from partita.search.find import find
names = ("dense", "dense_1", "dense_2")
stack = [keras.layers.Dense({units}, activation="relu", name=name) for name in names]
stack.append(keras.layers.Dense(10, name="dense_3"))
model = keras.Sequential([keras.Input(({units},)), *stack], name="sequential")
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
result = find(capture_program(model, {batch}).graph, resolve_machine(None))
plan, _ = result.baselines["data parallel"]
plan.save({str(path)!r})
"""
    subprocess.run([sys.executable, "-c", code], env=environment(2, str(path.parent)), check=True)


def environment(devices: int, cache: str) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {
        "NPROC": "1",
        "KERAS_BACKEND": "jax",
        "XLA_FLAGS": flags,
        "PARTITA_CACHE": cache,
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def turns(
    ways: dict[str, list[str]], devices: int, cache: str, rounds: int
) -> dict[str, dict[str, float]]:
    """Per way, medians over the rounds of the seconds to the first batch and of a step."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, command in ways.items():
            start = time.time()
            done = subprocess.run(
                command,
                env=environment(devices, cache),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
            said = json.loads(done.stdout.strip().splitlines()[-1])
            found[name].append({"start": said["first"] - start, "step": said["step"]})
    return {
        name: {key: statistics.median(r[key] for r in rows) for key in ("start", "step")}
        for name, rows in found.items()
    }


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    first = next(iter(found.values()))
    print(title)
    for name, row in found.items():
        more = (
            f"  {row['start'] - first['start']:+.2f} s of start, {row['step'] / first['step']:.3f} x a step"
            if row is not first
            else ""
        )
        print(
            f"  {name:24} start {row['start']:5.2f} s  step {row['step'] * 1e3:.3f} ms{more}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
