"""Every model of keras.applications, planned for 8 devices; the smallest ten also run.

    python benchmarks/applications.py                       # all: about an hour on two cores
    python benchmarks/applications.py --only mobilenet --check 99
    python benchmarks/applications.py --machine dgx-h100:8               # planned for 64

Captures and plans allocate no weights. The smallest models, by FLOPs of a step, are then trained
one step on 8 virtual devices and compared with plain Keras. Their plans are for a machine that
computes so slowly that every split pays. `benchmarks/stages.py` plans all models with stages.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["NPROC"] = "1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

SIDES = (32, 64, 75, 96, 128, 224)
"""Sides of the square images tried, in pixels: each model takes the first that it accepts."""
BATCH, CLASSES = 16, 16
TOLERANCE = 2e-3
"""Largest difference, relative to the largest value of its tensor.

Float32 sums come in another order, through up to 400 layers.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="models whose name has this in it")
    parser.add_argument("--machine", default="h100:8")
    parser.add_argument("--check", type=int, default=10, help="how many of the smallest to run")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(run(given.one) if given.run else planned(given.one, given.machine)))
        return 0
    chosen = [n for n in names() if given.only.lower() in n.lower()]
    rows, failed = {}, 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for name, row in zip(
            chosen, pool.map(lambda n: child(n, "--machine", given.machine), chosen), strict=True
        ):
            rows[name] = row
            failed += "error" in row
            print(f"{name:20} {row.get('error') or PLANNED.format(**row)}", flush=True)
        done = sorted((r["flops"], n) for n, r in rows.items() if "error" not in r)
        small = [name for _, name in done[: given.check]]
        print(f"{len(chosen)} models, {failed} not planned; one step of the {len(small)} smallest:")
        differ = 0
        for name, row in zip(small, pool.map(lambda n: child(n, "--run"), small), strict=True):
            differ += "error" in row or not row["worst"] <= TOLERANCE
            print(f"{name:20} {row.get('error') or CHECKED.format(**row)}", flush=True)
    print(f"{differ} of {len(small)} differ")
    return int(failed + differ > 0)


PLANNED = (
    "side {side:3}  {instructions:6} instructions  {operators:4} operators"
    "  captured in {captured:5.1f} s, planned in {planned:5.1f} s"
    "  data parallel / found {ratio:5.2f}  {text}"
)
CHECKED = (
    "largest relative difference {worst:.1e} at {where}; {split} of {operators} operators split"
)


def child(name: str, *options: str) -> dict[str, Any]:
    """The row of one model, from a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", name, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {
            "error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


def names() -> list[str]:
    """The models of keras.applications: its functions that take weights and a shape."""
    from keras import applications

    functions = inspect.getmembers(applications, inspect.isfunction)
    return [
        n
        for n, f in functions
        if {"weights", "input_shape"} <= set(inspect.signature(f).parameters)
    ]


def made(name: str) -> tuple[Any, int]:
    """The model, not compiled, at the smallest of the sides that it takes; and the side."""
    import keras

    refused = ""
    for side in SIDES:
        try:
            model = getattr(keras.applications, name)(
                weights=None, input_shape=(side, side, 3), classes=CLASSES
            )
        except ValueError as error:
            refused = str(error)
            continue
        return model, side
    raise SystemExit(f"{name} takes none of the sides {SIDES}: {refused}")


def compiled(model: Any) -> None:
    """Compiles it with SGD, whose step is linear in the gradient: a rounding stays a rounding."""
    import keras

    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )


def planned(name: str, machine: str) -> dict[str, Any]:
    """Captures and plans one model, allocating nothing."""
    from partita.capture.keras_models import abstract
    from partita.capture.program import capture_program
    from partita.machine import load
    from partita.planning import best_plan, describe

    with abstract():
        model, side = made(name)
    compiled(model)
    start = time.perf_counter()
    graph = capture_program(model, BATCH).graph
    captured = time.perf_counter() - start
    where = load(machine)
    start = time.perf_counter()
    plan = best_plan(graph, where)
    return {
        "side": side,
        "instructions": len(graph.instructions),
        "operators": len(graph.operators),
        "captured": captured,
        "planned": time.perf_counter() - start,
        "flops": sum(x.flops * x.trips for x in graph.instructions),
        "ratio": plan.why["baselines"]["data parallel"]["seconds"] / plan.predicted["seconds"],
        "text": describe(plan),
    }


def run(name: str) -> dict[str, Any]:
    """The largest difference of a planned step from plain Keras: losses, metrics, variables."""
    import keras
    import numpy as np

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from zoo.compare import slow

    import partita
    from partita.keras.fit import attached

    results = []
    for parallel in (False, True):
        keras.utils.set_random_seed(1)
        keras.backend.clear_session()
        model, side = made(name)
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                # The variance of a single pixel is next to nothing: its rounding would dominate.
                layer.epsilon = 1.0
        compiled(model)
        if parallel:
            partita.parallelize(model, machine=slow(8), say=lambda line: None)
        x = np.random.default_rng(1).normal(size=(BATCH, side, side, 3)).astype("float32")
        losses = model.train_on_batch(x, np.arange(BATCH) % CLASSES, return_dict=True)
        results.append(
            {"losses": list(losses.values()), **{v.path: np.asarray(v) for v in model.variables}}
        )
    plain, ours = results
    worst, where = 0.0, "nothing"
    for key, value in plain.items():
        a, b = (np.asarray(v, "float64") for v in (value, ours[key]))
        gap = float(np.max(np.abs(a - b), initial=0)) / max(
            1e-2, float(np.max(np.abs(a), initial=0))
        )
        if not gap <= worst:
            worst, where = gap, key
    choices = attached(model).plan.choices
    return {
        "worst": worst,
        "where": where,
        "split": sum(bool(c) for c in choices.values()),
        "operators": len(choices),
    }


if __name__ == "__main__":
    sys.exit(main())
