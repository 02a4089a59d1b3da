"""Calibration: figures are stored, used where they apply, and ignored elsewhere."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

from partita.errors import MachineError
from partita.execute.calibrate import (
    COLLECTIVES,
    Calibration,
    LinkTransfer,
    Measured,
    _collective,
    _fit_links,
    calibrate,
    calibrated,
    file_of,
    key_of,
)
from partita.execute.calibration_sizes import CalibrationSizes, sizes_of
from partita.execute.devices import at_hand
from partita.files.checksums import checksum
from partita.machine import host, load, read
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
    comment, _, content = kept().to_toml().split("\n", 2)  # without the checksum
    changed = content.replace('"device.overhead" = 0.001', f'"device.overhead" = {value}')
    seal = f'checksum = "{checksum(tomllib.loads(changed))}"'
    file_of(key_of(2)).write_text(f"{comment}\n{seal}\n{changed}")
    with pytest.raises(
        MachineError,
        match="toml: values.device.overhead is .*: delete the file, or measure again",
    ):
        calibrated(at_hand(2), 2)


def test_a_changed_or_emptied_file_is_named(cache: Path) -> None:
    content = kept().to_toml()
    for changed, problem in (
        (content.replace("0.001", "0.002", 1), "checksum is '.*', and its content has"),
        ("", "the content is without the key 'checksum'"),
        (content.replace("\nchecksum", "-1cksum", 1), "the content is without the key 'checksum'"),
    ):
        file_of(key_of(2)).write_text(changed)
        with pytest.raises(MachineError, match=f"{problem}.*: delete the file, or measure again"):
            calibrated(at_hand(2), 2)


def test_fitted_links_reproduce_the_measured_times() -> None:
    machine = host(2, 1 << 30).revised(
        {"level.process.latency": 3e-4, "level.process.bandwidth": 7e8}, "made up"
    )
    asked = [(kind, 4.0 * size) for kind in COLLECTIVES for size in CalibrationSizes().reduced]
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


def test_measuring_in_processes_writes_a_file_that_plans_use(cache: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "NPROC")}
    done = subprocess.run(
        [sys.executable, "-m", "partita", "machine", "measure", "--processes", "2", "--json"],
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
    assert written["key"] == said["key"] and written["key"]["processes"] == 2
    computed = {"dot", "conv", "elementwise", "reduce", "gather", "sort", "stream", "chain"}
    assert {m["what"] for m in written["measured"]} == computed | set(COLLECTIVES)
    assert all(value > 0 for value in written["values"].values())


SLOW_GPU = """
name = "slow"
source = "made up: as fast as one core"
status = "assumed"
[device]
name = "a slow GPU"
overhead = "5 us"
[device.memory.hbm]
capacity = "1 GiB"
bandwidth = "2 GB/s"
efficiency = 1.0
shared_by = 1
[device.memory.host]
capacity = "8 GiB"
bandwidth = "1 GB/s"
efficiency = 1.0
shared_by = 1
[device.engine."*"]
"*" = { peak = "1 GFLOP/s", efficiency = 1.0 }
[device.engine.dot]
tf32 = { peak = "10 GFLOP/s", efficiency = 1.0 }
float32 = { peak = "1 GFLOP/s", efficiency = 1.0 }
[device.engine.conv]
tf32 = { peak = "4 GFLOP/s", efficiency = 1.0 }
[level.node]
size = 2
fabric = "switch"
latency = "100 us"
bandwidth = "1 GB/s"
shared_by = 1
[backend]
platform = "cuda"
reduce_scatter = true
overlap = 0.0
promotes_16_bit_all_reduce = false
float32_products = "tf32"
"""


def test_an_accelerator_is_measured_by_repeated_operations_of_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("partita.execute.calibration_sizes.PROGRAM_SECONDS", 2e-3)
    machine = read(SLOW_GPU, "slow").with_devices(1)
    sizes = sizes_of(machine)
    assert sizes.dots[0] == (128, 128, 128), "0.2 ms at 10 GFLOP/s: a million multiplications"
    found = calibrate(machine, lambda subject: None)
    assert {m.kind for m in found.measured} == {"dot", "conv", "stream", "chain"}
    peaks = {path for path in found.values if path.endswith("peak")}
    assert peaks == {"device.engine.dot.tf32.peak", "device.engine.conv.tf32.peak"}
    assert not any("host" in path for path in found.values), "slower than HBM: no cache"
    assert all(value > 0 for value in found.values.values())
    flops = 2 * 128**3
    product = found.measured[0]
    assert product.rate == pytest.approx(flops / product.seconds)


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_repeated_collective_keeps_the_size_of_its_operand(kind: str) -> None:
    machine = read(SLOW_GPU, "slow")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("a",))
    sizes = dataclasses.replace(sizes_of(machine), program_seconds=1e-3)
    transfer = _collective(mesh, machine, sizes, kind, (2, 1 << 10))
    assert transfer.nbytes == 4 * (1 << 10) * (2 if kind == "all_gather" else 1)


@pytest.mark.parametrize("preset", ["v100", "a100", "h100", "b200", "tpu-v5e", "tpu-v6e"])
def test_sizes_follow_the_rates_of_the_device(preset: str) -> None:
    """Every operation takes 0.1 to 0.4 ms by the description, every program at least 20 ms."""
    machine = load(preset)
    sizes = sizes_of(machine)
    for rows, inner, columns in sizes.dots:
        seconds = 2 * rows * inner * columns / machine.rate("dot", "bfloat16")
        assert 1e-4 < seconds < 4e-4
        assert sizes.repeats(seconds) * seconds > 0.019
    for samples, side, inputs, outputs, kernel in sizes.convs:
        flops = 6 * samples * side * side * inputs * outputs * kernel * kernel
        assert 1e-4 < flops / machine.rate("conv", "bfloat16") < 4e-4
    assert 12 * sizes.streams[-1] > 2 * (50 << 20), "larger than any cache"
