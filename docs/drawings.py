"""Draws the pictures of the documentation as SVG that follows the reader's light or dark setting.

    python docs/drawings.py        # writes docs/img/*.svg

Each function returns the shapes of one picture. `SPEEDUPS` repeats the table of
benchmarks/RESULTS.md ("Found against keras.distribution"); everything else is schematic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent / "img"

STYLE = """
  :root { --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --ground: #ffffff;
    --a: #0969da; --b: #bf8700; --c: #1a7f37; --d: #8250df; --empty: #d8dee4; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #f0f6fc; --soft: #9198a1; --line: #3d444d; --ground: #0d1117;
      --a: #4493f8; --b: #d29922; --c: #3fb950; --d: #ab7df8; --empty: #30363d; } }
  text { font: 13px system-ui, sans-serif; fill: var(--ink); }
  .soft { fill: var(--soft); } .bold { font-weight: 600; } .mono { font-family: ui-monospace, monospace; }
  .small { font-size: 11px; } .on { fill: #ffffff; }
  .box { fill: var(--ground); stroke: var(--line); stroke-width: 1.5; }
  .a { fill: var(--a); } .b { fill: var(--b); } .c { fill: var(--c); } .d { fill: var(--d); }
  .empty { fill: var(--empty); } .faint { opacity: 0.45; }
  .wire { fill: none; stroke: var(--soft); stroke-width: 1.5; } .thin { stroke: var(--line); }
  .cut { stroke: var(--b); stroke-width: 2; }
"""
COLORS = "abcd"


@dataclass(frozen=True)
class Picture:
    """Shapes with the size of their canvas, pixels, and a sentence for readers who cannot see
    it.
    """

    width: int
    height: int
    description: str
    shapes: tuple[str, ...]

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">'
        )
        parts = [
            head,
            f"<title>{escape(self.description)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect width="{self.width}" height="{self.height}" fill="var(--ground)"/>',
            *self.shapes,
            "</svg>",
        ]
        return "\n".join(parts) + "\n"


def rect(x: float, y: float, width: float, height: float, kind: str, radius: float = 3) -> str:
    return (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        f'rx="{radius:g}"/>'
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def line(points: Iterable[tuple[float, float]], kind: str = "wire", arrow: bool = False) -> str:
    steps = " ".join(f"{x:g},{y:g}" for x, y in points)
    end = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<polyline class="{kind}" points="{steps}"{end}/>'


ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="var(--soft)"/></marker></defs>'
)


def speedups() -> Picture:
    """Step time of an AlexNet-like network on two processes: keras.distribution against Partita."""
    shapes = [
        text(16, 26, "Seconds a training step takes, two processes", "bold"),
        text(16, 44, "AlexNet-like network, 61 M parameters, batch 32; shorter is better", "soft"),
    ]
    y = 66
    longest = max(before for _, before, _ in SPEEDUPS)
    for name, before, after in SPEEDUPS:
        shapes.append(text(16, y + 24, name, "bold"))
        for row, (label, seconds, kind) in enumerate(
            (("keras.distribution", before, "empty"), ("Partita", after, "a"))
        ):
            top = y + 20 * row
            length = max(3.0, 330 * seconds / longest)
            figure = f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
            shapes.append(text(232, top + 13, label, "soft small", "end"))
            shapes.append(rect(240, top + 2, length, 14, kind))
            note = figure if row == 0 else f"{figure}  ·  {before / after:.1f} x as fast"
            shapes.append(text(246 + length, top + 13, note, "small" if row == 0 else "small bold"))
        y += 54
    return Picture(720, y + 4, "Step times: keras.distribution and Partita", tuple(shapes))


SPEEDUPS = (("full speed", 1.35, 0.50), ("1 Gbit/s", 4.97, 0.68), ("200 Mbit/s", 20.6, 1.07))
"""(link, seconds with keras.distribution, seconds with Partita's plan); benchmarks/processes.py,
2026-11-25.
"""


def soap() -> Picture:
    """One dense layer, batch x inputs times inputs x outputs, under S, A, P and O on two
    devices.
    """
    shapes = [ARROW]
    panels = (
        ("S", "sample", "Half of the batch each.", "gradients are summed"),
        ("A", "attribute", "Half of every sample each.", "rows, columns, positions"),
        ("P", "parameter", "Half of the weights each.", "inputs are whole"),
        ("O", "operator", "Other layers each.", "pipeline stages, branches"),
    )
    for number, (letter, name, what, more) in enumerate(panels):
        left = 16 + 182 * number
        shapes.append(text(left, 28, letter, "bold"))
        shapes.append(text(left + 16, 28, name, "soft"))
        shapes += _split_layer(letter, left, 48)
        shapes.append(text(left, 182, what, "small"))
        shapes.append(text(left, 199, more, "soft small"))
    shapes.append(rect(16, 216, 12, 12, "a"))
    shapes.append(text(34, 226, "device 0", "small"))
    shapes.append(rect(100, 216, 12, 12, "b"))
    shapes.append(text(118, 226, "device 1", "small"))
    shapes.append(rect(184, 216, 12, 12, "empty"))
    shapes.append(text(202, 226, "on both devices", "small"))
    return Picture(
        744, 242, "A layer split by sample, attribute, parameter and operator", tuple(shapes)
    )


def _split_layer(letter: str, left: float, top: float) -> list[str]:
    """Samples (three sheets), weights and results of one layer, coloured by device."""
    shapes: list[str] = []
    if letter == "O":
        for row, (name, kind) in enumerate((("layer 1", "a"), ("layer 2", "b"))):
            y = top + 52 * row
            shapes.append(rect(left, y, 150, 36, kind))
            shapes.append(text(left + 75, y + 23, name, "on bold", "middle"))
        shapes.append(line([(left + 75, top + 38), (left + 75, top + 50)], arrow=True))
        return shapes
    shapes.append(text(left, top + 6, "input", "soft small"))
    shapes.append(text(left + 62, top + 6, "weights", "soft small"))
    shapes.append(text(left + 112, top + 6, "output", "soft small"))
    halves = {"S": ("top", None, "top"), "A": ("side", None, "side"), "P": (None, "side", "side")}
    for kind, x, width, height in zip(
        halves[letter], (left, left + 62, left + 112), (44, 36, 44), (76, 44, 76), strict=True
    ):
        shapes += _half(x, top + 14, width, height, kind)
    return shapes


def _half(x: float, y: float, width: float, height: float, cut: str | None) -> list[str]:
    """A block in two colours: cut into top and bottom, into left and right, or whole on both
    devices.
    """
    if cut is None:
        return [rect(x, y, width, height, "empty")]
    if cut == "top":
        half = height / 2 - 1
        return [rect(x, y, width, half, "a"), rect(x, y + half + 2, width, half, "b")]
    half = width / 2 - 1
    return [rect(x, y, half, height, "a"), rect(x + half + 2, y, half, height, "b")]


def pipeline_of_the_tool() -> Picture:
    """The stages from a script to a verified run."""
    boxes = (
        ("capture", "StableHLO text"),
        ("graph", "of operators"),
        ("search", "costs, simulation"),
        ("plan", "a small JSON file"),
        ("execute", "XLA, inside fit"),
        ("report", "tables, timeline"),
    )
    shapes = [ARROW]
    for number, (name, what) in enumerate(boxes):
        left = 12 + 122 * number
        shapes.append(rect(left, 40, 106, 50, "box", 6))
        shapes.append(text(left + 53, 62, name, "bold", "middle"))
        shapes.append(text(left + 53, 79, what, "soft small", "middle"))
        if number:
            shapes.append(line([(left - 16, 65), (left - 2, 65)], arrow=True))
    shapes.append(text(12, 24, "train.py", "mono"))
    shapes.append(line([(64, 28), (64, 38)], arrow=True))
    shapes.append(text(309, 24, "machine", "mono", "middle"))
    shapes.append(line([(309, 28), (309, 38)], arrow=True))
    shapes.append(line([(553, 92), (553, 112), (309, 112), (309, 94)], arrow=True))
    shapes.append(
        text(431, 128, "the compiler answers: memory, collectives, FLOPs", "soft small", "middle")
    )
    return Picture(744, 140, "From a training script to a verified run", tuple(shapes))


def schedule() -> Picture:
    """One step of a pipeline: 4 stages, 4 microbatches, schedule 1f1b."""
    stages = 4
    microbatches = 4
    shapes = [
        text(16, 24, "A pipeline step: 4 stages, 4 microbatches, schedule 1f1b", "bold"),
    ]
    for stage in range(stages):
        y = 40 + 34 * stage
        shapes.append(text(16, y + 19, f"stage {stage}", "soft"))
        shapes.append(rect(80, y, 648, 28, "empty"))
    for stage, start, kind, microbatch in _one_forward_one_backward(stages, microbatches):
        x = 80 + 30.8 * start
        width = 30.8 if kind == "forward" else 61.6
        y = 40 + 34 * stage
        shapes.append(rect(x + 1, y, width - 2, 28, "a" if kind == "forward" else "c"))
        shapes.append(text(x + width / 2, y + 18, str(microbatch), "on small", "middle"))
    bottom = 40 + 34 * stages + 8
    for x, kind, label in ((80, "a", "forward"), (170, "c", "backward"), (268, "empty", "bubble")):
        shapes.append(rect(x, bottom, 12, 12, kind))
        shapes.append(text(x + 18, bottom + 10, label, "small"))
    return Picture(744, bottom + 26, "Pipeline schedule with four stages", tuple(shapes))


def _one_forward_one_backward(stages: int, microbatches: int) -> list[tuple[int, int, str, int]]:
    """(stage, start, pass, microbatch) with a forward pass of 1 and a backward pass of 2 units."""
    orders = []
    for stage in range(stages):
        ahead = min(microbatches, stages - stage)
        order = [("forward", m) for m in range(ahead)]
        for m in range(microbatches):
            order.append(("backward", m))
            if ahead + m < microbatches:
                order.append(("forward", ahead + m))
        orders.append(order)
    end: dict[tuple[int, str, int], int] = {}
    free = [0] * stages
    tasks = []
    while any(orders):
        for stage, order in enumerate(orders):
            if not order:
                continue
            kind, m = order[0]
            before = (stage - 1, kind, m) if kind == "forward" else (stage + 1, kind, m)
            is_first = not 0 <= before[0] < stages
            if not is_first and before not in end:
                continue
            start = max(free[stage], 0 if is_first else end[before])
            free[stage] = end[stage, kind, m] = start + (1 if kind == "forward" else 2)
            tasks.append((stage, start, kind, m))
            order.pop(0)
    return tasks


def partitioned_graph() -> Picture:
    """A graph in two parts: edges inside parts, edges between them, and halo vertices."""
    places = {
        0: (70, 70), 1: (140, 44), 2: (120, 120), 3: (200, 90), 4: (190, 150),
        5: (330, 60), 6: (320, 130), 7: (400, 40), 8: (410, 110), 9: (370, 165),
    }  # fmt: skip
    inside = [
        (0, 1),
        (0, 2),
        (1, 2),
        (1, 3),
        (2, 4),
        (3, 4),
        (5, 6),
        (5, 7),
        (6, 8),
        (7, 8),
        (6, 9),
        (8, 9),
    ]
    between = [(3, 5), (3, 6), (4, 6)]
    shapes = [
        rect(30, 20, 200, 160, "box", 10),
        rect(290, 20, 160, 160, "box", 10),
        text(40, 200, "device 0", "bold"),
        text(300, 200, "device 1", "bold"),
    ]
    shapes += [line([places[u], places[v]]) for u, v in inside]
    shapes += [line([places[u], places[v]], "wire cut") for u, v in between]
    for vertex, (x, y) in places.items():
        kind = "a" if vertex < 5 else "c"
        shapes.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="9"/>')
    notes = (
        (52, "A device stores the vertices of a part", ""),
        (70, "and sums over edges into them.", ""),
        (100, "Rows at the end of a cut edge (the halo)", ""),
        (118, "are exchanged in every aggregation.", ""),
        (148, "Loss and weight gradients are summed.", ""),
    )
    shapes += [text(470, y, words, kind) for y, words, kind in notes]
    return Picture(744, 216, "A graph divided over two devices", tuple(shapes))


PICTURES = {
    "speedups": speedups,
    "soap": soap,
    "tool": pipeline_of_the_tool,
    "schedule": schedule,
    "graph": partitioned_graph,
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
