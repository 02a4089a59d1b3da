"""The machine: its devices, the links between them, and the source of every number.

Devices are the leaves of a tree of `levels`, outermost (slow links) to innermost (fast links).
Their number is the product of the level sizes. All devices are equal, or of `kinds`, whose devices
follow each other along the leaves.

Here: the value, as its description states it. Elsewhere: parts (`parts`), collective times
(`collectives`), reading of descriptions (`load`), checks (`check`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from partita.errors import MachineError
from partita.machine.parts import (
    FULL_FLOAT32,
    PLAIN_DIMENSIONS,
    STATUSES,
    Attached,
    Backend,
    Device,
    DeviceKind,
    Domain,
    Grid,
    Level,
    Memory,
    Source,
    Thermal,
    Value,
    number_fields,
    path_fields,
    slowest_kind,
)
from partita.machine.times import OperatorTimes
from partita.units import (
    exact,
    format_bandwidth,
    format_bytes,
    format_flops,
    format_seconds,
    is_whole_number,
)

POWER_SECTIONS = ("domain.", "thermal.")
HOST_MEMORY = "host"
"""Name of the memory of a device's host, which takes offloaded optimizer slots."""
POWER_FIELDS = (".energy_per_bit", ".power", ".idle_power", ".voltage", ".watts")


