"""A timeline in the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Source of the format: "Trace Event Format", Google: complete events ("X") in microseconds, metadata events ("M") that name rows,
counter events ("C") for memory.
"""

from __future__ import annotations

from typing import Any

from partita.simulate.timeline import KERNELS, LINKS, Timeline


def trace(timeline: Timeline) -> dict[str, Any]:
    """The timeline as a JSON value: a row for a device's kernels, one for its links, and its memory as a curve."""
    who = "every device" if timeline.devices > 1 else "the device"
    rows = {KERNELS: 0, LINKS: 1}
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "tid": 0, "name": "process_name", "args": {"name": f"{timeline.graph} on {timeline.machine}: {who}"}}
    ]
    for name, row in rows.items():
        events.append({"ph": "M", "pid": 0, "tid": row, "name": "thread_name", "args": {"name": name}})
    for s in timeline.spans:
        events.append(
            {
                "ph": "X", "pid": 0, "tid": rows[s.stream], "ts": s.start * 1e6, "dur": s.seconds * 1e6, "name": s.name, "cat": f"{s.phase},{s.kind}",
                "args": {"layer": s.operator, "kind": s.kind, "phase": s.phase, "critical": s.critical},
            }
        )  # fmt: skip
    for at, nbytes in timeline.memory:
        events.append({"ph": "C", "pid": 0, "tid": 0, "ts": at * 1e6, "name": "memory", "args": {"bytes": nbytes}})
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"plan": timeline.plan, "devices": str(timeline.devices), "seconds": repr(timeline.seconds), "source": timeline.source},
    }
