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
from partita.execute import members
from partita.execute.calibration_sizes import (
    STREAM_ARRAYS,
    VALUE_BYTES,
    CalibrationSizes,
    sizes_of,
)
from partita.execute.process_arrays import put
from partita.files.checksums import KEY, checksum, sealed
from partita.files.reading import FileKind, checked, parse_toml, read_text
from partita.files.schema import mapping, plain, positive_number, table
from partita.files.writing import check_writable
from partita.machine import Machine
from partita.machine.collectives import collective_seconds

ROUNDS = 7
"""Timed runs of a program. The median counts."""
LIGHT = 1 << 16
"""Size of a device's array for light operations (element-wise, reduce, gather, sort), values.
It stays in the caches."""
REPEATS = 32
"""Runs of a light operation in one program."""
WIDE = ("float32", "bfloat16", "float16")
"""Dtypes of the rates, if the machine's model distinguishes them."""


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
        content = "\n".join(lines) + "\n"
        comment = "# Measured by 'partita machine measure'. Delete this file for assumed figures."
        return f'{comment}\n{KEY} = "{checksum(tomllib.loads(content))}"\n{content}'


CALIBRATION_FILE = FileKind(
    "a calibration",
    "delete the file, or measure again with 'partita machine measure'",
    MachineError,
    by_hand=False,
    most_bytes=2**24,
)

MANNERS = {"cpu": 3}
"""Platform -> version of the measuring method. A new one makes older figures invalid."""
MANNER = 4
"""The version on all other platforms."""


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
        "manner": MANNERS.get(jax.devices()[0].platform, MANNER),
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
    table_of_file = parse_toml(read_text(path, CALIBRATION_FILE), path, CALIBRATION_FILE)
    content = checked(table_of_file, _CONTENT, path, CALIBRATION_FILE)
    if content["key"] != key:
        return machine
    figures = machine.provenance()
    measured = content["values"]
    values = {name: value for name, value in measured.items() if name in figures}
    return machine.revised(values, f"partita machine measure, {path.name}")


_CONTENT = sealed(
    table(
        {"key": mapping(plain), "values": mapping(positive_number)},
        {"fit": plain, "measured": plain},
    ),
    required=True,
)


def calibrate(machine: Machine, report: Callable[[str], None]) -> Calibration:
    """Measures the local devices, described by `machine`, and fits its model to them.

    `report` gets the name of every measurement before it starts.
    """
    devices = members.devices()[: machine.devices]
    mesh = jax.sharding.Mesh(np.array(devices), ("a",))
    figures = machine.provenance()
    sizes = sizes_of(machine)
    programs_of = _engine_programs(mesh, machine, sizes, report)
    measured: list[Measured] = []
    for programs in programs_of.values():
        measured += programs
    report("memory")
    streams = [_stream(mesh, machine, sizes, size) for size in sizes.streams]
    measured += streams
    report("starting an operation")
    chain = _chain(mesh, sizes.chain)
    measured.append(chain)
    values = _memories(machine, sizes, streams)
    values["device.overhead"] = chain.seconds
    errors: list[float] = []
    for engine, programs in programs_of.items():
        rates = [program.rate for program in programs if program.rate]
        rate = geometric_mean(rates)
        values[f"device.engine.{engine}.peak"] = rate
        values[f"device.engine.{engine}.efficiency"] = 1.0
        errors += [abs(rate / program_rate - 1) for program_rate in rates]
    if len(devices) > 1:
        transfers = _transfers(mesh, machine, sizes, report)
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
    machine: Machine,
    sizes: CalibrationSizes,
    report: Callable[[str], None],
) -> dict[str, list[Measured]]:
    """The "class.dtype" of the machine's engines -> its timed programs."""
    figures = machine.provenance()
    programs_of: dict[str, list[Measured]] = {}
    for op_class, name in NAMES.items():
        for dtype in WIDE:
            engine = f"{op_class}.{machine.run_dtype(op_class, dtype)}"
            if f"device.engine.{engine}.peak" not in figures:
                continue
            report(f"{name}, {dtype}")
            if op_class == "dot":
                programs_of[engine] = _dots(mesh, machine, sizes, dtype)
            elif op_class == "conv":
                programs_of[engine] = _convs(mesh, machine, sizes, dtype)
            else:
                programs_of[engine] = _light(mesh, op_class, dtype)
    return programs_of


