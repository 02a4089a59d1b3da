"""What a simulation returns: when a device computes, sends and waits in one step, what holds it up, and how its memory fills.

A Timeline is a frozen value. Its spans are in the order in which a device issues them; one device stands for all that do the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KERNELS, LINKS = "kernels", "links"


@dataclass(frozen=True, slots=True)
class Span:
    """One task of a device. `stream` is "kernels" or "links"; `kind` says what it is for, `phase` when in the step it is."""

    name: str
    operator: str
    kind: str
    phase: str
    stream: str
    start: float
    seconds: float
    critical: bool = False
    """On the critical path: were it shorter, the step would be."""
    group: str = ""
    """The devices that do it, where not all do the same."""

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True)
class Timeline:
    """One simulated step under a plan, in seconds from its start.

    `idle` is the time in which a device runs no kernels, by what it waits for: "links" (a collective that its next kernel needs),
    "end" (nothing left to do but to wait for the last collectives), or "bubble" (another stage). Where groups of devices do different things, it is the mean
    of theirs. `memory` are (seconds, bytes held by a device from then on).
    """

    plan: str
    graph: str
    machine: str
    devices: int
    seconds: float
    spans: tuple[Span, ...]
    idle: Mapping[str, float]
    memory: tuple[tuple[float, int], ...]
    peak_bytes: int
    held: Mapping[str, int]
    """What holds memory at the peak, by kind."""
    peak_operator: str
    traffic: Mapping[str, int]
    """Bytes that a device sends, by kind of collective."""
    source: str
    """Where the seconds come from."""
    notes: tuple[str, ...] = field(default=())
    groups: int = 1
    """How many groups of devices do different things."""

    @property
    def total_traffic(self) -> int:
        """Bytes that all devices together send in a step."""
        return self.devices * sum(self.traffic.values())

    def busy_part(self) -> float:
        """The part of the step in which a device runs kernels."""
        return (
            sum(s.seconds for s in self.spans if s.kind == "compute") / self.seconds / self.groups
            if self.seconds
            else 1.0
        )

    def rows(self) -> list[tuple[str, str]]:
        """(group, stream) of every row of a picture: group after group as they begin, kernels first."""
        groups = {group: n for n, group in enumerate(dict.fromkeys(s.group for s in self.spans))}
        return sorted(
            dict.fromkeys((s.group, s.stream) for s in self.spans),
            key=lambda row: (groups[row[0]], row[1] != KERNELS),
        )

    def by_kind(self) -> dict[str, float]:
        """Seconds by kind of task, hidden or not."""
        found: dict[str, float] = {}
        for span in self.spans:
            found[span.kind] = found.get(span.kind, 0.0) + span.seconds
        return found

    def critical_path(self) -> tuple[Span, ...]:
        return tuple(s for s in self.spans if s.critical)

    def to_json(self) -> dict[str, Any]:
        """A plain JSON value."""
        return {
            "plan": self.plan,
            "graph": self.graph,
            "machine": self.machine,
            "devices": self.devices,
            "seconds": self.seconds,
            "idle_seconds": dict(self.idle),
            "kind_seconds": self.by_kind(),
            "peak_bytes": self.peak_bytes,
            "memory_bytes": dict(self.held),
            "peak_operator": self.peak_operator,
            "traffic_bytes": dict(self.traffic),
            "total_traffic_bytes": self.total_traffic,
            "source": self.source,
            "notes": list(self.notes),
            "spans": [
                {
                    "name": s.name,
                    "operator": s.operator,
                    "kind": s.kind,
                    "phase": s.phase,
                    "stream": s.stream,
                    "start": s.start,
                    "seconds": s.seconds,
                    "critical": s.critical,
                    "group": s.group,
                }
                for s in self.spans
            ],
        }
