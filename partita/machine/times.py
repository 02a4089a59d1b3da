"""What operators really take on one device of a machine: those that were measured, and a fit for those that were not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

START = "start"
"""The feature of a kernel's fixed cost, beside two for each kind of kernel."""
CAUSES = ("FLOPs", "bytes")
"""The two sides of the roofline, which a fit adds up: by how much they hide each other is then in their factors."""


def feature(kind: str, cause: str) -> str:
    """The name of the seconds that kernels of a kind compute, or move bytes, by the roofline."""
    return f"{kind}, {cause}"


HELD = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""What leaving the roofline may cost a fit: at 0.1, a factor that doubles is as dear as an operator that is a tenth off."""
FOLDS = 5
OperatorKey = tuple[str, int, tuple[int, ...]]
"""An operator at its local shape: the digest of its terms, how many devices work, and into how many parts each factor is split."""


@dataclass(frozen=True, eq=False)
class OperatorTimes:
    """Seconds of operators on one device. `scale` multiplies the roofline's seconds of each feature, and is 1 for those that are not in it.

    `corrections` is by how much the operators of a digest were slower than the fit, in the median of the splits that were measured: what of
    an operator the fit does not see, its other splits have too. `error` is the relative error that is to be expected of the fit (`fitted_scales`), which was made from `samples` operators.
    """

    seconds: Mapping[OperatorKey, float]
    scale: Mapping[str, float]
    corrections: Mapping[str, float]
    error: float
    samples: int

    def factor(self, feature: str) -> float:
        return self.scale.get(feature, 1.0)

    def fitted_seconds(self, features: Mapping[str, float]) -> float:
        """Seconds of an operator with these features, if nothing is known of it."""
        return sum(self.factor(name) * seconds for name, seconds in features.items())


def fitted_times(records: Iterable[Mapping[str, Any]]) -> OperatorTimes:
    """What records of measured operators ("features", "seconds", and the "model" that each is of) tell of operators that were not measured."""
    rows = list(records)
    scale, error = fitted_scales(
        [r["features"] for r in rows], [r["seconds"] for r in rows], [r["model"] for r in rows]
    )
    return OperatorTimes({}, scale, {}, error, len(rows))


def fitted_scales(
    features: Sequence[Mapping[str, float]], seconds: Sequence[float], models: Sequence[str]
) -> tuple[dict[str, float], float]:
    """(scale per feature, error): non-negative least squares of relative errors, held near what the roofline says.

    `features` are the roofline's seconds of each operator, by name. The error is what is to be expected of a model that was not seen: each model's operators are
    predicted by a fit to all others', and what they are off, added up, is taken over what they take, in the mean of the models. How firmly the fit is held (HELD)
    is what makes that error least: few operators say little, and many much. Where all are of one model, one part in FOLDS of them is left out after the other.

    >>> scale, error = fitted_scales([{"dot": 1.0}, {"dot": 2.0}, {"dot": 1.0, "reduce": 3.0}] * 9, [2.0, 4.0, 8.0] * 9, ["a"] * 9 + ["b"] * 9 + ["c"] * 9)
    >>> round(scale["dot"], 1), round(scale["reduce"], 1), round(error, 2)
    (2.0, 2.0, 0.0)
    """
    names = sorted({name for f in features for name in f})
    if not names:
        return {}, 0.0
    taken = np.array(seconds)
    matrix = np.array([[f.get(name, 0.0) for name in names] for f in features]) / taken[:, None]
    several = len(set(models)) > 1
    groups = (
        np.unique(np.array(models), return_inverse=True)[1]
        if several
        else np.arange(len(taken)) % FOLDS
    )

    def unseen(held: float) -> float:
        """The error of what a fit has not seen."""
        parts = [groups == g for g in range(max(groups) + 1)]
        off = [
            taken[part]
            @ np.abs(matrix[part] @ _scales(matrix[~part], held) - 1)
            / taken[part].sum()
            for part in parts
        ]
        return float(np.mean(off))

    errors = {held: unseen(held) for held in HELD}
    best = min(HELD, key=lambda held: (errors[held], -held))
    return dict(zip(names, map(float, _scales(matrix, best)), strict=True)), errors[best]


def _scales(matrix: np.ndarray, held: float) -> np.ndarray:
    """The factors of features, [sample, feature] over the sample's seconds, that bring every sum nearest to 1."""
    count = matrix.shape[1]
    rows = np.concatenate([matrix, held * np.eye(count)])
    return nnls(rows, np.concatenate([np.ones(len(matrix)), np.full(count, held)]))[0]
