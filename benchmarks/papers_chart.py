"""The chart of docs/papers.md: how much faster found plans are than data parallelism, by network, cluster and devices.

partita bench papers --json > rows.json
python benchmarks/papers_chart.py rows.json            # writes docs/found-vs-data-parallel.svg; several files are taken together
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

COLORS = {
    "alexnet": "#4269d0",
    "inception-v3": "#efb118",
    "resnet-101": "#ff725c",
    "rnntc": "#6cc5b0",
    "rnnlm": "#3ca951",
    "nmt": "#a463f2",
}
CLUSTERS = ("k80-cluster", "p100-cluster")
COUNTS = (4, 8, 16, 32, 64)
TOP, BOTTOM, WIDTH = 50, 310, 320


def gains(files: list[str]) -> dict[tuple[str, str], dict[int, float]]:
    """(network, cluster) -> devices -> seconds of data parallelism per second of the plan found."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in (row for file in files for row in json.loads(Path(file).read_text())):
        case, plans = row["case"], row["plans"]
        if case["paper"] == "FlexFlow" and case["network"] in COLORS:
            by_count = found.setdefault((case["network"], case["machine"]), {})
            by_count[case["devices"]] = (
                plans["data parallel"]["seconds"] / plans["found"]["seconds"]
            )
    return found


def chart(found: dict[tuple[str, str], dict[int, float]]) -> str:
    most = max(gain for by_count in found.values() for gain in by_count.values())
    steps = [1 + i * (math.ceil(most * 100) - 100) / 400 for i in range(5)]
    y = lambda gain: BOTTOM - (gain - 1) / (steps[-1] - 1) * (BOTTOM - TOP)
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 360" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for k, cluster in enumerate(CLUSTERS):
        left = 60 + 400 * k
        x = lambda devices, left=left: left + (math.log2(devices) - 2) / 4 * WIDTH
        lines.append(f'<text x="{left}" y="28" font-weight="bold">{cluster}</text>')
        for step in steps:
            lines.append(
                f'<line x1="{left}" x2="{left + WIDTH}" y1="{y(step):.1f}" y2="{y(step):.1f}" stroke="#ddd"/>'
            )
            lines.append(
                f'<text x="{left - 8}" y="{y(step) + 4:.1f}" text-anchor="end" fill="#555">{step:.2f}</text>'
            )
        lines += [
            f'<text x="{x(n):.1f}" y="332" text-anchor="middle" fill="#555">{n}</text>'
            for n in COUNTS
        ]
        for network, color in COLORS.items():
            points = [
                (x(n), y(gain)) for n, gain in sorted(found.get((network, cluster), {}).items())
            ]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            lines.append(
                f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{path}"/>'
            )
            lines += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{color}"/>' for a, b in points
            ]
    for i, (network, color) in enumerate(COLORS.items()):
        lines.append(
            f'<circle cx="835" cy="{60 + 22 * i}" r="5" fill="{color}"/><text x="848" y="{64 + 22 * i}">{network}</text>'
        )
    lines.append(
        '<text x="60" y="354" fill="#555">devices; simulated seconds of a step, data parallel / found</text></svg>'
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    (Path(__file__).parents[1] / "docs" / "found-vs-data-parallel.svg").write_text(
        chart(gains(sys.argv[1:]))
    )
