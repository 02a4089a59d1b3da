"""Checks of a machine, whether it was read from a file or built in code."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from partita.errors import MachineError
from partita.files.schema import shown
from partita.machine.machine import Machine, numbers
from partita.machine.parts import (
    DIRECTIONS,
    DOMAINS,
    DTYPES,
    FABRICS,
    OP_CLASSES,
    PLAIN_DIMENSIONS,
    PLATFORMS,
    ROUTINGS,
    STATUSES,
    Attached,
    Device,
    Domain,
    DomainPoint,
    Engine,
    Grid,
    Level,
    Memory,
    OperatingPoint,
    Thermal,
    Trip,
    Value,
)

MOST_DEVICES = 2**24
_NAME = re.compile(r"[A-Za-z0-9_-]+")
Named = Memory | OperatingPoint | DomainPoint | Level | Domain | Trip | Grid | Attached
"""Parts with a name of their own."""


LONGEST_PATH = 120
"""Characters of the longest key path in a message."""


class DescriptionError(MachineError):
    """A MachineError about one key path. A reader of files adds the line."""

    def __init__(self, path: str, message: str) -> None:
        shown = path if len(path) <= LONGEST_PATH else f"{path[:LONGEST_PATH]}..."
        super().__init__(f"{shown} {message}" if path else message)
        self.path = path


def check(machine: Machine) -> None:
    """Raise MachineError unless the machine has the properties on which later stages rely.

    - Every number is in its range: sizes, capacities, bandwidths and rates above zero, latencies
      not negative, efficiencies and fractions within 0 to 1.
    - There is a main memory and an engine. Parts of one kind have different names. Every link and
      memory belongs to some device, and kinds of devices fill the levels.
    - Fabrics, operator classes, dtypes, domain kinds and statuses are known ones.
    - Every number has a source and a status (`Machine.provenance`).
    """
    devices = [(f"kind.{kind.key}", kind) for kind in machine.kinds]
    for path, device in devices or [("device", machine.device)]:
        _check_device(path, device)
    _check_sizes(machine)
    _check_counts(machine)
    _check_names("level", machine.levels)
    _check_names("domain", machine.domains)
    for path, device in devices or [("device", machine.device)]:
        _check_names(f"{path}.memory", device.memories)
        _check_names(f"{path}.operating_point", device.points)
    for level in machine.levels:
        one_of(
            f"level.{level.name}.fabric",
            "fabric",
            level.fabric,
            FABRICS,
        )
    for domain in machine.domains:
        _check_domain(domain, machine)
    if machine.thermal is not None:
        _check_thermal(machine.thermal, machine)
    _check_names("grid", machine.grids)
    for grid in machine.grids:
        one_of(
            f"grid.{grid.name}.routing",
            "routing",
            grid.routing,
            ROUTINGS,
        )
        one_of(
            f"grid.{grid.name}.direction",
            "direction",
            grid.direction,
            DIRECTIONS,
        )
    _check_names("attached", machine.attached)
    for part in machine.attached:
        _check_engines(f"attached.{part.name}", part.engines)
    one_of(
        "backend.float32_products",
        "dtype",
        machine.backend.float32_products,
        DTYPES[:-1],
    )
    if machine.backend.platform:
        one_of(
            "backend.platform",
            "platform",
            machine.backend.platform,
            PLATFORMS,
        )
    capability = machine.backend.compute_capability
    if capability and not re.fullmatch(r"\d+\.\d+", capability):
        raise DescriptionError(
            "backend.compute_capability",
            f"is '{capability}': write two numbers, as in \"8.0\".",
        )
    for path, value, dimension in numbers(machine):
        check_number(path, value, dimension)
    for path, (_, source, status) in machine.provenance().items():
        check_source(path, source, status)


def _check_device(path: str, device: Device) -> None:
    if not device.memories:
        raise DescriptionError(
            f"{path}.memory",
            f"is missing: add [{path}.memory.main] with its capacity and bandwidth.",
        )
    if not device.engines:
        raise DescriptionError(
            f"{path}.engine",
            f'is missing: add [{path}.engine."*"] with "*" = {{ peak = ..., efficiency = ... }}.',
        )
    _check_engines(path, device.engines)


def _check_domain(domain: Domain, machine: Machine) -> None:
    path = f"domain.{domain.name}"
    one_of(
        f"{path}.kind",
        "kind of domain",
        domain.kind,
        DOMAINS,
    )
    _check_names(f"{path}.operating_point", domain.points)
    if domain.members:
        one_of(
            f"{path}.members",
            "kind of device",
            domain.members,
            [kind.key for kind in machine.kinds] or ["no kinds"],
        )
    for point in domain.points:
        if len(point.power) != domain.devices:
            raise DescriptionError(
                f"{path}.operating_point.{point.name}.power",
                f"has {len(point.power)} numbers for {domain.devices} devices: write the power "
                "with 1, 2, ... of them active.",
            )


def _check_thermal(thermal: Thermal, machine: Machine) -> None:
    """The matrices fit each other and the domains; trips name domains with points."""
    nodes = len(thermal.transition)
    if len(thermal.transition[0]) != nodes:
        raise DescriptionError("thermal.transition", "is not square: write a row per node.")
    growth = float(np.abs(np.linalg.eigvals(np.array(thermal.transition))).max())
    if growth >= 1:
        raise DescriptionError(
            "thermal.transition",
            f"lets temperatures grow by {growth:.3g} each step: its eigenvalues must be below 1.",
        )
    inputs = [domain.name for domain in machine.domains if domain.kind in ("clock", "power")]
    if (len(thermal.gain), len(thermal.gain[0])) != (nodes, len(inputs)):
        raise DescriptionError(
            "thermal.gain",
            f"is not {nodes} x {len(inputs)}: write a row per node, with a number for each of "
            f"{listed(inputs) or 'no domains'}.",
        )
    _check_names("thermal.trip", thermal.trips)
    clocks = [domain.name for domain in machine.domains if domain.points]
    for trip in thermal.trips:
        one_of(
            f"thermal.trip.{trip.name}.domain",
            "domain with operating points",
            trip.domain,
            clocks or ["no domains"],
        )


def _check_engines(path: str, engines: Sequence[Engine]) -> None:
    for engine in engines:
        engine_path = f"{path}.engine.{engine.op_class}"
        one_of(
            engine_path,
            "operator class",
            engine.op_class,
            OP_CLASSES,
        )
        one_of(
            f"{engine_path}.{engine.dtype}",
            "dtype",
            engine.dtype,
            DTYPES,
        )


def _check_sizes(machine: Machine) -> None:
    """Numbers of devices that a plan's mesh can have."""
    for level in machine.levels:
        if isinstance(level.size, int) and level.size > MOST_DEVICES:
            raise DescriptionError(
                f"level.{level.name}.size",
                f"is {level.size:,}: a machine has at most {MOST_DEVICES:,} devices.",
            )
    if machine.devices > MOST_DEVICES:
        raise DescriptionError(
            "level",
            f"makes {machine.devices:,} devices: a machine has at most {MOST_DEVICES:,}.",
        )


