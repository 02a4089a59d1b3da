"""Recursive least squares with forgetting, and an error bar of its predictions."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.9
"""Probability that an interval holds an observation."""
START_VARIANCE = 0.0025
"""Variance of the residuals before any was seen: 5 % of a ratio."""


class RecursiveLeastSquares:
    """Fits y = x . weights one observation at a time (Haykin, Adaptive Filter Theory, chapter 10).

    An observation that is `n` others old counts `forgetting ** n`. The error bar of a prediction is
    a Student interval of the prediction errors so far, widened where x was seldom seen.
    """

    def __init__(
        self, features: int, forgetting: float = 0.995, prior: float | np.ndarray = 0.05
    ) -> None:
        """`prior`: variance of the weights before any observation, relative to the noise's; one for
        all, or [feature].

        Forgetting lets variances grow where nothing is observed; they stay below the prior's sum.
        """
        self.weights = np.zeros(features)
        self.covariance = np.diag(np.broadcast_to(prior, features)).astype(float)
        self.forgetting = forgetting
        self.most_variance = float(np.trace(self.covariance))
        self.observations = 0
        self._squares = START_VARIANCE

    def update(self, x: np.ndarray, residual: float) -> None:
        """Takes an observation in.

        Args:
            x: [feature], or the gradient of a model that is linear nearby.
            residual: Observed minus predicted.
        """
        spread = float(x @ self.covariance @ x)
        gain = self.covariance @ x / (self.forgetting + spread)
        self.weights = self.weights + gain * residual
        outer = np.outer(gain, x @ self.covariance)
        covariance = (self.covariance - outer) / self.forgetting
        excess = float(np.trace(covariance)) / self.most_variance
        self.covariance = covariance / max(1.0, excess)
        self.observations += 1
        self._squares += residual**2 / (1 + spread)

    def half_width(self, x: np.ndarray) -> float:
        """Half of the interval that holds an observation at x with CONFIDENCE."""
        variance = self._squares / (1 + self.observations)
        spread = float(x @ self.covariance @ x)
        quantile = float(stdtrit(1 + self.observations, (1 + CONFIDENCE) / 2))
        return quantile * math.sqrt(variance * (1 + spread))
