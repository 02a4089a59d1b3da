"""Traces: slow devices and links, losses and returns of devices over time, as JSON lines.

    {"second": 10, "event": "slow", "device": 3, "factor": 0.3}
    {"second": 40, "event": "slow", "device": 3, "factor": 1}
    {"second": 60, "event": "link", "level": "network", "factor": 0.2}
    {"second": 90, "event": "lost", "device": 5}
    {"second": 150, "event": "back", "device": 5}
    {"second": 200, "event": "end"}

A factor is the speed relative to the description. Each event holds until another one of the same
device or level.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from partita.errors import PlanError
from partita.files.reading import FileKind, checked, parse_json, read_text
from partita.files.schema import number, one_of, table, text, whole_number
from partita.machine import Machine

KINDS = ("slow", "link", "lost", "back", "end")
TAIL_SECONDS = 60.0
"""Time after the last event, if the trace has no end."""
TRACE_FILE = FileKind(
    "a trace of events", "write a JSON object a line, as docs/manage.md shows", PlanError
)
_EVENT = table(
    {"second": number(0), "event": one_of(*KINDS)},
    {"device": whole_number(), "level": text(80), "factor": number(1e-6, 1e6)},
)


@dataclass(frozen=True)
class Event:
    """A change of the machine."""

    second: float
    kind: str
    """One of KINDS."""
    device: int = -1
    level: str = ""
    factor: float = 1.0
    """Of the speed of the device or of the level's bandwidth."""

    def __str__(self) -> str:
        if self.kind == "end":
            return "the trace ends"
        if self.kind in ("lost", "back"):
            return f"device {self.device} is {self.kind}"
        part = f"at {self.factor:.0%}" if self.factor != 1.0 else "as described"
        return f"{self.level or f'device {self.device}'} {part}"


@dataclass(frozen=True)
class MachineState:
    """The differences of a machine from its description."""

    slow: tuple[tuple[int, float], ...] = ()
    """(device, factor), sorted."""
    links: tuple[tuple[str, float], ...] = ()
    """(level, factor), sorted."""
    lost: frozenset[int] = frozenset()

    def after(self, event: Event) -> MachineState:
        """The state after an event."""
        if event.kind == "slow":
            slow = {**dict(self.slow), event.device: event.factor}
            return replace(self, slow=_unequal_one(slow))
        if event.kind == "link":
            return replace(
                self, links=_unequal_one({**dict(self.links), event.level: event.factor})
            )
        if event.kind == "lost":
            return replace(self, lost=self.lost | {event.device})
        if event.kind == "back":
            return replace(self, lost=self.lost - {event.device})
        return self

    def __str__(self) -> str:
        parts = [f"device {device} at {factor:.0%}" for device, factor in self.slow]
        parts += [f"{level} at {factor:.0%}" for level, factor in self.links]
        if self.lost:
            noun = "device" if len(self.lost) == 1 else "devices"
            parts.append(f"without {noun} {', '.join(map(str, sorted(self.lost)))}")
        return "; ".join(parts) or "as described"


def _unequal_one(factors: dict[Any, float]) -> tuple[tuple[Any, float], ...]:
    return tuple(sorted((key, factor) for key, factor in factors.items() if factor != 1.0))


@dataclass(frozen=True)
class Segment:
    """A time in which the machine does not change."""

    start: float
    seconds: float
    state: MachineState


