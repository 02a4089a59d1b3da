"""The figures of a compiled step beside its plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partita.cost.collectives import Collective
from partita.execute.emitted import Emitted
from partita.units import format_bytes, format_flops

TOLERANCE = 0.01
"""Largest difference of the bytes of one kind of collective, as a fraction of all planned bytes."""
SHOWN_LAYERS = 3
"""Layers that are listed if the bytes of a kind differ."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one kind of collective, per device and step."""

    kind: str
    planned: int
    emitted: int
    layers: tuple[tuple[str, int, int], ...] = ()
    """(layer path, planned, emitted), largest difference first; empty if the totals agree."""


@dataclass(frozen=True)
class Verification:
    """The compiled program of a step beside the plan, per device."""

    peak_bytes: int
    """Peak memory by the compiler."""
    capacity_bytes: int | None
    """Memory of a device, None if it is unknown."""
    traffic: tuple[Traffic, ...]
    compiled_flops: float | None
    """None if the compiler does not count them."""
    planned_flops: float | None
    notes: tuple[str, ...] = ()
    """Further comparisons, as lines of text."""

    @property
    def measured(self) -> dict[str, Any]:
        """The compiler's figures of a device for a report: peak bytes, bytes by collective, FLOPs
        if they are counted.
        """
        figures: dict[str, Any] = {
            "peak_bytes": self.peak_bytes,
            "traffic_bytes": {traffic.kind: traffic.emitted for traffic in self.traffic},
        }
        if self.compiled_flops is not None:
            figures["flops"] = self.compiled_flops
        return figures

    @property
    def ok(self) -> bool:
        """Whether the collectives are the planned ones."""
        return not any(traffic.layers for traffic in self.traffic)

    def __str__(self) -> str:
        memory_line = f"memory per device, by the compiler: {format_bytes(self.peak_bytes)}"
        if self.capacity_bytes:
            memory_line += f" of {format_bytes(self.capacity_bytes)}"
        lines = [memory_line]
        for traffic in self.traffic:
            lines.append(f"{traffic.kind}: {_planned_emitted(traffic.planned, traffic.emitted)}")
            for path, planned, emitted_bytes in traffic.layers:
                lines.append(
                    f"  {path or '(no layer)'}: {_planned_emitted(planned, emitted_bytes)}"
                )
        if not self.traffic:
            lines.append("collectives: none planned, none emitted")
        if self.compiled_flops is not None and self.planned_flops is not None:
            planned_text = format_flops(self.planned_flops)
            compiled_text = format_flops(self.compiled_flops)
            lines.append(f"work per device: {planned_text} planned, {compiled_text} compiled")
        return "\n".join([*lines, *self.notes])


def _planned_emitted(planned: int, emitted_bytes: int) -> str:
    return f"{format_bytes(planned)} planned, {format_bytes(emitted_bytes)} emitted"


def compared_traffic(
    expected: Sequence[Collective], compiled: Sequence[Emitted]
) -> tuple[Traffic, ...]:
    """Bytes of every kind of collective, planned and compiled."""
    planned_bytes = _bytes_by_kind(expected)
    emitted_bytes = _bytes_by_kind(compiled)
    all_planned = sum(sum(by_path.values()) for by_path in planned_bytes.values())
    traffic = []
    for kind in sorted({*planned_bytes, *emitted_bytes}):
        planned = planned_bytes[kind]
        of_program = emitted_bytes[kind]
        planned_total = sum(planned.values())
        emitted_total = sum(of_program.values())
        layers: list[tuple[str, int, int]] = []
        if abs(planned_total - emitted_total) > TOLERANCE * all_planned:
            layers = _different_layers(planned, of_program)[:SHOWN_LAYERS]
        traffic.append(Traffic(kind, planned_total, emitted_total, tuple(layers)))
    return tuple(traffic)


def _bytes_by_kind(
    collectives: Sequence[Collective] | Sequence[Emitted],
) -> dict[str, dict[str, int]]:
    """Kind of collective -> layer path -> bytes."""
    nbytes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for collective in collectives:
        nbytes[collective.kind][collective.path] += collective.nbytes * collective.trips
    return nbytes


def _different_layers(
    planned: Mapping[str, int], of_program: Mapping[str, int]
) -> list[tuple[str, int, int]]:
    """(layer path, planned, emitted) of layers that differ, largest difference first."""
    layers = []
    for path in {*planned, *of_program}:
        planned_bytes = planned.get(path, 0)
        emitted_bytes = of_program.get(path, 0)
        if planned_bytes != emitted_bytes:
            layers.append((path, planned_bytes, emitted_bytes))
    return sorted(layers, key=lambda layer: (-abs(layer[1] - layer[2]), layer[0]))
