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
from pathlib import Path
from typing import Any

from children import below

PERIOD = 4_000
"""Microseconds after which a quota of processor time is renewed."""

VERSION_1 = Path("/sys/fs/cgroup/cpu")
"""The control groups of processor time, if they are of version 1."""


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


class Shares:
    """Control groups, one for each process, of version 1 or 2; `cores` of each."""

    def __init__(self, cores: list[float]) -> None:
        root = VERSION_1 if VERSION_1.is_dir() else Path("/sys/fs/cgroup")
        self.folders = [root / f"partita-{os.getpid()}-{i}" for i in range(len(cores))]
        for folder, share in zip(self.folders, cores, strict=True):
            try:
                self._make(folder, int(share * PERIOD))
            except OSError as error:
                self.end()
                sys.exit(
                    f"{folder} cannot be used: {error.strerror}. Run this as root, on a system "
                    "with control groups for processor time."
                )

    def _make(self, folder: Path, quota: int) -> None:
        """A group with a quota in microseconds of each period."""
        folder.mkdir()
        if VERSION_1.is_dir():
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
            (folder / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (folder / "cpu.max").write_text(f"{quota} {PERIOD}")

    def take(self, pids: list[int]) -> None:
        """Moves a process into each group."""
        for folder, pid in zip(self.folders, pids, strict=True):
            (folder / "cgroup.procs").write_text(str(pid))

    def end(self) -> None:
        """Removes the groups."""
        for folder in filter(Path.is_dir, self.folders):
            folder.rmdir()


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
    shares = Shares([each] * (arguments.devices - 1) + [last])
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        workers = below(run.pid)
        while run.poll() is None and len(workers) < arguments.devices:
            time.sleep(0.05)
            workers = below(run.pid)
        if run.poll() is None:
            shares.take(workers)
        output, _ = run.communicate()
    finally:
        run.kill()
        run.wait()
        shares.end()
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
