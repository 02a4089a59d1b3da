"""What this machine's devices and links really do, measured in under a minute and kept in a file for all plans made here.

All devices work at once, as they do in a step, so that what they share (memory, cores, links) is shared while it is measured.
Rates and links are those of the machine's model that come closest to the measurements; how close is kept with them.
"""

from __future__ import annotations

import json
import math
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
from partita.machine.collectives import collective_seconds

ROUNDS = 7
"""Times that each program is run; the median counts."""
DOTS = ((64, 1024, 1024), (256, 512, 512), (512, 512, 512), (32, 4096, 1024), (1024, 1024, 256))
"""Matrix products: rows, inner width, columns."""
CONVS = ((8, 32, 32, 3, 5), (8, 16, 64, 64, 3), (8, 28, 32, 64, 3), (4, 56, 16, 32, 3))
"""Convolutions with their gradients: samples, height and width, channels in, channels out, kernel."""
STREAMS = (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""float32 values of a device's arrays when its memories are measured: the last ones are in its main memory."""
LIGHT = 1 << 16
"""Values of a device's arrays when its element-wise, reduction, gather and sort rates are measured: they stay in its caches."""
WIDE = ("float32", "bfloat16", "float16")
"""The dtypes that rates are measured in, as far as the machine's model tells them apart."""
CHAIN = 200
"""Dependent small products that show what starting one costs."""
REDUCED = (1 << 10, 1 << 14, 1 << 18, 1 << 21, 1 << 23)
"""float32 values of a device that a collective sends."""


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
        lines = [
            "# Measured by 'partita machine measure'. Delete this file to go back to assumed figures.",
            "[key]",
        ]
        lines += [f"{k} = {json.dumps(v)}" for k, v in self.key.items()]
        lines += [
            "",
            "[values]",
            *(f"{json.dumps(k)} = {v:.6g}" for k, v in self.values.items()),
            "",
            "[fit]",
            f"error = {self.error:.4f}",
        ]
        for m in self.measured:
            lines += [
                "",
                "[[measured]]",
                f"what = {json.dumps(m.what)}",
                f"size = {json.dumps(m.size)}",
                f"seconds = {m.seconds:.6g}",
            ]
            lines += [f"rate = {m.rate:.6g}"] if m.rate else []
        return "\n".join(lines) + "\n"


MANNER = 3
"""Which way of measuring: raised where figures of before no longer hold."""


def key_of(devices: int) -> dict[str, Any]:
    """What a calibration holds for: it is used where all of it is the same."""
    return {
        "host": platform.node(),
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "processes": jax.process_count(),
        "threads": os.environ.get("NPROC", "all"),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "manner": MANNER,
    }


def file_of(key: dict[str, Any]) -> Path:
    folder = Path(
        os.environ.get("PARTITA_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "partita"
    )
    return (
        folder
        / f"machine-{re.sub(r'[^A-Za-z0-9.]+', '-', str(key['host']))}-{key['devices']}x{key['processes']}.toml"
    )


def calibrated(machine: Machine, devices: int) -> Machine:
    """The machine with the figures that were measured here for so many devices; as it is where there are none that hold."""
    key = key_of(devices)
    path = file_of(key)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return machine
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MachineError(
            f"{path} is not TOML: {error}. Delete it, or measure again: partita machine measure."
        ) from None
    if found.get("key") != key:
        return machine
    known, given = machine.provenance(), found.get("values", {})
    values = (
        {k: v for k, v in given.items() if k in known}
        if isinstance(given, dict)
        else {"values": given}
    )
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise MachineError(
                f"{path} says that {name} is {value!r}, and a number above 0 is needed. Delete it, or measure again: partita machine measure."
            )
    return machine.revised(values, f"partita machine measure, {path.name}")


def calibrate(machine: Machine, report: Callable[[str], None]) -> Calibration:
    """Measures the devices of `machine`, which are those at hand, and fits its model to them. `report` is told what is measured."""
    devices = jax.devices()[: machine.devices]
    mesh = jax.sharding.Mesh(np.array(devices), ("a",))
    found: list[Measured] = []
    known = machine.provenance()
    rates: dict[str, list[Measured]] = {}
    for op_class, make in (
        ("dot", _dots),
        ("conv", _convs),
        ("elementwise", _elementwise),
        ("reduce", _reduce),
        ("gather", _gather),
        ("sort", _sort),
    ):
        for dtype in WIDE:
            if f"device.engine.{op_class}.{dtype}.peak" in known:
                report(f"{NAMES[op_class]}, {dtype}")
                rates[f"{op_class}.{dtype}"] = make(mesh, dtype)
                found += rates[f"{op_class}.{dtype}"]
    report("memory")
    found += [_stream(mesh, size) for size in STREAMS]
    report("starting an operation")
    found += [_chain(mesh)]
    chain = next(m for m in found if m.what == "chain")
    values = _memories(machine, [m for m in found if m.what == "stream"]) | {
        "device.overhead": chain.seconds
    }
    errors = []
    for engine, programs in rates.items():
        rate = geometric_mean([m.rate for m in programs if m.rate])
        values |= {f"device.engine.{engine}.peak": rate, f"device.engine.{engine}.efficiency": 1.0}
        errors += [abs(rate / m.rate - 1) for m in programs if m.rate]
    if len(devices) > 1:
        sent = []
        for kind in COLLECTIVES:
            report(kind.replace("_", "-"))
            every = [
                _collective(mesh, kind, group, size)
                for group in _groups(len(devices))
                for size in REDUCED
            ]
            sent += [
                s for s in every if s.measured.seconds > 0
            ]  # of the smallest, noise can be more than they take
        found += [s.measured for s in sent]
        links, off = _fit_links(machine, machine.levels[-1].name, sent)
        values |= links
        errors += off
    return Calibration(
        key_of(len(devices)),
        {k: v for k, v in values.items() if k in known},
        tuple(found),
        median(errors),
    )


def _timed(
    mesh: Any, function: Any, *arrays: tuple[tuple[int, ...], PartitionSpec], dtype: str = "float32"
) -> float:
    """Median seconds of a jitted function of arrays laid out so, whose first dim is one part per device where it is split."""
    values = [
        put(np.full(shape, 0.5).astype(dtype), NamedSharding(mesh, spec)) for shape, spec in arrays
    ]
    run = jax.jit(function)
    jax.block_until_ready(run(*values))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(run(*values))
        times.append(time.perf_counter() - start)
    return median(times)


SPLIT, WHOLE = PartitionSpec("a"), PartitionSpec()
NAMES = {
    "dot": "matrix products",
    "conv": "convolutions",
    "elementwise": "element-wise operations",
    "reduce": "reductions",
    "gather": "gathers",
    "sort": "sorts",
}


def _each(mesh: Any, function: Any, *shapes: tuple[int, ...], dtype: str) -> float:
    """Median seconds of a function of arrays of these shapes, every device computing it on its own."""
    each = jax.shard_map(
        lambda *xs: jax.tree.map(lambda y: y[None], function(*(x[0] for x in xs))),
        mesh=mesh,
        in_specs=SPLIT,
        out_specs=SPLIT,
    )
    return _timed(mesh, each, *(((mesh.size, *shape), SPLIT) for shape in shapes), dtype=dtype)


def _dots(mesh: Any, dtype: str) -> list[Measured]:
    found = []
    for rows, inner, columns in DOTS:
        seconds = _each(mesh, lambda x, w: x @ w, (rows, inner), (inner, columns), dtype=dtype)
        found.append(
            Measured(
                "dot",
                f"{rows}x{inner}x{columns} {dtype}",
                seconds,
                2 * rows * inner * columns / seconds,
            )
        )
    return found


def _convs(mesh: Any, dtype: str) -> list[Measured]:
    def loss(x: Any, w: Any) -> Any:
        return jnp.sum(
            jax.lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            ** 2
        )

    found = []
    for samples, side, inputs, outputs, kernel in CONVS:
        seconds = _each(
            mesh,
            jax.grad(loss, argnums=(0, 1)),
            (samples, side, side, inputs),
            (kernel, kernel, inputs, outputs),
            dtype=dtype,
        )
        flops = 3 * 2 * samples * side * side * inputs * outputs * kernel * kernel
        size = f"{samples}x{side}x{side}x{inputs} to {outputs} by {kernel}x{kernel} {dtype}"
        found.append(Measured("conv", size, seconds, flops / seconds))
    return found


def _light(
    mesh: Any, dtype: str, what: str, functions: dict[str, tuple[Any, int]]
) -> list[Measured]:
    """The rate of functions x -> x of so many FLOPs a value, each often in a row on values that stay in the cache."""
    found = []
    for name, (function, flops) in functions.items():
        seconds = (
            _each(
                mesh,
                lambda x, f=function: jax.lax.fori_loop(0, REPEATS, lambda _, y: f(y), x),
                (LIGHT,),
                dtype=dtype,
            )
            / REPEATS
        )
        found.append(
            Measured(
                what,
                f"{name} of {LIGHT} {dtype}",
                seconds,
                flops * LIGHT / seconds if flops else None,
            )
        )
    return found


REPEATS = 32


def _elementwise(mesh: Any, dtype: str) -> list[Measured]:
    functions = {  # FLOPs as they are counted in a graph: none for a transcendental
        "tanh": (jnp.tanh, 0),
        "relu": (lambda x: jnp.maximum(x * x, 0) + x, 3),
        "polynomial": (lambda x: ((x * 0.5 - 0.25) * x + 0.125) * x, 5),
        "division": (lambda x: x / (x + 1), 2),
    }
    return _light(mesh, dtype, "elementwise", functions)


def _reduce(mesh: Any, dtype: str) -> list[Measured]:
    functions = {
        "rows": (lambda x: x + jnp.sum(x.reshape(256, -1), 1).astype(dtype)[0], 1),
        "columns": (lambda x: x + jnp.sum(x.reshape(256, -1), 0).astype(dtype)[0], 1),
    }
    return _light(mesh, dtype, "reduce", functions)


def _gather(mesh: Any, dtype: str) -> list[Measured]:
    at = jnp.asarray(np.random.default_rng(0).permutation(LIGHT // 64), "int32")
    return _light(
        mesh, dtype, "gather", {"rows of 64": (lambda x: x.reshape(-1, 64)[at].reshape(-1), 1)}
    )


def _sort(mesh: Any, dtype: str) -> list[Measured]:
    return _light(mesh, dtype, "sort", {"values": (lambda x: jnp.sort(-x), 1)})


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
    values = {
        f"device.memory.{main.name}.bandwidth": rates[-1] * main.shared_by,
        f"device.memory.{main.name}.efficiency": 1.0,
    }
    fast = [i for i, rate in enumerate(rates) if rate > 2 * rates[-1]]
    if caches and fast:
        cache, last = caches[0], fast[-1]
        values[f"device.memory.{cache.name}.capacity"] = int(
            3 * 4 * STREAMS[last] * cache.shared_by
        )
        values[f"device.memory.{cache.name}.bandwidth"] = (
            median(rates[: last + 1]) * cache.shared_by
        )
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


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute")


@dataclass(frozen=True)
class Sent:
    """A collective that was timed: `nbytes` are counted as `collective_seconds` counts them."""

    kind: str
    group: int
    nbytes: float
    measured: Measured


def _groups(devices: int) -> list[int]:
    """Sizes of groups of neighbours that divide the devices."""
    return [n for n in range(2, devices + 1) if devices % n == 0]


def _collective(mesh: Any, kind: str, group: int, size: int) -> Sent:
    """One collective on `size` float32 values a device, in groups of neighbours, all at once.

    As it is in a step: what it sends was made just before, so a program that only makes it is subtracted.
    """
    lax, n = jax.lax, mesh.size
    own = jax.sharding.Mesh(mesh.devices.reshape(n // group, group), ("a", "b"))
    function = {
        "all_reduce": lambda x: lax.psum(x, "b"),
        "all_gather": lambda x: lax.all_gather(x, "b", tiled=True),
        "reduce_scatter": lambda x: lax.psum_scatter(x, "b", tiled=True),
        "all_to_all": lambda x: lax.all_to_all(x, "b", 0, 0, tiled=True),
        "collective_permute": lambda x: lax.ppermute(
            x, "b", [(i, (i + 1) % group) for i in range(group)]
        ),
    }[kind]
    size -= size % group
    spec = PartitionSpec(("a", "b"))
    with_it, without = (
        jax.shard_map(f, mesh=own, in_specs=spec, out_specs=spec, check_vma=False)
        for f in (lambda x: function(x + 1), lambda x: x + 1)
    )
    seconds = _timed(own, with_it, ((n * size,), spec)) - _timed(own, without, ((n * size,), spec))
    what = Measured(kind, f"{4 * size >> 10} KiB of each of {group}", seconds, 4 * size / seconds)
    return Sent(kind, group, 4.0 * size * (group if kind == "all_gather" else 1), what)


def _fit_links(
    machine: Machine, level: str, sent: Sequence[Sent]
) -> tuple[dict[str, float], list[float]]:
    """The latency and bandwidth with which the model of collectives is nearest to the measured ones, and its errors."""
    paths = (f"level.{level}.latency", f"level.{level}.bandwidth")

    def times(logs: Any) -> np.ndarray:
        guess = machine.revised(dict(zip(paths, map(float, np.exp(logs)), strict=True)), "a guess")
        return np.array(
            [
                collective_seconds(guess, s.kind, s.nbytes, ((len(machine.levels) - 1, s.group),))
                for s in sent
            ]
        )

    real = np.array([s.measured.seconds for s in sent])
    most = max(sent, key=lambda s: s.nbytes)
    start = np.log([max(1e-7, real.min()), most.nbytes / most.measured.seconds])
    best = minimize(
        lambda logs: float(np.sum(np.log(times(logs) / real) ** 2)), start, method="Nelder-Mead"
    )
    return dict(zip(paths, map(float, np.exp(best.x)), strict=True)), list(
        np.abs(times(best.x) / real - 1)
    )
