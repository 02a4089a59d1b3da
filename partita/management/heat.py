"""Temperatures of a machine as a linear system, and throttling by its trips.

The description gives the system for one step: x[k+1] = A x[k] + B P. With A = V diag(w) V^-1,
constant power P for any time t (a fraction of the step too) gives

    x(t) = s + V diag(w ^ (t / step)) V^-1 (x(0) - s),    s = (I - A)^-1 B P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import linalg

from partita.machine import Thermal, Trip


@dataclass(frozen=True, eq=False)
class ThermalModel:
    """The exact solution of a thermal description for constant power."""

    thermal: Thermal

    @cached_property
    def _transition(self) -> np.ndarray:
        return np.array(self.thermal.transition)

    @cached_property
    def _modes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues, eigenvectors, and the inverse of the eigenvectors."""
        values, vectors = np.linalg.eig(self._transition)
        return values.astype(complex), vectors, linalg.inv(vectors)

    @cached_property
    def _gain(self) -> np.ndarray:
        """[node, input]: steady rise above ambient per watt, kelvins."""
        nodes = len(self._transition)
        return linalg.solve(np.eye(nodes) - self._transition, np.array(self.thermal.gain))

    def propagator(self, seconds: float) -> tuple[np.ndarray, np.ndarray]:
        """Matrices M, G of a time: rise after it = M rise + G watts, for constant power.

        M: [node, node]. G: [node, input].
        """
        values, vectors, inverse = self._modes
        decay = values ** (seconds / self.thermal.step)
        transition = ((vectors * decay) @ inverse).real
        return transition, self._gain - transition @ self._gain


def active_trips(trips: Sequence[Trip], active: frozenset[str], celsius: float) -> frozenset[str]:
    """Names of the trips that limit clocks at a temperature.

    A trip that is active stays so until the temperature is `hysteresis` below its own.
    """
    names = []
    for trip in trips:
        margin = trip.hysteresis if trip.name in active else 0.0
        if celsius > trip.temperature - margin:
            names.append(trip.name)
    return frozenset(names)
