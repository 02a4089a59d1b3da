"""A timeline in the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Source of the format: "Trace Event Format", Google: complete events ("X") in microseconds, metadata events ("M") that name rows,
counter events ("C") for memory. Times are whole nanoseconds, as Perfetto keeps them, so that what follows another does not overlap it.
"""

from __future__ import annotations

import math
from typing import Any

from partita.simulation.timeline import Timeline


def trace(timeline: Timeline) -> dict[str, Any]:
    """The timeline as a JSON value: a row for every stream, kernels first, and the memory of a device as a curve."""
    who = "every device" if timeline.devices > 1 else "the device"
    rows = {stream: row for row, stream in enumerate(timeline.rows())}
    events: list[dict[str, Any]] = [
        {
            "ph": "M",
            "pid": 0,
            "tid": 0,
            "name": "process_name",
            "args": {"name": f"{timeline.graph} on {timeline.machine}: {who}"},
        }
    ]
    for (group, stream), row in rows.items():
        events.append(
            {
                "ph": "M",
                "pid": 0,
                "tid": row,
                "name": "thread_name",
                "args": {"name": f"{group}: {stream}" if group else stream},
            }
        )
        events.append(
            {
                "ph": "M",
                "pid": 0,
                "tid": row,
                "name": "thread_sort_index",
                "args": {"sort_index": row},
            }
        )
    for s in timeline.spans:
        begin, end = round(s.start * 1e9), round(s.end * 1e9)
        events.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": rows[s.group, s.stream],
                "ts": _micro(begin),
                "dur": _micro(end - begin),
                "name": s.name,
                "cat": f"{s.phase},{s.kind}",
                "args": {
                    "layer": s.operator,
                    "kind": s.kind,
                    "phase": s.phase,
                    "critical": s.critical,
                },
            }
        )
    for at, nbytes in timeline.memory:
        events.append(
            {
                "ph": "C",
                "pid": 0,
                "tid": 0,
                "ts": _micro(round(at * 1e9)),
                "name": "memory",
                "args": {"bytes": nbytes},
            }
        )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "plan": timeline.plan,
            "devices": str(timeline.devices),
            "seconds": repr(timeline.seconds),
            "source": timeline.source,
        },
    }


def _micro(nanoseconds: int) -> float:
    """Microseconds that are still as many whole nanoseconds after they are multiplied by 1000 and cut, as Perfetto does.

    >>> int(1.001 * 1000), int(_micro(1001) * 1000)
    (1000, 1001)
    """
    value = nanoseconds / 1e3
    return value if int(value * 1e3) == nanoseconds else math.nextafter(value, math.inf)
