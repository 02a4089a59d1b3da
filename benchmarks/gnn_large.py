"""Full-graph training of a large graph by one process of one core and by several: seconds per phase, epochs, memory.

    partita gnn generate blocks --vertices 233k --edges 115M --features 602 --classes 41 -o reddit.lux
    python benchmarks/gnn_large.py reddit.lux --hidden 256 --processes 1 2
    partita gnn generate rmat --scale 24 --edges 1G --features 16 --transpose -o billion.lux
    python benchmarks/gnn_large.py billion.lux --hidden 16 --processes 0 --epochs 3

0 processes: one process with all cores. Memory is what all processes together held at once at most, sampled: anonymous, and with mapped files (RSS).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from children import below

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("graph")
parser.add_argument("--model", default="gcn")
parser.add_argument("--hidden", type=int, default=256)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
parser.add_argument("more", nargs="*", help="further options of `partita gnn train`, after --")
arguments = parser.parse_args()


def held(pid: int, what: str) -> int:
    try:
        line = next(
            line
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith(what + ":")
        )
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def run(processes: int) -> dict:
    """What training says of itself, with the most memory held and seconds in all."""
    command = [
        sys.executable,
        "-m",
        "partita",
        "gnn",
        "train",
        arguments.graph,
        "--model",
        arguments.model,
        "--hidden",
        str(arguments.hidden),
        "--epochs",
        str(arguments.epochs),
        "--json",
        *arguments.more,
    ]
    environment = dict(os.environ)
    if processes == 1:
        command, environment = ["taskset", "-c", "0", *command], environment | {"NPROC": "1"}
    elif processes > 1:
        command += ["--processes", str(processes)]
    began, anonymous, resident = time.perf_counter(), 0, 0
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    while job.poll() is None:
        pids = [job.pid, *below(job.pid)]
        anonymous, resident = (
            max(anonymous, sum(held(p, "RssAnon") for p in pids)),
            max(resident, sum(held(p, "VmRSS") for p in pids)),
        )
        time.sleep(0.25)
    if job.returncode:
        sys.exit(f"{' '.join(command)} ended with {job.returncode}.")
    text = job.communicate()[0]
    return {
        **json.loads(text[text.index("{") :]),
        "all": time.perf_counter() - began,
        "anonymous": anonymous,
        "resident": resident,
    }


found = {}
for processes in arguments.processes:
    name = f"{processes} of one core" if processes else "one of all cores"
    one = found[processes] = run(processes)
    epoch = statistics.median(one["seconds"][1:])
    print(
        f"{name}: {one['all']:.1f} s in all: making parts {one['prepare_seconds']:.1f}, first epoch with compilation {one['first_seconds']:.1f}, epoch {epoch:.2f} "
        f"({min(one['seconds'][1:]):.2f} to {max(one['seconds'][1:]):.2f}); {one['edges'] / epoch / 1e6:.1f} million edges a second; loss {one['loss']:.5f}; "
        f"traffic {one['traffic'] / 1e6:.0f} MB an epoch; memory {one['anonymous'] / 2**30:.2f} GiB, {one['resident'] / 2**30:.2f} GiB with mapped files",
        flush=True,
    )
if 1 in found:
    alone = statistics.median(found[1]["seconds"][1:])
    for processes in (p for p in found if p > 1):
        print(
            f"{processes} processes are {alone / statistics.median(found[processes]['seconds'][1:]):.2f} times as fast as one"
        )
