"""Measured rates of this machine's devices and links, stored for all later plans.

Measuring takes less than a minute.

All devices work at once and share memory, cores and links, as they do in a step. The figures are
those with which the machine's model is nearest to the measurements; the file has its error too.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
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
from partita.files.reading import FileKind, checked, parse_toml, read_text
from partita.files.schema import mapping, plain, positive_number, table
from partita.files.writing import check_writable
from partita.machine import Machine
from partita.machine.collectives import collective_seconds

ROUNDS = 7
"""Timed runs of a program. The median counts."""
DOTS = ((64, 1024, 1024), (256, 512, 512), (512, 512, 512), (32, 4096, 1024), (1024, 1024, 256))
"""Matrix products: rows, inner width, columns."""
CONVS = ((8, 32, 32, 3, 5), (8, 16, 64, 64, 3), (8, 28, 32, 64, 3), (4, 56, 16, 32, 3))
"""Convolutions with gradients: samples, height and width, channels in, channels out, kernel."""
STREAMS = (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""Sizes of a device's arrays for its memories, float32 values. The last ones are in main memory."""
LIGHT = 1 << 16
"""Size of a device's array for light operations (element-wise, reduce, gather, sort), values.
It stays in the caches."""
REPEATS = 32
"""Runs of a light operation in one program."""
WIDE = ("float32", "bfloat16", "float16")
"""Dtypes of the rates, if the machine's model distinguishes them."""
CHAIN = 200
"""Number of dependent small products that give the time to start one."""
REDUCED = (1 << 10, 1 << 14, 1 << 18, 1 << 21, 1 << 23)
"""Sizes of collectives, float32 values of a device."""


@dataclass(frozen=True)
class Measured:
    """One timed program."""

    kind: str
    """Kind of the program: "dot", "stream", a collective."""
    size: str
    """Its size in words."""
    seconds: float
    rate: float | None = None
    """FLOP/s or bytes/s of one device."""


@dataclass(frozen=True)
class Calibration:
    """Figures of a machine's model and their measurements."""

    key: dict[str, Any]
    """Hardware and library versions."""
    values: dict[str, float]
    """Figures of the machine, by key path."""
    measured: tuple[Measured, ...]
    error: float
    """Median relative error of the model on its own measurements."""

    def to_toml(self) -> str:
        """The calibration as the text of a TOML file."""
        lines = [
            "# Measured by 'partita machine measure'. Delete this file for assumed figures.",
            "[key]",
        ]
        lines += [f"{name} = {json.dumps(value)}" for name, value in self.key.items()]
        lines += ["", "[values]"]
        lines += [f"{json.dumps(path)} = {value:.6g}" for path, value in self.values.items()]
        lines += ["", "[fit]", f"error = {self.error:.4f}"]
        for measured in self.measured:
            lines += [
                "",
                "[[measured]]",
                f"what = {json.dumps(measured.kind)}",
                f"size = {json.dumps(measured.size)}",
                f"seconds = {measured.seconds:.6g}",
            ]
            if measured.rate:
                lines.append(f"rate = {measured.rate:.6g}")
        return "\n".join(lines) + "\n"


CALIBRATION_FILE = FileKind(
    "a calibration",
    "delete the file, or measure again with 'partita machine measure'",
    MachineError,
    by_hand=False,
    most_bytes=2**24,
)

MANNER = 3
"""Version of the measuring method. A new one makes older figures invalid."""


def key_of(devices: int) -> dict[str, Any]:
    """The conditions of a calibration: hardware, threads and library versions.

    A calibration is used only under equal conditions.
    """
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


def cache_folder() -> Path:
    """Partita's cache folder: PARTITA_CACHE, or `partita` in the user's cache folder."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PARTITA_CACHE") or caches / "partita")


def file_of(key: dict[str, Any]) -> Path:
    """The calibration file for a key, in Partita's cache folder."""
    host = re.sub(r"[^A-Za-z0-9.]+", "-", str(key["host"]))
    return cache_folder() / f"machine-{host}-{key['devices']}x{key['processes']}.toml"


