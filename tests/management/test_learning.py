"""Corrections, trees, imitation and the files of policies."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from partita.errors import PlanError
from partita.machine import load
from partita.management.comparison import compare_policies
from partita.management.hardware import hardware_of
from partita.management.least_squares import RecursiveLeastSquares
from partita.management.program import (
    Kernel,
    Program,
    captured_programs,
    merged,
    synthetic_programs,
)
from partita.management.school import LearnedPolicy, load_policy, train_policy
from partita.management.tree import LEAF, DecisionTree, fit_tree

STUMP = DecisionTree(
    (0, LEAF, LEAF), (0.5, 0.0, 0.0), (1, LEAF, LEAF), (2, LEAF, LEAF), (3, 3, 7), (0.5, 1.0, 1.0)
)
RANGES = ((0.0, 1.0),) * 12
POLICY = LearnedPolicy("odroid-xu3", 197, ("mlp",), STUMP, RANGES)


def test_least_squares_find_the_weights() -> None:
    generator = np.random.default_rng(0)
    weights = np.array([0.3, -0.2, 0.1])
    model = RecursiveLeastSquares(3)
    for _ in range(300):
        x = generator.normal(size=3)
        model.update(x, float(x @ weights - x @ model.weights))
    assert model.weights == pytest.approx(weights, abs=0.02)


def test_the_error_bar_holds_nine_of_ten() -> None:
    generator = np.random.default_rng(1)
    held = []
    for _ in range(40):
        weights = generator.normal(0, 0.2, 3)
        model = RecursiveLeastSquares(3, forgetting=1.0)
        for step in range(40):
            x = generator.normal(size=3)
            residual = float(x @ weights - x @ model.weights + generator.normal(0, 0.1))
            if step >= 5:
                held.append(abs(residual) <= model.half_width(x))
            model.update(x, residual)
    assert 0.85 <= np.mean(held) <= 0.95


def test_a_tree_is_walked_and_fitted() -> None:
    assert STUMP.labels[STUMP.leaf([0.5])] == 3
    assert STUMP.labels[STUMP.leaf([0.6])] == 7
    rows = np.array([[0.0], [0.2], [0.8], [1.0]])
    fitted = fit_tree(rows, np.array([3, 3, 7, 7]))
    assert [fitted.labels[fitted.leaf(row)] for row in rows] == [3, 3, 7, 7]


def test_imitation_of_seen_programs_is_near_the_oracle() -> None:
    odroid = load("odroid-xu3")
    programs = synthetic_programs()[:1]
    hardware = hardware_of(odroid)
    learned = train_policy(hardware, programs)
    runs, _ = compare_policies(programs[0], odroid, ["imitation", "gated"], learned=learned)
    regrets = [runs.regret(run) for run in runs.runs]
    assert regrets[0] < 0.02 and regrets[1] < 0.05


def test_captured_programs_keep_their_work() -> None:
    programs = captured_programs()
    assert len(programs) == 7
    assert programs["transformer"].flops == pytest.approx(32.15e9, rel=1e-3)


def test_small_kernels_are_merged() -> None:
    kernels = [Kernel("a", "forward", "dot", "float32", 1e9, 1e9)]
    kernels += [Kernel("b", "forward", "elementwise", "float32", 1e3, 1e3)] * 2
    program = merged(Program("p", tuple(kernels)), "q")
    assert program.name == "q" and len(program.kernels) == 1
    assert program.flops == 1e9 + 2e3


def test_a_policy_file_is_readable_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(POLICY.to_text())
    assert load_policy(path) == POLICY


def changed(tmp_path: Path, **fields: object) -> str:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({**POLICY.to_json(), **fields}))
    return str(path)


def test_sentences_of_policy_files(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="There is no file '.*absent.json': give a file that 'part"):
        load_policy(tmp_path / "absent.json")
    with pytest.raises(PlanError, match="settings is -1: give a file that 'partita manage train"):
        load_policy(changed(tmp_path, settings=-1))
    with pytest.raises(PlanError, match="tree.labels is above the number of settings: give a file"):
        load_policy(changed(tmp_path, settings=5))
    endless = {**POLICY.to_json()["tree"], "left": [0, LEAF, LEAF]}
    with pytest.raises(PlanError, match="tree is no tree at node 0: give a file"):
        load_policy(changed(tmp_path, tree=endless))
    with pytest.raises(PlanError, match="features is in another order: give a file"):
        load_policy(changed(tmp_path, features=POLICY.to_json()["features"][::-1]))
    path = tmp_path / "policy.json"
    path.write_text(POLICY.to_text().replace(f'"settings": {POLICY.settings}', '"settings": 999'))
    with pytest.raises(PlanError, match="checksum is '.*', and its content has .*: give a file"):
        load_policy(path)
    hardware = hardware_of(load("odroid-xu3"))
    other = replace(POLICY, machine="rk3588")
    message = "trained for 'rk3588', not for 'odroid-xu3': train one with 'partita manage train"
    with pytest.raises(PlanError, match=message):
        other.check(hardware)
    with pytest.raises(PlanError, match=r"'odroid-xu3', with 9 settings instead of \d+: train one"):
        replace(POLICY, machine="odroid-xu3", settings=9).check(hardware)
