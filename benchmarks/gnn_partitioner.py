"""The learnt split against the fixed ones where one device is slow: seconds of an epoch after the fifth, on a skewed graph.

    partita gnn generate rmat --scale 17 --edges 3M --features 64 --classes 8 -o graph.lux
    sudo python benchmarks/gnn_partitioner.py graph.lux --devices 4

Each device is a process, and has by a control group's quota of processor time an equal share of the cores; the last one has half of that.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from children import below

parser = argparse.ArgumentParser(
    description="The learnt split against fixed ones, one device slow."
)
parser.add_argument("graph")
parser.add_argument("--devices", type=int, default=4)
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--hidden", type=int, default=64)
parser.add_argument("--partitions", nargs="+", default=["vertices", "edges", "learned"])
parser.add_argument("--even", action="store_true", help="slow no device")
arguments = parser.parse_args()
PERIOD = 4_000
"""Microseconds in which a quota is used up and given anew."""


class Shares:
    """Control groups, one for each process, of version 1 or 2."""

    def __init__(self, cores: list[float]) -> None:
        first = Path("/sys/fs/cgroup/cpu")
        self.old = first.is_dir()
        root = first if self.old else Path("/sys/fs/cgroup")
        self.folders = [root / f"partita-{os.getpid()}-{i}" for i in range(len(cores))]
        for folder, share in zip(self.folders, cores, strict=True):
            try:
                folder.mkdir()
                quota = int(share * PERIOD)
                if self.old:
                    (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
                    (folder / "cpu.cfs_quota_us").write_text(str(quota))
                else:
                    (folder / "cpu.max").write_text(f"{quota} {PERIOD}")
            except OSError as error:
                self.end()
                sys.exit(
                    f"{folder} cannot be used: {error.strerror}. Run this as root, on a system with control groups for processor time."
                )

    def take(self, pids: list[int]) -> None:
        for folder, pid in zip(self.folders, pids, strict=True):
            (folder / "cgroup.procs").write_text(str(pid))

    def end(self) -> None:
        for folder in filter(Path.is_dir, self.folders):
            folder.rmdir()


def trained(partition: str) -> dict:
    """What a training run says of itself."""
    command = [
        sys.executable,
        "-m",
        "partita",
        "gnn",
        "train",
        arguments.graph,
        "--hidden",
        str(arguments.hidden),
        "--epochs",
        str(arguments.epochs),
        "--processes",
        str(arguments.devices),
        "--partition",
        partition,
        "--json",
    ]
    each = (os.cpu_count() or 1) / arguments.devices
    shares = Shares([each] * (arguments.devices - 1) + [each if arguments.even else each / 2])
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        while run.poll() is None and len(found := below(run.pid)) < arguments.devices:
            time.sleep(0.05)
        if run.poll() is None:
            shares.take(found)
        output, _ = run.communicate()
    finally:
        run.kill()
        run.wait()
        shares.end()
    if run.returncode:
        sys.exit(f"{' '.join(command)} ended with {run.returncode}.")
    return json.loads(output[output.index("{") :])


print(f"{arguments.graph}, {arguments.devices} processes, {os.cpu_count()} cores")
late = {}
for partition in arguments.partitions:
    found = trained(partition)
    late[partition] = statistics.median(found["seconds"][5:])
    last = statistics.median(found["seconds"][-10:])
    print(
        f"{partition:9} {1e3 * late[partition]:8.1f} ms an epoch after the fifth, {1e3 * last:8.1f} ms in the last ten",
        end="",
    )
    if partition == "learned":
        learnt = found["learned"]
        print(
            f"; {learnt['moves']} moves, slowness {[round(s, 2) for s in learnt['slowness']]}, error {learnt['error']:.1%}",
            end="",
        )
    print()
for partition in late.keys() - {"learned"} if "learned" in late else ():
    print(f"learned is {late[partition] / late['learned']:.2f} times as fast as equal {partition}")