def check_cache(path: Path) -> str:
    """The path of a measurement's file, before the measurement; makes its folder.

    MachineError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    except OSError as error:
        raise MachineError(
            f"{path} cannot be written ({error.strerror}), so a measurement would be lost: set "
            "PARTITA_CACHE to a folder that can be written."
        ) from None
    return str(path)


def calibrated(machine: Machine, devices: int) -> Machine:
    """The machine with the figures measured here for `devices` devices, if there are valid ones.

    Raises a MachineError for a broken file.
    """
    key = key_of(devices)
    path = file_of(key)
    if not path.exists():
        return machine
    content = parse_toml(read_text(path, CALIBRATION_FILE), path, CALIBRATION_FILE)
    if content.get("key") != key:
        return machine
    figures = machine.provenance()
    schema = table({"key": plain, "values": mapping(positive_number)}, {}, plain)
    measured = checked(content, schema, path, CALIBRATION_FILE)["values"]
    values = {name: value for name, value in measured.items() if name in figures}
    return machine.revised(values, f"partita machine measure, {path.name}")


def calibrate(machine: Machine, report: Callable[[str], None]) -> Calibration:
    """Measures the local devices, described by `machine`, and fits its model to them.

    `report` gets the name of every measurement before it starts.
    """
    devices = jax.devices()[: machine.devices]
    mesh = jax.sharding.Mesh(np.array(devices), ("a",))
    figures = machine.provenance()
    programs_of = _engine_programs(mesh, figures, report)
    measured: list[Measured] = []
    for programs in programs_of.values():
        measured += programs
    report("memory")
    streams = [_stream(mesh, size) for size in STREAMS]
    measured += streams
    report("starting an operation")
    chain = _chain(mesh)
    measured.append(chain)
    values = _memories(machine, streams)
    values["device.overhead"] = chain.seconds
    errors: list[float] = []
    for engine, programs in programs_of.items():
        rates = [program.rate for program in programs if program.rate]
        rate = geometric_mean(rates)
        values[f"device.engine.{engine}.peak"] = rate
        values[f"device.engine.{engine}.efficiency"] = 1.0
        errors += [abs(rate / program_rate - 1) for program_rate in rates]
    if len(devices) > 1:
        transfers = _transfers(mesh, report)
        measured += [transfer.measured for transfer in transfers]
        links, link_errors = _fit_links(
            machine,
            machine.levels[-1].name,
            transfers,
        )
        values |= links
        errors += link_errors
    return Calibration(
        key_of(len(devices)),
        {path: value for path, value in values.items() if path in figures},
        tuple(measured),
        median(errors),
    )


def _engine_programs(
    mesh: Any,
    figures: Mapping[str, Any],
    report: Callable[[str], None],
) -> dict[str, list[Measured]]:
    """The "class.dtype" of the machine's engines -> its timed programs."""
    programs_of: dict[str, list[Measured]] = {}
    for op_class, make in (
        ("dot", _dots),
        ("conv", _convs),
        ("elementwise", _elementwise),
        ("reduce", _reduce),
        ("gather", _gather),
        ("sort", _sort),
    ):
        for dtype in WIDE:
            engine = f"{op_class}.{dtype}"
            if f"device.engine.{engine}.peak" in figures:
                report(f"{NAMES[op_class]}, {dtype}")
                programs_of[engine] = make(mesh, dtype)
    return programs_of


def _transfers(mesh: Any, report: Callable[[str], None]) -> list[LinkTransfer]:
    """Timed collectives of every kind, group size and size.

    Without the smallest ones, if noise exceeds their time.
    """
    transfers: list[LinkTransfer] = []
    for kind in COLLECTIVES:
        report(kind.replace("_", "-"))
        for group in _groups(mesh.size):
            for size in REDUCED:
                transfer = _collective(mesh, kind, group, size)
                if transfer.measured.seconds > 0:
                    transfers.append(transfer)
    return transfers


def _timed(
    mesh: Any,
    function: Any,
    *arrays: tuple[tuple[int, ...], PartitionSpec],
    dtype: str = "float32",
) -> float:
    """Median seconds of a jitted function of arrays of these shapes and shardings."""
    values = []
    for shape, spec in arrays:
        array = np.full(shape, 0.5).astype(dtype)
        values.append(put(array, NamedSharding(mesh, spec)))
    run = jax.jit(function)
    jax.block_until_ready(run(*values))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(run(*values))
        times.append(time.perf_counter() - start)
    return median(times)


SPLIT = PartitionSpec("a")
NAMES = {
    "dot": "matrix products",
    "conv": "convolutions",
    "elementwise": "element-wise operations",
    "reduce": "reductions",
    "gather": "gathers",
    "sort": "sorts",
}


