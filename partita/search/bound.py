"""Lower bounds on the step of every plan, also with pipeline stages and placed operators.

Every kernel runs at the machine's rates and in its fastest memory, and the sum is divided evenly
over the devices. No split, placement or order makes a kernel less work, and rematerialization adds
work.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from partita.cost.evaluate import PHASES, engine_dtype
from partita.cost.operator_terms import OperatorTerms, Work
from partita.cost.terms import Terms
from partita.graph.operator_graph import Phase
from partita.machine import Machine

PhaseSeconds = list[tuple[Phase, float]]
"""Phase and seconds of each kernel of an operator."""


def lower_bound_seconds(terms: Terms, machine: Machine, devices: int) -> float:
    """Lower bound on the seconds of every step on `devices` devices."""
    return sum(lower_bounds_by_operator(terms, machine)) / devices


def lower_bounds_by_operator(
    terms: Terms, machine: Machine, phases: Collection[Phase] = PHASES
) -> list[float]:
    """Per operator, least seconds of its kernels of some phases on one device."""
    bounds = []
    for kernels in _kernel_seconds(terms, machine):
        bounds.append(sum(seconds for phase, seconds in kernels if phase in phases))
    return bounds


def lower_bounds_by_phase(terms: Terms, machine: Machine) -> dict[Phase, float]:
    """Per phase, least seconds of all kernels on one device."""
    bounds = dict.fromkeys(PHASES, 0.0)
    for kernels in _kernel_seconds(terms, machine):
        for phase, seconds in kernels:
            bounds[phase] += seconds
    return bounds


def _kernel_seconds(terms: Terms, machine: Machine) -> list[PhaseSeconds]:
    """Kernels of each operator, on the kind of device that is fastest at them; once per digest."""
    count = max(1, len(machine.kinds))
    kinds = [machine.of_kind(n) for n in range(count)]
    by_digest: dict[str, PhaseSeconds] = {}
    for operator in terms.operators:
        if operator.digest not in by_digest:
            by_digest[operator.digest] = _fastest(operator, kinds)
    return [by_digest[operator.digest] for operator in terms.operators]


def _fastest(operator: OperatorTerms, kinds: Sequence[Machine]) -> PhaseSeconds:
    kernels = []
    for work in operator.work:
        seconds = min(_seconds(work, kind) for kind in kinds)
        kernels.append((work.phase, work.trips * seconds))
    return kernels


def _seconds(work: Work, kind: Machine) -> float:
    """Seconds of a kernel that runs once, with all its memory traffic in the fastest memory."""
    moved_bytes = sum(nbytes for nbytes, _ in work.traffic)
    bandwidth = float(kind.bandwidth_for(np.zeros(1))[0])
    rate = kind.rate(work.op_class, engine_dtype(work.dtype))
    return max(work.flops / rate, moved_bytes / bandwidth)
