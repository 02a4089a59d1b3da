"""The learned split against fixed ones where one device is slow: seconds of an epoch.

    partita gnn generate rmat --scale 17 --edges 3M --features 64 --classes 8 -o graph.lux
    sudo python benchmarks/gnn_partitioner.py graph.lux --devices 4

Each device is a process with an equal share of the cores, by the quota of a control group. The last
one has half of that. Epochs count after the fifth, on a skewed graph.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from children import below
from limits import control_groups, enter, limit_cores

PERIOD = 4_000
"""Microseconds after which a quota of processor time is renewed."""


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The learned split against fixed ones.")
    parser.add_argument("graph")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--partitions", nargs="+", default=["vertices", "edges", "learned"])
    parser.add_argument("--even", action="store_true", help="slow no device")
    return parser.parse_args()


arguments = arguments_of()


def command_of(partition: str) -> list[str]:
    return [
        *(sys.executable, "-m", "partita", "gnn", "train", arguments.graph),
        *("--hidden", str(arguments.hidden)),
        *("--epochs", str(arguments.epochs)),
        *("--processes", str(arguments.devices)),
        *("--partition", partition),
        "--json",
    ]


def trained(partition: str) -> dict[str, Any]:
    """The facts that a training run prints."""
    command = command_of(partition)
    each = (os.cpu_count() or 1) / arguments.devices
    last = each if arguments.even else each / 2
    with control_groups("cpu", arguments.devices) as groups:
        for group in groups:
            limit_cores(group, last if group is groups[-1] else each, PERIOD)
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            workers = below(run.pid)
            while run.poll() is None and len(workers) < arguments.devices:
                time.sleep(0.05)
                workers = below(run.pid)
            if run.poll() is None:
                for group, worker in zip(groups, workers, strict=True):
                    enter(group, worker)
            output, _ = run.communicate()
        finally:
            run.kill()
            run.wait()
    if run.returncode:
        sys.exit(f"{' '.join(command)} ended with {run.returncode}.")
    return json.loads(output[output.index("{") :])


def report(partition: str) -> float:
    """Prints the figures of a partitioner; the median seconds of its epochs after the fifth."""
    facts = trained(partition)
    median = statistics.median(facts["seconds"][5:])
    last = statistics.median(facts["seconds"][-10:])
    text = (
        f"{partition:9} {1e3 * median:8.1f} ms an epoch after the fifth, "
        f"{1e3 * last:8.1f} ms in the last ten"
    )
    if partition == "learned":
        learned = facts["learned"]
        slowness = [round(factor, 2) for factor in learned["slowness"]]
        text += f"; {learned['moves']} moves, slowness {slowness}, error {learned['error']:.1%}"
    print(text)
    return median


print(f"{arguments.graph}, {arguments.devices} processes, {os.cpu_count()} cores")
seconds = {partition: report(partition) for partition in arguments.partitions}
if "learned" in seconds:
    for partition in seconds.keys() - {"learned"}:
        ratio = seconds[partition] / seconds["learned"]
        print(f"learned is {ratio:.2f} times as fast as equal {partition}")