def _transfers(
    mesh: Any, machine: Machine, sizes: CalibrationSizes, report: Callable[[str], None]
) -> list[LinkTransfer]:
    """Timed collectives of every kind, group size and size.

    Without the smallest ones, if noise exceeds their time.
    """
    transfers: list[LinkTransfer] = []
    for kind in COLLECTIVES:
        report(kind.replace("_", "-"))
        for group in _groups(mesh.size):
            for size in sizes.reduced:
                transfer = _collective(mesh, machine, sizes, kind, (group, size))
                if transfer.measured.seconds > 0:
                    transfers.append(transfer)
    return transfers


@dataclass(frozen=True)
class Operand:
    """An array of a timed program."""

    shape: tuple[int, ...]
    sharding: PartitionSpec
    deviation: float = 0.0
    """Standard deviation of its normal values around 0; 0: all values are 0.5.

    The power of an accelerator, and with it its clock, depend on the values.
    """

    def array(self, dtype: str) -> np.ndarray:
        """The values."""
        if not self.deviation:
            return np.full(self.shape, 0.5).astype(dtype)
        block = np.random.default_rng(0).standard_normal(1 << 16) * self.deviation
        return np.resize(block.astype(dtype), self.shape)


def _timed(mesh: Any, function: Any, *operands: Operand, dtype: str = "float32") -> float:
    """Median seconds of a jitted function of operands."""
    values = []
    for operand in operands:
        values.append(put(operand.array(dtype), NamedSharding(mesh, operand.sharding)))
    run = jax.jit(function)
    jax.block_until_ready(run(*values))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(run(*values))
        times.append(time.perf_counter() - start)
    return median(times)


def _repeated(function: Callable[[Any], Any], repeats: int, first: Any) -> Any:
    """The function applied `repeats` times, each time to the result before."""
    if repeats == 1:
        return function(first)
    return jax.lax.fori_loop(0, repeats, lambda _, value: function(value), first)


SPLIT = PartitionSpec("a")
NAMES = {
    "dot": "matrix products",
    "conv": "convolutions",
    "elementwise": "element-wise operations",
    "reduce": "reductions",
    "gather": "gathers",
    "sort": "sorts",
}


def _each(mesh: Any, function: Any, *operands: Operand, dtype: str) -> float:
    """Median seconds of a function of operands of these shapes, computed by every device."""

    def of_device(*parts: Any) -> Any:
        results = function(*(part[0] for part in parts))
        return jax.tree.map(lambda result: result[None], results)

    each = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=SPLIT,
        out_specs=SPLIT,
    )
    arrays = [
        Operand((mesh.size, *operand.shape), SPLIT, operand.deviation) for operand in operands
    ]
    return _timed(mesh, each, *arrays, dtype=dtype)


def _dots(mesh: Any, machine: Machine, sizes: CalibrationSizes, dtype: str) -> list[Measured]:
    """Products x @ up; repeated ones alternate with the product that brings the width back."""
    measured = []
    for rows, inner, columns in sizes.dots:
        flops = 2 * rows * inner * columns
        repeats = sizes.repeats(flops / machine.rate("dot", dtype))
        pairs = repeats // 2

        def products(x: Any, up: Any, down: Any, pairs: int = pairs) -> Any:
            return _repeated(lambda y: (y @ up) @ down, pairs, x)

        if repeats == 1:
            operands = (Operand((rows, inner), SPLIT), Operand((inner, columns), SPLIT))
            seconds = _each(mesh, lambda x, up: x @ up, *operands, dtype=dtype)
        else:
            # Weights that keep the size of the values: products of infinities take less power.
            x = Operand((rows, inner), SPLIT, 1.0)
            up = Operand((inner, columns), SPLIT, inner**-0.5)
            down = Operand((columns, inner), SPLIT, columns**-0.5)
            seconds = _each(mesh, products, x, up, down, dtype=dtype) / (2 * pairs)
        size = f"{rows}x{inner}x{columns} {dtype}"
        measured.append(Measured("dot", size, seconds, flops / seconds))
    return measured


