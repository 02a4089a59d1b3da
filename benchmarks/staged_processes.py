"""Pipelines over processes: stages that work at the same time, a slow link against data
parallelism, and a state that does not fit the memory limit of one process.

    python benchmarks/staged_processes.py overlap --width 1024 --layers 8 --samples 1024
    sudo python benchmarks/staged_processes.py link --rate 200mbit --width 4096 --layers 3
    sudo python benchmarks/staged_processes.py memory --width 4096 --layers 8 --limit-gigabytes 1.2

Dense layers of equal width, SGD with momentum, a process per core. `overlap`: two processes train
with 1, 4 and 8 microbatches of --samples samples. One microbatch takes 2 (f + b), for f and b the
seconds of a forward and a backward pass of a stage; m microbatches should take (m + 1) (f + b).
`link`: in a network namespace whose loopback `tc tbf` shapes, two processes train by a pipeline and
by data parallelism, in turns; medians and losses. `memory`: control groups limit the memory of each
process; one process, two and four train by pipelines. A process is expected to be killed if its
state does not fit. Peaks are those of the kernel, without the memory of Python, JAX and programs,
which is what a process has beside its state between two steps. Planned peaks are beside them. Freed
memory is returned to the system (`PARTITA_RETURN_MEMORY`, 1 unless it is set): kept blocks would add
up to a quarter.
`link` and `memory` need root.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from limits import control_groups, limit_memory, network, with_limits

from partita.plans.plan import Mesh, Plan

SCRIPT = """
import ctypes, json, os, sys, time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from limits import enter

import partita

width, layers, samples, steps = map(int, sys.argv[1:5])
index = jax.process_index()
groups = sys.argv[5:]
if groups:
    enter(Path(groups[index]), os.getpid())
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cores[index % len(cores)]})


def resident_bytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def loss(weights, x, y):
    for name in sorted(weights):
        x = jnp.tanh(x @ weights[name])
    return jnp.mean((x - y) ** 2)


def train_step(weights, momentum, x, y):
    value, gradients = jax.value_and_grad(loss)(weights, x, y)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradients)
    weights = jax.tree.map(lambda w, m: w - 0.1 * m, weights, momentum)
    return weights, momentum, value


