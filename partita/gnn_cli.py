"""`partita gnn`: graphs for full-graph training, made, converted and looked at. Parse, call `partita.gnn`, print.

What it calls is imported inside the commands, so that other commands do not wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.errors import GraphError
from partita.terminal import err, errors, out

app = typer.Typer(no_args_is_help=True, help="Full-graph training of graph neural networks: make, convert and look at graphs.")

Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="The .lux (or .npz) file to write; features, labels and masks of a .lux lie beside it.",
        show_default=False,
    ),
]
Transpose = Annotated[
    bool,
    typer.Option(
        "--transpose",
        help="Also write the transpose beside a .lux file, so that training need not make it in memory (8 bytes an edge).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table for people.")]


@app.callback()
def gnn() -> None:
    """Full-graph training of graph neural networks: make, convert and look at graphs."""


@app.command()
def generate(
    kind: Annotated[str, typer.Argument(help="rmat (a few vertices have most edges), erdos-renyi (all alike) or blocks (classes that keep to themselves).", show_default=False)],
    output: Output,
    edges: Annotated[str, typer.Option(help="How many edges: 16M, 1G, 500,000.", show_default=False)],
    vertices: Annotated[str, typer.Option(help="How many vertices; for rmat say --scale instead.", show_default=False)] = "",
    scale: Annotated[int | None, typer.Option(help="For rmat: 2^scale vertices.", show_default=False)] = None,
    features: Annotated[int, typer.Option(help="Features of every vertex; with them come labels and masks.")] = 0,
    classes: Annotated[int, typer.Option(help="Classes of the vertices.")] = 16,
    within: Annotated[float, typer.Option(help="For blocks: the share of the edges that stays in a class.")] = 0.8,
    undirected: Annotated[bool, typer.Option("--undirected", help="Add the reverse of every edge too.")] = False,
    transpose: Transpose = False,
    seed: Annotated[int, typer.Option(help="Another seed is another graph; the same seed is the same graph.", min=0)] = 0,
) -> None:  # fmt: skip
    """Draw a graph of any size, in little memory.

    Example: partita gnn generate rmat --scale 20 --edges 16M --features 64 -o graph.lux

    Example: partita gnn generate blocks --vertices 10000 --edges 200k --features 32 --classes 5 -o blocks.lux
    """
    with errors():
        from partita.gnn import files
        from partita.gnn import generate as draw
        from partita.units import parse_count

        _can_transpose(transpose, output)
        count = parse_count(edges)
        tables: dict[str, Any] = {"features": features, "classes": classes, "seed": seed}
        if kind == "rmat":
            if scale is None or vertices:
                raise GraphError("An rmat graph has 2^scale vertices: say --scale 20 for about a million, and no --vertices.")
            stream = draw.rmat(scale, count, **tables)
        elif kind in ("erdos-renyi", "blocks"):
            if not vertices or scale is not None:
                raise GraphError(f"For {kind} say how many vertices, as in --vertices 10000, and no --scale.")
            if kind == "blocks":
                stream = draw.blocks(parse_count(vertices), count, within=within, **tables)
            else:
                stream = draw.erdos_renyi(parse_count(vertices), count, **tables)
        else:
            raise GraphError(f"There is no generator {kind!r}: use rmat, erdos-renyi or blocks.")
        with progress() as report:
            made = files.gather(stream.with_reverse_edges() if undirected else stream, output, report)
            if transpose:
                files.transpose(output, report)
        err.print(f"{made}, written to {output}", markup=False, soft_wrap=True)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .lux, .npz or .parquet file, an edge list in text, or the folder of an OGB data set.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="The .lux or .npz file to write.", show_default=False)],
    undirected: Annotated[bool, typer.Option("--undirected", help="Add the reverse of every edge, where each is kept in one direction (ogbn-products).")] = False,
    split: Annotated[str | None, typer.Option(help="Which split of an OGB data set, where it has several.")] = None,
    transpose: Transpose = False,
) -> None:  # fmt: skip
    """Make a .lux or .npz file of another; edge lists and OGB folders of any size become .lux in little memory.

    Example: partita gnn convert dataset/ogbn_products products.lux --undirected

    Example: partita gnn convert edges.txt.gz graph.lux
    """
    with errors():
        from partita.gnn import files

        _can_transpose(transpose, output)
        with progress() as report:
            made = files.convert(source, output, undirected=undirected, split=split, report=report)
            if transpose:
                files.transpose(output, report)
        err.print(f"{made}, written to {output}", markup=False, soft_wrap=True)


@app.command()
def info(
    file: Annotated[
        Path, typer.Argument(help="A graph: a .lux, .npz or .parquet file, an edge list, or an OGB folder.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """What a graph has: vertices, edges, degrees, features, classes, masks, bytes. It is checked on the way.

    Example: partita gnn info graph.lux
    """
    with errors():
        from partita.gnn import files
        from partita.gnn.facts import facts, facts_table

        with progress() as report:
            found = facts(files.open(file, report))
        if as_json:
            print(json.dumps(found))
        else:
            out.print(facts_table(found))


def _can_transpose(transpose: bool, output: Path) -> None:
    if transpose and output.suffix != ".lux":
        raise GraphError(
            f"A transpose lies beside a .lux file, and {output.name!r} is none: call it {output.stem + '.lux'!r}, or leave --transpose away."
        )


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar that follows what is done to a graph; nothing where there is no terminal to show it on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, whole: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=whole)
            bar.update(tasks[what], completed=done)

        yield report