def _convs(mesh: Any, machine: Machine, sizes: CalibrationSizes, dtype: str) -> list[Measured]:
    """Convolutions with both gradients; repeated ones take the gradients as operands."""

    def loss(x: Any, w: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.sum(y**2)

    gradients = jax.grad(loss, argnums=(0, 1))

    def next_operands(operands: Any) -> Any:
        x, w = operands
        x_gradient, w_gradient = gradients(x, w)
        # The factors keep the values from growing: the squared norm of w is about 4.
        return (x_gradient * 0.125).astype(x.dtype), (w + w_gradient * 1e-6).astype(w.dtype)

    measured = []
    for samples, side, inputs, outputs, kernel in sizes.convs:
        flops = 3 * 2 * samples * side * side * inputs * outputs * kernel * kernel
        repeats = sizes.repeats(flops / machine.rate("conv", dtype))
        x_shape = (samples, side, side, inputs)
        w_shape = (kernel, kernel, inputs, outputs)

        def repeated(x: Any, w: Any, repeats: int = repeats) -> Any:
            return _repeated(next_operands, repeats, (x, w))

        if repeats == 1:
            function, deviations = gradients, (0.0, 0.0)
        else:
            function, deviations = repeated, (1.0, (kernel * kernel * inputs) ** -0.5)
        operands = (Operand(x_shape, SPLIT, deviations[0]), Operand(w_shape, SPLIT, deviations[1]))
        seconds = _each(mesh, function, *operands, dtype=dtype) / repeats
        size = f"{samples}x{side}x{side}x{inputs} to {outputs} by {kernel}x{kernel} {dtype}"
        measured.append(Measured("conv", size, seconds, flops / seconds))
    return measured


def _light_functions(op_class: str, dtype: str) -> dict[str, tuple[Any, int]]:
    """Functions x -> x of a class by name, each with the FLOPs per value that a graph counts:
    none for a transcendental."""
    if op_class == "elementwise":
        return {
            "tanh": (jnp.tanh, 0),
            "relu": (lambda x: jnp.maximum(x * x, 0) + x, 3),
            "polynomial": (lambda x: ((x * 0.5 - 0.25) * x + 0.125) * x, 5),
            "division": (lambda x: x / (x + 1), 2),
        }
    if op_class == "reduce":
        return {
            "rows": (lambda x: x + jnp.sum(x.reshape(256, -1), 1).astype(dtype)[0], 1),
            "columns": (lambda x: x + jnp.sum(x.reshape(256, -1), 0).astype(dtype)[0], 1),
        }
    if op_class == "gather":
        rows = jnp.asarray(np.random.default_rng(0).permutation(LIGHT // 64), "int32")
        return {"rows of 64": (lambda x: x.reshape(-1, 64)[rows].reshape(-1), 1)}
    return {"values": (lambda x: jnp.sort(-x), 1)}


def _light(mesh: Any, op_class: str, dtype: str) -> list[Measured]:
    """Rates of light operations on values that stay in the cache, `REPEATS` times in a row."""
    measured = []
    for name, (function, flops) in _light_functions(op_class, dtype).items():

        def repeated(x: Any, function: Any = function) -> Any:
            return _repeated(function, REPEATS, x)

        seconds = _each(mesh, repeated, Operand((LIGHT,), SPLIT), dtype=dtype) / REPEATS
        rate = flops * LIGHT / seconds if flops else None
        measured.append(Measured(op_class, f"{name} of {LIGHT} {dtype}", seconds, rate))
    return measured


def _stream(mesh: Any, machine: Machine, sizes: CalibrationSizes, size: int) -> Measured:
    """Time of x / 2 + y on `size` values, repeated so that the program's start is negligible."""
    nbytes = STREAM_ARRAYS * VALUE_BYTES * size
    repeats = max((1 << 22) // size, sizes.repeats(nbytes / machine.memory_bandwidth))

    def one(x: Any, y: Any) -> Any:
        return jax.lax.fori_loop(
            0,
            repeats,
            lambda _, z: z * 0.5 + y,
            x,
        )

    operand = Operand((mesh.size * size,), SPLIT)
    each = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(SPLIT, SPLIT),
        out_specs=SPLIT,
    )
    seconds = _timed(mesh, each, operand, operand) / repeats
    return Measured(
        "stream",
        f"{nbytes >> 10} KiB",
        seconds,
        nbytes / seconds,
    )


def _memories(
    machine: Machine, sizes: CalibrationSizes, streams: Sequence[Measured]
) -> dict[str, float]:
    """Bandwidth of the main memory, and capacity and bandwidth of the cache.

    The cache's capacity is the largest stream that is twice as fast as main memory.
    """
    rates = [stream.rate or 0.0 for stream in streams]
    main, *others = machine.device.memories
    caches = [memory for memory in others if memory.capacity < main.capacity]
    values = {
        f"device.memory.{main.name}.bandwidth": rates[-1] * main.shared_by,
        f"device.memory.{main.name}.efficiency": 1.0,
    }
    fast = [number for number, rate in enumerate(rates) if rate > 2 * rates[-1]]
    if caches and fast:
        cache = caches[0]
        last = fast[-1]
        prefix = f"device.memory.{cache.name}"
        bandwidth = median(rates[: last + 1])
        nbytes = STREAM_ARRAYS * VALUE_BYTES * sizes.streams[last]
        values[f"{prefix}.capacity"] = int(nbytes * cache.shared_by)
        values[f"{prefix}.bandwidth"] = bandwidth * cache.shared_by
        values[f"{prefix}.efficiency"] = 1.0
    return values


def _chain(mesh: Any, length: int) -> Measured:
    """Time of one of many dependent small products."""

    def one(x: Any) -> Any:
        y = x[0]
        for _ in range(length):
            y = y @ x[0]
        return y[None]

    each = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=SPLIT,
        out_specs=SPLIT,
    )
    seconds = _timed(mesh, each, Operand((mesh.size, 8, 8), SPLIT)) / length
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
    mesh: Any, machine: Machine, sizes: CalibrationSizes, kind: str, extent: tuple[int, int]
) -> LinkTransfer:
    """One collective in groups of neighbours, all at once.

    `extent`: devices of a group, float32 values of a device. As in a step, its operand was computed
    just before. The time of a program that only computes the operand is subtracted.
    """
    group, size = extent
    n = mesh.size
    group_mesh = jax.sharding.Mesh(mesh.devices.reshape(n // group, group), ("a", "b"))
    communicate = _communication(kind, group)
    size -= size % group
    parts = group if kind == "all_gather" else 1
    nbytes = 4.0 * size * parts
    links = ((len(machine.levels) - 1, group),)
    repeats = sizes.repeats(collective_seconds(machine, kind, nbytes, links))
    spec = PartitionSpec(("a", "b"))

    def with_transfer(x: Any) -> Any:
        result = communicate(x + 1)
        return result if repeats == 1 else jnp.resize(result, x.shape)

    def seconds_of(function: Callable[[Any], Any]) -> float:
        each = jax.shard_map(
            lambda x: _repeated(function, repeats, x),
            mesh=group_mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )
        return _timed(group_mesh, each, Operand((n * size,), spec)) / repeats

    seconds = seconds_of(with_transfer) - seconds_of(lambda x: x + 1)
    text = f"{4 * size >> 10} KiB of each of {group}"
    measured = Measured(kind, text, seconds, 4 * size / seconds)
    return LinkTransfer(kind, group, nbytes, measured)


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
