"""The learnt split against the fixed ones where one device is slow: seconds of an epoch after the fifth, on a skewed graph.

    partita gnn generate rmat --scale 18 --edges 4M --features 64 --classes 8 -o graph.lux
    python benchmarks/gnn_partitioner.py graph.lux --devices 4 --processes

With --processes each device is a process, and the last one is stopped half of the time (SIGSTOP and SIGCONT every few milliseconds). Without, devices are
threads of one process, none of which can be stopped alone: a neighbour that computes for ever on the first core slows whichever runs there. The
script starts and ends both itself.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

parser = argparse.ArgumentParser(description="The learnt split against fixed ones, one device slow.")
parser.add_argument("graph")
parser.add_argument("--devices", type=int, default=4)
parser.add_argument("--processes", action="store_true", help="each device is a process")
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--hidden", type=int, default=64)
parser.add_argument("--even", action="store_true", help="slow no device")
arguments = parser.parse_args()
BUSY = "import os\ntry: os.sched_setaffinity(0, [0])\nexcept AttributeError: pass\nwhile True: pass"
PERIOD = 0.01


def below(pid: int) -> list[int]:
    """Processes that a process started, and those that they started; in the order of their numbers."""
    children = [int(c) for task in Path(f"/proc/{pid}/task").glob("*") for c in (task / "children").read_text().split()]
    return sorted(p for child in children for p in [child, *below(child)])


def at_half_speed(pid: int, done: threading.Event) -> None:
    """Stops the last of a command's processes half of the time."""
    while not done.is_set():
        try:
            workers = below(pid)
            if len(workers) < arguments.devices:
                time.sleep(0.1)
                continue
            slow = workers[-1]
            while not done.is_set():
                os.kill(slow, signal.SIGSTOP)
                time.sleep(PERIOD / 2)
                os.kill(slow, signal.SIGCONT)
                time.sleep(PERIOD / 2)
            os.kill(slow, signal.SIGCONT)
        except (OSError, ProcessLookupError):
            time.sleep(0.1)


def trained(partition: str) -> dict:
    """What a training run says of itself."""
    across = "--processes" if arguments.processes else "--devices"
    command = [sys.executable, "-m", "partita", "gnn", "train", arguments.graph, "--hidden", str(arguments.hidden), "--epochs", str(arguments.epochs),
               across, str(arguments.devices), "--partition", partition, "--json"]  # fmt: skip
    neighbour = None if arguments.even or arguments.processes else subprocess.Popen([sys.executable, "-c", BUSY])
    done = threading.Event()
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    slower = threading.Thread(target=at_half_speed, args=(run.pid, done), daemon=True)
    if arguments.processes and not arguments.even:
        slower.start()
    try:
        output, _ = run.communicate()
    finally:
        done.set()
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    if run.returncode:
        sys.exit(f"{' '.join(command)} ended with {run.returncode}.")
    return json.loads(output[output.index("{") :])


print(f"{arguments.graph}, {arguments.devices} {'processes' if arguments.processes else 'devices'}, {os.cpu_count()} cores")
late = {}
for partition in ("vertices", "edges", "learned"):
    found = trained(partition)
    late[partition] = statistics.median(found["seconds"][5:])
    last = statistics.median(found["seconds"][-10:])
    print(
        f"{partition:9} {1e3 * late[partition]:8.1f} ms an epoch after the fifth, {1e3 * last:8.1f} ms in the last ten", end=""
    )
    if partition == "learned":
        learnt = found["learned"]
        print(
            f"; {learnt['moves']} moves, slowness {[round(s, 2) for s in learnt['slowness']]}, error {learnt['error']:.1%}",
            end="",
        )
    print()
for partition in ("vertices", "edges"):
    print(f"learned is {late[partition] / late['learned']:.2f} times as fast as equal {partition}")
