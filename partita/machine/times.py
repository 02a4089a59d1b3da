"""Operator times of one device: a table of measured operators, and a fit for all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from scipy.optimize import nnls

START = "start"
"""The feature of a kernel's fixed cost, beside two for each kind of kernel."""
CAUSES = ("FLOPs", "bytes")
"""The two sides of the roofline. A fit adds them; its factors express how much they overlap."""

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Candidate penalties for factors away from 1. At 0.1, a doubled factor costs as much as an error
of 10 % in one operator."""
FOLDS = 5
"""Parts for cross-validation where all operators are of one model."""

OperatorKey = tuple[str, int, tuple[int, ...]]
"""An operator at its local shape: the digest of its terms, the number of working devices, and the
number of parts of each factor."""


def feature(kind: str, cause: str) -> str:
    """The name of a feature: roofline seconds of kernels of a kind by FLOPs or by bytes."""
    return f"{kind}, {cause}"


@dataclass(frozen=True)
class OperatorTimes:
    """Seconds of operators on one device."""

    seconds: Mapping[OperatorKey, float] = field(hash=False)
    """Measured operators."""
    scale: Mapping[str, float] = field(hash=False)
    """Feature -> factor on its roofline seconds, 1 where it is missing."""
    corrections: Mapping[str, float] = field(hash=False)
    """Digest of an operator -> its measured seconds over those of the fit, median of its measured
    splits. The parts of an operator that the fit does not see also occur in its other splits."""
    error: float
    """Expected relative error of the fit (`fitted_scales`)."""
    samples: int
    """Number of operators in the fit."""

    def factor(self, feature: str) -> float:
        """The factor on the roofline seconds of a feature."""
        return self.scale.get(feature, 1.0)

    def fitted_seconds(self, features: Mapping[str, float]) -> float:
        """Seconds by the fit of an operator with these features."""
        return sum(self.factor(name) * seconds for name, seconds in features.items())


def fitted_times(records: Iterable[Mapping[str, Any]]) -> OperatorTimes:
    """A fit to records of measured operators ("features", "seconds", and the "model" of each)."""
    rows = list(records)
    scale, error = fitted_scales(
        [row["features"] for row in rows],
        [row["seconds"] for row in rows],
        [row["model"] for row in rows],
    )
    return OperatorTimes(
        seconds={},
        scale=scale,
        corrections={},
        error=error,
        samples=len(rows),
    )


def fitted_scales(
    features: Sequence[Mapping[str, float]],
    seconds: Sequence[float],
    models: Sequence[str],
) -> tuple[dict[str, float], float]:
    """Factor of every feature, and the expected relative error.

    Non-negative least squares of relative errors, with a penalty for factors away from 1.
    `features`: roofline seconds of each operator, by name.

    The error is that on an unseen model: each model's operators are predicted by a fit to all other
    models. Their absolute errors, summed, are divided by their seconds, and averaged over the
    models. The penalty is the one with the smallest error: a strong one for few operators, a weak
    one for many. If all operators are of one model, FOLDS parts of them take the place of models.

    >>> scale, error = fitted_scales(
    ...     [{"dot": 1.0}, {"dot": 2.0}, {"dot": 1.0, "reduce": 3.0}] * 9,
    ...     [2.0, 4.0, 8.0] * 9,
    ...     ["a"] * 9 + ["b"] * 9 + ["c"] * 9,
    ... )
    >>> round(scale["dot"], 1), round(scale["reduce"], 1), round(error, 2)
    (2.0, 2.0, 0.0)
    """
    names = sorted(set(chain.from_iterable(features)))
    if not names:
        return {}, 0.0
    rows = [[row.get(name, 0.0) for name in names] for row in features]
    measured = np.array(seconds)
    relative = np.array(rows) / measured[:, None]
    groups = _groups(models)
    errors = {
        p: _unseen_error(
            relative,
            measured,
            groups,
            p,
        )
        for p in PENALTIES
    }
    penalty = min(PENALTIES, key=lambda p: (errors[p], -p))
    factors = map(float, _fit(relative, penalty))
    return dict(zip(names, factors, strict=True)), errors[penalty]


def _groups(models: Sequence[str]) -> np.ndarray:
    """Per sample its group for cross-validation: its model, or one of FOLDS parts."""
    if len(set(models)) > 1:
        return np.unique(np.array(models), return_inverse=True)[1]
    return np.arange(len(models)) % FOLDS


def _unseen_error(
    relative: np.ndarray,
    measured: np.ndarray,
    groups: np.ndarray,
    penalty: float,
) -> float:
    """Mean relative error on groups that a fit has not seen."""
    errors = []
    for group in range(max(groups) + 1):
        unseen = groups == group
        predicted = relative[unseen] @ _fit(relative[~unseen], penalty)
        absolute = measured[unseen] @ np.abs(predicted - 1)
        errors.append(absolute / measured[unseen].sum())
    return float(np.mean(errors))


def _fit(relative: np.ndarray, penalty: float) -> np.ndarray:
    """The factors that bring every weighted sum of features nearest to 1.

    `relative`: [sample, feature], roofline seconds over measured seconds.
    """
    samples, features = relative.shape
    rows = np.concatenate([relative, penalty * np.eye(features)])
    targets = np.concatenate([np.ones(samples), np.full(features, penalty)])
    return nnls(rows, targets)[0]
