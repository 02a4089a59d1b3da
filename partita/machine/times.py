"""What operators really take on one device of a machine: those that were measured, and a fit for those that were not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

START = "start"
"""The feature of a kernel's fixed cost, beside one feature per operator class."""
Key = tuple[str, int, tuple[int, ...]]
"""An operator at its local shape: the digest of its terms, how many devices work, and into how many parts each factor is split."""


@dataclass(frozen=True, eq=False)
class OperatorTimes:
    """Seconds of operators on one device. `scale` multiplies the roofline's seconds of a class, and those of starting kernels.

    `own` is by how much the operators of a digest were slower than the fit, in the median of the splits that were measured: what of
    an operator the fit does not see, its other splits have too. `error` is the median relative error of the fit on the `samples` operators that it was made from.
    """

    seconds: Mapping[Key, float]
    scale: Mapping[str, float]
    own: Mapping[str, float]
    error: float
    samples: int

    def of(self, op_class: str) -> float:
        return self.scale.get(op_class, 1.0)

    def fit(self, features: Mapping[str, float]) -> float:
        """Seconds of an operator with these features, if nothing is known of it."""
        return sum(self.of(name) * seconds for name, seconds in features.items())


def fitted_times(records: Iterable[Mapping[str, Any]]) -> OperatorTimes:
    """What records of measured operators ("features", "seconds", and the "model" that each is of) tell of operators that were not measured."""
    rows = list(records)
    scale, error = fitted([r["features"] for r in rows], [r["seconds"] for r in rows], [r["model"] for r in rows])
    return OperatorTimes({}, scale, {}, error, len(rows))


def fitted(features: Sequence[Mapping[str, float]], seconds: Sequence[float], models: Sequence[str]) -> tuple[dict[str, float], float]:
    """(scale per feature, error): non-negative least squares of relative errors.

    `features` are the roofline's seconds per class of each operator. A little is paid for leaving what the roofline says, so a
    class that hardly occurs stays near 1. The error is what is to be expected of operators of a model that was not seen: each model's are predicted by a fit to
    all others', and the median of the relative errors is taken. Where all are of one model, they are left out one part in five after the other.

    >>> scale, error = fitted([{"dot": 1.0}, {"dot": 2.0}, {"dot": 1.0, "reduce": 3.0}] * 9, [2.0, 4.0, 8.0] * 9, ["a", "b", "c"] * 9)
    >>> round(scale["dot"], 1), round(scale["reduce"], 1), round(error, 2)
    (2.0, 1.9, 0.02)
    """
    names = sorted({name for f in features for name in f})
    if not names:
        return {}, 0.0
    matrix = np.array([[f.get(name, 0.0) for name in names] for f in features]) / np.array(seconds)[:, None]
    several = len(set(models)) > 1
    groups = np.unique(np.array(models), return_inverse=True)[1] if several else np.arange(len(seconds)) % FOLDS
    errors = [np.abs(matrix[groups == g] @ _scales(matrix[groups != g]) - 1) for g in np.unique(groups)]
    return dict(zip(names, map(float, _scales(matrix)), strict=True)), float(np.median(np.concatenate(errors)))


def _scales(matrix: np.ndarray) -> np.ndarray:
    """The factors of features, [sample, feature] over the sample's seconds, that bring every sum nearest to 1."""
    count = matrix.shape[1]
    held = np.concatenate([matrix, HELD * np.eye(count)])
    return nnls(held, np.concatenate([np.ones(len(matrix)), np.full(count, HELD)]))[0]


HELD = 0.3
"""What leaving the roofline costs a fit, in relative errors of operators."""
FOLDS = 5
