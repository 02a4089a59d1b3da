"""`partita gnn`: generate, convert and describe graphs, and train on them.

Commands import JAX, Keras and NumPy when they run, so that other commands start without them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.cli.files import check_writable, save_model, save_page, save_text
from partita.cli.options import Target, command
from partita.cli.processes import join_processes, keep_stdout, run_in_processes
from partita.cli.terminal import err, errors, out
from partita.errors import GraphError
from partita.units import format_bytes, format_seconds

app = typer.Typer(no_args_is_help=True, help="Train graph networks on whole graphs.")

GraphFile = Annotated[
    Path,
    typer.Argument(
        help="A .lux, .npz or .parquet file, an edge list in text, or an OGB folder.",
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="The .lux or .npz file to write.", show_default=False),
]
Transpose = Annotated[
    bool,
    typer.Option("--transpose", help="Also write the transpose, which training needs."),
]
Undirected = Annotated[
    bool,
    typer.Option("--undirected", help="Also add the reverse of every edge."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Kind = Annotated[
    str,
    typer.Argument(help="rmat, erdos-renyi or blocks.", show_default=False),
]
EdgeCount = Annotated[
    str,
    typer.Option("--edges", help="Number of edges, such as 16M or 500,000.", show_default=False),
]
VertexCount = Annotated[
    str,
    typer.Option("--vertices", help="Number of vertices (not for rmat).", show_default=False),
]
Scale = Annotated[
    int | None,
    typer.Option(help="2^scale vertices (for rmat).", show_default=False),
]
Features = Annotated[
    int,
    typer.Option(help="Features per vertex; labels and masks come with them."),
]
Classes = Annotated[int, typer.Option(help="Number of classes.")]
Within = Annotated[float, typer.Option(help="Share of edges within a class (for blocks).")]
TrainingFile = Annotated[
    Path,
    typer.Argument(help="A graph with features, labels and a training mask.", show_default=False),
]
Model = Annotated[str, typer.Option(help="gcn, sage, gin, gatv2, commnet or gatedgraph.")]
Hidden = Annotated[int, typer.Option(help="Features between layers.", min=1)]
Layers = Annotated[int, typer.Option(help="Number of layers.", min=1)]
Epochs = Annotated[int, typer.Option(help="Number of steps over the graph.", min=1)]
Dropout = Annotated[
    float,
    typer.Option(help="Dropout rate before each layer.", min=0, max=0.99),
]
Rate = Annotated[float, typer.Option(help="Learning rate of Adam.", min=0)]
Decay = Annotated[float, typer.Option(help="Weight decay of the first layer.", min=0)]
Normalise = Annotated[
    bool,
    typer.Option("--normalise", help="Divide the features of each vertex by their sum."),
]
Devices = Annotated[
    int,
    typer.Option(help="Number of devices; a CPU can act as several.", min=1),
]
Processes = Annotated[int, typer.Option(help="Number of processes on this host.", min=1)]
Partition = Annotated[
    str,
    typer.Option(help="edges, vertices, learned or metis (see above)."),
]
Columns = Annotated[
    int | None,
    typer.Option(help="Devices that split features, not vertices.", min=1, show_default="fastest"),
]
Order = Annotated[
    str | None,
    typer.Option(help="Vertex order: degree or neighbours.", show_default="as in the file"),
]
Memory = Annotated[
    str | None,
    typer.Option(help="Memory limit of each device, such as 4GiB.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers.", min=0)]
Save = Annotated[
    Path | None,
    typer.Option(help="Write the trained model to this .keras file.", show_default=False),
]
CheckpointFolder = Annotated[
    Path | None,
    typer.Option(help="Folder to save training in and resume it from.", show_default=False),
]
Every = Annotated[int, typer.Option(help="Epochs between checkpoints.", min=1)]


@app.callback()
def gnn() -> None:
    """Train graph networks on whole graphs."""


@dataclass(frozen=True)
class _Size:
    """The vertices of a random graph."""

    vertices: VertexCount = ""
    scale: Scale = None


@dataclass(frozen=True)
class _Contents:
    """Everything of a random graph besides its size."""

    features: Features = 0
    classes: Classes = 16
    within: Within = 0.8
    seed: Seed = 0


@command(app)
def generate(
    kind: Kind,
    output: Output,
    edges: EdgeCount,
    size: _Size,
    contents: _Contents,
    undirected: Undirected = False,
    transpose: Transpose = False,
) -> None:
    """Generate a random graph of any size.

    In an rmat graph a few vertices have most edges, as in social networks. In an erdos-renyi graph
    any two vertices may be connected. In a blocks graph most edges stay within a class.

    Example: partita gnn generate rmat --scale 20 --edges 16M -o graph.lux

    Example: partita gnn generate blocks --vertices 9k --edges 90k -o b.lux
    """
    with _errors():
        from partita.gnn.data import files
        from partita.gnn.data import generate as generators
        from partita.units import parse_count

        _check_transpose(transpose, output)
        edge_count = parse_count(edges)
        draws: dict[str, Any] = {
            "features": contents.features,
            "classes": contents.classes,
            "seed": contents.seed,
        }
        _check_size(kind, size)
        if kind == "rmat":
            assert size.scale is not None
            stream = generators.rmat(size.scale, edge_count, **draws)
        elif kind == "blocks":
            vertex_count = parse_count(size.vertices)
            stream = generators.blocks(vertex_count, edge_count, within=contents.within, **draws)
        else:
            stream = generators.erdos_renyi(parse_count(size.vertices), edge_count, **draws)
        if undirected:
            stream = stream.with_reverse_edges()
        with progress() as report:
            graph = files.save_stream(stream, output, report)
            if transpose:
                files.transpose(output, report)
        err.print(f"{graph}, written to {output}", markup=False, soft_wrap=True)


def _check_size(kind: str, size: _Size) -> None:
    """GraphError for an unknown generator, or a size in the wrong option."""
    if kind not in ("rmat", "erdos-renyi", "blocks"):
        raise GraphError(f"{kind!r} is no generator: use rmat, erdos-renyi or blocks.")
    if kind == "rmat" and (size.scale is None or size.vertices):
        raise GraphError(
            "An rmat graph has 2^scale vertices: give --scale, such as 20 for a million, and "
            "remove --vertices."
        )
    if kind != "rmat" and (size.scale is not None or not size.vertices):
        raise GraphError(
            f"A graph of kind {kind} has any number of vertices: give --vertices, such as 10000, "
            "and remove --scale."
        )


@app.command()
def convert(
    source: GraphFile,
    output: Annotated[
        Path,
        typer.Argument(help="The .lux or .npz file to write.", show_default=False),
    ],
    undirected: Undirected = False,
    split: Annotated[
        str | None,
        typer.Option(help="Split of an OGB data set that has several."),
    ] = None,
    transpose: Transpose = False,
) -> None:
    """Convert a graph to a .lux or .npz file.

    Edge lists and OGB folders of any size become .lux files in bounded memory. Data sets that store
    each edge in one direction, such as ogbn-products, need --undirected.

    Example: partita gnn convert dataset/ogbn_products products.lux --undirected

    Example: partita gnn convert edges.txt.gz graph.lux
    """
    with _errors():
        from partita.gnn.data import files

        _check_transpose(transpose, output)
        with progress() as report:
            graph = files.convert(
                source,
                output,
                undirected=undirected,
                split=split,
                report=report,
            )
            if transpose:
                files.transpose(output, report)
        err.print(f"{graph}, written to {output}", markup=False, soft_wrap=True)


@app.command()
def info(file: GraphFile, as_json: Json = False) -> None:
    """Check a graph and count what it has.

    Prints vertices, edges, degrees, features, classes, masks and bytes.

    Example: partita gnn info graph.lux
    """
    with _errors():
        from partita.gnn.data import files
        from partita.gnn.data.facts import facts_table, graph_facts

        with progress() as report:
            facts = graph_facts(files.open(file, report=report))
        if as_json:
            print(json.dumps(facts))
        else:
            out.print(facts_table(facts))


@dataclass(frozen=True)
class _Network:
    """A network and its optimizer, as described on the command line."""

    model: Model = "gcn"
    hidden: Hidden = 16
    layers: Layers = 2
    dropout: Dropout = 0.5
    rate: Rate = 0.01
    decay: Decay = 5e-4
    seed: Seed = 0

    def compiled(self, classes: int) -> Any:
        """A new Keras model with weights drawn from the seed."""
        import keras

        from partita.gnn.nn.models import MODELS

        if self.model not in MODELS:
            raise GraphError(f"{self.model!r} is no model: use {', '.join(MODELS)}.")
        keras.utils.set_random_seed(self.seed)
        model: Any = MODELS[self.model](
            hidden=self.hidden,
            classes=classes,
            layers=self.layers,
            dropout=self.dropout,
            l2=self.decay,
        )
        model.compile(keras.optimizers.Adam(self.rate), metrics=["accuracy"])
        return model


@dataclass(frozen=True)
class _Split:
    """The devices, and the part of the graph of each."""

    devices: Devices = 1
    processes: Processes = 1
    partition: Partition = "edges"
    columns: Columns = None
    order: Order = None
    memory: Memory = None


ARGUMENTS = "|".join(field.name for group in (_Network, _Split) for field in fields(group))
"""Arguments of models and of `fit` that are options of the commands, by the same name."""


@contextmanager
def _errors() -> Iterator[None]:
    """`errors`, with the options of the command in sentences on arguments in Python."""
    with errors():
        try:
            yield
        except GraphError as error:
            raise GraphError(_with_options(str(error))) from None


def _with_options(sentence: str) -> str:
    """A sentence with options in place of arguments.

    >>> _with_options('Use memory="991200 B" or devices=4.')
    'Use --memory "991200 B" or --devices 4.'
    """
    return re.sub(rf"(?<![\w-])({ARGUMENTS})=(?=[\w'\"])", r"--\1 ", sentence)


@dataclass(frozen=True)
class _Saving:
    """The files of a training."""

    save: Save = None
    checkpoint: CheckpointFolder = None
    every: Every = 1


@command(app)
def train(
    file: TrainingFile,
    network: _Network,
    split: _Split,
    saving: _Saving,
    epochs: Epochs = 200,
    normalise: Normalise = False,
    as_json: Json = False,
) -> None:
    """Train a graph network on a whole graph.

    Prints loss, accuracy, time per epoch, the parts of the devices and their traffic. The same seed
    gives the same losses on any number of devices. Training uses the devices of this machine; the
    command plan predicts it for any machine.

    --partition: "edges" and "vertices" give every device an equal number of in-edges or vertices.
    "learned" moves the split between epochs by measured times. "metis" keeps neighbours together.

    --columns: groups of this many devices have the same vertices and aggregate a slice of the
    features each.

    --order: "degree" numbers the vertices that are read most first, for skewed graphs. "neighbours"
    numbers neighbours near each other, for meshes and road networks.

    Example: partita gnn train cora.npz --normalise --epochs 200 --devices 4
    """
    with _errors():
        save = saving.save
        if save is not None and save.suffix != ".keras":
            raise GraphError(
                f"{save.name!r} does not end in .keras: call it {save.stem + '.keras'!r}."
            )
        check_writable(model=save)
        devices = split.devices
        run_in_processes(split.processes, devices if devices > 1 else None)
        if os.environ.get("PARTITA_LAUNCHED"):
            keep_stdout()
        is_first = join_processes()
        graph = _open_for_training(file, devices, normalise)
        trained = network.compiled(max(1, graph.classes))
        with progress() as report:
            trained.fit(
                graph,
                epochs,
                callbacks=_callbacks(saving, epochs, report),
                verbose=0,
                devices=devices,
                partition=split.partition,
                columns=split.columns,
                order=split.order,
                memory=split.memory,
            )
        from partita.gnn.train import trained_facts

        facts = {"model": network.model, **trained_facts(trained, graph)}
        if not is_first:
            return
        if save is not None:
            save_model(trained, save)
        if as_json:
            print(json.dumps(facts))
        else:
            _print_training(facts)


@command(app)
def plan(
    file: TrainingFile,
    network: _Network,
    target: Target,
    partition: Partition = "edges",
    order: Order = None,
    memory: Memory = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page about the best plan to this .html file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict graph training on a machine that need not be here.

    Prints seconds per epoch, memory of a device against what a step may use, and traffic, for each
    number of parts. Nothing is trained. A step within a memory limit, or one that does not fit, is
    predicted with a memory plan, and its copies to and from the host.

    Example: partita gnn plan graph.lux --model sage --hidden 256 --machine h100:8
    """
    with _errors():
        check_writable(report=report)
        if target.machine is None:
            raise GraphError(
                "gnn plan needs the machine to predict for: give --machine, such as h100:8, or a "
                ".toml file."
            )
        from partita import gnn

        graph = _open_for_training(file, 1, False)
        model = network.compiled(max(1, graph.classes))
        plans = gnn.plan(
            model,
            graph,
            target.machine,
            devices=target.devices,
            partition=partition,
            order=order,
            memory=memory,
        )
        best = plans.best
        if report is not None and best is not None:
            save_page(report, None, best.timeline)
        if as_json:
            print(json.dumps(plans.to_json()))
            return
        _print_plans(plans)
        if report is not None and best is not None:
            err.print(f"report written to {report}", markup=False, soft_wrap=True)


