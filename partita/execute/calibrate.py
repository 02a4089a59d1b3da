"""What this machine's devices and links really do, measured in under a minute and kept in a file for all plans made here.

All devices work at once, as they do in a step, so that what they share (memory, cores, links) is shared while it is measured.
Rates and links are those of the machine's model that come closest to the measurements; how close is kept with them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from scipy.optimize import minimize

from partita.errors import MachineError
from partita.execute.processes import put
from partita.machine import Machine
from partita.machine.collectives import Group, collective_seconds

ROUNDS = 7
"""Times that each program is run; the median counts."""
DOTS = ((64, 1024, 1024), (256, 512, 512), (512, 512, 512), (32, 4096, 1024), (1024, 1024, 256))
"""Matrix products: rows, inner width, columns."""
CONVS = ((8, 32, 32, 3, 5), (8, 16, 64, 64, 3), (8, 28, 32, 64, 3), (4, 56, 16, 32, 3))
"""Convolutions with their gradients: samples, height and width, channels in, channels out, kernel."""
STREAMS = (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""float32 values of a device's arrays when its memories are measured: the last ones are in its main memory."""
CHAIN = 200
"""Dependent small products that show what starting one costs."""
REDUCED = (1 << 10, 1 << 14, 1 << 18, 1 << 21)
"""float32 values per all-reduce."""


@dataclass(frozen=True)
class Measured:
    """One program that was timed."""

    what: str
    size: str
    seconds: float
    rate: float | None = None
    """FLOP/s or bytes/s of one device."""


@dataclass(frozen=True)
class Calibration:
    """The numbers of a machine's model, by key path, and the measurements that they come from."""

    key: dict[str, Any]
    values: dict[str, float]
    measured: tuple[Measured, ...]
    error: float
    """Median relative error of the model on its own measurements."""

    def to_toml(self) -> str:
        lines = ["# Measured by 'partita machine measure'. Delete this file to go back to assumed figures.", "[key]"]
        lines += [f"{k} = {json.dumps(v)}" for k, v in self.key.items()]
        lines += ["", "[values]", *(f"{json.dumps(k)} = {v:.6g}" for k, v in self.values.items()), "", "[fit]", f"error = {self.error:.4f}"]
        for m in self.measured:
            lines += ["", "[[measured]]", f"what = {json.dumps(m.what)}", f"size = {json.dumps(m.size)}", f"seconds = {m.seconds:.6g}"]
            lines += [f"rate = {m.rate:.6g}"] if m.rate else []
        return "\n".join(lines) + "\n"


def key_of(devices: int) -> dict[str, Any]:
    """What a calibration holds for: it is used where all of it is the same."""
    return {
        "host": platform.node(), "device": jax.devices()[0].device_kind, "devices": devices, "processes": jax.process_count(),
        "threads": os.environ.get("NPROC", "all"), "jax": jax.__version__, "jaxlib": version("jaxlib"),
    }  # fmt: skip


