"""The machine: its devices, their memories and engines, the links between them, and where every number comes from.

A value, not a model: what a machine is, as its description says. What follows from it is elsewhere: collective times in
`collectives.py`, reading a description in `load.py`, what later stages may rely on in `check.py`.

Devices stand at the leaves of a tree of `levels`, outermost (slow links) to innermost (fast links); there are as many as the product of the level
sizes. They are all alike, or of `kinds`, whose counts follow each other along the leaves. A number's annotation says its unit, and that is the whole schema:
the reader, the writer, the checks and the provenance all walk the same annotations (`numbers`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from partita.errors import MachineError
from partita.machine.times import OperatorTimes
from partita.units import exact, format_bandwidth, format_bytes, format_flops, format_seconds

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

OP_CLASSES = ("dot", "conv", "elementwise", "gather", "reduce", "sort", "*")
DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16", "int8", "*")
FABRICS = ("switch", "tree", "bus", "ring", "torus", "mesh")
DOMAINS = ("clock", "power", "failure")
STATUSES = ("measured", "verified", "derived", "recalled", "assumed")
"""How sure a number is, surest first."""


@dataclass(frozen=True)
class Memory:
    """A memory of a device. `capacity` and `bandwidth` are those of the memory; `shared_by` devices divide them."""

    name: str
    capacity: Bytes
    bandwidth: BytesPerSecond
    efficiency: Efficiency = 1.0
    shared_by: Count = 1
    endurance_writes: Count | None = None
    energy_per_bit: JoulesPerBit | None = None


@dataclass(frozen=True)
class Engine:
    """How fast a device computes operators of one class in one dtype; "*" stands for every class or dtype not named."""

    op_class: str
    dtype: str
    peak: FlopsPerSecond
    efficiency: Efficiency


@dataclass(frozen=True)
class OperatingPoint:
    """A frequency that a device can run at, and what that costs. The engines' peaks are those of the first point."""

    name: str
    frequency: Hertz
    power: Watts
    voltage: Volts | None = None


@dataclass(frozen=True)
class Device:
    """One of the machine's equal devices. The first memory is the main one; `overhead` is what each kernel costs."""

    name: str
    overhead: Seconds
    memories: tuple[Memory, ...]
    engines: tuple[Engine, ...]
    points: tuple[OperatingPoint, ...] = ()


@dataclass(frozen=True)
class DeviceKind(Device):
    """`count` consecutive devices of a machine whose devices differ; `key` is what its description calls them."""

    key: str = ""
    count: Count = 1


@dataclass(frozen=True)
class Level:
    """`size` equal parts joined by links: the parts are devices at the innermost level, else levels of the next one.

    `bandwidth` is what a link carries per direction, and `shared_by` how many devices have to share that link when all
    send at once (four GPUs behind one network card: 4). Of a ring, torus or mesh it is all links of a device along this
    level together. `latency` is the time from send to receive of an empty message.
    """

    name: str
    size: Count
    fabric: str
    latency: Seconds
    bandwidth: BytesPerSecond
    shared_by: Count = 1


@dataclass(frozen=True)
class Domain:
    """Every `devices` consecutive devices clock, draw power or fail together."""

    name: str
    kind: str
    devices: Count


@dataclass(frozen=True)
class Backend:
    """What the compiler and its runtime do on this machine.

    reduce_scatter: a sum that is wanted split is a reduce-scatter; if not, an all-reduce and a slice.
    overlap: the part of a collective's time that hides behind independent compute.
    promotes_16_bit_all_reduce: bfloat16 and float16 are summed, and sent, as float32.
    float32_products: the dtype in which float32 dots and convolutions run unless the program asks for more precision.
    dense_grouped_gradients: the weight gradient of a grouped convolution is computed for all pairs of groups.
    recomputes: what several kernels read is computed in each where that is possible, not only where it saves reads.
    transposed_copies: convolutions of the backward pass read transposed copies, made early and kept.
    combines: sums of gradients that are done at once are started once; if not, each is started by itself.
    """

    reduce_scatter: bool = True
    overlap: Fraction = 0.0
    promotes_16_bit_all_reduce: bool = False
    float32_products: str = "float32"
    dense_grouped_gradients: bool = False
    recomputes: bool = False
    transposed_copies: bool = False
    combines: bool = True


@dataclass(frozen=True)
class Source:
    """Where the number at a key path comes from, and the value that was read there."""

    path: str
    value: float
    source: str
    status: str


