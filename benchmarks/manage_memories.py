"""Products of few vectors with a stored matrix: on the device, or in the memory's compute.

    python benchmarks/manage_memories.py [--sizes 4096 16384]

Prints microseconds of both by the cost model, for resident and for trained matrices. No program
runs; all figures rest on recalled or assumed numbers of the presets (`partita machine show upmem`).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np

from partita.cost.attached import attached_seconds, kernel_bytes
from partita.cost.operator_terms import Work
from partita.machine import Machine, load

ROWS = (1, 2, 3, 4, 8, 64)


@dataclass(frozen=True)
class Case:
    """Products on a machine in a dtype."""

    machine: str
    dtype: str
    item: int
    """Bytes of a number."""


CASES = (
    Case("upmem", "int8", 1),
    Case("upmem", "float32", 4),
    Case("hbm-pim", "float16", 2),
    Case("gddr6-aim", "bfloat16", 2),
    Case("reram", "int8", 1),
)


def product(case: Case, rows: int, size: int, frozen: bool) -> Work:
    """Vectors [rows, size] times a stored matrix [size, size]."""
    weights = size * size * case.item
    result = rows * size * (4 if case.dtype == "int8" else case.item)
    return Work(
        "dot",
        case.dtype,
        2.0 * rows * size * size,
        (),
        ((weights + rows * size * case.item + result, ()),),
        trips=1,
        phase="forward",
        stored_bytes=weights,
        frozen_bytes=weights if frozen else 0,
        written_bytes=result,
    )


def seconds(machine: Machine, work: Work) -> tuple[float, float]:
    """Seconds on the device, and on its attached compute."""
    total = np.array([float(work.traffic[0][0])])
    flops = np.array([work.flops])
    compute = flops / machine.rate(work.op_class, work.dtype)
    on_device = np.maximum(compute, total / machine.bandwidth_for(total)) + machine.overhead
    nbytes = kernel_bytes(work, total)
    attached = attached_seconds(machine, machine.attached[0], work, flops, nbytes)
    return float(on_device[0]), float(attached[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384])
    sizes = parser.parse_args().sizes
    for case in CASES:
        machine = load(case.machine)
        for frozen in (True, False):
            matrix = "resident" if frozen else "trained"
            print(f"{case.machine}, {case.dtype}, {matrix} matrix: us on the device / in memory")
            for rows in ROWS:
                cells = []
                for size in sizes:
                    device, memory = seconds(machine, product(case, rows, size, frozen))
                    mark = "*" if memory < device else " "
                    inside = f"{memory * 1e6:10.1f}" if math.isfinite(memory) else "too large"
                    cells.append(f"{size}: {device * 1e6:10.1f} / {inside:>10} {mark}")
                print(f"  {rows:3} vectors  " + "   ".join(cells))


if __name__ == "__main__":
    main()