@dataclass(frozen=True)
class Machine:
    """Devices and their links."""

    name: str
    device: Device
    """The device; the slowest one where devices differ."""
    levels: tuple[Level, ...]
    backend: Backend = Backend()
    domains: tuple[Domain, ...] = ()
    notes: str = ""
    sources: tuple[Source, ...] = ()
    kinds: tuple[DeviceKind, ...] = ()
    """The kinds of different devices, in order of the devices; empty where all are equal."""
    times: OperatorTimes | None = None
    """Measured operator times. Not part of the description."""
    thermal: Thermal | None = None
    grids: tuple[Grid, ...] = ()
    attached: tuple[Attached, ...] = ()
    """Compute attached to the memory of the devices."""

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(level.size for level in self.levels)

    @cached_property
    def digest(self) -> str:
        """A digest of the described devices and links, without name, notes and sources."""
        text = replace(self, name="", notes="", sources=()).to_toml()
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def device_kinds(self) -> list[int]:
        """Per device the number of its kind; empty where all are equal."""
        if len(self.kinds) <= 1:
            return []
        numbers: list[int] = []
        for number, kind in enumerate(self.kinds):
            numbers += [number] * kind.count
        return numbers

    def of_kind(self, number: int) -> Machine:
        """This machine with all devices of one kind."""
        if not self.kinds:
            return self
        kind = self.kinds[number]
        device = Device(
            kind.name,
            kind.overhead,
            kind.memories,
            kind.engines,
            kind.points,
        )
        return replace(self, device=device, kinds=())

    @property
    def target(self) -> str:
        """The target to capture a step for ("cuda", "cuda:8.0", "tpu"), "" if it is not known."""
        capability = self.backend.compute_capability
        return f"{self.backend.platform}:{capability}" if capability else self.backend.platform

    @property
    def memory_bytes(self) -> int:
        """One device's share of its main memory, bytes; the smallest where devices differ."""
        main_memories = [device.memories[0] for device in self.kinds or (self.device,)]
        return min(memory.capacity // memory.shared_by for memory in main_memories)

    @property
    def memory_bandwidth(self) -> float:
        """Achievable bytes per second of one device to its main memory."""
        return self.device.memories[0].device_bandwidth

    @property
    def host_memory(self) -> Memory | None:
        """The memory of the host that devices read over their own link; None if not described."""
        others = self.device.memories[1:]
        return next((memory for memory in others if memory.name == HOST_MEMORY), None)

    def host_bandwidth(self) -> float:
        """Achievable bytes per second of copies between one device and the host.

        A CPU's device memory is the host's: a copy reads and writes there. MachineError for another
        device whose link to the host is not described.
        """
        host = self.host_memory
        if host is not None:
            return host.device_bandwidth
        if self.backend.platform == "cpu":
            return self.memory_bandwidth / 2
        raise MachineError(
            f"'{self.name}' describes no link to the host: add [device.memory.host] with its "
            "capacity and bandwidth."
        )

    def bandwidth_for(self, nbytes: np.ndarray) -> np.ndarray:
        """Achievable bytes per second of one device for kernels that touch `nbytes` bytes.

        Each kernel uses the fastest memory with enough capacity, other than the host's.
        """
        bandwidth = np.full(np.shape(nbytes), self.memory_bandwidth)
        for memory in self.device.memories[1:]:
            if memory.name == HOST_MEMORY:
                continue
            fits = np.asarray(nbytes) <= memory.capacity / memory.shared_by
            faster = np.maximum(bandwidth, memory.device_bandwidth)
            bandwidth = np.where(fits, faster, bandwidth)
        return bandwidth

    @property
    def overhead(self) -> float:
        """Seconds that each kernel costs besides its work."""
        return self.device.overhead

    def rate(self, op_class: str, dtype: str) -> float:
        """Achievable FLOP/s of one device on operators of a class in a dtype.

        The most specific engine counts: (class, dtype), (class, "*"), ("*", dtype), ("*", "*").
        Products of float32 run in the backend's dtype for them (`Backend.float32_products`). Fused
        attention without an engine of its own runs as fast as a product.
        """
        engines = {(engine.op_class, engine.dtype): engine for engine in self.device.engines}
        run_dtype = self.run_dtype(op_class, dtype)
        keys = [(op_class, run_dtype), (op_class, "*")]
        if op_class == "attention":
            keys += [("dot", run_dtype), ("dot", "*")]
        for key in (*keys, ("*", run_dtype), ("*", "*")):
            if key in engines:
                return engines[key].rate
        names = ", ".join(f"{engine.op_class}/{engine.dtype}" for engine in self.device.engines)
        raise MachineError(
            f"Machine '{self.name}' has no engine for '{op_class}' in {dtype}: its engines are "
            f"{names}. Add {dtype} = {{ peak = ..., efficiency = ... }} to "
            f'[device.engine.{op_class}], or an engine for "*".'
        )

    def run_dtype(self, op_class: str, dtype: str) -> str:
        """The dtype in which the compiler runs operators of a class: "tf32" for products of float32
        on recent GPUs, unless they ask for FULL_FLOAT32."""
        if dtype == FULL_FLOAT32:
            return "float32"
        if dtype == "float32" and op_class in ("dot", "conv"):
            return self.backend.float32_products
        return dtype

    def with_devices(self, count: int) -> Machine:
        """This machine with `count` of its devices.

        Inner levels stay whole first, and every part gets the same number. Neighbouring torus
        levels are cut as square as possible. A cut ring or torus no longer closes: it is a mesh.
        """
        if not is_whole_number(count):
            raise MachineError(f"count={count!r} is no number of devices: give a whole number.")
        count = int(count)
        if self.kinds and count == self.devices:
            return self
        if self.kinds:
            raise MachineError(
                f"Cannot take {count} devices of '{self.name}': its {self.devices} devices differ. "
                "Describe the smaller machine in a file."
            )
        possible = 1 <= count <= self.devices
        sizes = _level_sizes(self.levels, count) if possible else None
        if sizes is None:
            raise self._count_error(count)
        memories = []
        for memory in self.device.memories:
            memories.append(replace(memory, shared_by=min(memory.shared_by, count)))
        domains = []
        for domain in self.domains:
            members = min(domain.devices, count)
            points = [replace(point, power=point.power[:members]) for point in domain.points]
            domains.append(replace(domain, devices=members, points=tuple(points)))
        smaller = replace(
            self,
            device=replace(self.device, memories=tuple(memories)),
            levels=_cut_levels(self.levels, sizes),
            domains=tuple(domains),
        )
        return smaller._sourced(self, f"follows from taking {count} devices", "derived")

    def with_senders(self, fractions: Sequence[float]) -> Machine:
        """The machine while only some devices send: fewer of them share a link.

        Args:
            fractions: Per level, the fraction of the devices inside each of its parts that send.
        """
        levels = []
        for number, (level, fraction) in enumerate(zip(self.levels, fractions, strict=True)):
            shared_by = level.shared_by
            fabric = level.fabric
            if fabric == "bus" and fraction < 1:
                # A bus is shared by all devices below it.
                shared_by = math.prod(inner.size for inner in self.levels[number:])
                fabric = "switch"
            shared_by = max(1, math.ceil(shared_by * fraction - 1e-9))
            levels.append(replace(level, shared_by=shared_by, fabric=fabric))
        return replace(self, levels=tuple(levels))

    def _count_error(self, count: int) -> MachineError:
        """The error for an impossible number of devices, with the nearest possible ones."""
        below = range(min(count - 1, self.devices), 0, -1)
        above = range(max(count, 0) + 1, self.devices + 1)
        nearest = []
        for candidates in (below, above):
            for candidate in candidates:
                if _level_sizes(self.levels, candidate):
                    nearest.append(str(candidate))
                    break
        parts = " x ".join(f"{level.size} ({level.name})" for level in self.levels)
        return MachineError(
            f"Cannot take {count} devices of '{self.name}', which has {self.devices} as {parts}: "
            f"every part must get the same number. Use {' or '.join(nearest)}."
        )

    def revised(
        self,
        values: Mapping[str, Value],
        source: str,
        status: str = "measured",
    ) -> Machine:
        """This machine with other numbers at some key paths ({"level.node.bandwidth": 2.1e9})."""
        remaining = dict(values)

        def revise(path: str, part: Any) -> Any:
            changes = {}
            for name, _ in number_fields(type(part)):
                if f"{path}.{name}" in remaining:
                    changes[name] = remaining.pop(f"{path}.{name}")
            return replace(part, **changes) if changes else part

        machine = _with_parts(self, revise)
        if remaining:
            raise MachineError(
                f"Machine '{self.name}' has no number {next(iter(remaining))}: "
                f"it has {', '.join(self.provenance())}."
            )
        sources = [entry for entry in self.sources if entry.path not in values]
        for path, value in values.items():
            sources.append(
                Source(
                    path,
                    value,
                    source,
                    status,
                )
            )
        sources.sort(key=lambda entry: entry.path)
        return replace(machine, sources=tuple(sources))

    def _sourced(
        self,
        before: Machine,
        source: str,
        status: str,
    ) -> Machine:
        """This machine with a source for the numbers that differ from those of `before`."""
        old_values = {path: value for path, value, _ in numbers(before)}
        changes = {}
        for path, value, _ in numbers(self):
            if value != old_values[path]:
                changes[path] = value
        return self.revised(changes, source, status)

    def provenance(self) -> dict[str, tuple[Value, str, str]]:
        """Per key path ("level.node.bandwidth"): value, source, status.

        A number that was set in code is assumed.
        """
        sources = {entry.path: entry for entry in self.sources}
        origins = {}
        for path, value, _ in numbers(self):
            entry = sources.get(path)
            if entry is None or entry.value != value:
                entry = Source(
                    path,
                    value,
                    "set in code",
                    "assumed",
                )
            origins[path] = (value, entry.source, entry.status)
        return origins

    def weakest_status(self) -> str:
        """The status of the least certain number that a plan can depend on.

        Levels of one part do not count: they carry no traffic.
        """
        idle = tuple(f"level.{level.name}." for level in self.levels if level.size == 1)
        statuses = []
        for path, (_, _, status) in self.provenance().items():
            if not path.startswith(idle) and not is_power_figure(path):
                statuses.append(status)
        return max(statuses, key=STATUSES.index)

    def weakest_power_status(self) -> str:
        """The status of the least certain number that joules, but not seconds, depend on."""
        origins = self.provenance()
        statuses = [status for path, (_, _, status) in origins.items() if is_power_figure(path)]
        return max(statuses, key=STATUSES.index, default=self.weakest_status())

    def to_toml(self) -> str:
        """The description that `load` reads back as an equal machine."""
        origins = self.provenance()
        lines = [f"name = {_quoted(self.name)}"]
        if self.notes:
            lines.append(f"notes = {_quoted(self.notes)}")
        for path, part in sections(self):
            header = ".".join(_toml_key(key) for key in path.split("."))
            lines += ["", f"[{header}]"]
            lines += _toml_fields(path, part, origins)
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        lines = []
        for number, device in enumerate(self.kinds or (self.device,)):
            same = self.of_kind(number)
            memory_bytes = format_bytes(same.memory_bytes)
            bandwidth = format_bandwidth(same.memory_bandwidth)
            count = str(self.devices)
            if isinstance(device, DeviceKind):
                count = f"{device.count} of {self.devices}"
            lines.append(
                f"machine {self.name}: {count} x {device.name}, {memory_bytes} at {bandwidth} each"
            )
        for level in self.levels:
            if level.size > 1:
                lines.append(f"  {_level_text(level)}")
        for device in self.kinds or (self.device,):
            prefix = f"{device.key}: " if isinstance(device, DeviceKind) else ""
            for engine in device.engines:
                rates = f"{format_flops(engine.rate)}/s of {format_flops(engine.peak)}/s"
                lines.append(f"  {prefix}{engine.op_class} {engine.dtype}: {rates}")
        lines.append(f"  numbers: {self.weakest_status()} at worst")
        return "\n".join(lines)


def is_power_figure(path: str) -> bool:
    """Whether the number at a key path tells power, energy or heat, and no seconds."""
    return path.startswith(POWER_SECTIONS) or path.endswith(POWER_FIELDS)


def sections(machine: Machine) -> Iterator[tuple[str, Any]]:
    """All parts of a machine that hold numbers, each with its key path."""
    parts: list[tuple[str, Any]] = []

    def collect(path: str, part: Any) -> Any:
        parts.append((path, part))
        return part

    _with_parts(machine, collect)
    yield from parts


def numbers(machine: Machine) -> Iterator[tuple[str, Value, str]]:
    """All numbers of a machine: key path, value, dimension. Numbers in lists share a path."""
    for path, part in sections(machine):
        for name, dimension in number_fields(type(part)):
            value = getattr(part, name)
            if value is not None:
                yield f"{path}.{name}", value, dimension


def _with_parts(machine: Machine, change: Callable[[str, Any], Any]) -> Machine:
    """The machine with every part replaced by `change(key path, part)`."""

    def changed(prefix: str, parts: Sequence[Any]) -> tuple[Any, ...]:
        replaced = []
        for part in parts:
            keys = [getattr(part, name) for name in path_fields(type(part))]
            replaced.append(change(f"{prefix}.{'.'.join(keys)}", part))
        return tuple(replaced)

    def changed_device(path: str, device: Any) -> Any:
        return replace(
            change(path, device),
            memories=changed(f"{path}.memory", device.memories),
            engines=changed(f"{path}.engine", device.engines),
            points=changed(f"{path}.operating_point", device.points),
        )

    def changed_domain(domain: Domain) -> Domain:
        path = f"domain.{domain.name}"
        leakage = domain.leakage
        return replace(
            change(path, domain),
            points=changed(f"{path}.operating_point", domain.points),
            leakage=None if leakage is None else change(f"{path}.leakage", leakage),
        )

    def changed_thermal(thermal: Thermal | None) -> Thermal | None:
        if thermal is None:
            return None
        return replace(change("thermal", thermal), trips=changed("thermal.trip", thermal.trips))

    def changed_attached(part: Attached) -> Attached:
        path = f"attached.{part.name}"
        return replace(change(path, part), engines=changed(f"{path}.engine", part.engines))

    kinds = tuple(changed_device(f"kind.{kind.key}", kind) for kind in machine.kinds)
    device = slowest_kind(kinds) if kinds else changed_device("device", machine.device)
    return replace(
        machine,
        device=device,
        kinds=kinds,
        levels=changed("level", machine.levels),
        domains=tuple(changed_domain(domain) for domain in machine.domains),
        backend=change("backend", machine.backend),
        thermal=changed_thermal(machine.thermal),
        grids=changed("grid", machine.grids),
        attached=tuple(changed_attached(part) for part in machine.attached),
    )


def _level_sizes(levels: Sequence[Level], count: int) -> tuple[int, ...] | None:
    """Sizes of the levels that make `count` devices, inner levels fullest; None if impossible."""
    if not levels:
        return () if count == 1 else None
    inner = levels[-1]
    if len(levels) > 1 and inner.fabric == levels[-2].fabric == "torus":
        root = math.isqrt(count)
        if root**2 < count:
            root += 1
        sizes = sorted(_divisors(count), key=lambda size: (max(size, root**2 // size), -size))
    else:
        sizes = sorted(_divisors(count), reverse=True)
    for size in sizes:
        if size > inner.size:
            continue
        outer = _level_sizes(levels[:-1], count // size)
        if outer is not None:
            return (*outer, size)
    return None


def _divisors(count: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(count) + 1) if count % n == 0]
    return sorted({*small, *(count // n for n in small)})


def _cut_levels(levels: Sequence[Level], sizes: Sequence[int]) -> tuple[Level, ...]:
    """The levels with other sizes; links keep their devices per part."""
    before = math.prod(level.size for level in levels)
    after = math.prod(sizes)
    cut = []
    for level, size in zip(levels, sizes, strict=True):
        inside_before = before // level.size
        inside_after = after // size
        if level.shared_by > inside_before:
            # A link of the whole level, not of each part.
            shared_by = math.ceil(level.shared_by * after / before)
        else:
            shared_by = math.ceil(level.shared_by * inside_after / inside_before)
        fabric = level.fabric
        if fabric in ("ring", "torus") and size < level.size:
            fabric = "mesh"
        cut.append(
            replace(
                level,
                size=size,
                shared_by=shared_by,
                fabric=fabric,
            )
        )
        before = inside_before
        after = inside_after
    return tuple(cut)


def _level_text(level: Level) -> str:
    bandwidth = format_bandwidth(level.bandwidth)
    latency = format_seconds(level.latency)
    shared = f", shared by {level.shared_by}" if level.shared_by > 1 else ""
    return f"{level.name}: {level.size} by {level.fabric}, {bandwidth}, {latency}{shared}"


def _toml_fields(
    path: str,
    part: Any,
    origins: Mapping[str, tuple[Value, str, str]],
) -> Iterator[str]:
    """The lines of one table: a part's numbers with their sources, and its other fields."""
    dimensions = dict(number_fields(type(part)))
    for field in fields(part):
        value = getattr(part, field.name)
        if value is None or field.name in path_fields(type(part)):
            continue
        if field.name not in dimensions:
            if isinstance(value, tuple) or is_dataclass(value):
                continue  # Parts have tables of their own.
            yield f"{field.name} = {_quoted(value)}"
            continue
        _, source, status = origins[f"{path}.{field.name}"]
        number = _toml_number(value, dimensions[field.name])
        origin = f"source = {_quoted(source)}, status = {_quoted(status)}"
        yield f"{field.name} = {{ value = {number}, {origin} }}"


def _toml_key(key: str) -> str:
    return '"*"' if key == "*" else key


def _quoted(value: str | bool) -> str:
    # A JSON string is a TOML basic string.
    return json.dumps(value, ensure_ascii=False)


def _toml_number(value: Value, dimension: str) -> str:
    if isinstance(value, tuple):
        items = [_toml_number(item, dimension) for item in value]
        return f"[{', '.join(items)}]"
    if dimension in PLAIN_DIMENSIONS:
        return repr(value)
    return _quoted(exact(value, dimension))