@dataclass(frozen=True)
class Machine:
    name: str
    device: Device
    levels: tuple[Level, ...]
    backend: Backend = Backend()
    domains: tuple[Domain, ...] = ()
    notes: str = ""
    sources: tuple[Source, ...] = ()
    kinds: tuple[DeviceKind, ...] = ()
    """Where devices differ: what they are, in their order; `device` is then the slowest. Empty where all are alike."""
    times: OperatorTimes | None = None
    """What operators were measured to take, where they were: no part of the description."""

    @property
    def devices(self) -> int:
        return math.prod(level.size for level in self.levels)

    def device_kinds(self) -> list[int]:
        """Per device the number of its kind; empty where all are alike."""
        return (
            [n for n, kind in enumerate(self.kinds) for _ in range(kind.count)]
            if len(self.kinds) > 1
            else []
        )

    def of_kind(self, number: int) -> Machine:
        """This machine as if all of its devices were of one kind."""
        if not self.kinds:
            return self
        kind = self.kinds[number]
        return replace(
            self,
            device=Device(kind.name, kind.overhead, kind.memories, kind.engines, kind.points),
            kinds=(),
        )

    @property
    def memory_bytes(self) -> int:
        """One device's share of its main memory, in bytes; the smallest where devices differ."""
        return min(
            device.memories[0].capacity // device.memories[0].shared_by
            for device in self.kinds or (self.device,)
        )

    @property
    def memory_bandwidth(self) -> float:
        """Achievable bytes per second of one device to its main memory."""
        memory = self.device.memories[0]
        return memory.bandwidth * memory.efficiency / memory.shared_by

    def bandwidth_for(self, nbytes: np.ndarray) -> np.ndarray:
        """Achievable bytes per second of one device for kernels that touch so many bytes: of the fastest memory that holds them."""
        found = np.full(np.shape(nbytes), self.memory_bandwidth)
        for memory in self.device.memories[1:]:
            fits = np.asarray(nbytes) <= memory.capacity / memory.shared_by
            found = np.where(
                fits,
                np.maximum(found, memory.bandwidth * memory.efficiency / memory.shared_by),
                found,
            )
        return found

    @property
    def overhead(self) -> float:
        """Seconds that each kernel costs besides its work."""
        return self.device.overhead

    def rate(self, op_class: str, dtype: str) -> float:
        """Achievable FLOP/s of one device on operators of a class in a dtype.

        The engine that names most wins: (class, dtype), then (class, "*"), ("*", dtype), ("*", "*"). Products of
        float32 run as the backend runs them (`Backend.float32_products`).
        """
        engines = {(engine.op_class, engine.dtype): engine for engine in self.device.engines}
        asked = dtype
        if dtype == "float32" and op_class in ("dot", "conv"):
            dtype = self.backend.float32_products
        for key in ((op_class, dtype), (op_class, "*"), ("*", dtype), ("*", "*")):
            if key in engines:
                return engines[key].peak * engines[key].efficiency
        has = ", ".join(f"{engine.op_class}/{engine.dtype}" for engine in self.device.engines)
        raise MachineError(
            f"Machine '{self.name}' has no engine for '{op_class}' in {asked}: its engines are {has}. "
            f'Add {asked} = {{ peak = ..., efficiency = ... }} to [device.engine.{op_class}], or an engine for "*".'
        )

    def with_devices(self, count: int) -> Machine:
        """This machine with `count` of its devices: whole inner levels first, the same number in every part.

        Neighbouring torus levels are cut as square as they can be. A cut ring or torus no longer closes: it is a mesh.
        """
        if self.kinds and count == self.devices:
            return self
        if self.kinds:
            raise MachineError(
                f"Cannot take {count} devices of '{self.name}': its {self.devices} devices differ, and which ones is not said. Describe the smaller machine in a file."
            )
        sizes = _layout(self.levels, count) if 1 <= count <= self.devices else None
        if sizes is None:
            parts = " x ".join(f"{level.size} ({level.name})" for level in self.levels)
            low = next(
                (n for n in range(min(count - 1, self.devices), 0, -1) if _layout(self.levels, n)),
                None,
            )
            high = next(
                (n for n in range(max(count, 0) + 1, self.devices + 1) if _layout(self.levels, n)),
                None,
            )
            use = " or ".join(str(n) for n in (low, high) if n is not None)
            raise MachineError(
                f"Cannot take {count} devices of '{self.name}', which has {self.devices} as {parts}: "
                f"every part must get the same number. Use {use}."
            )
        before, after = self.devices, count
        levels = []
        for level, size in zip(self.levels, sizes, strict=True):
            inside_before, inside_after = before // level.size, after // size
            if level.shared_by > inside_before:  # a link of the whole level, not of each part
                shared_by = math.ceil(level.shared_by * after / before)
            else:
                shared_by = math.ceil(level.shared_by * inside_after / inside_before)
            fabric = (
                "mesh" if level.fabric in ("ring", "torus") and size < level.size else level.fabric
            )
            levels.append(replace(level, size=size, shared_by=shared_by, fabric=fabric))
            before, after = inside_before, inside_after
        memories = tuple(
            replace(memory, shared_by=min(memory.shared_by, count))
            for memory in self.device.memories
        )
        domains = tuple(
            replace(domain, devices=min(domain.devices, count)) for domain in self.domains
        )
        device = replace(self.device, memories=memories)
        return replace(self, device=device, levels=tuple(levels), domains=domains)._sourced(
            self, f"follows from taking {count} devices", "derived"
        )

    def revised(
        self, values: Mapping[str, float], source: str, status: str = "measured"
    ) -> Machine:
        """This machine with other numbers at some key paths, such as {"level.node.bandwidth": 2.1e9}."""
        left = dict(values)

        def change(path: str, part: Any) -> Any:
            mine = {
                name: left.pop(f"{path}.{name}")
                for name, _ in number_fields(type(part))
                if f"{path}.{name}" in left
            }
            return replace(part, **mine) if mine else part

        machine = _rebuilt(self, change)
        if left:
            raise MachineError(
                f"Machine '{self.name}' has no number {next(iter(left))}: it has {', '.join(self.provenance())}."
            )
        kept = tuple(known for known in self.sources if known.path not in values)
        new = tuple(Source(path, value, source, status) for path, value in values.items())
        return replace(machine, sources=tuple(sorted(kept + new, key=lambda known: known.path)))

    def _sourced(self, before: Machine, source: str, status: str) -> Machine:
        """Give this source to the numbers that differ from those of `before`."""
        old = {path: value for path, value, _ in numbers(before)}
        changed = {path: value for path, value, _ in numbers(self) if value != old[path]}
        return self.revised(changed, source, status)

    def provenance(self) -> dict[str, tuple[float, str, str]]:
        """Per key path ("level.node.bandwidth"): value, source, status. A number set in code is assumed."""
        known = {entry.path: entry for entry in self.sources}
        found = {}
        for path, value, _ in numbers(self):
            entry = known.get(path)
            if entry is None or entry.value != value:
                entry = Source(path, value, "set in code", "assumed")
            found[path] = (value, entry.source, entry.status)
        return found

    def weakest_status(self) -> str:
        """The status of the least sure number that a plan can rest on; levels of one part carry no traffic."""
        idle = tuple(f"level.{level.name}." for level in self.levels if level.size == 1)
        return max(
            (
                status
                for path, (_, _, status) in self.provenance().items()
                if not path.startswith(idle)
            ),
            key=STATUSES.index,
        )

    def to_toml(self) -> str:
        """The description that `load` reads back as an equal machine."""
        origin = self.provenance()
        lines = [f"name = {_text(self.name)}"]
        if self.notes:
            lines.append(f"notes = {_text(self.notes)}")
        for path, part in sections(self):
            dimensions = dict(number_fields(type(part)))
            lines += ["", f"[{'.'.join(_key(key) for key in path.split('.'))}]"]
            for field in fields(part):
                value = getattr(part, field.name)
                if (
                    value is None
                    or isinstance(value, tuple)
                    or (field.name in path_fields(type(part)))
                ):
                    continue
                if field.name in dimensions:
                    _, source, status = origin[f"{path}.{field.name}"]
                    number = _number(value, dimensions[field.name])
                    value = f"{{ value = {number}, source = {_text(source)}, status = {_text(status)} }}"
                else:
                    value = _text(value)
                lines.append(f"{field.name} = {value}")
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        lines = []
        for number, device in enumerate(self.kinds or (self.device,)):
            one = self.of_kind(number)
            memory = f"{format_bytes(one.memory_bytes)} at {format_bandwidth(one.memory_bandwidth)}"
            count = (
                f"{device.count} of {self.devices}"
                if isinstance(device, DeviceKind)
                else self.devices
            )
            lines.append(f"machine {self.name}: {count} x {device.name}, {memory} each")
        for level in self.levels:
            if level.size > 1:
                shared = f", shared by {level.shared_by}" if level.shared_by > 1 else ""
                link = (
                    f"{format_bandwidth(level.bandwidth)}, {format_seconds(level.latency)}{shared}"
                )
                lines.append(f"  {level.name}: {level.size} by {level.fabric}, {link}")
        for device in self.kinds or (self.device,):
            for engine in device.engines:
                rate = f"{format_flops(engine.peak * engine.efficiency)}/s of {format_flops(engine.peak)}/s"
                kind = f"{device.key}: " if isinstance(device, DeviceKind) else ""
                lines.append(f"  {kind}{engine.op_class} {engine.dtype}: {rate}")
        lines.append(f"  numbers: {self.weakest_status()} at worst")
        return "\n".join(lines)


