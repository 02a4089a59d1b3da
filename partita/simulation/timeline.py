"""The result of a simulation: tasks, waiting times, critical path and memory of one step.

A Timeline is a frozen value. Spans are in the order in which a device issues them, for one
representative device of every device group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KERNELS, LINKS = "kernels", "links"


@dataclass(frozen=True, slots=True)
class Span:
    """One task of a device. Times are in seconds."""

    name: str
    operator: str
    kind: str
    """Purpose: "compute", "exchange", "sum", "gather", "move" or "held up" (kernels blocked)."""
    phase: str
    """Phase of the step: "forward", "backward" or "update"."""
    stream: str
    """The stream of the device: "kernels" or "links"."""
    start: float
    seconds: float
    critical: bool = False
    """Whether the task is on the critical path: if it were shorter, the step would be."""
    group: str = ""
    """Name of its device group; "" if there is one."""

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True)
class Timeline:
    """One simulated step under a plan. Times are in seconds from its start."""

    plan: str
    graph: str
    machine: str
    devices: int
    seconds: float
    spans: tuple[Span, ...]
    idle: Mapping[str, float]
    """Seconds in which a device runs no kernels, by cause; the mean over device groups.

    "links": its next kernel needs a collective. "held up": a collective blocks kernels. "end": only
    the last collectives are left. "bubble": it waits for another stage or group.
    """
    memory: tuple[tuple[float, int], ...]
    """(seconds, bytes) of a device: from each time on it has this many bytes in memory."""
    peak_bytes: int
    held: Mapping[str, int]
    """Bytes at the peak, by kind of memory."""
    peak_operator: str
    """The operator that runs at the peak."""
    traffic: Mapping[str, int]
    """Bytes that a device sends, by kind of collective."""
    source: str
    """Source of the seconds, for people."""
    notes: tuple[str, ...] = field(default=())
    groups: int = 1
    """Number of device groups, or of stages."""
    joules: float | None = None
    """Energy of the step on all devices; None where the machine lacks power figures."""

    @property
    def total_traffic(self) -> int:
        """Bytes that all devices together send in a step."""
        return self.devices * sum(self.traffic.values())

    def busy_part(self) -> float:
        """Fraction of the step in which a device runs kernels."""
        if not self.seconds:
            return 1.0
        compute_seconds = sum(span.seconds for span in self.spans if span.kind == "compute")
        return compute_seconds / self.seconds / self.groups

    def rows(self) -> list[tuple[str, str]]:
        """(group, stream) of every row of a picture: group after group as they begin, kernels
        first.
        """
        groups = {group: n for n, group in enumerate(dict.fromkeys(s.group for s in self.spans))}
        return sorted(
            dict.fromkeys((s.group, s.stream) for s in self.spans),
            key=lambda row: (groups[row[0]], row[1] != KERNELS),
        )

    def by_kind(self) -> dict[str, float]:
        """Seconds by kind of task, hidden or not."""
        seconds: dict[str, float] = {}
        for span in self.spans:
            seconds[span.kind] = seconds.get(span.kind, 0.0) + span.seconds
        return seconds

    def critical_path(self) -> tuple[Span, ...]:
        return tuple(s for s in self.spans if s.critical)

    def to_json(self) -> dict[str, Any]:
        """The timeline as a JSON value."""
        energy = {} if self.joules is None else {"joules": self.joules}
        return {
            "plan": self.plan,
            "graph": self.graph,
            "machine": self.machine,
            "devices": self.devices,
            "seconds": self.seconds,
            **energy,
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
