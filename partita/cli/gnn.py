"""`partita gnn`: graphs for full-graph training, made, converted and looked at. Parse, call `partita.gnn`, print.

What it calls is imported inside the commands, so that other commands do not wait for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.cli.terminal import err, errors, in_processes, join, keep_stdout, out
from partita.errors import GraphError
from partita.units import format_bytes, format_seconds

app = typer.Typer(
    no_args_is_help=True,
    help="Full-graph training of graph neural networks: make, convert and look at graphs, train on them.",
)

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
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON for machines instead of a table for people.")
]


@app.callback()
def gnn() -> None:
    """Full-graph training of graph neural networks: make, convert and look at graphs, train on them."""


@app.command()
def generate(
    kind: Annotated[
        str,
        typer.Argument(
            help="rmat (a few vertices have most edges), erdos-renyi (all alike) or blocks (classes that keep to themselves).",
            show_default=False,
        ),
    ],
    output: Output,
    edges: Annotated[
        str, typer.Option(help="How many edges: 16M, 1G, 500,000.", show_default=False)
    ],
    vertices: Annotated[
        str,
        typer.Option(help="How many vertices; for rmat say --scale instead.", show_default=False),
    ] = "",
    scale: Annotated[
        int | None, typer.Option(help="For rmat: 2^scale vertices.", show_default=False)
    ] = None,
    features: Annotated[
        int, typer.Option(help="Features of every vertex; with them come labels and masks.")
    ] = 0,
    classes: Annotated[int, typer.Option(help="Classes of the vertices.")] = 16,
    within: Annotated[
        float, typer.Option(help="For blocks: the share of the edges that stays in a class.")
    ] = 0.8,
    undirected: Annotated[
        bool, typer.Option("--undirected", help="Add the reverse of every edge too.")
    ] = False,
    transpose: Transpose = False,
    seed: Annotated[
        int,
        typer.Option(help="Another seed is another graph; the same seed is the same graph.", min=0),
    ] = 0,
) -> None:
    """Draw a graph of any size, in little memory.

    Example: partita gnn generate rmat --scale 20 --edges 16M --features 64 -o graph.lux

    Example: partita gnn generate blocks --vertices 10000 --edges 200k --features 32 --classes 5 -o blocks.lux
    """
    with errors():
        from partita.gnn.data import files
        from partita.gnn.data import generate as draw
        from partita.units import parse_count

        _can_transpose(transpose, output)
        count = parse_count(edges)
        tables: dict[str, Any] = {"features": features, "classes": classes, "seed": seed}
        if kind == "rmat":
            if scale is None or vertices:
                raise GraphError(
                    "An rmat graph has 2^scale vertices: say --scale 20 for about a million, and no --vertices."
                )
            stream = draw.rmat(scale, count, **tables)
        elif kind in ("erdos-renyi", "blocks"):
            if not vertices or scale is not None:
                raise GraphError(
                    f"For {kind} say how many vertices, as in --vertices 10000, and no --scale."
                )
            if kind == "blocks":
                stream = draw.blocks(parse_count(vertices), count, within=within, **tables)
            else:
                stream = draw.erdos_renyi(parse_count(vertices), count, **tables)
        else:
            raise GraphError(f"There is no generator {kind!r}: use rmat, erdos-renyi or blocks.")
        with progress() as report:
            made = files.gather(
                stream.with_reverse_edges() if undirected else stream, output, report
            )
            if transpose:
                files.transpose(output, report)
        err.print(f"{made}, written to {output}", markup=False, soft_wrap=True)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .lux, .npz or .parquet file, an edge list in text, or the folder of an OGB data set.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Argument(help="The .lux or .npz file to write.", show_default=False)
    ],
    undirected: Annotated[
        bool,
        typer.Option(
            "--undirected",
            help="Add the reverse of every edge, where each is kept in one direction (ogbn-products).",
        ),
    ] = False,
    split: Annotated[
        str | None, typer.Option(help="Which split of an OGB data set, where it has several.")
    ] = None,
    transpose: Transpose = False,
) -> None:
    """Make a .lux or .npz file of another; edge lists and OGB folders of any size become .lux in little memory.

    Example: partita gnn convert dataset/ogbn_products products.lux --undirected

    Example: partita gnn convert edges.txt.gz graph.lux
    """
    with errors():
        from partita.gnn.data import files

        _can_transpose(transpose, output)
        with progress() as report:
            made = files.convert(source, output, undirected=undirected, split=split, report=report)
            if transpose:
                files.transpose(output, report)
        err.print(f"{made}, written to {output}", markup=False, soft_wrap=True)


@app.command()
def info(
    file: Annotated[
        Path,
        typer.Argument(
            help="A graph: a .lux, .npz or .parquet file, an edge list, or an OGB folder.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """What a graph has: vertices, edges, degrees, features, classes, masks, bytes. It is checked on the way.

    Example: partita gnn info graph.lux
    """
    with errors():
        from partita.gnn.data import files
        from partita.gnn.data.facts import facts, facts_table

        with progress() as report:
            found = facts(files.open(file, report=report))
        if as_json:
            print(json.dumps(found))
        else:
            out.print(facts_table(found))


@app.command()
def train(
    file: Annotated[
        Path,
        typer.Argument(
            help="A graph with features, labels and a training mask: .npz, .lux, or an OGB folder.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, typer.Option(help="gcn, sage, gin, gatv2, commnet or gatedgraph.")
    ] = "gcn",
    hidden: Annotated[int, typer.Option(help="Features of a vertex between layers.", min=1)] = 16,
    layers: Annotated[int, typer.Option(help="Layers of the network.", min=1)] = 2,
    epochs: Annotated[int, typer.Option(help="Steps, each over the whole graph.", min=1)] = 200,
    dropout: Annotated[
        float,
        typer.Option(
            help="Share of features left out at random before each layer.", min=0, max=0.99
        ),
    ] = 0.5,
    rate: Annotated[float, typer.Option(help="Learning rate of Adam.", min=0)] = 0.01,
    decay: Annotated[float, typer.Option(help="Weight decay of the first layer.", min=0)] = 5e-4,
    normalise: Annotated[
        bool,
        typer.Option(
            "--normalise",
            help="Divide the features of every vertex by their sum, as is usual for counts of words.",
        ),
    ] = False,
    devices: Annotated[
        int,
        typer.Option(
            help="Split the vertices over so many devices; a CPU stands for as many as asked for. With --processes: one a core.",
            min=1,
        ),
    ] = 1,
    processes: Annotated[
        int,
        typer.Option(
            help="Start so many processes on this host, a share of its cores each, that train together.",
            min=1,
        ),
    ] = 1,
    partition: Annotated[
        str,
        typer.Option(
            help="Parts of as many 'edges', of as many 'vertices', 'learned' from measured times, or by 'metis'."
        ),
    ] = "edges",
    columns: Annotated[
        int | None,
        typer.Option(
            help="Groups of so many devices share their vertices and split the features of an aggregation; default: as is cheapest.",
            min=1,
            show_default=False,
        ),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            help="Number the vertices inside by 'degree' (the most read first; for skewed graphs) or 'neighbours' (for meshes and roads).",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Keep to so much memory of one device, as 4GiB: what does not fit goes to the host's disk and comes back.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(help="The same seed is the same training, on any number of devices.", min=0),
    ] = 0,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the trained model to this .keras file.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Save the training in this folder on the way, and go on from what is there.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        int, typer.Option(help="With --checkpoint: epochs from one to the next.", min=1)
    ] = 1,
    as_json: Json = False,
) -> None:
    """Train a graph network on the whole graph, every epoch: accuracy, time per epoch, parts, traffic.

    Example: partita gnn train cora.npz --model gcn --normalise --epochs 200 --devices 4
    """
    with errors():
        if save is not None and save.suffix != ".keras":
            raise GraphError(
                f"A model is saved to a .keras file, and {save.name!r} is none: call it {save.stem + '.keras'!r}."
            )
        in_processes(processes, devices if devices > 1 else None)
        if os.environ.get("PARTITA_LAUNCHED"):
            keep_stdout()
        first = join()
        from partita.gnn.data import files

        with progress() as report:
            graph = files.open(file, report=report)
        os.environ.setdefault("KERAS_BACKEND", "jax")
        from partita.execute.devices import start_host_devices

        if devices > 1:
            start_host_devices(devices)
        import keras

        from partita.gnn.nn.models import MODELS
        from partita.gnn.train import normalised, trained_facts

        if model not in MODELS:
            raise GraphError(f"There is no model {model!r}: use {', '.join(MODELS)}.")
        keras.utils.set_random_seed(seed)
        network = MODELS[model](
            hidden=hidden, classes=max(1, graph.classes), layers=layers, dropout=dropout, l2=decay
        )
        network.compile(keras.optimizers.Adam(rate), metrics=["accuracy"])
        graph = normalised(graph) if normalise else graph
        with progress() as report:
            follow: list[Any] = [
                keras.callbacks.LambdaCallback(
                    on_epoch_end=lambda epoch, logs: report("training", epoch + 1, epochs)
                )
            ]
            if checkpoint is not None:
                from partita.keras.checkpoint import Checkpoint

                follow.insert(0, Checkpoint(checkpoint, every=every))
            network.fit(
                graph,
                epochs,
                callbacks=follow,
                verbose=0,
                devices=devices,
                partition=partition,
                columns=columns,
                order=order,
                memory=memory,
            )
        found = {"model": model, **trained_facts(network, graph)}
        if first and save is not None:
            network.save(save)
        if first and as_json:
            print(json.dumps(found))
        elif first:
            _print_trained(found)


@app.command("partition")
def compare(
    file: Annotated[
        Path,
        typer.Argument(
            help="A graph: a .lux, .npz or .parquet file, an edge list, or an OGB folder.",
            show_default=False,
        ),
    ],
    devices: Annotated[int, typer.Option(help="Parts to cut it into.", min=1)] = 2,
    features: Annotated[
        int, typer.Option(help="Features of a vertex where rows are summed and fetched.", min=1)
    ] = 64,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Also write a page with the times of all devices to this .html file.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the ways to split a graph: the slowest part, imbalance, rows and bytes that are fetched.

    Times are predicted from sums over random ranges, timed on this machine in some seconds.

    Example: partita gnn partition graph.lux --devices 8 --report parts.html
    """
    with errors():
        if report is not None and report.suffix != ".html":
            raise GraphError(
                f"A report is an .html file, and {report.name!r} is none: call it {report.stem + '.html'!r}."
            )
        from partita.gnn.data import files
        from partita.gnn.split import compare as comparing
        from partita.report.parts import page

        with progress() as follow:
            graph = files.open(file, report=follow)
            if devices > max(1, graph.vertices):
                raise GraphError(
                    f"{graph.vertices:,} vertices cannot be cut into {devices:,} parts: use --devices {max(1, graph.vertices)} at most."
                )
            found = comparing.compare(graph, devices, features, follow)
        partitioners = found["partitioners"]
        rows = [comparing.row_of(name, one) for name, one in partitioners.items()]
        notes = [
            comparing.source_of(found),
            *([] if "metis" in partitioners else [comparing.WITHOUT_METIS]),
        ]
        if report is not None:
            try:
                report.write_text(
                    page(found, comparing.TITLES, comparing.COLUMNS, rows, notes), encoding="utf-8"
                )
            except OSError as error:
                raise GraphError(
                    f"{str(report)!r} cannot be written: {error.strerror}. Name a file in a folder that exists."
                ) from None
        if as_json:
            print(json.dumps(found))
            return
        out.print(comparing.comparison_table(found))
        out.print(comparing.device_table(found))
        for note in notes:
            out.print(note, markup=False)
        if report is not None:
            err.print(f"written to {report}", markup=False, soft_wrap=True)


