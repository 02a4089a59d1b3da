"""The chart of docs/papers.md: speed of found plans relative to data parallelism.

    partita bench papers --json > rows.json
    python benchmarks/papers_chart.py rows.json      # writes docs/found-vs-data-parallel.svg

Several files are merged.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

COLORS = {
    "alexnet": "#4269d0",
    "inception-v3": "#efb118",
    "resnet-101": "#ff725c",
    "rnntc": "#6cc5b0",
    "rnnlm": "#3ca951",
    "nmt": "#a463f2",
}
CLUSTERS = ("k80-cluster", "k80-flat", "p100-cluster")
COUNTS = (4, 8, 16, 32, 64)
TOP, BOTTOM, WIDTH = 50, 310, 320
"""Vertical range and width of a panel, pixels."""
PITCH = 400
"""Pixels from one panel to the next."""
OUTPUT = Path(__file__).parents[1] / "docs" / "found-vs-data-parallel.svg"

Gains = Mapping[tuple[str, str], Mapping[int, float]]
"""(network, cluster) -> devices -> seconds of data parallelism over those of the found plan."""


def gains_of(files: list[Path]) -> Gains:
    """The gains of all FlexFlow rows in the files."""
    gains: dict[tuple[str, str], dict[int, float]] = {}
    for file in files:
        for row in json.loads(file.read_text(encoding="utf-8")):
            case = row["case"]
            plans = row["plans"]
            if case["paper"] != "FlexFlow" or case["network"] not in COLORS:
                continue
            gain = plans["data parallel"]["seconds"] / plans["found"]["seconds"]
            gains.setdefault((case["network"], case["machine"]), {})[case["devices"]] = gain
    return gains


def chart(gains: Gains) -> str:
    """An SVG with one panel per cluster and one line per network."""
    largest = max(gain for by_count in gains.values() for gain in by_count.values())
    top = math.ceil(largest * 100) / 100
    ticks = [1 + i * (top - 1) / 4 for i in range(5)]
    legend = 35 + PITCH * len(CLUSTERS)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {legend + 125} 360" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, cluster in enumerate(CLUSTERS):
        lines += _panel(cluster, 60 + PITCH * number, ticks, gains)
    for number, (network, color) in enumerate(COLORS.items()):
        y = 60 + 22 * number
        lines.append(f'<circle cx="{legend}" cy="{y}" r="5" fill="{color}"/>')
        lines.append(f'<text x="{legend + 13}" y="{y + 4}">{network}</text>')
    caption = "devices; simulated seconds of a step, data parallel / found"
    lines.append(f'<text x="60" y="354" fill="#555">{caption}</text></svg>')
    return "\n".join(lines) + "\n"


def _panel(cluster: str, left: int, ticks: list[float], gains: Gains) -> Iterator[str]:
    height = BOTTOM - TOP
    scale = height / max(ticks[-1] - 1, 0.01)
    yield f'<text x="{left}" y="28" font-weight="bold">{cluster}</text>'
    for tick in ticks:
        y = BOTTOM - (tick - 1) * scale
        right = left + WIDTH
        yield f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        label = f'x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#555"'
        yield f"<text {label}>{tick:.2f}</text>"
    for count in COUNTS:
        x = left + (math.log2(count) - 2) / 4 * WIDTH
        yield f'<text x="{x:.1f}" y="332" text-anchor="middle" fill="#555">{count}</text>'
    for network, color in COLORS.items():
        points = []
        for count, gain in sorted(gains.get((network, cluster), {}).items()):
            x = left + (math.log2(count) - 2) / 4 * WIDTH
            points.append((x, BOTTOM - (gain - 1) * scale))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{path}"/>'
        for x, y in points:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="JSON of partita bench papers")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: the chart in docs")
    arguments = parser.parse_args()
    arguments.output.write_text(chart(gains_of(arguments.files)), encoding="utf-8")


if __name__ == "__main__":
    main()