def _each(
    mesh: Any,
    function: Any,
    *shapes: tuple[int, ...],
    dtype: str,
) -> float:
    """Median seconds of a function of arrays of these shapes, computed by every device."""

    def of_device(*parts: Any) -> Any:
        results = function(*(part[0] for part in parts))
        return jax.tree.map(lambda result: result[None], results)

    each = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=SPLIT,
        out_specs=SPLIT,
    )
    arrays = [((mesh.size, *shape), SPLIT) for shape in shapes]
    return _timed(mesh, each, *arrays, dtype=dtype)


def _dots(mesh: Any, dtype: str) -> list[Measured]:
    measured = []
    for rows, inner, columns in DOTS:
        seconds = _each(
            mesh,
            lambda x, w: x @ w,
            (rows, inner),
            (inner, columns),
            dtype=dtype,
        )
        flops = 2 * rows * inner * columns
        size = f"{rows}x{inner}x{columns} {dtype}"
        measured.append(Measured("dot", size, seconds, flops / seconds))
    return measured


def _convs(mesh: Any, dtype: str) -> list[Measured]:
    def loss(x: Any, w: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.sum(y**2)

    measured = []
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
        measured.append(Measured("conv", size, seconds, flops / seconds))
    return measured


def _light(
    mesh: Any,
    dtype: str,
    op_class: str,
    functions: dict[str, tuple[Any, int]],
) -> list[Measured]:
    """Rates of functions x -> x on values that stay in the cache, by name.

    Each comes with its FLOPs per value, and runs `REPEATS` times in a row.
    """
    measured = []
    for name, (function, flops) in functions.items():

        def repeated(x: Any, function: Any = function) -> Any:
            return jax.lax.fori_loop(
                0,
                REPEATS,
                lambda _, y: function(y),
                x,
            )

        seconds = _each(mesh, repeated, (LIGHT,), dtype=dtype) / REPEATS
        rate = flops * LIGHT / seconds if flops else None
        measured.append(Measured(op_class, f"{name} of {LIGHT} {dtype}", seconds, rate))
    return measured


def _elementwise(mesh: Any, dtype: str) -> list[Measured]:
    # FLOPs as a graph counts them: none for a transcendental.
    functions = {
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
    rows = jnp.asarray(np.random.default_rng(0).permutation(LIGHT // 64), "int32")

    def gather(x: Any) -> Any:
        return x.reshape(-1, 64)[rows].reshape(-1)

    return _light(
        mesh,
        dtype,
        "gather",
        {"rows of 64": (gather, 1)},
    )


def _sort(mesh: Any, dtype: str) -> list[Measured]:
    return _light(
        mesh,
        dtype,
        "sort",
        {"values": (lambda x: jnp.sort(-x), 1)},
    )


def _stream(mesh: Any, size: int) -> Measured:
    """Time of x / 2 + y on `size` values, repeated so that the program's start is negligible."""
    repeats = max(1, (1 << 22) // size)

    def one(x: Any, y: Any) -> Any:
        return jax.lax.fori_loop(
            0,
            repeats,
            lambda _, z: z * 0.5 + y,
            x,
        )

    shape = ((mesh.size * size,), SPLIT)
    each = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(SPLIT, SPLIT),
        out_specs=SPLIT,
    )
    seconds = _timed(mesh, each, shape, shape) / repeats
    nbytes = 3 * 4 * size
    return Measured(
        "stream",
        f"{nbytes >> 10} KiB",
        seconds,
        nbytes / seconds,
    )


def _memories(machine: Machine, streams: Sequence[Measured]) -> dict[str, float]:
    """Bandwidth of the main memory, and capacity and bandwidth of the cache.

    The cache's capacity is the largest stream that is twice as fast as main memory.
    """
    rates = [stream.rate or 0.0 for stream in streams]
    main, *caches = machine.device.memories
    values = {
        f"device.memory.{main.name}.bandwidth": rates[-1] * main.shared_by,
        f"device.memory.{main.name}.efficiency": 1.0,
    }
    fast = [i for i, rate in enumerate(rates) if rate > 2 * rates[-1]]
    if caches and fast:
        cache = caches[0]
        last = fast[-1]
        prefix = f"device.memory.{cache.name}"
        bandwidth = median(rates[: last + 1])
        values[f"{prefix}.capacity"] = int(3 * 4 * STREAMS[last] * cache.shared_by)
        values[f"{prefix}.bandwidth"] = bandwidth * cache.shared_by
        values[f"{prefix}.efficiency"] = 1.0
    return values


def _chain(mesh: Any) -> Measured:
    """Time of one of many dependent small products."""

    def one(x: Any) -> Any:
        y = x[0]
        for _ in range(CHAIN):
            y = y @ x[0]
        return y[None]

    each = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=SPLIT,
        out_specs=SPLIT,
    )
    seconds = _timed(mesh, each, ((mesh.size, 8, 8), SPLIT)) / CHAIN
    return Measured("chain", "8x8x8", seconds)


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute")


@dataclass(frozen=True)
class LinkTransfer:
    """A timed collective."""

    kind: str
    group: int
    """Number of devices that communicate."""
    nbytes: float
    """Bytes as `collective_seconds` counts them."""
    measured: Measured


def _groups(devices: int) -> list[int]:
    """Sizes of groups of neighbours that divide the devices."""
    return [n for n in range(2, devices + 1) if devices % n == 0]


def _communication(kind: str, group: int) -> Callable[[Any], Any]:
    """A collective over the axis "b" of `group` devices."""
    ring = [(i, (i + 1) % group) for i in range(group)]
    functions: dict[str, Callable[[Any], Any]] = {
        "all_reduce": lambda x: jax.lax.psum(x, "b"),
        "all_gather": lambda x: jax.lax.all_gather(x, "b", tiled=True),
        "reduce_scatter": lambda x: jax.lax.psum_scatter(x, "b", tiled=True),
        "all_to_all": lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True),
        "collective_permute": lambda x: jax.lax.ppermute(x, "b", ring),
    }
    return functions[kind]


def _collective(
    mesh: Any,
    kind: str,
    group: int,
    size: int,
) -> LinkTransfer:
    """One collective on `size` float32 values a device, in groups of neighbours, all at once.

    As in a step, its operand was computed just before. The time of a program that only computes
    the operand is subtracted.
    """
    n = mesh.size
    group_mesh = jax.sharding.Mesh(mesh.devices.reshape(n // group, group), ("a", "b"))
    communicate = _communication(kind, group)
    size -= size % group
    spec = PartitionSpec(("a", "b"))

    def seconds_of(function: Callable[[Any], Any]) -> float:
        each = jax.shard_map(
            function,
            mesh=group_mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )
        return _timed(group_mesh, each, ((n * size,), spec))

    seconds = seconds_of(lambda x: communicate(x + 1)) - seconds_of(lambda x: x + 1)
    text = f"{4 * size >> 10} KiB of each of {group}"
    measured = Measured(kind, text, seconds, 4 * size / seconds)
    parts = group if kind == "all_gather" else 1
    return LinkTransfer(kind, group, 4.0 * size * parts, measured)


def _fit_links(
    machine: Machine,
    level: str,
    transfers: Sequence[LinkTransfer],
) -> tuple[dict[str, float], list[float]]:
    """Latency and bandwidth for which the model of collectives is nearest to the measurements.

    Also the model's relative errors.
    """
    paths = (f"level.{level}.latency", f"level.{level}.bandwidth")

    def figures(logs: Any) -> dict[str, float]:
        return dict(zip(paths, map(float, np.exp(logs)), strict=True))

    def predicted(logs: Any) -> np.ndarray:
        guess = machine.revised(figures(logs), "a guess")
        times = []
        for transfer in transfers:
            links = ((len(machine.levels) - 1, transfer.group),)
            times.append(collective_seconds(guess, transfer.kind, transfer.nbytes, links))
        return np.array(times)

    def loss(logs: Any) -> float:
        return float(np.sum(np.log(predicted(logs) / measured) ** 2))

    measured = np.array([transfer.measured.seconds for transfer in transfers])
    largest = max(transfers, key=lambda transfer: transfer.nbytes)
    latency = max(1e-7, measured.min())
    bandwidth = largest.nbytes / largest.measured.seconds
    start = np.log([latency, bandwidth])
    best = minimize(loss, start, method="Nelder-Mead")
    errors = np.abs(predicted(best.x) / measured - 1)
    return figures(best.x), list(errors)