def _print_plans(plans: Any) -> None:
    """Prints the table of plans, and the best one."""
    from partita.report.tables import parts_table, timeline_summary

    out.print(parts_table(plans.to_json()))
    out.print(plans.sentence, markup=False, soft_wrap=True)
    if plans.best is not None:
        for line in timeline_summary(plans.best.timeline):
            out.print(line, markup=False, soft_wrap=True)


def _open_for_training(file: Path, devices: int, normalise: bool) -> Any:
    """The graph of a file; JAX starts afterwards, with its devices."""
    from partita import gnn
    from partita.execute.devices import start_host_devices

    gnn.require_jax()
    with progress() as report:
        graph = gnn.open(file, report=report)
    if devices > 1:
        start_host_devices(devices)
    return gnn.normalised(graph) if normalise else graph


def _callbacks(saving: _Saving, epochs: int, report: Callable[..., None]) -> list[Any]:
    """Keras callbacks: progress, and before it checkpoints if they are requested."""
    import keras

    def report_epoch(epoch: int, logs: Any) -> None:
        report("training", epoch + 1, epochs)

    progress_callback = keras.callbacks.LambdaCallback(on_epoch_end=report_epoch)
    if saving.checkpoint is None:
        return [progress_callback]
    from partita.keras.checkpoint import Checkpoint

    return [Checkpoint(saving.checkpoint, every=saving.every), progress_callback]


