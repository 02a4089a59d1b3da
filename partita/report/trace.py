"""A timeline in the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Source: "Trace Event Format", Google: complete events ("X") in microseconds, metadata events ("M")
that name rows, counter events ("C") for memory. Times are whole nanoseconds, as in Perfetto, so
that consecutive events do not overlap.
"""

from __future__ import annotations

import math
from typing import Any

from partita.simulation.timeline import Span, Timeline

Event = dict[str, Any]


def trace(timeline: Timeline) -> dict[str, Any]:
    """A JSON value: one row per stream, kernels first, and a device's memory as a curve."""
    devices = "every device" if timeline.devices > 1 else "the device"
    events = [
        _metadata("process_name", 0, name=f"{timeline.graph} on {timeline.machine}: {devices}")
    ]
    rows = {stream: row for row, stream in enumerate(timeline.rows())}
    for (group, stream), row in rows.items():
        name = f"{group}: {stream}" if group else stream
        events.append(_metadata("thread_name", row, name=name))
        events.append(_metadata("thread_sort_index", row, sort_index=row))
    for span in timeline.spans:
        events.append(_complete(span, rows[span.group, span.stream]))
    for seconds, nbytes in timeline.memory:
        events.append(_counter(seconds, nbytes))
    other = {
        "plan": timeline.plan,
        "devices": str(timeline.devices),
        "seconds": repr(timeline.seconds),
        "source": timeline.source,
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def _metadata(event: str, row: int, **arguments: Any) -> Event:
    return {"ph": "M", "pid": 0, "tid": row, "name": event, "args": arguments}


def _complete(span: Span, row: int) -> Event:
    begin = round(span.start * 1e9)
    end = round(span.end * 1e9)
    return {
        "ph": "X",
        "pid": 0,
        "tid": row,
        "ts": _microseconds(begin),
        "dur": _microseconds(end - begin),
        "name": span.name,
        "cat": f"{span.phase},{span.kind}",
        "args": {
            "layer": span.operator,
            "kind": span.kind,
            "phase": span.phase,
            "critical": span.critical,
        },
    }


def _counter(seconds: float, nbytes: int) -> Event:
    time = _microseconds(round(seconds * 1e9))
    return {"ph": "C", "pid": 0, "tid": 0, "ts": time, "name": "memory", "args": {"bytes": nbytes}}


def _microseconds(nanoseconds: int) -> float:
    """Microseconds that give the same nanoseconds when multiplied by 1000 and truncated.

    Perfetto does that.

    >>> int(1.001 * 1000), int(_microseconds(1001) * 1000)
    (1000, 1001)
    """
    value = nanoseconds / 1e3
    return value if int(value * 1e3) == nanoseconds else math.nextafter(value, math.inf)
