"""Machines, and the time of collectives on them. `load("h100:8")` is the usual way in."""

from partita.machine.check import check
from partita.machine.collectives import KINDS, collective_seconds
from partita.machine.load import host, load, presets, read
from partita.machine.machine import Machine
from partita.machine.parts import (
    Backend,
    Device,
    DeviceKind,
    Domain,
    Engine,
    Level,
    Memory,
    OperatingPoint,
    Source,
)
from partita.machine.times import OperatorTimes, fitted_times

__all__ = [
    "KINDS",
    "Backend",
    "Device",
    "DeviceKind",
    "Domain",
    "Engine",
    "Level",
    "Machine",
    "Memory",
    "OperatingPoint",
    "OperatorTimes",
    "Source",
    "check",
    "collective_seconds",
    "fitted_times",
    "host",
    "load",
    "presets",
    "read",
]
