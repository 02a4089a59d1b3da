"""Runs a program of the zoo plainly and in parallel, and tells how far the results are apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import keras
import numpy as np

import partita
from partita.keras.fit import attached
from partita.machine import host, read
from zoo import jax_steps, keras_models, keras_training  # noqa: F401  (they register their programs)
from zoo.programs import PROGRAMS, Program

__all__ = ["PROGRAMS", "Difference", "difference"]

SLOW = """
name = "slow"
source = "made up: so slow at computing that everything is worth splitting"
status = "assumed"
[device]
name = "slow device"
overhead = "0 s"
[device.memory.main]
capacity = "16 GiB"
bandwidth = "10 MB/s"
efficiency = 1.0
shared_by = 1
[device.engine."*"]
"*" = { peak = "1 MFLOP/s", efficiency = 1.0 }
[level.node]
size = 64
fabric = "switch"
latency = "1 ns"
bandwidth = "100 GB/s"
shared_by = 1
"""


@dataclass(frozen=True)
class Difference:
    """The largest difference of two results, relative to the largest value of the array it is
    in.
    """

    worst: float
    where: str
    split: int
    """Operators that a plan split."""
    said: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.worst:.2g} at {self.where}; {self.split} operators split; said: {self.said}"


def difference(program: Program, devices: int) -> Difference:
    """How far a program's results on `devices` devices are from those of plain Keras or JAX."""
    plain = _run(program, lambda target, args=None, **how: target)
    said: list[str] = []
    made: list[Any] = []
    machine = slow(devices)

    def par(target: Any, args: Any = None, **how: Any) -> Any:
        made.append(partita.parallelize(target, args, machine=machine, say=said.append, **how))
        return made[-1]

    planned = _run(program, par)
    plans = [
        getattr(m, "plan", None)
        or getattr(attached(m) if isinstance(m, keras.Model) else None, "plan", None)
        for m in made
    ]
    split = sum(1 for p in plans if p is not None for c in p.choices.values() if c)
    worst, where = 0.0, "nothing"
    left, right = (jax.tree_util.tree_flatten_with_path(_arrays(x))[0] for x in (plain, planned))
    assert [p for p, _ in left] == [p for p, _ in right], "the results have different structures"
    for (path, a), (_, b) in zip(left, right, strict=True):
        a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
        assert a.shape == b.shape, f"{jax.tree_util.keystr(path)}: {a.shape} and {b.shape}"
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        gap = float(np.max(np.where(same, 0, np.abs(a - b)), initial=0)) / max(
            1e-2, float(np.max(np.abs(a), initial=0))
        )
        if not gap <= worst:
            worst, where = gap, jax.tree_util.keystr(path)
    return Difference(worst, where, split, said)


def slow(devices: int) -> Any:
    """A machine of so many devices of this host, so slow at computing that everything is worth
    splitting.
    """
    machine = read(SLOW, "the slow machine").with_devices(devices)
    return machine.__class__(**{**vars(machine), "backend": host(devices, 1 << 34).backend})


def _run(program: Program, par: Any) -> Any:
    keras.utils.set_random_seed(1)
    keras.backend.clear_session()
    return program.run(par)


def _arrays(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x), tree)
