"""Machines, and the time of collectives on them. `load("h100:8")` is the usual way in."""

from partita.machine.check import check
from partita.machine.collectives import KINDS, collective_seconds
from partita.machine.load import host, load, presets, read
from partita.machine.machine import Machine
from partita.machine.parts import (
    FULL_FLOAT32,
    PLATFORMS,
    Attached,
    Backend,
    Device,
    DeviceKind,
    Domain,
    DomainPoint,
    Engine,
    Grid,
    Leakage,
    Level,
    Memory,
    OperatingPoint,
    Source,
    Thermal,
    Trip,
)
from partita.machine.times import OperatorTimes, fitted_times

__all__ = [
    "FULL_FLOAT32",
    "KINDS",
    "Attached",
    "PLATFORMS",
    "Backend",
    "Device",
    "DeviceKind",
    "Domain",
    "DomainPoint",
    "Engine",
    "Grid",
    "Leakage",
    "Level",
    "Machine",
    "Memory",
    "OperatingPoint",
    "OperatorTimes",
    "Source",
    "Thermal",
    "Trip",
    "check",
    "collective_seconds",
    "fitted_times",
    "host",
    "load",
    "presets",
    "read",
]
