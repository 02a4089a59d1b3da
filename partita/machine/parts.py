"""The parts of a machine: devices with memories and engines, levels of links, the backend.

A number's annotation states its dimension, and that is the whole schema: reader, writer, checks and
provenance all follow the same annotations (`number_fields`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

Bytes = Annotated[int, "B"]
BytesPerSecond = Annotated[float, "B/s"]
FlopsPerSecond = Annotated[float, "FLOP/s"]
Seconds = Annotated[float, "s"]
JoulesPerBit = Annotated[float, "J/bit"]
Hertz = Annotated[float, "Hz"]
Volts = Annotated[float, "V"]
Watts = Annotated[float, "W"]
Count = Annotated[int, "count"]
Efficiency = Annotated[float, "efficiency"]
"""The achievable part of a peak, above 0 and at most 1."""
Fraction = Annotated[float, "fraction"]
"""0 to 1."""
Celsius = Annotated[float, "degC"]
Kelvins = Annotated[float, "K"]
Number = Annotated[float, "number"]
"""Any finite number, without a unit."""
WattsByCount = Annotated[tuple[float, ...], "W"]
"""Power with 1, 2, ... active devices."""
Matrix = Annotated[tuple[tuple[float, ...], ...], "number"]
"""Rows of numbers without a unit."""
Value = float | tuple[float, ...] | tuple[tuple[float, ...], ...]
"""A number of a description, or numbers with one source."""

OP_CLASSES = ("dot", "conv", "attention", "elementwise", "gather", "reduce", "sort", "*")
FULL_FLOAT32 = "full float32"
"""The dtype of products that run in float32 whatever the backend does to other ones of float32."""
DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16", "int8", "*")
FABRICS = ("switch", "tree", "bus", "ring", "torus", "mesh")
DOMAINS = ("clock", "power", "thermal", "failure")
ROUTINGS = ("xy", "yx")
DIRECTIONS = ("both", "up", "down")
PLAIN_DIMENSIONS = ("count", "efficiency", "fraction", "number")
"""Dimensions of numbers without a unit."""
PLATFORMS = ("cpu", "cuda", "tpu")
STATUSES = ("measured", "verified", "derived", "recalled", "assumed")
"""Certainty of a number, surest first."""
ZERO_CELSIUS = 273.0
"""Kelvin of 0 °C, as the thermal models use it."""
LEAKAGE_CELSIUS = 60.0
"""Temperature of the power of operating points."""


@dataclass(frozen=True)
class Memory:
    """A memory of a device. `shared_by` devices divide its `capacity` and `bandwidth`.

    `device_limit` is the bandwidth that one device can draw alone, at its first operating point.
    """

    name: str
    capacity: Bytes
    bandwidth: BytesPerSecond
    efficiency: Efficiency = 1.0
    shared_by: Count = 1
    endurance_writes: Count | None = None
    energy_per_bit: JoulesPerBit | None = None
    device_limit: BytesPerSecond | None = None

    @property
    def device_bandwidth(self) -> float:
        """Achievable bytes per second of one device."""
        return self.bandwidth * self.efficiency / self.shared_by


@dataclass(frozen=True)
class Engine:
    """Speed of a device on operators of one class in one dtype.

    "*" stands for every class or dtype without an engine of its own.
    """

    op_class: str
    dtype: str
    peak: FlopsPerSecond
    efficiency: Efficiency

    @property
    def rate(self) -> float:
        """Achievable FLOP/s."""
        return self.peak * self.efficiency


@dataclass(frozen=True)
class OperatingPoint:
    """A frequency of a device, with its power. The engines' peaks are those of the first point.

    `power` is that of a device whose kernels run, `idle_power` that of a waiting one; both with its
    memories.
    """

    name: str
    frequency: Hertz
    power: Watts
    voltage: Volts | None = None
    idle_power: Watts | None = None


@dataclass(frozen=True)
class DomainPoint:
    """A frequency of a domain: its voltage, and its power by number of active devices."""

    name: str
    frequency: Hertz
    voltage: Volts
    power: WattsByCount


@dataclass(frozen=True)
class Leakage:
    """Static power of a domain at voltage V and temperature T (kelvin), watts.

    V (scale T^2 exp(-activation / T) + gate), of all devices of the domain.
    """

    scale: Number
    activation: Kelvins
    gate: Number

    def watts(self, volts: float, celsius: float) -> float:
        """Static power at a voltage and a temperature."""
        kelvin = celsius + ZERO_CELSIUS
        subthreshold = self.scale * kelvin**2 * math.exp(-self.activation / kelvin)
        return volts * (subthreshold + self.gate)


@dataclass(frozen=True)
class Device:
    """One of the machine's equal devices."""

    name: str
    overhead: Seconds
    """Seconds that each kernel costs besides its work."""
    memories: tuple[Memory, ...]
    """The first is the main memory."""
    engines: tuple[Engine, ...]
    points: tuple[OperatingPoint, ...] = ()


