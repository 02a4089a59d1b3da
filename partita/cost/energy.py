"""Joules of a step: power of busy and of waiting devices, and energy of the bytes that move.

    joules = busy device seconds x power + other device seconds x idle power
           + bits between devices x energy per bit
           + seconds of attached compute x its power
           (+ bits of the main memory x energy per bit, where power is that of domains)

The power of a device's operating point is that of the whole board with its memories. The power of a
domain's operating point is that of its devices alone, so memory traffic is added, and the leakage
at 60 °C is in it. A plan for fewer devices uses the first ones; the others wait.

Kernels draw the power of a busy device whatever they compute: joules are an upper estimate for
kernels that wait for memory. Temperature and other operating points: `manage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from partita.cost.evaluate import Assignment, ShardCounts
from partita.cost.moves import Placement
from partita.cost.terms import Terms
from partita.errors import MachineError
from partita.machine import Device, Domain, Machine

BITS = 8
"""Of a byte."""
IDLE_CELSIUS = 45.0
"""Temperature of a cluster that waits, for its leakage."""


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules of a step on all devices, by cause."""

    kernels: float
    idle: float
    """Devices without a kernel, and domains that always draw power."""
    memory: float
    links: float
    attached: float = 0.0
    """Compute attached to memory, at work."""

    @property
    def joules(self) -> float:
        """All joules."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class DeviceActivity:
    """The activity of a step that energy depends on."""

    devices: int
    """Devices that the plan uses."""
    seconds: float
    busy: float
    """Seconds in which a device of the plan runs kernels, the mean over them."""
    memory_bytes: float
    """Bytes that kernels of a device read and write, the mean over devices."""
    link_bytes: float
    """Bytes that a device sends, the mean over devices."""
    attached_seconds: tuple[float, ...] = ()
    """[attached part of the machine]: seconds in which it works and a device waits for it."""


def missing_power(machine: Machine) -> tuple[str, ...]:
    """Key paths of the figures that joules need and a machine's description lacks."""
    missing: list[str] = []
    clocks = _clock_domains(machine)
    if clocks:
        for path, device in _devices(machine):
            memory = device.memories[0]
            if memory.energy_per_bit is None:
                missing.append(f"{path}.memory.{memory.name}.energy_per_bit")
            if not any(domain.members in ("", _key(device)) for domain in clocks):
                missing.append(f"domain of {path} with operating points")
    else:
        for path, device in _devices(machine):
            if not device.points:
                missing.append(f"{path}.operating_point")
            elif device.points[0].idle_power is None:
                missing.append(f"{path}.operating_point.{device.points[0].name}.idle_power")
    for part in machine.attached:
        if part.power is None:
            missing.append(f"attached.{part.name}.power")
    for level in machine.levels:
        if level.size > 1 and level.energy_per_bit is None:
            missing.append(f"level.{level.name}.energy_per_bit")
    return tuple(missing)


def require_power(machine: Machine) -> None:
    """MachineError unless a machine has the figures that joules need; names the missing ones."""
    missing = missing_power(machine)
    if missing:
        raise MachineError(
            f"The joules of '{machine.name}' are unknown: it lacks {', '.join(missing)}. Add them "
            "to its description, or use a machine with power figures, as odroid-xu3."
        )


def step_energy(machine: Machine, activity: DeviceActivity) -> Energy | None:
    """The energy of a step at the first operating points; None where power figures are missing."""
    if missing_power(machine):
        return None
    busy = min(activity.busy, activity.seconds) - sum(activity.attached_seconds)
    busy = max(busy, 0.0)
    waiting = activity.seconds - busy
    link_joules = 0.0
    if activity.devices > 1:
        # Every byte is charged the level with the most energy: traffic is not known by level.
        per_bit = max(level.energy_per_bit or 0.0 for level in machine.levels)
        link_joules = activity.devices * activity.link_bytes * BITS * per_bit
    clocks = _clock_domains(machine)
    if clocks:
        kernel_watts, idle_watts = _domain_watts(machine, clocks, activity.devices)
        memory = machine.device.memories[0]
        memory_bits = activity.devices * activity.memory_bytes * BITS
        memory_joules = memory_bits * (memory.energy_per_bit or 0.0)
    else:
        kernel_watts, idle_watts = _device_watts(machine, activity.devices)
        memory_joules = 0.0
    always = sum(group_count(machine, domain) * (domain.watts or 0.0) for domain in machine.domains)
    return Energy(
        kernels=busy * kernel_watts,
        idle=waiting * idle_watts + activity.seconds * always,
        memory=memory_joules,
        links=link_joules,
        attached=_attached_joules(machine, activity),
    )


def _attached_joules(machine: Machine, activity: DeviceActivity) -> float:
    parts = zip(machine.attached, activity.attached_seconds, strict=False)
    return sum(seconds * (part.power or 0.0) for part, seconds in parts)


def memory_bytes(
    terms: Terms,
    placement: Placement,
    assignments: Sequence[Assignment],
    fractions: Sequence[float],
) -> float:
    """Bytes that kernels read and write in main memory in one step, the mean over devices.

    fractions: [operator], fraction of the devices that run it.
    """
    total = 0.0
    for operator, assignment, fraction in zip(
        terms.operators,
        assignments,
        fractions,
        strict=True,
    ):
        split = ShardCounts(placement, [assignment])
        for work in operator.work:
            total += fraction * work.trips * float(split.local_bytes(work.traffic)[0])
    return total


def _clock_domains(machine: Machine) -> Sequence[Domain]:
    return [domain for domain in machine.domains if domain.points]


def _devices(machine: Machine) -> list[tuple[str, Device]]:
    """The kinds of devices with their key paths."""
    if machine.kinds:
        return [(f"kind.{kind.key}", kind) for kind in machine.kinds]
    return [("device", machine.device)]


def _key(device: Device) -> str:
    return getattr(device, "key", "")


def _members(machine: Machine, domain: Domain) -> tuple[int, int]:
    """The first device of a domain, and the number of its devices in all groups."""
    first = 0
    for kind in machine.kinds:
        if kind.key == domain.members:
            return first, kind.count
        first += kind.count
    return 0, machine.devices


def group_count(machine: Machine, domain: Domain) -> int:
    """Number of groups of devices that a domain divides its members into."""
    _, count = _members(machine, domain)
    return max(1, count // domain.devices)


def _domain_watts(
    machine: Machine,
    clocks: Sequence[Domain],
    devices: int,
) -> tuple[float, float]:
    """Watts of all clock domains with the first `devices` devices busy, and with none."""
    busy = 0.0
    idle = 0.0
    for domain in clocks:
        point = domain.points[0]
        leakage = 0.0
        if domain.leakage is not None:
            leakage = domain.leakage.watts(point.voltage, IDLE_CELSIUS)
        first, count = _members(machine, domain)
        active = min(max(devices - first, 0), count)
        for group in range(group_count(machine, domain)):
            in_group = min(max(active - group * domain.devices, 0), domain.devices)
            busy += point.power[in_group - 1] if in_group else leakage
            idle += leakage
    return busy, idle


def _device_watts(machine: Machine, devices: int) -> tuple[float, float]:
    """Watts of all devices when the first `devices` run kernels, and when none does."""
    busy = 0.0
    idle = 0.0
    remaining = devices
    for kind in machine.kinds or (machine.device,):
        count = getattr(kind, "count", machine.devices)
        active = min(remaining, count)
        remaining -= active
        idle_watts = kind.points[0].idle_power or 0.0
        busy += active * kind.points[0].power + (count - active) * idle_watts
        idle += count * idle_watts
    return busy, idle