@app.command("partition")
def compare(
    file: GraphFile,
    devices: Annotated[int, typer.Option(help="Number of parts.", min=1)] = 2,
    features: Annotated[int, typer.Option(help="Features of an aggregation.", min=1)] = 64,
    report: Annotated[
        Path | None,
        typer.Option(help="Also write the comparison to this .html file.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare partitions of a graph by predicted time.

    Prints the slowest part, imbalance, fetched rows and bytes of every partitioner. Nothing is
    trained: times are predicted from sums over random ranges, which takes some seconds.

    Example: partita gnn partition graph.lux --devices 8 --report parts.html
    """
    with _errors():
        if report is not None and report.suffix != ".html":
            raise GraphError(
                f"{report.name!r} does not end in .html: call it {report.stem + '.html'!r}."
            )
        check_writable(report=report)
        from partita.gnn.data import files
        from partita.gnn.split import compare as comparing

        with progress() as follow:
            graph = files.open(file, report=follow)
            if devices > max(1, graph.vertices):
                raise GraphError(
                    f"--devices {devices:,} exceeds the {graph.vertices:,} vertices: use at most "
                    f"{max(1, graph.vertices)}."
                )
            comparison = comparing.compare(graph, devices, features, follow)
        partitioners = comparison["partitioners"]
        rows = [comparing.row_of(name, one) for name, one in partitioners.items()]
        notes = [comparing.source_of(comparison)]
        if "metis" not in partitioners:
            notes.append(comparing.WITHOUT_METIS)
        if report is not None:
            _write_report(report, comparison, rows, notes)
        if as_json:
            print(json.dumps(comparison))
            return
        out.print(comparing.comparison_table(comparison))
        out.print(comparing.device_table(comparison))
        for note in notes:
            out.print(note, markup=False)
        if report is not None:
            err.print(f"written to {report}", markup=False, soft_wrap=True)


def _write_report(
    path: Path, comparison: dict[str, Any], rows: list[list[str]], notes: list[str]
) -> None:
    from partita.gnn.split import compare as comparing
    from partita.report.parts import page

    text = page(comparison, comparing.TITLES, comparing.COLUMNS, rows, notes)
    save_text(text, path, "report")


def _print_training(facts: dict[str, Any]) -> None:
    """Prints the facts of a trained model, one per line."""
    for line in _training_lines(facts):
        out.print(line, markup=False)


def _training_lines(facts: dict[str, Any]) -> Iterator[str]:
    loss = f"loss {facts['loss']:.4f}"
    yield f"{facts['model']} on {facts['graph']}: {facts['epochs']} epochs, {loss}"
    for mask, accuracy in facts["accuracy"].items():
        yield f"accuracy, {mask}: {accuracy:.1%}"
    if facts["epoch_seconds"] is None:
        yield "no epoch was left to train: the checkpoint is of the last one"
    else:
        yield f"time per epoch: {format_seconds(facts['epoch_seconds'])} (median)"
        yield f"first epoch: {format_seconds(facts['first_seconds'])}, with compilation"
    parts = facts["parts"]
    for i, part in enumerate(parts):
        yield (
            f"part {i}: {part['vertices']:,} vertices, {part['edges']:,} in-edges, "
            f"{part['fetched']:,} fetched rows"
        )
    if parts:
        yield "fetched rows: rows of other parts that an aggregation reads"
    for width, columns in facts["columns"].items():
        yield f"aggregations of {width} features: split by features over {columns} devices"
    if parts:
        yield f"traffic: {format_bytes(facts['traffic'])} per epoch between {len(parts)} parts"
    if "learned" in facts:
        yield _learned_line(facts["learned"])
    if "memory" in facts:
        yield from _memory_lines(facts["memory"])


def _learned_line(learned: dict[str, Any]) -> str:
    line = f"learned partition: moved {learned['moves']} times"
    if learned["error"] is None:
        return line
    return f"{line}; median error of predictions {learned['error']:.0%}"


def _memory_lines(memory: dict[str, Any]) -> Iterator[str]:
    need, budget, least = (format_bytes(memory[key]) for key in ("need", "budget", "least"))
    yield f"memory: limit {budget}, minimum {least}, {need} without a limit"
    planned = format_bytes(memory["traffic"])
    cache = format_bytes(memory["lru_traffic"])
    yield f"host traffic per epoch: {planned} (a least-recently-used cache: {cache})"
    if not memory["exact"]:
        yield "memory plan: not exact, since there are too many tensors to search all plans"


def _check_transpose(transpose: bool, output: Path) -> None:
    if transpose and output.suffix != ".lux":
        raise GraphError(
            f"--transpose needs a .lux file and {output.name!r} is none: call it "
            f"{output.stem + '.lux'!r}, or remove --transpose."
        )


@contextmanager
def progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A progress bar on a terminal, as a function (activity, done, whole); nothing elsewhere."""
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

        def report(activity: str, done: int, whole: int | None) -> None:
            if activity not in tasks:
                tasks[activity] = bar.add_task(activity, total=whole)
            bar.update(tasks[activity], completed=done)

        yield report