def file_of(key: dict[str, Any]) -> Path:
    folder = Path(os.environ.get("PARTITA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "partita")
    return folder / f"machine-{re.sub(r'[^A-Za-z0-9.]+', '-', str(key['host']))}-{key['devices']}x{key['processes']}.toml"


def calibrated(machine: Machine, devices: int) -> Machine:
    """The machine with the figures that were measured here for so many devices; as it is where there are none that hold."""
    key = key_of(devices)
    path = file_of(key)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return machine
    except tomllib.TOMLDecodeError as error:
        raise MachineError(f"{path} is not TOML: {error}. Delete it, or measure again: partita machine measure.") from None
    if found.get("key") != key:
        return machine
    known = machine.provenance()
    values = {k: float(v) for k, v in found.get("values", {}).items() if k in known}
    return machine.revised(values, f"partita machine measure, {path.name}")


def calibrate(machine: Machine, report: Callable[[str], None]) -> Calibration:
    """Measures the devices of `machine`, which are those at hand, and fits its model to them. `report` is told what is measured."""
    devices = jax.devices()[: machine.devices]
    mesh = jax.sharding.Mesh(np.array(devices), ("a",))
    found: list[Measured] = []
    report("matrix products")
    found += [_dot(mesh, *shape) for shape in DOTS]
    report("convolutions")
    found += [_conv(mesh, *shape) for shape in CONVS]
    report("memory")
    found += [_stream(mesh, size) for size in STREAMS]
    report("starting an operation")
    found += [_chain(mesh)]
    dots, convs = ([m.rate for m in found if m.what == what and m.rate] for what in ("dot", "conv"))
    known = machine.provenance()
    chain = next(m for m in found if m.what == "chain")
    rates = {"dot": geometric_mean(dots), "conv": geometric_mean(convs)}
    values = _memories(machine, [m for m in found if m.what == "stream"]) | {"device.overhead": chain.seconds}
    for kind, rate in rates.items():
        values |= {f"device.engine.{kind}.float32.peak": rate, f"device.engine.{kind}.float32.efficiency": 1.0}
    errors = [abs(rates[m.what] / m.rate - 1) for m in found if m.what in rates and m.rate]
    if len(devices) > 1:
        report("collectives")
        reduced = [_all_reduce(mesh, size) for size in REDUCED]
        found += reduced
        level = machine.levels[-1].name
        links, off = _fit_links(machine, level, len(devices), reduced)
        values |= links
        errors += off
    return Calibration(key_of(len(devices)), {k: v for k, v in values.items() if k in known}, tuple(found), median(errors))


def _timed(mesh: Any, function: Any, *arrays: tuple[tuple[int, ...], PartitionSpec]) -> float:
    """Median seconds of a jitted function of arrays laid out so, whose first dim is one part per device where it is split."""
    values = [put(np.full(shape, 0.5, "float32"), NamedSharding(mesh, spec)) for shape, spec in arrays]
    run = jax.jit(function)
    jax.block_until_ready(run(*values))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(run(*values))
        times.append(time.perf_counter() - start)
    return median(times)


SPLIT, WHOLE = PartitionSpec("a"), PartitionSpec()


def _dot(mesh: Any, rows: int, inner: int, columns: int) -> Measured:
    n = mesh.size
    each = jax.shard_map(lambda x, w: (x[0] @ w[0])[None], mesh=mesh, in_specs=(SPLIT, SPLIT), out_specs=SPLIT)
    seconds = _timed(mesh, each, ((n, rows, inner), SPLIT), ((n, inner, columns), SPLIT))
    return Measured("dot", f"{rows}x{inner}x{columns}", seconds, 2 * rows * inner * columns / seconds)


def _conv(mesh: Any, samples: int, side: int, inputs: int, outputs: int, kernel: int) -> Measured:
    def loss(x: Any, w: Any) -> Any:
        return jnp.sum(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2)

    def one(x: Any, w: Any) -> Any:
        dx, dw = jax.grad(loss, argnums=(0, 1))(x[0], w[0])
        return dx[None], dw[None]

    n = mesh.size
    each = jax.shard_map(one, mesh=mesh, in_specs=(SPLIT, SPLIT), out_specs=(SPLIT, SPLIT))
    seconds = _timed(mesh, each, ((n, samples, side, side, inputs), SPLIT), ((n, kernel, kernel, inputs, outputs), SPLIT))
    flops = 3 * 2 * samples * side * side * inputs * outputs * kernel * kernel
    return Measured("conv", f"{samples}x{side}x{side}x{inputs} to {outputs} by {kernel}x{kernel}", seconds, flops / seconds)


def _stream(mesh: Any, size: int) -> Measured:
    """x / 2 + y, as often in a row as makes the start of the program small beside it."""
    repeats = max(1, (1 << 22) // size)

    def one(x: Any, y: Any) -> Any:
        return jax.lax.fori_loop(0, repeats, lambda _, z: z * 0.5 + y, x)

    shape = ((mesh.size * size,), SPLIT)
    each = jax.shard_map(one, mesh=mesh, in_specs=(SPLIT, SPLIT), out_specs=SPLIT)
    seconds = _timed(mesh, each, shape, shape) / repeats
    return Measured("stream", f"{3 * 4 * size >> 10} KiB", seconds, 3 * 4 * size / seconds)


def _memories(machine: Machine, streams: Sequence[Measured]) -> dict[str, float]:
    """Bandwidth of the main memory, and capacity and bandwidth of the cache: the largest stream that is twice as fast."""
    rates = [m.rate or 0.0 for m in streams]
    main, *caches = machine.device.memories
    values = {f"device.memory.{main.name}.bandwidth": rates[-1] * main.shared_by, f"device.memory.{main.name}.efficiency": 1.0}
    fast = [i for i, rate in enumerate(rates) if rate > 2 * rates[-1]]
    if caches and fast:
        cache, last = caches[0], fast[-1]
        values[f"device.memory.{cache.name}.capacity"] = int(3 * 4 * STREAMS[last] * cache.shared_by)
        values[f"device.memory.{cache.name}.bandwidth"] = median(rates[: last + 1]) * cache.shared_by
        values[f"device.memory.{cache.name}.efficiency"] = 1.0
    return values


def _chain(mesh: Any) -> Measured:
    def one(x: Any) -> Any:
        y = x[0]
        for _ in range(CHAIN):
            y = y @ x[0]
        return y[None]

    each = jax.shard_map(one, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT)
    return Measured("chain", "8x8x8", _timed(mesh, each, ((mesh.size, 8, 8), SPLIT)) / CHAIN)


def _all_reduce(mesh: Any, size: int) -> Measured:
    reduce = jax.shard_map(lambda x: jax.lax.psum(x, "a"), mesh=mesh, in_specs=SPLIT, out_specs=WHOLE)
    seconds = _timed(mesh, reduce, ((mesh.size, size), SPLIT))
    return Measured("all_reduce", f"{4 * size >> 10} KiB", seconds, 4 * size / seconds)


def _fit_links(machine: Machine, level: str, devices: int, reduced: Sequence[Measured]) -> tuple[dict[str, float], list[float]]:
    """The latency and bandwidth with which the model of an all-reduce is nearest to the measured ones, and its errors."""
    paths = (f"level.{level}.latency", f"level.{level}.bandwidth")
    group: Group = ((len(machine.levels) - 1, devices),)
    sizes = [float(4 * size) for size in REDUCED]

    def times(logs: Any) -> np.ndarray:
        guess = machine.revised(dict(zip(paths, map(float, np.exp(logs)), strict=True)), "a guess")
        return np.array([collective_seconds(guess, "all_reduce", nbytes, group) for nbytes in sizes])

    real = np.array([m.seconds for m in reduced])
    start = np.log([max(1e-7, real[0]), sizes[-1] / real[-1]])
    best = minimize(lambda logs: float(np.sum(np.log(times(logs) / real) ** 2)), start, method="Nelder-Mead")
    return dict(zip(paths, map(float, np.exp(best.x)), strict=True)), list(np.abs(times(best.x) / real - 1))