def sections(machine: Machine) -> Iterator[tuple[str, Any]]:
    """Every part of a machine that holds numbers, with its key path."""
    found: list[tuple[str, Any]] = []
    _rebuilt(machine, lambda path, part: (found.append((path, part)), part)[1])
    yield from found


def numbers(machine: Machine) -> Iterator[tuple[str, float, str]]:
    """Every number of a machine: key path, value, dimension."""
    for path, part in sections(machine):
        for name, dimension in number_fields(type(part)):
            value = getattr(part, name)
            if value is not None:
                yield f"{path}.{name}", value, dimension


@lru_cache
def number_fields(part: type) -> tuple[tuple[str, str], ...]:
    """The fields of a class of parts that hold numbers, each with its dimension."""
    found = []
    for name, hint in get_type_hints(part, include_extras=True).items():
        for option in get_args(hint) if get_origin(hint) in (Union, type(int | None)) else (hint,):
            if get_origin(option) is Annotated:
                found.append((name, get_args(option)[1]))
    return tuple(found)


def path_fields(part: type) -> tuple[str, ...]:
    """The fields of a class of parts that its key path already says."""
    return {Device: (), Backend: (), DeviceKind: ("key",), Engine: ("op_class", "dtype")}.get(
        part, ("name",)
    )


