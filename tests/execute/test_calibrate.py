"""Calibration: figures are stored, used where they apply, and ignored elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from partita.errors import MachineError
from partita.execute.calibrate import (
    COLLECTIVES,
    REDUCED,
    Calibration,
    LinkTransfer,
    Measured,
    _fit_links,
    calibrated,
    file_of,
    key_of,
)
from partita.execute.devices import at_hand
from partita.machine import host
from partita.machine.collectives import collective_seconds


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    return tmp_path


def kept(**changes: object) -> Calibration:
    found = Calibration(
        key_of(2),
        {"device.overhead": 1e-3, "device.engine.dot.float32.peak": 5e9},
        (Measured("dot", "8", 1e-3, 5e9),),
        0.1,
    )
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def test_measured_figures_are_used_with_their_status(cache: Path) -> None:
    file_of(key_of(2)).write_text(kept().to_toml())
    machine = calibrated(at_hand(2), 2)
    assert machine.overhead == 1e-3
    value, source, status = machine.provenance()["device.overhead"]
    assert (value, status) == (1e-3, "measured") and "partita machine measure" in source
    assert calibrated(at_hand(4), 4) == at_hand(4), "measured with another number of devices"


@pytest.mark.parametrize("what", ["host", "jax", "device", "threads"])
def test_figures_of_another_machine_or_library_are_ignored(what: str, cache: Path) -> None:
    other = kept(key={**key_of(2), what: "another"})
    file_of(key_of(2)).write_text(other.to_toml())
    assert calibrated(at_hand(2), 2) == at_hand(2)


def test_a_broken_file_is_named(cache: Path) -> None:
    for broken, problem in ((b"[key\n", "not TOML"), (b"\x80\x81", "no text in UTF-8")):
        file_of(key_of(2)).write_bytes(broken)
        with pytest.raises(
            MachineError, match=f"is {problem}.*: delete the file, or measure again"
        ):
            calibrated(at_hand(2), 2)


@pytest.mark.parametrize("value", ['"fast"', "0", "-1", "nan", "inf"])
def test_an_impossible_figure_is_named(value: str, cache: Path) -> None:
    file_of(key_of(2)).write_text(
        kept().to_toml().replace('"device.overhead" = 0.001', f'"device.overhead" = {value}')
    )
    with pytest.raises(
        MachineError,
        match="toml: values.device.overhead is .*: delete the file, or measure again",
    ):
        calibrated(at_hand(2), 2)


def test_fitted_links_reproduce_the_measured_times() -> None:
    machine = host(2, 1 << 30).revised(
        {"level.process.latency": 3e-4, "level.process.bandwidth": 7e8}, "made up"
    )
    asked = [(kind, 4.0 * size) for kind in COLLECTIVES for size in REDUCED]
    sent = [
        LinkTransfer(
            kind, 2, n, Measured(kind, "", collective_seconds(machine, kind, n, ((0, 2),)))
        )
        for kind, n in asked
    ]
    values, errors = _fit_links(host(2, 1 << 30), "process", sent)
    assert values["level.process.latency"] == pytest.approx(3e-4, rel=1e-2)
    assert values["level.process.bandwidth"] == pytest.approx(7e8, rel=1e-2)
    assert max(errors) < 1e-2


def test_a_kernel_that_fits_the_cache_has_its_bandwidth() -> None:
    machine = host(1, 1 << 30).revised(
        {"device.memory.cache.capacity": 1000, "device.memory.cache.bandwidth": 5e10}, "made up"
    )
    assert machine.bandwidth_for(np.array([10.0, 1000.0, 1001.0])).tolist() == [
        5e10,
        5e10,
        machine.memory_bandwidth,
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_measuring_writes_a_file_that_plans_use(processes: int, cache: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "NPROC")}
    many = ["--devices", "2"] if processes == 1 else ["--processes", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "partita", "machine", "measure", *many, "--json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    (file,) = cache.iterdir()
    written = tomllib.loads(file.read_text())
    assert said["file"] == str(file)
    assert written["key"] == said["key"] and written["key"]["processes"] == processes
    computed = {"dot", "conv", "elementwise", "reduce", "gather", "sort", "stream", "chain"}
    assert {m["what"] for m in written["measured"]} == computed | set(COLLECTIVES)
    assert all(value > 0 for value in written["values"].values())