@dataclass(frozen=True)
class Trace:
    """Events in time, the first at or after second 0."""

    events: tuple[Event, ...]

    def segments(self) -> list[Segment]:
        """The times between events."""
        end = self.events[-1].second
        if self.events[-1].kind != "end":
            end += TAIL_SECONDS
        bounds = [*(event.second for event in self.events), end]
        state = MachineState()
        segments = [Segment(0.0, bounds[0], state)]
        for event, following in zip(self.events, bounds[1:], strict=True):
            state = state.after(event)
            segments.append(Segment(event.second, following - event.second, state))
        return [segment for segment in segments if segment.seconds > 0]

    def check(self, machine: Machine) -> None:
        """PlanError unless all devices and levels are those of a machine."""
        levels = [level.name for level in machine.levels]
        state = MachineState()
        for event in self.events:
            if event.kind in ("slow", "lost", "back") and event.device >= machine.devices:
                raise PlanError(
                    f"The trace names device {event.device} at {event.second:g} s, and "
                    f"'{machine.name}' has devices 0 to {machine.devices - 1}: change the trace or "
                    "take a larger machine."
                )
            if event.kind == "link" and event.level not in levels:
                raise PlanError(
                    f"The trace names level '{event.level}' at {event.second:g} s, and "
                    f"'{machine.name}' has {', '.join(levels)}: use one of them."
                )
            if event.kind == "back" and event.device not in state.lost:
                raise PlanError(
                    f"The trace brings device {event.device} back at {event.second:g} s, and it "
                    "was not lost: add its loss or remove the return."
                )
            if event.kind == "lost" and event.device in state.lost:
                raise PlanError(
                    f"The trace loses device {event.device} at {event.second:g} s, and it was lost "
                    "before: remove the loss or bring the device back first."
                )
            state = state.after(event)
            if len(state.lost) == machine.devices:
                lost = (
                    f"all {machine.devices} devices" if machine.devices > 1 else "the only device"
                )
                raise PlanError(
                    f"The trace has lost {lost} at {event.second:g} s, and nothing can run: let a "
                    "device come back before."
                )

    def to_text(self) -> str:
        """The trace as JSON lines."""
        lines = []
        for event in self.events:
            fields: dict[str, Any] = {"second": event.second, "event": event.kind}
            if event.kind in ("slow", "lost", "back"):
                fields["device"] = event.device
            if event.kind == "link":
                fields["level"] = event.level
            if event.kind in ("slow", "link"):
                fields["factor"] = event.factor
            lines.append(json.dumps(fields))
        return "\n".join(lines) + "\n"


def load_trace(path: str | Path) -> Trace:
    """The trace of a file. PlanError names the line that is wrong."""
    events = tuple(_events(read_text(path, TRACE_FILE), path))
    if not events:
        raise PlanError(f"{path} has no events: {TRACE_FILE.fix}.")
    if events[-1].kind == "end" and events[-1].second == 0:
        raise PlanError(f"{path} ends at 0 s, so nothing runs: give its end a later second.")
    return Trace(events)


NEEDED = {
    "slow": ("device", "factor"),
    "link": ("level", "factor"),
    "lost": ("device",),
    "back": ("device",),
    "end": (),
}
"""Fields of each kind of event, besides its second."""


def _events(content: str, path: str | Path) -> Iterator[Event]:
    before = 0.0
    has_ended = False
    for number_, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number_}"
        fields = checked(parse_json(line, where, TRACE_FILE), _EVENT, where, TRACE_FILE)
        kind = fields["event"]
        if has_ended:
            raise PlanError(f"{where}: the trace has ended: move 'end' to the last line.")
        has_ended = kind == "end"
        for name in NEEDED[kind]:
            if name not in fields:
                raise PlanError(f"{where}: event '{kind}' lacks its {name}: add \"{name}\".")
        if fields["second"] < before:
            raise PlanError(
                f"{where}: second {fields['second']:g} is before {before:g} of the line above: "
                "sort the events by time."
            )
        before = fields["second"]
        given = {name: fields[name] for name in NEEDED[kind]}
        yield Event(before, kind, **given)


def slow_downs(
    lengths: Sequence[float], pauses: Sequence[float], device: int, factor: float
) -> Trace:
    """A trace of slow times of one device: a pause, a slow time, and so on."""
    events = []
    second = 0.0
    for length, pause in zip(lengths, pauses, strict=True):
        second += pause
        events.append(Event(second, "slow", device, factor=factor))
        second += length
        events.append(Event(second, "slow", device, factor=1.0))
    events.append(Event(second + pauses[-1], "end"))
    return Trace(tuple(events))
