"""What later stages may rely on about a machine, whether it was read from a file or made in code."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence

from partita.errors import MachineError
from partita.machine.machine import (
    DOMAINS,
    DTYPES,
    FABRICS,
    OP_CLASSES,
    STATUSES,
    Domain,
    Level,
    Machine,
    Memory,
    OperatingPoint,
    numbers,
)

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_BOUNDS = {  # dimension: (what is allowed, whether a value is)
    "count": ("a whole number of at least 1", lambda value: isinstance(value, int) and value >= 1),
    "efficiency": ("a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "fraction": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "s": ("zero seconds or more", lambda value: 0 <= value < math.inf),
}
_POSITIVE = ("more than zero", lambda value: 0 < value < math.inf)


class Wrong(MachineError):
    """A MachineError about one key path, so that a reader of files can add the line."""

    def __init__(self, path: str, message: str):
        super().__init__(f"{path} {message}" if path else message)
        self.path = path


def check(machine: Machine) -> None:
    """Raise MachineError unless these hold, which later stages rely on:

    - every number is in its range: sizes, capacities, bandwidths and rates above zero, latencies not negative,
      efficiencies and fractions within 0 to 1;
    - there is a main memory and an engine; parts of one kind have different names; no link or memory is shared by
      nobody, kinds of devices fill the levels, and fabrics, operator classes, dtypes, domain kinds and statuses are ones that Partita knows;
    - every number has a source and a status (`Machine.provenance`).
    """
    named: list[tuple[str, Sequence[Memory | OperatingPoint | Level | Domain]]] = [
        ("level", machine.levels),
        ("domain", machine.domains),
    ]
    for where, device in [(f"kind.{kind.key}", kind) for kind in machine.kinds] or [
        ("device", machine.device)
    ]:
        if not device.memories:
            raise Wrong(
                f"{where}.memory",
                f"is missing: add [{where}.memory.main] with its capacity and bandwidth.",
            )
        if not device.engines:
            raise Wrong(
                f"{where}.engine",
                f'is missing: add [{where}.engine."*"] with "*" = {{ peak = ..., efficiency = ... }}.',
            )
        named += [(f"{where}.memory", device.memories), (f"{where}.operating_point", device.points)]
        for engine in device.engines:
            one_of(
                f"{where}.engine.{engine.op_class}", "operator class", engine.op_class, OP_CLASSES
            )
            one_of(
                f"{where}.engine.{engine.op_class}.{engine.dtype}", "dtype", engine.dtype, DTYPES
            )
    counts = [kind.count for kind in machine.kinds]
    if counts and sum(counts) != machine.devices:
        given = (
            f"{' + '.join(map(str, counts))} = {sum(counts)} devices"
            if len(counts) > 1
            else f"{counts[0]} devices"
        )
        if not machine.levels:
            raise Wrong(
                "kind",
                f"has {given} and no link reaches them: add [level.NAME] with the size, fabric, latency and bandwidth of what joins them.",
            )
        sizes = " x ".join(str(level.size) for level in machine.levels)
        raise Wrong(
            "kind",
            f"has {given}, and the levels have {sizes} = {machine.devices}: change a count or a size, so that they agree.",
        )
    for kind, parts in named:
        names = [part.name for part in parts]
        for name in names:
            if not _NAME.fullmatch(name):
                raise Wrong(f"{kind}.{name}", "is no good name: use letters, digits, '-' and '_'.")
            if names.count(name) > 1:
                raise Wrong(f"{kind}.{name}", "stands twice: give each its own name.")
    for level in machine.levels:
        one_of(f"level.{level.name}.fabric", "fabric", level.fabric, FABRICS)
    for domain in machine.domains:
        one_of(f"domain.{domain.name}.kind", "kind of domain", domain.kind, DOMAINS)
    one_of("backend.float32_products", "dtype", machine.backend.float32_products, DTYPES[:-1])
    for path, value, dimension in numbers(machine):
        check_number(path, value, dimension)
    for path, (_, source, status) in machine.provenance().items():
        check_source(path, source, status)


def check_number(path: str, value: float, dimension: str) -> None:
    """Raise unless a number is in the range of its dimension."""
    allowed, holds = _BOUNDS.get(dimension, _POSITIVE)
    if not holds(value):
        unit = "" if dimension in ("count", "efficiency", "fraction") else f" {dimension}"
        raise Wrong(path, f"is {value:g}{unit}: it must be {allowed}.")


def check_source(path: str, source: object, status: object) -> None:
    if not source:
        raise Wrong(
            path, 'has no source: add source = "where the number was read" to it or to its section.'
        )
    if not status:
        raise Wrong(
            path, f"has no status: add status = one of {listed(STATUSES)} to it or to its section."
        )
    one_of(path, "status", status, STATUSES)


def one_of(path: str, what: str, given: object, allowed: Iterable[str]) -> None:
    """Raise, naming what is allowed and what was probably meant, unless `given` is allowed."""
    allowed = tuple(allowed)
    if given not in allowed:
        near = difflib.get_close_matches(str(given), allowed, 1)
        meant = f"did you mean '{near[0]}'? " if near else ""
        raise Wrong(path, f"has the unknown {what} '{given}': {meant}Use one of {listed(allowed)}.")


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)