# Files and zeros take no memory before a device reads its part.
weights = {f"layer{n:02}": np.load(f"{n}.npy", mmap_mode="r") for n in range(layers)}
momentum = {name: np.zeros((width, width), "float32") for name in weights}
rng = np.random.default_rng(0)
x, y = rng.standard_normal((2, samples, width)).astype("float32")
step = partita.parallelize(train_step, (weights, momentum, x, y), say=print, donate=True)
seconds, losses = [], []
for number in range(steps + 1):
    start = time.perf_counter()
    weights, momentum, value = step(weights, momentum, x, y)
    losses.append(float(value))
    jax.block_until_ready([a for a in jax.tree.leaves(weights) if a.addressable_shards])
    if number:
        seconds.append(time.perf_counter() - start)
    else:
        # Python, JAX and compiled programs: all but the state between two steps. JAX frees the sums
        # of gradients and temporaries in threads of its own, some time after the step, and Partita
        # lets glibc keep freed blocks.
        shards = [s for a in jax.tree.leaves((weights, momentum)) for s in a.addressable_shards]
        time.sleep(1)
        ctypes.CDLL(None).malloc_trim(0)
        other_bytes = resident_bytes("VmRSS") - sum(shard.data.nbytes for shard in shards)
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts anew
result = {"seconds": seconds, "losses": losses, "peak": resident_bytes("VmHWM") - other_bytes}
Path(f"result-{index}.json").write_text(json.dumps(result))
"""


class Shape(NamedTuple):
    """The model and its batch."""

    width: int
    layers: int
    samples: int
    steps: int

    @property
    def state_bytes(self) -> int:
        """Weights and momentum."""
        return 2 * 4 * self.layers * self.width**2


def pipeline(shape: Shape, stages: int, microbatches: int) -> Plan:
    """The layers in equal runs on the stages."""
    choices = {}
    for n in range(shape.layers):
        choices[f"weights/layer{n:02}"] = {"a": f"at({n * stages // shape.layers})"}
    return Plan(
        "train_step",
        f"host:{stages}",
        Mesh.of((stages,)),
        choices,
        batch_size=shape.samples,
        microbatches=microbatches,
    )


def train(
    shape: Shape,
    folder: Path,
    processes: int,
    plan: str,
    inside: Sequence[str] = (),
    groups: Sequence[Path] = (),
    returns: str = "0",
) -> tuple[list[dict[str, Any]], str] | None:
    """(the results of all processes, the output of the run); None if it did not end well."""
    command = [sys.executable, "-m", "partita", "run", "--devices", str(processes), "--plan", plan]
    if processes > 1:
        command += ["--processes", str(processes)]
    numbers = [str(number) for number in shape]
    done = subprocess.run(
        [*inside, *command, "train.py", *numbers, *map(str, groups)],
        cwd=folder,
        env={
            **with_limits(),
            "NPROC": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "1000000",
            "PARTITA_RETURN_MEMORY": os.environ.get("PARTITA_RETURN_MEMORY", returns),
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print("\n".join((done.stdout + done.stderr).splitlines()[-2:]), flush=True)
        return None
    results = [json.loads((folder / f"result-{n}.json").read_text()) for n in range(processes)]
    return results, done.stdout + done.stderr


def write_weights(shape: Shape, folder: Path) -> None:
    """The script and a file for every layer."""
    (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
    rng = np.random.default_rng(1)
    for n in range(shape.layers):
        values = rng.standard_normal((shape.width, shape.width), np.float32)
        np.save(folder / f"{n}.npy", values / np.float32(shape.width**0.5))


def compare_microbatches(shape: Shape, folder: Path) -> bool:
    """Steps of 4 and 8 microbatches against one. Whether they are within 5 % of full overlap."""
    seconds = {}
    for microbatches in (1, 4, 8):
        batch = shape._replace(samples=microbatches * shape.samples)
        name = f"pipeline-{microbatches}.json"
        pipeline(batch, 2, microbatches).save(folder / name)
        done = train(batch, folder, 2, name)
        if done is None:
            return False
        seconds[microbatches] = statistics.median(done[0][0]["seconds"])
    ratios = {m: seconds[m] / ((m + 1) / 2 * seconds[1]) for m in seconds if m > 1}
    for microbatches, ratio in ratios.items():
        print(
            f"{microbatches} microbatches {seconds[microbatches]:.3f} s, one {seconds[1]:.3f} s: "
            f"{ratio:.3f} of (m + 1) (f + b)"
        )
    return max(ratios.values()) < 1.05


def compare_on_link(shape: Shape, folder: Path, rate: str, turns: int, microbatches: int) -> bool:
    """Trains by both plans in turns. Whether the losses are equal."""
    pipeline(shape, 2, microbatches).save(folder / "pipeline.json")
    seconds: dict[str, list[float]] = {"pipeline.json": [], "dp": []}
    losses: dict[str, list[float]] = {}
    with network(rate) as inside:
        for _ in range(turns):
            for plan in seconds:
                done = train(shape, folder, 2, plan, inside)
                if done is None:
                    return False
                results, _ = done
                seconds[plan] += results[0]["seconds"]
                losses[plan] = results[0]["losses"]
    ours, theirs = (statistics.median(s) for s in seconds.values())
    expected = np.array(losses["dp"])
    distance = np.max(np.abs(np.array(losses["pipeline.json"]) / expected - 1))
    print(
        f"{shape.layers * shape.width**2 / 1e6:.0f} M parameters, {rate or 'full speed'}: pipeline "
        f"({microbatches} microbatches) {ours:.3f} s, data parallel {theirs:.3f} s, "
        f"ratio {theirs / ours:.2f}; losses differ by {distance:.1e}: {losses['dp']}"
    )
    return bool(distance < 1e-5)


def compare_memory(shape: Shape, folder: Path, limit_bytes: int, microbatches: int) -> bool:
    """Trains over 1, 2 and 4 processes under a memory limit. Whether those over 2 and 4 ended."""
    print(f"state {shape.state_bytes / 1e9:.2f} GB, limit {limit_bytes / 1e9:.2f} GB a process")
    ended = []
    for processes in (1, 2, 4):
        name = "one device"
        if processes > 1:
            name = f"pipeline{processes}.json"
            pipeline(shape, processes, microbatches).save(folder / name)
        with control_groups("memory", processes) as groups:
            for group in groups:
                limit_memory(group, limit_bytes)
            done = train(shape, folder, processes, name, groups=groups, returns="1")
        ended.append(done is not None)
        if done is None:
            print(f"{processes} processes: stopped", flush=True)
            continue
        results, output = done
        planned = dict(re.findall(r"device group (\d+): .*, ([\d.]+ [KMG]iB) planned", output))
        for n, result in enumerate(results):
            peak = f"{result['peak'] / 2**30:.3f} GiB"
            print(f"process {n} of {processes}: {peak}, {planned.get(str(n))} planned", flush=True)
        print(f"losses {results[0]['losses']}", flush=True)
    return ended[1:] == [True, True]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["overlap", "link", "memory"])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--rate", default="200mbit", help='a rate of tc; "" for full speed')
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--limit-gigabytes", type=float, default=1.2)
    given = parser.parse_args()
    shape = Shape(given.width, given.layers, given.samples, given.steps)
    with tempfile.TemporaryDirectory(prefix="partita-stages-") as name:
        folder = Path(name)
        write_weights(shape, folder)
        if given.part == "overlap":
            right = compare_microbatches(shape, folder)
        elif given.part == "link":
            right = compare_on_link(shape, folder, given.rate, given.turns, given.microbatches)
        else:
            limit_bytes = int(given.limit_gigabytes * 1e9)
            right = compare_memory(shape, folder, limit_bytes, given.microbatches)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