@dataclass(frozen=True)
class DeviceKind(Device):
    """`count` consecutive devices of a machine with different devices."""

    key: str = ""
    """Name of the kind in the description."""
    count: Count = 1


@dataclass(frozen=True)
class Level:
    """`size` equal parts joined by links.

    The parts are devices at the innermost level, else levels of the next one.
    """

    name: str
    size: Count
    fabric: str
    latency: Seconds
    """Time from send to receive of an empty message."""
    bandwidth: BytesPerSecond
    """Of one link, per direction. In a ring, torus or mesh: of all links of a device at this level
    together."""
    shared_by: Count = 1
    """Devices that share a link when all send at once (four GPUs behind one network card: 4)."""
    energy_per_bit: JoulesPerBit | None = None


@dataclass(frozen=True)
class Domain:
    """Groups of `devices` consecutive devices that clock, draw power, heat or fail together.

    The members are the devices of the kind `members`, or all devices. The engines' peaks are those
    of the first point.
    """

    name: str
    kind: str
    devices: Count
    members: str = ""
    watts: Watts | None = None
    """Power that a group draws always, besides that of its points."""
    switch: Seconds | None = None
    """Time of a change of the operating point."""
    points: tuple[DomainPoint, ...] = ()
    """Slowest to fastest, or in any order."""
    leakage: Leakage | None = None
    """The part of the points' power that grows with temperature; their power is that at
    LEAKAGE_CELSIUS."""


@dataclass(frozen=True)
class Trip:
    """A temperature from which a domain may not exceed a frequency.

    The limit ends `hysteresis` below the temperature.
    """

    name: str
    domain: str
    temperature: Celsius
    hysteresis: Kelvins
    frequency: Hertz


@dataclass(frozen=True)
class Thermal:
    """Temperatures as a linear system: x[k+1] = transition x[k] + gain P[k].

    x: temperatures of the nodes above `ambient`. P: watts of the clock and power domains, in their
    order. One step takes `step`.
    """

    step: Seconds
    ambient: Celsius
    transition: Matrix
    gain: Matrix
    trips: tuple[Trip, ...] = ()


@dataclass(frozen=True)
class Grid:
    """A network on chip: tiles in `rows` and `columns`, a router each, links between neighbours.

    `routing`: "xy" goes along the row first. `direction`: "both"; "up" for links that lead to
    growing coordinates only, "down" for falling ones. `closed`: a torus.
    """

    name: str
    columns: Count
    rows: Count
    bandwidth: BytesPerSecond
    """Of a link, per direction."""
    hop_latency: Seconds
    routing: str = "xy"
    direction: str = "both"
    closed: bool = False
    energy_per_bit: JoulesPerBit | None = None
    """Of a hop."""


