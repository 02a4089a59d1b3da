"""The fit of operator times recovers known rates, and estimates its error on unseen models."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.machine import OperatorTimes, fitted_times
from partita.machine.times import fitted_scales

NAMES = ("dot, FLOPs", "dot, bytes", "reduce, bytes", "start")


def records(scales: list[float], off: dict[str, float], seed: int, count: int = 12) -> list[dict]:
    """Records of operators: seconds by `scales`, times the slowness of their model (`off`)."""
    rng, found = np.random.default_rng(seed), []
    for model, slower in off.items():
        for _ in range(count):
            features = {
                name: float(10 ** rng.uniform(-5, -2)) for name in NAMES if rng.random() < 0.7
            } or {NAMES[0]: 1e-3}
            seconds = slower * sum(
                scales[NAMES.index(name)] * value for name, value in features.items()
            )
            found.append({"model": model, "features": features, "seconds": seconds})
    return found


def off(times: OperatorTimes, rows: list[dict]) -> float:
    """Absolute errors of the fit, summed, over the seconds of all operators."""
    return sum(abs(times.fitted_seconds(r["features"]) - r["seconds"]) for r in rows) / sum(
        r["seconds"] for r in rows
    )


@given(scales=st.lists(st.floats(0.3, 10.0), min_size=4, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_known_rates_are_recovered(scales: list[float], seed: int) -> None:
    rows = records(scales, dict.fromkeys("abc", 1.0), seed, count=40)
    times = fitted_times(rows)
    assert times.error < 0.05 and times.samples == 120
    unseen = records(scales, {"d": 1.0}, seed + 1)
    assert off(times, unseen) < 0.05


@given(seed=st.integers(0, 99), spread=st.floats(0.0, 0.5))
@settings(max_examples=40, deadline=None)
def test_the_error_is_that_on_an_unseen_model(seed: int, spread: float) -> None:
    """Half of the models are slower, half faster.

    The next model is off by about the spread, and a fit to all of them hides that.
    """
    seen = {f"m{n}": 1 + (spread if n % 2 else -spread) for n in range(6)}
    times = fitted_times(records([2.0, 1.0, 3.0, 1.0], seen, seed))
    for slower in (1 + spread, 1 - spread):
        unseen = records([2.0, 1.0, 3.0, 1.0], {"next": slower}, seed + 1000, count=40)
        assert off(times, unseen) <= 2 * times.error + 0.1
        assert times.error >= spread / 2 - 0.1


def test_a_different_model_is_not_explained_by_itself() -> None:
    """Two models of products only: one as fast as the roofline, one ten times slower.

    A fit to one says nothing about the other.
    """
    features, seconds = [{"dot, FLOPs": 1.0}] * 20, [1.0] * 10 + [10.0] * 10
    assert fitted_scales(features, seconds, ["a"] * 10 + ["b"] * 10)[1] == pytest.approx(
        (0 + 0.9) / 2, abs=0.01
    )
    assert fitted_scales(features[:10], seconds[:10], ["a"] * 10)[1] == pytest.approx(0, abs=1e-6)


def test_rare_features_and_no_records_stay_near_the_roofline() -> None:
    rows = records([1.0] * 4, {"a": 1.0}, 0) + [
        {"model": "b", "features": {"sort, FLOPs": 1e-9, "dot, FLOPs": 1.0}, "seconds": 1.0}
    ]
    scale = fitted_times(rows).scale
    assert scale["sort, FLOPs"] == pytest.approx(1, rel=1e-3) and min(scale.values()) >= 0
    assert fitted_times([]).fitted_seconds({"dot, FLOPs": 2.0}) == 2.0


def test_times_are_equal_by_content_and_may_be_keys_of_a_cache() -> None:
    rows = records([2.0, 1.0, 3.0, 1.0], {"a": 1.0}, 0)
    times = fitted_times(rows)
    assert times == fitted_times(rows) and hash(times) == hash(fitted_times(rows))
    assert times != fitted_times(records([2.0, 1.0, 3.0, 1.0], {"a": 2.0}, 0))
