"""Costs of plans that measurements correct, with an error bar.

A step's predicted seconds have parts: kernels, collectives on activations and on gradients, moves.
Each part has an unknown factor exp(w), so

    log(measured / predicted) = log(sum of shares x exp(w)),

which recursive least squares fit to probes by linearization at the present w. A probe is a plan
whose step was measured. The part of the seconds that overlaps is left out of the shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from partita.cost.predict import CAUSES, Prediction
from partita.management.least_squares import START_VARIANCE, RecursiveLeastSquares

PRIOR = 1.0
"""Variance of the logarithm of a factor: kernels and links are often off by a factor of 2.7."""


@dataclass(frozen=True)
class CorrectedSeconds:
    """Seconds of a step, and the interval that holds a measurement with 90 %."""

    seconds: float
    low: float
    high: float


class CorrectedCosts:
    """Predictions of plans, corrected by the plans that were measured."""

    def __init__(self) -> None:
        prior = PRIOR / START_VARIANCE
        self.model = RecursiveLeastSquares(len(CAUSES), forgetting=1.0, prior=prior)

    def probe(self, prediction: Prediction, measured_seconds: float) -> None:
        """Takes in a measured plan."""
        log_factor, gradient = self._linearized(prediction)
        residual = math.log(measured_seconds / prediction.seconds) - log_factor
        self.model.update(gradient, residual)

    def seconds(self, prediction: Prediction) -> CorrectedSeconds:
        """The corrected seconds of a plan."""
        log_factor, gradient = self._linearized(prediction)
        seconds = prediction.seconds * math.exp(log_factor)
        width = math.exp(self.model.half_width(gradient))
        return CorrectedSeconds(seconds, seconds / width, seconds * width)

    def _linearized(self, prediction: Prediction) -> tuple[float, np.ndarray]:
        """Logarithm of measured over predicted by the model, and its gradient by the weights."""
        parts = np.array([prediction.by_cause()[cause] for cause in CAUSES])
        shares = parts / parts.sum()
        scaled = shares * np.exp(self.model.weights)
        return math.log(scaled.sum()), scaled / scaled.sum()