def _print_trained(found: dict[str, Any]) -> None:
    out.print(
        f"{found['model']} on {found['graph']}: {found['epochs']} epochs, loss {found['loss']:.4f}",
        markup=False,
    )
    for mask, accuracy in found["accuracy"].items():
        out.print(f"accuracy, {mask}: {accuracy:.1%}", markup=False)
    if found["epoch_seconds"] is None:
        out.print("nothing was left to train: the checkpoint is of the last epoch")
    else:
        out.print(
            f"time per epoch: {format_seconds(found['epoch_seconds'])}; the first, compiled on the way: {format_seconds(found['first_seconds'])}"
        )
    for i, part in enumerate(found["parts"]):
        out.print(
            f"part {i}: {part['vertices']:,} vertices, {part['edges']:,} in-edges, {part['fetched']:,} rows of other parts"
        )
    for width, columns in found["columns"].items():
        out.print(f"aggregations of {width} features: split over {columns} devices")
    if found["parts"]:
        out.print(
            f"traffic: {format_bytes(found['traffic'])} an epoch between {len(found['parts'])} parts"
        )
    if "learned" in found:
        learnt = found["learned"]
        off = (
            ""
            if learnt["error"] is None
            else f"; predictions were {learnt['error']:.0%} off (median)"
        )
        out.print(f"learned: the split moved {learnt['moves']} times{off}", markup=False)
    if "memory" in found:
        held = found["memory"]
        out.print(
            f"memory: {format_bytes(held['need'])} needed, {format_bytes(held['budget'])} given, {format_bytes(held['least'])} the least",
            markup=False,
        )
        out.print(
            f"to the host and back: {format_bytes(held['traffic'])} an epoch as planned, {format_bytes(held['lru_traffic'])} by a least-recently-used cache"
            f"{'' if held['exact'] else '; too many tensors to search them all, so the plan is that cache'}",
            markup=False,
        )


def _can_transpose(transpose: bool, output: Path) -> None:
    if transpose and output.suffix != ".lux":
        raise GraphError(
            f"A transpose lies beside a .lux file, and {output.name!r} is none: call it {output.stem + '.lux'!r}, or leave --transpose away."
        )


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar that follows what is done to a graph; nothing where there is no terminal to show it on."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, whole: int | None) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=whole)
            bar.update(tasks[what], completed=done)

        yield report