@dataclass(frozen=True)
class Attached:
    """Compute attached to memory: `units` with a memory each, reached through the host only.

    Units do not exchange data: the host gathers (`up`), scatters (`down`) and broadcasts. All rates
    are those of the whole unless they are said to be a unit's. `lockstep` units run the same
    instruction.
    """

    name: str
    units: Count
    lockstep: Count
    capacity: Bytes
    """Of a unit."""
    bandwidth: BytesPerSecond
    """Of a unit to its own memory."""
    up: BytesPerSecond
    down: BytesPerSecond
    broadcast: BytesPerSecond
    launch: Seconds
    """Of one kernel, from the host's call to its return."""
    power: Watts | None = None
    """Of all units at work."""
    endurance_writes: Count | None = None
    """Writes that a cell lasts."""
    write_bandwidth: BytesPerSecond | None = None
    """Of all units, for new weights; `down` if None."""
    engines: tuple[Engine, ...] = ()
    """Of a unit. Classes and dtypes without an engine run on the devices."""
    in_main_memory: bool = False
    """The units compute in the devices' main memory, so stored operands need no transfer."""


@dataclass(frozen=True)
class Backend:
    """The behaviour of the compiler and its runtime on a machine."""

    reduce_scatter: bool = True
    """A sum with a split target is a reduce-scatter. If False: an all-reduce and a slice."""
    overlap: Fraction = 0.0
    """The part of a collective's time that independent compute hides."""
    promotes_16_bit_all_reduce: bool = False
    """bfloat16 is summed, and sent, as float32; float16 is not."""
    float32_products: str = "float32"
    """The dtype of float32 dots and convolutions, unless the program asks for more precision."""
    dense_grouped_gradients: bool = False
    """The weight gradient of a grouped convolution is computed for all pairs of groups."""
    recomputes: bool = False
    """A value with several kernels as readers is computed in each of them where possible, not only
    where that saves reads."""
    transposed_copies: bool = False
    """Convolutions of the backward pass read transposed copies, which are made early and stored."""
    platform: str = ""
    """The platform for which programs are compiled, one of PLATFORMS; "" where it is not known."""
    compute_capability: str = ""
    """The generation of an NVIDIA GPU ("8.0"), which decides on its kernels; "" for the newest."""
    on_chip_memory: Bytes | None = None
    """Memory beside the main one that holds a program's temporaries, as the compiler decides."""
    combines: bool = True
    """Sums of gradients at the same time are started once. If False: each by itself."""


@dataclass(frozen=True)
class Source:
    """The origin of the number at a key path, and its value there."""

    path: str
    value: Value
    source: str
    status: str


@lru_cache
def number_fields(part: type) -> tuple[tuple[str, str], ...]:
    """The fields of a class of parts that hold numbers, each with its dimension."""
    numbers = []
    for name, hint in get_type_hints(part, include_extras=True).items():
        for option in _options(hint):
            if get_origin(option) is Annotated:
                numbers.append((name, get_args(option)[1]))
    return tuple(numbers)


@lru_cache
def list_depth(part: type, field: str) -> int:
    """How deep the lists of a number field are nested: 0 for a plain number, 2 for a matrix."""
    hints = get_type_hints(part, include_extras=True)
    for option in _options(hints[field]):
        if get_origin(option) is Annotated:
            return str(get_args(option)[0]).count("tuple")
    return 0


def _options(hint: Any) -> Iterator[Any]:
    """The members of a union type, or the type itself."""
    if get_origin(hint) in (Union, type(int | None)):
        yield from get_args(hint)
    else:
        yield hint


def path_fields(part: type) -> tuple[str, ...]:
    """The fields of a class of parts that form the last keys of its path."""
    if part in (Device, Backend, Thermal, Leakage):
        return ()
    if part is DeviceKind:
        return ("key",)
    if part is Engine:
        return ("op_class", "dtype")
    return ("name",)


def slowest_kind(kinds: Sequence[DeviceKind]) -> DeviceKind:
    """The kind with the lowest best rate, then with the lowest main memory bandwidth."""

    def speed(kind: DeviceKind) -> tuple[float, list[float]]:
        best_rate = max((engine.rate for engine in kind.engines), default=0.0)
        return best_rate, [memory.device_bandwidth for memory in kind.memories[:1]]

    return min(kinds, key=speed)