def _rebuilt(machine: Machine, change: Callable[[str, Any], Any]) -> Machine:
    """The machine with every part replaced by `change(key path, part)`."""

    def all_of(prefix: str, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            change(
                f"{prefix}.{'.'.join(getattr(part, name) for name in path_fields(type(part)))}",
                part,
            )
            for part in parts
        )

    def whole(path: str, device: Any) -> Any:
        return replace(
            change(path, device),
            memories=all_of(f"{path}.memory", device.memories),
            engines=all_of(f"{path}.engine", device.engines),
            points=all_of(f"{path}.operating_point", device.points),
        )

    kinds = tuple(whole(f"kind.{kind.key}", kind) for kind in machine.kinds)
    return replace(
        machine,
        device=slowest_kind(kinds) if kinds else whole("device", machine.device),
        kinds=kinds,
        levels=all_of("level", machine.levels),
        domains=all_of("domain", machine.domains),
        backend=change("backend", machine.backend),
    )


def slowest_kind(kinds: Sequence[DeviceKind]) -> DeviceKind:
    """The kind that others wait for: that of the lowest best rate, then of the lowest bandwidth."""
    rate = lambda kind: max((e.peak * e.efficiency for e in kind.engines), default=0.0)  # noqa: E731
    return min(
        kinds,
        key=lambda kind: (
            rate(kind),
            [m.bandwidth * m.efficiency / m.shared_by for m in kind.memories[:1]],
        ),
    )


def _layout(levels: Sequence[Level], count: int) -> tuple[int, ...] | None:
    """How many parts of each level make `count` devices, inner levels fullest; None if there is no equal way."""
    if not levels:
        return () if count == 1 else None
    if len(levels) > 1 and levels[-1].fabric == levels[-2].fabric == "torus":
        near = math.isqrt(count) + (math.isqrt(count) ** 2 < count)  # the square root, rounded up
        options = sorted(_divisors(count), key=lambda size: (max(size, near**2 // size), -size))
    else:
        options = sorted(_divisors(count), reverse=True)
    for size in options:
        if size <= levels[-1].size and (outer := _layout(levels[:-1], count // size)) is not None:
            return (*outer, size)
    return None


def _divisors(count: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(count) + 1) if count % n == 0]
    return sorted({*small, *(count // n for n in small)})


def _key(key: str) -> str:
    return '"*"' if key == "*" else key


def _text(value: str | bool) -> str:
    return json.dumps(value, ensure_ascii=False)  # a JSON string is a TOML basic string


def _number(value: float, dimension: str) -> str:
    if dimension in ("count", "efficiency", "fraction"):
        return repr(value)
    return _text(exact(value, dimension))
