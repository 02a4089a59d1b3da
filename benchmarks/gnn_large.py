"""Full-graph training of a large graph by one process of one core and by several.

    partita gnn generate blocks --vertices 233k --edges 115M --features 602 --classes 41 \\
        -o reddit.lux
    python benchmarks/gnn_large.py reddit.lux --hidden 256 --processes 1 2
    partita gnn generate rmat --scale 24 --edges 1G --features 16 --transpose -o billion.lux
    python benchmarks/gnn_large.py billion.lux --hidden 16 --processes 0 --epochs 3

It prints seconds of every phase, epochs and memory. 0 processes are one process with all cores.
Memory is the sampled peak of all processes together: anonymous, and with mapped files (RSS).
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
from typing import Any

from children import below


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graph")
    parser.add_argument("--model", default="gcn")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("more", nargs="*", help="options of `partita gnn train`, after --")
    return parser.parse_args()


arguments = arguments_of()


def allocated_bytes(pid: int, field: str) -> int:
    """A field of a process's status in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def command_of(processes: int) -> list[str]:
    command = [
        *(sys.executable, "-m", "partita", "gnn", "train", arguments.graph),
        *("--model", arguments.model),
        *("--hidden", str(arguments.hidden)),
        *("--epochs", str(arguments.epochs)),
        "--json",
        *arguments.more,
    ]
    if processes == 1:
        return ["taskset", "-c", "0", *command]
    return [*command, "--processes", str(processes)] if processes else command


def run(processes: int) -> dict[str, Any]:
    """The facts that training prints, with peak memory and seconds in all."""
    command = command_of(processes)
    environment = dict(os.environ)
    if processes == 1:
        environment["NPROC"] = "1"
    began = time.perf_counter()
    anonymous = 0
    resident = 0
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    while job.poll() is None:
        pids = [job.pid, *below(job.pid)]
        anonymous = max(anonymous, sum(allocated_bytes(pid, "RssAnon") for pid in pids))
        resident = max(resident, sum(allocated_bytes(pid, "VmRSS") for pid in pids))
        time.sleep(0.25)
    if job.returncode:
        sys.exit(f"{' '.join(command)} ended with {job.returncode}.")
    text = job.communicate()[0]
    facts = json.loads(text[text.index("{") :])
    all_seconds = time.perf_counter() - began
    return {**facts, "all": all_seconds, "anonymous": anonymous, "resident": resident}


def report(processes: int) -> float:
    """Prints the figures of a run; the median seconds of its epochs after the first."""
    name = f"{processes} of one core" if processes else "one of all cores"
    facts = run(processes)
    seconds = facts["seconds"][1:]
    epoch = statistics.median(seconds)
    print(
        f"{name}: {facts['all']:.1f} s in all: preparation {facts['prepare_seconds']:.1f}, "
        f"first epoch with compilation {facts['first_seconds']:.1f}, epoch {epoch:.2f} "
        f"({min(seconds):.2f} to {max(seconds):.2f}); "
        f"{facts['edges'] / epoch / 1e6:.1f} million edges a second; loss {facts['loss']:.5f}; "
        f"traffic {facts['traffic'] / 1e6:.0f} MB an epoch; "
        f"memory {facts['anonymous'] / 2**30:.2f} GiB, "
        f"{facts['resident'] / 2**30:.2f} GiB with mapped files",
        flush=True,
    )
    return epoch


epochs = {processes: report(processes) for processes in arguments.processes}
if 1 in epochs:
    for processes in epochs:
        if processes > 1:
            ratio = epochs[1] / epochs[processes]
            print(f"{processes} processes are {ratio:.2f} times as fast as one")
