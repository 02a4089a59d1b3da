"""Checks of a machine, whether it was read from a file or built in code."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence

from partita.errors import MachineError
from partita.machine.machine import Machine, numbers
from partita.machine.parts import (
    DOMAINS,
    DTYPES,
    FABRICS,
    OP_CLASSES,
    STATUSES,
    Device,
    Domain,
    Level,
    Memory,
    OperatingPoint,
)

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_PLAIN_DIMENSIONS = ("count", "efficiency", "fraction")
"""Dimensions of numbers without a unit."""


class DescriptionError(MachineError):
    """A MachineError about one key path. A reader of files adds the line."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path} {message}" if path else message)
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
        one_of(
            f"domain.{domain.name}.kind",
            "kind of domain",
            domain.kind,
            DOMAINS,
        )
    one_of(
        "backend.float32_products",
        "dtype",
        machine.backend.float32_products,
        DTYPES[:-1],
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
    for engine in device.engines:
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


def _check_names(path: str, parts: Sequence[Memory | OperatingPoint | Level | Domain]) -> None:
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
    value: float,
    dimension: str,
) -> None:
    """Raise DescriptionError unless a number is in the range of its dimension."""
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
    else:
        allowed = "more than zero"
        in_range = 0 < value < math.inf
    if not in_range:
        unit = "" if dimension in _PLAIN_DIMENSIONS else f" {dimension}"
        raise DescriptionError(path, f"is {value:g}{unit}: it must be {allowed}.")


def check_source(
    path: str,
    source: object,
    status: object,
) -> None:
    """Raise DescriptionError unless a number has a source and a known status."""
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
            f"has the unknown {noun} '{given}': {did_you_mean(str(given), allowed)}"
            f"Use one of {listed(allowed)}.",
        )


def did_you_mean(given: str, allowed: Sequence[str]) -> str:
    """A question with the nearest allowed name and a space, empty if none is near."""
    matches = difflib.get_close_matches(given, allowed, 1)
    return f"did you mean '{matches[0]}'? " if matches else ""


def listed(names: Iterable[str]) -> str:
    """The names, with commas."""
    return ", ".join(names)
