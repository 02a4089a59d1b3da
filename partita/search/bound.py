"""Bounds that hold for every plan, staged and placed ones too: every kernel at the machine's rates and in its fastest memory, shared out without a rest.

No split, place or order makes a kernel less work, and recomputation makes more of it.
"""

from __future__ import annotations

import numpy as np

from partita.cost.evaluate import PHASES, engine_dtype
from partita.cost.terms import Terms
from partita.graph.operator_graph import Phase
from partita.machine import Machine


def lower_bound_seconds(terms: Terms, machine: Machine, devices: int) -> float:
    """Seconds that no step on so many devices is shorter than."""
    return sum(lower_bounds_by_operator(terms, machine)) / devices


def lower_bounds_by_operator(terms: Terms, machine: Machine) -> list[float]:
    """Per operator, seconds of its kernels on one device."""
    return [sum(seconds for _, seconds in mine) for mine in _kernels(terms, machine)]


def lower_bounds_by_phase(terms: Terms, machine: Machine) -> dict[Phase, float]:
    """Per phase, seconds of all kernels on one device."""
    kernels = [kernel for mine in _kernels(terms, machine) for kernel in mine]
    return {phase: sum(seconds for p, seconds in kernels if p == phase) for phase in PHASES}


def _kernels(terms: Terms, machine: Machine) -> list[list[tuple[Phase, float]]]:
    """Per operator, phase and seconds of each kernel; where devices differ, each on those that are fastest at it. Equal operators are looked at once."""
    kinds = [machine.of_kind(n) for n in range(len(machine.kinds) or 1)]
    fastest = [float(kind.bandwidth_for(np.zeros(1))[0]) for kind in kinds]
    known: dict[str, list[tuple[Phase, float]]] = {}
    for own in terms.operators:
        if own.digest not in known:
            known[own.digest] = []
            for w in own.work:
                moved = sum(nbytes for nbytes, _ in w.traffic)
                rates = [
                    (kind.rate(w.op_class, engine_dtype(w.dtype)), bandwidth)
                    for kind, bandwidth in zip(kinds, fastest, strict=True)
                ]
                known[own.digest].append(
                    (
                        w.phase,
                        w.trips
                        * min(max(w.flops / rate, moved / bandwidth) for rate, bandwidth in rates),
                    )
                )
    return [known[own.digest] for own in terms.operators]
