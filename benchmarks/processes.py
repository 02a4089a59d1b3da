"""The found plan against what an expert would write and against `keras.distribution`, on two
processes of one core each, three links.

    sudo python benchmarks/processes.py                     # four models, full speed, 1 Gbit/s and
      200 Mbit/s
    python benchmarks/processes.py --links full --models lstm

Each link is a network namespace whose loopback `tc tbf` shapes (this needs root and iproute2).
`partita bench fidelity` runs in it, which measures the machine, operators and plans; then
`keras.distribution.DataParallel` trains the same models in processes of its own, without Partita.
Medians. `--save` keeps all steps of all links.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limits import network

os.environ.setdefault("KERAS_BACKEND", "jax")

LINKS = {"full": "", "1gbit": "1gbit", "200mbit": "200mbit"}
KERAS = "keras.distribution"
ROUNDS = {"full": 15, "1gbit": 3, "200mbit": 2}
MODELS = ("alexnet", "transformer", "recommender", "lstm")


def peer(models: list[str], rounds: int) -> None:
    """Median seconds of a step under `keras.distribution.DataParallel`, each process reading its
    own half of the batch: nothing of Partita.
    """
    import jax

    jax.distributed.initialize(
        os.environ["JAX_COORDINATOR_ADDRESS"],
        int(os.environ["JAX_NUM_PROCESSES"]),
        int(os.environ["JAX_PROCESS_ID"]),
        cluster_detection_method="deactivate",
    )
    import keras
    import numpy as np

    from partita.bench.fidelity_models import MODELS as MAKE

    keras.distribution.set_distribution(
        keras.distribution.DataParallel(
            devices=keras.distribution.list_devices(), auto_shard_dataset=False
        )
    )
    for name in models:
        keras.utils.set_random_seed(0)  # Keras wants the same first weights in all processes
        model, batch = MAKE[name]()
        inputs = [np.zeros((batch // 2, *i.shape[1:]), i.dtype) for i in model.inputs]
        labels = np.zeros((batch // 2, *model.output_shape[1:-1]), "int32")
        times = []
        for _ in range(rounds + 1):
            begun = time.perf_counter()
            model.train_on_batch(inputs[0] if len(inputs) == 1 else inputs, labels)
            times.append(time.perf_counter() - begun)
        if jax.process_index() == 0:
            print(
                "RESULT " + json.dumps({"model": name, "seconds": statistics.median(times[1:])}),
                flush=True,
            )


def peers(start: list[str], models: list[str], rounds: int) -> dict[str, float]:
    """What two processes of one core each take under `keras.distribution`, by model."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryFile("w+") as errors:
        running = []
        for i in range(2):
            said = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
                "NPROC": "1",
            }
            command = [
                *start,
                "taskset",
                "-c",
                str(i),
                sys.executable,
                __file__,
                "--peer",
                "--rounds",
                str(rounds),
                "--models",
                *models,
            ]
            out = subprocess.PIPE if i == 0 else subprocess.DEVNULL
            running.append(
                subprocess.Popen(
                    command, env={**os.environ, **said}, stdout=out, stderr=errors, text=True
                )
            )
        text = running[0].communicate()[0]
        if any(p.wait() for p in running):
            errors.seek(0)
            raise SystemExit(errors.read()[-3000:])
    found = [json.loads(line[7:]) for line in text.splitlines() if line.startswith("RESULT ")]
    return {f["model"]: f["seconds"] for f in found}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}, after one to warm up")
    parser.add_argument("--save", type=Path, help="a .json file for the steps of all links")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        peer(given.models, given.rounds)
        return 0
    from rich.console import Console

    from partita.bench.fidelity import Step, summaries
    from partita.report.bench_tables import fidelity_summary, fidelity_table

    out, every = Console(), []
    for link in given.links:
        rounds = str(given.rounds or ROUNDS[link])
        bench = [
            sys.executable,
            "-m",
            "partita",
            "bench",
            "fidelity",
            "--devices",
            "",
            "--processes",
            "2",
            "--rounds",
            rounds,
        ]
        with network(LINKS[link]) as start:
            done = subprocess.run(
                [*start, *bench, "--models", ",".join(given.models), "--json"],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            rivals = peers(start, given.models, int(rounds))
        steps = [Step(**s) for s in json.loads(done.stdout)["steps"]]
        out.print(fidelity_table([vars(s) for s in steps]))
        for name in given.models:
            show(f"{name} over {link}", [s for s in steps if s.model == name], rivals[name])
        every += [replace(s, model=f"{s.model} over {link}") for s in steps]
    out.print(fidelity_summary(summaries(every)))
    if given.save:
        given.save.write_text(json.dumps([vars(s) for s in every]))
    return 0


def show(where: str, steps: Sequence[Any], rival: float) -> None:
    """What was gained, in words."""
    times = {s.plan: s.seconds for s in steps}
    found, (best, name) = (
        next(s.seconds for s in steps if s.chosen),
        min((t, n) for n, t in times.items() if not n.startswith(("found", "random"))),
    )
    print(
        f"{where}: found {found:.3f} s, {KERAS} {rival:.3f} s; {KERAS} / found {rival / found:.2f}; "
        f"data parallel / found {times['data parallel'] / found:.2f}; found / best baseline ({name}) {found / best:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