def _check_counts(machine: Machine) -> None:
    """The counts of the kinds must agree with the sizes of the levels."""
    counts = [kind.count for kind in machine.kinds]
    if not counts or sum(counts) == machine.devices:
        return
    given = f"{sum(counts)} devices"
    if len(counts) > 1:
        given = f"{' + '.join(map(str, counts))} = {given}"
    if not machine.levels:
        raise DescriptionError(
            "kind",
            f"has {given} without links: add [level.NAME] with the size, fabric, latency and "
            "bandwidth of their links.",
        )
    sizes = " x ".join(str(level.size) for level in machine.levels)
    raise DescriptionError(
        "kind",
        f"has {given}, but the levels have {sizes} = {machine.devices}: change a count or a size.",
    )


def _check_names(path: str, parts: Sequence[Named]) -> None:
    names = [part.name for part in parts]
    for name in names:
        if not _NAME.fullmatch(name):
            raise DescriptionError(
                f"{path}.{name}", "is not a valid name: use letters, digits, '-' and '_'."
            )
        if names.count(name) > 1:
            raise DescriptionError(f"{path}.{name}", "is used twice: use different names.")


def check_number(
    path: str,
    value: Value,
    dimension: str,
) -> None:
    """Raise DescriptionError unless numbers are in the range of their dimension."""
    if isinstance(value, tuple):
        for item in value:
            check_number(path, item, dimension)
        return
    if dimension == "count":
        allowed = "a whole number of at least 1"
        in_range = isinstance(value, int) and value >= 1
    elif dimension == "efficiency":
        allowed = "a number above 0 and at most 1"
        in_range = 0 < value <= 1
    elif dimension == "fraction":
        allowed = "a number from 0 to 1"
        in_range = 0 <= value <= 1
    elif dimension == "s":
        allowed = "zero seconds or more"
        in_range = 0 <= value < math.inf
    elif dimension in ("number", "degC"):
        allowed = "a finite number"
        in_range = math.isfinite(value)
    else:
        allowed = "more than zero"
        in_range = 0 < value < math.inf
    if not in_range:
        unit = "" if dimension in PLAIN_DIMENSIONS else f" {dimension}"
        raise DescriptionError(path, f"is {value:g}{unit}: it must be {allowed}.")


def check_source(
    path: str,
    source: object,
    status: object,
) -> None:
    """Raise DescriptionError unless a number has a source and a known status."""
    if not isinstance(source, str | None):
        raise DescriptionError(path, 'has a source that is no text: write source = "...".')
    if not source:
        raise DescriptionError(
            path, 'has no source: add source = "where the number was read" to it or to its section.'
        )
    if not status:
        raise DescriptionError(
            path, f"has no status: add status = one of {listed(STATUSES)} to it or to its section."
        )
    one_of(
        path,
        "status",
        status,
        STATUSES,
    )


def one_of(
    path: str,
    noun: str,
    given: object,
    allowed: Iterable[str],
) -> None:
    """Raise DescriptionError unless `given` is allowed, with the allowed values and the nearest."""
    allowed = tuple(allowed)
    if given not in allowed:
        raise DescriptionError(
            path,
            f"has the unknown {noun} {shown(str(given))}: {did_you_mean(str(given), allowed)}"
            f"Use one of {listed(allowed)}.",
        )


def did_you_mean(given: str, allowed: Sequence[str]) -> str:
    """A question with the nearest allowed name and a space, empty if none is near."""
    matches = difflib.get_close_matches(given, allowed, 1)
    return f"did you mean '{matches[0]}'? " if matches else ""


def listed(names: Iterable[str]) -> str:
    """The names, with commas."""
    return ", ".join(names)
