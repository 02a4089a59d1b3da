"""Graphs in files: saving and opening, conversion in bounded memory, errors of damaged files."""

from __future__ import annotations

import errno
import gzip
import io
import os
import resource
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_gnn_graph import PLAIN, SOURCE, TARGET, TRAIN, X, Y, equal, graphs, pairs

import partita.gnn as gnn
from partita.errors import GraphError
from partita.gnn import Graph
from partita.gnn.data import files, text
from partita.gnn.data.stream import EdgeStream, save_transpose

FILES = settings(deadline=None, max_examples=25)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def stream_of(graph: Graph, piece: int = 3) -> EdgeStream:
    """A graph's edges in pieces, in the order of their targets; its tables in two pieces."""
    target = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    tables = {
        what: t
        for what in ("features", "labels", "train", "validation", "test")
        if (t := getattr(graph, what)) is not None
    }

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        for i in range(0, graph.edges, piece):
            yield (
                graph.sources[i : i + piece],
                target[i : i + piece],
                None if graph.weights is None else graph.weights[i : i + piece],
            )

    return EdgeStream(
        pieces,
        graph.vertices,
        graph.edges,
        {k: lambda t=t: [t[:1], t[1:]] for k, t in tables.items()},
    )


# --------------------------------------------------------------------------------------------- laws


@FILES
@given(graphs(), st.sampled_from([".lux", ".npz"]))
def test_a_saved_graph_opens_unchanged(graph: Graph, ending: str) -> None:
    with folder() as at:
        gnn.save(graph, at / f"g{ending}")
        assert equal(gnn.open(at / f"g{ending}"), graph)
        for other in (".lux", ".npz"):
            assert equal(gnn.convert(at / f"g{ending}", at / f"h{other}"), graph)


@FILES
@given(graphs(), st.integers(1, 60), st.integers(1, 7))
def test_sorting_in_little_memory_gives_the_same_graph(
    graph: Graph, memory: int, piece: int
) -> None:
    assume(graph.edges or graph.weights is None)  # where no edge comes, no weight does
    stream = stream_of(graph, piece)
    with folder() as at:
        assert equal(stream.save(at / "g.lux", memory=memory), graph) and equal(
            stream.graph(), graph
        )
        both = stream.with_reverse_edges()
        assert equal(both.save(at / "both.lux", memory=memory), both.graph())
        assert not list(at.glob(".*"))


@FILES
@given(graphs(), st.integers(1, 60))
def test_a_transpose_in_files_equals_the_one_in_memory(graph: Graph, memory: int) -> None:
    with folder() as at:
        gnn.save(graph, at / "g.lux")
        save_transpose(at / "g.lux", memory=memory)
        memory_transpose, file_transpose = graph.transposed(), gnn.open(at / "g.lux").transposed()
        for field in ("offsets", "destinations", "order"):
            assert (
                np.array_equal(getattr(memory_transpose, field), getattr(file_transpose, field))
                and getattr(memory_transpose, field).dtype == getattr(file_transpose, field).dtype
            )
        assert {p.name for p in at.iterdir()} >= {"g.transposed.lux", "g.transposed.order.bin"}
        gnn.save(
            graph, at / "g.lux"
        )  # may have other edges: the transpose is not of this graph any more
        assert not list(at.glob("*transposed*"))


@FILES
@given(
    graphs(),
    st.sampled_from([" ", "\t", ",", ", ", " ; "]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.integers(5, 40),
)
def test_an_edge_list_opens_as_its_graph(
    graph: Graph, separator: str, newline: str, packed: bool, block: int
) -> None:
    target = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    columns = [graph.sources, target] + ([] if graph.weights is None else [graph.weights])
    lines = [
        "# who knows whom",
        "",
        *(separator.join(map(str, edge)) for edge in zip(*columns, strict=True)),
    ]
    lines.insert(2 + graph.edges // 2, "  % halfway")
    data = newline.join(lines).encode()
    with folder() as at, pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BYTES", block)  # lines are cut anywhere
        (at / "edges.txt").write_bytes(gzip.compress(data) if packed else data)
        if not graph.edges:
            with pytest.raises(GraphError, match="without edges|has no edge|is empty"):
                gnn.open(at / "edges.txt")
            return
        bare = Graph.from_edges(graph.sources, target, weights=graph.weights)
        assert equal(gnn.open(at / "edges.txt"), bare)
        assert equal(gnn.convert(at / "edges.txt", at / "edges.lux"), bare)
        assert pairs(gnn.convert(at / "edges.txt", at / "both.lux", undirected=True)) == pairs(
            bare.with_reverse_edges()
        )


@FILES
@given(st.lists(st.floats(allow_nan=True, allow_infinity=False, width=32), min_size=1, max_size=30))
def test_numbers_are_read_as_python_reads_them(numbers: list[float]) -> None:
    with folder() as at:
        for shown in (str, "{:.9e}".format, "{:+.6g}".format):
            (at / "t.csv").write_text("\n".join(f"{shown(x)},{shown(x)}" for x in numbers))
            read = np.concatenate(list(text.table(at / "t.csv", np.float32)))
            assert np.allclose(
                read,
                np.array([[float(shown(x))] * 2 for x in numbers], np.float32),
                rtol=3e-7,
                atol=0,
                equal_nan=True,
            )


# -------------------------------------------------------------------------------------- other files


def test_planetoid_splits_are_read(tmp_path: Path) -> None:
    x = scipy.sparse.csr_array(X)
    features = {
        "feature_data": x.data,
        "feature_indices": x.indices,
        "feature_indptr": x.indptr,
        "feature_shape": np.array(X.shape),
    }
    np.savez_compressed(
        tmp_path / "small.npz",
        source=SOURCE,
        target=TARGET,
        label=Y,
        train=np.flatnonzero(TRAIN),
        **features,
    )
    graph = gnn.open(tmp_path / "small.npz")
    assert equal(graph, PLAIN) and graph.name == "small"


def test_the_files_that_roc_reads_are_read(tmp_path: Path) -> None:
    head = (4).to_bytes(4, "little") + (4).to_bytes(8, "little")
    rows, sources = np.array([1, 3, 4, 4], "<u8"), np.array([2, 0, 2, 1], "<u4")
    (tmp_path / "g.add_self_edge.lux").write_bytes(head + rows.tobytes() + sources.tobytes())
    (tmp_path / "g.feats.csv").write_text("1,0\n0,1\n0,0\n0,0\n")
    (tmp_path / "g.label").write_text("1\n0\n2\n1\n")
    (tmp_path / "g.mask").write_text("Train\nNone\nTrain\nNone\n")
    graph = gnn.open(tmp_path / "g.add_self_edge.lux")
    assert equal(graph, PLAIN) and graph.name == "g"
    gnn.save(graph, tmp_path / "g.add_self_edge.lux")
    assert (
        tmp_path / "g.add_self_edge.lux"
    ).read_bytes() == head + rows.tobytes() + sources.tobytes()
    assert not (tmp_path / "g.label").exists() and equal(
        gnn.open(tmp_path / "g.add_self_edge.lux"), graph
    )


def test_a_graph_that_replaces_another_one_inherits_no_table(tmp_path: Path) -> None:
    gnn.save(PLAIN, tmp_path / "g.lux")
    bare = replace(PLAIN, features=None, labels=None, train=None)
    gnn.save(bare, tmp_path / "g.lux")
    assert equal(gnn.open(tmp_path / "g.lux"), bare) and [p.name for p in tmp_path.iterdir()] == [
        "g.lux"
    ]


def test_a_lux_file_is_memory_mapped(tmp_path: Path) -> None:
    gnn.save(PLAIN, tmp_path / "g.lux")
    graph = gnn.open(tmp_path / "g.lux")
    assert (
        graph.features is not None
        and isinstance(graph.features.base, np.memmap)
        and isinstance(graph.sources.base, np.memmap)
    )


def ogb(at: Path, masks: bool = True, split: str = "time", **more: str) -> Path:
    """A data set as OGB lays it out, of the plain graph."""
    texts = {
        "raw/edge.csv.gz": "\n".join(f"{a},{b}" for a, b in zip(SOURCE, TARGET, strict=True)),
        "raw/num-node-list.csv.gz": "4\n",
        "raw/node-feat.csv.gz": "\n".join(",".join(map(str, row)) for row in X),
        "raw/node-label.csv.gz": "\n".join(map(str, Y)),
    }
    if masks:
        texts |= {
            f"split/{split}/train.csv.gz": "0\n2\n",
            f"split/{split}/valid.csv.gz": "1\n",
            f"split/{split}/test.csv.gz": "3\n",
        }
    for name, message in (texts | more).items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(gzip.compress(message.encode()))
    return at


SPLIT = replace(PLAIN, validation=np.arange(4) == 1, test=np.arange(4) == 3)


def test_ogb_folders_are_read_and_converted(tmp_path: Path) -> None:
    assert (
        equal(gnn.open(ogb(tmp_path / "ogbn_small")), SPLIT)
        and gnn.open(tmp_path / "ogbn_small").name == "ogbn_small"
    )
    assert equal(gnn.convert(tmp_path / "ogbn_small", tmp_path / "s.lux"), SPLIT)
    assert gnn.convert(tmp_path / "ogbn_small", tmp_path / "t.lux", undirected=True).edges == 8
    ogb(tmp_path / "ogbn_small", split="random")
    assert equal(gnn.open(tmp_path / "ogbn_small", split="random"), SPLIT)
    assert equal(gnn.convert(tmp_path / "ogbn_small", tmp_path / "u.npz", split="random"), SPLIT)


def test_a_gzip_file_without_its_first_bytes_is_no_list_of_edges(tmp_path: Path) -> None:
    path = ogb(tmp_path / "o") / "raw/edge.csv.gz"
    path.write_bytes(b"NaN" + path.read_bytes()[3:])
    with pytest.raises(GraphError, match="edge.csv.gz' is truncated or damaged: it is no gzip"):
        gnn.open(tmp_path / "o")


def test_an_array_that_a_damaged_entry_hides_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "g.npz"
    gnn.save(PLAIN, path)
    content = bytearray(path.read_bytes())
    last = content.rindex(b"PK\x01\x02")
    end = content.rindex(b"PK\x05\x06")
    before = content.rindex(b"PK\x01\x02", 0, last)
    content[before + 32 : before + 34] = (end - last).to_bytes(2, "little")  # its comment
    path.write_bytes(content)
    with pytest.raises(GraphError, match=r"no .npz file: it has \d of \d arrays. Save plain"):
        gnn.open(path)


def test_large_ogb_sets_in_npz_are_read(tmp_path: Path) -> None:
    ogb(tmp_path / "o")
    for name in ("edge", "node-feat", "node-label", "num-node-list"):
        (tmp_path / f"o/raw/{name}.csv.gz").unlink()
    np.savez(
        tmp_path / "o/raw/data.npz",
        edge_index=np.array([SOURCE, TARGET]),
        num_nodes_list=[4],
        num_edges_list=[4],
        node_feat=X.astype(np.float16),
    )
    np.savez(tmp_path / "o/raw/node-label.npz", node_label=np.array([[1], [0], [2], [np.nan]]))
    with pytest.raises(GraphError, match="Vertex 3 is in the test mask and has no label"):
        gnn.open(tmp_path / "o")
    np.savez(tmp_path / "o/raw/node-label.npz", node_label=Y[:, None].astype(float))
    assert equal(gnn.open(tmp_path / "o"), SPLIT) and equal(
        gnn.convert(tmp_path / "o", tmp_path / "o.lux"), SPLIT
    )


class Column:
    """The used part of a pyarrow column."""

    def __init__(self, values: Any) -> None:
        self.values, self.null_count = np.asarray(values), 0

    def to_numpy(self, zero_copy_only: bool) -> np.ndarray:
        return self.values


def parquet(monkeypatch: pytest.MonkeyPatch, **columns: Any) -> None:
    """Lets every Parquet file have these columns, two rows a batch."""

    def batches(size: int, columns: list[str]) -> Iterator[Any]:
        for i in range(0, 4, 2):
            yield SimpleNamespace(column=lambda name, i=i: Column(given[name][i : i + 2]))

    given = columns
    file = SimpleNamespace(
        schema_arrow=SimpleNamespace(names=list(columns)),
        metadata=SimpleNamespace(num_rows=4),
        iter_batches=batches,
    )
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules, "pyarrow.parquet", SimpleNamespace(ParquetFile=lambda path, **options: file)
    )


def test_parquet_files_are_read_by_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "e.parquet").write_bytes(b"PAR1")
    parquet(monkeypatch, dst=TARGET, Src=SOURCE, weight=[1.0, 2, 3, 4])
    assert equal(
        gnn.open(tmp_path / "e.parquet"), Graph.from_edges(SOURCE, TARGET, weights=[1, 2, 3, 4])
    )
    parquet(monkeypatch, a=TARGET, b=SOURCE)
    with pytest.raises(
        GraphError, match="has the columns a, b: call the ends of an edge source and target"
    ):
        gnn.open(tmp_path / "e.parquet")
    parquet(monkeypatch, source=[0.5] * 4, target=TARGET)
    with pytest.raises(GraphError, match="source is float64: use integers."):
        gnn.open(tmp_path / "e.parquet")


def test_without_pyarrow_the_error_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "e.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        GraphError, match="run `pip install pyarrow`, or save the edges as text or .npz"
    ):
        gnn.open(tmp_path / "e.parquet")


# -------------------------------------------------------------------------- interrupted and damaged


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limits the size of a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


BIG = Graph.from_edges(
    np.arange(3000) % 100, np.arange(3000) % 97, features=np.ones((100, 40), np.float32)
)


@pytest.mark.parametrize(
    "write",
    [
        lambda at: gnn.save(BIG, at / "g.lux"),
        lambda at: gnn.save(BIG, at / "g.npz"),
        lambda at: stream_of(BIG, 100).save(at / "g.lux", memory=2000),
    ],
)
@pytest.mark.parametrize("size", [100, 9000, 14000])
def test_a_full_disk_leaves_the_old_files(
    write: Callable[[Path], Any], size: int, tmp_path: Path
) -> None:
    gnn.save(PLAIN, tmp_path / "g.lux")
    with (
        largest_file(size),
        pytest.raises(GraphError, match="The disk is full .*g.*was deleted"),
    ):
        write(tmp_path)
    assert equal(gnn.open(tmp_path / "g.lux"), PLAIN) and {
        p.suffix for p in tmp_path.iterdir()
    } == {".lux", ".bin"}
    assert not list(tmp_path.glob(".*"))
    write(tmp_path)  # and with room it goes well
    assert any(
        equal(gnn.open(p), BIG) for p in (tmp_path / "g.lux", tmp_path / "g.npz") if p.exists()
    )


def test_a_disk_that_is_too_small_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(GraphError, match="needs 28.1 KiB and the disk has 1000 B free"):
        gnn.save(BIG, tmp_path / "g.lux")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    def pieces() -> Iterator[Any]:
        yield from stream_of(PLAIN).pieces()
        if list(tmp_path.glob(".*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EdgeStream(pieces, 4).save(tmp_path / "g.lux", memory=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory", [4, 2**20])
@pytest.mark.parametrize(
    "second", [[[0], [1]], [[0, 1, 2, 2, 3], [1, 2, 0, 1, 3]], [[0, 1, 2, 2], [1, 1, 1, 1]]]
)
def test_edges_that_change_during_conversion_are_refused(
    second: list[list[int]], memory: int, tmp_path: Path
) -> None:
    times = iter([[SOURCE, TARGET], second])

    def pieces() -> Iterator[Any]:
        source, target = next(times)
        yield np.array(source), np.array(target), None

    with pytest.raises(GraphError, match="The edges changed while they were read"):
        EdgeStream(pieces, 4).save(tmp_path / "g.lux", memory=memory)
    assert not list(tmp_path.iterdir())


def cut(name: str, length: int) -> Callable[[Path], None]:
    return lambda at: (at / name).write_bytes((at / name).read_bytes()[:length])


def put(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda at: (at / name).write_bytes(data) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("g.lux", 7), "g.lux' has 7 bytes: a .lux file begins with 12 bytes"),
        (
            cut("g.lux", 20),
            "is truncated or no .lux file: its header says 4 vertices and 4 edges, which need 60 "
            "bytes, and it has 20 (it ends within the offsets).",
        ),
        (cut("g.lux", 53), "which need 60 bytes, and it has 53 (it ends within edge 2)."),
        (put("g.lux", b"\x7fELF" + bytes(100)), "is truncated or no .lux file"),
        (
            lambda at: put("g.lux", (at / "g.lux").read_bytes()[:-4] + b"\7\0\0\0")(at),
            "g: Edge 3 into vertex 2 comes from vertex 7: use ids from 0 to 3.",
        ),
        (
            cut("g.feats.bin", 30),
            "g.feats.bin' is truncated or of another graph: 30 bytes are no multiple of 16, a "
            "float32 for each of 4 vertices.",
        ),
        (
            cut("g.label.bin", 15),
            "g.label.bin' is truncated or of another graph: 4 vertices need 16 bytes, and it has "
            "15.",
        ),
        (
            cut("g.train.bin", 3),
            "g.train.bin' is truncated or of another graph: 4 vertices need 4 bytes, and it has 3.",
        ),
        (
            put("g.train.bin", b"\0\1\7\0"),
            "g.train.bin' has 7 for vertex 2: a mask has one byte per vertex, 0 or 1.",
        ),
        (
            put("g.weights.bin", bytes(12)),
            "g.weights.bin' is truncated or of another graph: 4 edges need 16 bytes, and it has "
            "12.",
        ),
        (
            put("g.transposed.order.bin", bytes(12)),
            "g.transposed.order.bin' is truncated or of another graph: 4 positions need 16 "
            "bytes, and it has 12.",
        ),
        (
            put("g.transposed.order.bin", b"\xff" * 16),
            "The transpose belongs to another graph: delete its files and transpose again.",
        ),
        (
            put("g.mask", b"Train\nVal\ntest\nTest\n"),
            "g.mask', line 3: 'test' is unknown: use Train, Val, Test or None.",
        ),
    ],
)
def test_a_damaged_lux_file_is_one_sentence(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    gnn.save(PLAIN, tmp_path / "g.lux")
    save_transpose(tmp_path / "g.lux")
    damage(tmp_path)
    assert message in refused(tmp_path / "g.lux")


def refused(path: Path) -> str:
    with pytest.raises(GraphError) as caught:
        gnn.open(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "0 1\n1 x\n",
            "e.txt', line 2: '1 x' is no edge: write two integers, source and target, and "
            "perhaps a weight.",
        ),
        ("0 1\n\n# no\n1.5 2\n", "line 4: '1.5 2' is no edge"),
        ("0 1\n7\n", "line 2: '7' has no target"),
        ("0 1\n-3 1\n", "line 2: '-3 1' has a negative id: number the vertices from 0."),
        (
            "0 1\n5000000000 1\n",
            "has an id of 2^32 or more: number the vertices from 0, without gaps.",
        ),
        (
            "0 1\n4000000000 1\n",
            "The largest id is 4,000,000,000 for 2 edges: number the vertices from 0 without gaps",
        ),
        (
            "0 1 0.5\n1 2\n",
            "line 2: '1 2' has no weight, unlike the edges before: give a weight to all edges, "
            "or to none.",
        ),
        ("0 1\n1 2 .5\n", "line 2: '1 2 .5' has a weight, unlike the edges before"),
        ("0 1 2 3\n", "line 1: '0 1 2 3' has more than three numbers"),
        ("0 1 nan\n", "The weight of edge 0 is nan: use finite weights."),
        (
            "%%MatrixMarket matrix coordinate\n",
            "is a MatrixMarket file: use Graph.from_scipy(scipy.io.mmread(...)).",
        ),
        ("", "e.txt' is empty: name a file with edges."),
        ("source target\n", "The number of vertices is unknown without edges"),
        (
            "0 1\n\0\0\0\1\n",
            "e.txt' is no text: name a .lux, .npz or .parquet file, an edge list in text",
        ),
        ("0 1\n" + "9" * 200 + "\n", "line 2: '" + "9" * 57 + "...' has an id of 2^32 or more"),
    ],
)
def test_a_bad_line_of_an_edge_list_is_one_sentence(
    lines: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "e.txt").write_text(lines)
    assert message in refused(tmp_path / "e.txt") and str(tmp_path) in refused(tmp_path / "e.txt")
    with pytest.raises(GraphError):
        gnn.convert(tmp_path / "e.txt", tmp_path / "e.lux")
    assert [p.name for p in tmp_path.iterdir()] == ["e.txt"]


def test_lines_are_counted_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BYTES", 16)
    (tmp_path / "e.txt").write_text("0 1\n" * 50 + "0 wrong\n")
    assert "line 51: '0 wrong' is no edge" in refused(tmp_path / "e.txt")
    monkeypatch.setattr(text, "LONGEST", 64)
    (tmp_path / "long.txt").write_text("1" * 300)
    assert "has a line of more than 64 bytes" in refused(tmp_path / "long.txt")


def test_a_header_of_words_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(
        "# made today\nsource,target,weight\n"
        + "\n".join(f"{a},{b},2" for a, b in zip(SOURCE, TARGET, strict=True))
    )
    assert equal(gnn.open(tmp_path / "e.csv"), Graph.from_edges(SOURCE, TARGET, weights=[2] * 4))


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    data = gzip.compress(b"0 1\n" * 5000)
    (tmp_path / "e.txt.gz").write_bytes(data[: len(data) // 2])
    assert "e.txt.gz' is truncated or damaged" in refused(tmp_path / "e.txt.gz")


def npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda at: np.savez(at / "g.npz", **arrays)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (put("g.npz", b"no zip at all"), "g.npz' "),
        (put("g.npz", b""), "g.npz' is truncated or no .npz file"),
        (
            npz(a=np.ones(1), b=np.ones(1)),
            "g.npz' has the arrays a, b: a graph needs source and target (Planetoid), or offsets "
            "and sources (Partita).",
        ),
        (
            npz(source=np.array([0, {}], object), target=np.array([0, 1])),
            "'source.npy' holds object and no plain numbers. Save plain arrays with numpy.savez.",
        ),
        (
            npz(source=[0, 5], target=[1, 0], label=[0, 1]),
            "g.npz': Edge 1 from 5 to 0 is outside the 2 vertices",
        ),
        (
            npz(
                source=[0],
                target=[1],
                feature_data=[1.0],
                feature_indices=[9],
                feature_indptr=[0, 5, 1],
                feature_shape=[2, 2],
            ),
            "g.npz': The features are no CSR matrix",
        ),
        (
            npz(offsets=np.array([0, 1]), sources=np.array([3], np.int32)),
            "g: Edge 0 into vertex 0 comes from vertex 3",
        ),
    ],
)
def test_an_npz_file_without_a_graph_is_one_sentence(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path)
    assert message in refused(tmp_path / "g.npz")


def test_a_truncated_npz_file_is_refused(tmp_path: Path) -> None:
    gnn.save(BIG, tmp_path / "g.npz")
    cut("g.npz", 5000)(tmp_path)
    assert "g.npz' is truncated or no .npz file" in refused(tmp_path / "g.npz")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"raw/num-node-list.csv.gz": "2\n2\n"},
            "lists 2 graphs: use a node-property data set, which has one.",
        ),
        (
            {"raw/num-node-list.csv.gz": "2\n"},
            "train.csv.gz': train lists vertex 2 of 2 vertices",
        ),
        (
            {"raw/edge.csv.gz": "0,1\n1,4\n"},
            "Edge 1 from 1 to 4 is outside the 4 vertices: use ids from 0 to 3.",
        ),
        (
            {"raw/node-label.csv.gz": "0,1\n1,1\n0,0\n0,1\n"},
            "has 2 labels per vertex: use a data set with one class per vertex.",
        ),
        (
            {"raw/node-feat.csv.gz": "0,1\n1\n0,0\n0,1\n"},
            "node-feat.csv.gz', line 2: '1' has another number of columns than line 1 (2).",
        ),
        (
            {"raw/node-feat.csv.gz": "0,1\n0,x\n0,0\n0,1\n"},
            "node-feat.csv.gz', line 2: '0,x' is not made of numbers: write 2 numbers.",
        ),
        ({"raw/node-feat.csv.gz": "0,1\n0,1\n"}, "features has 2 rows for 4 vertices"),
        (
            {"split/time/test.csv.gz": "9\n"},
            "test.csv.gz': test lists vertex 9 of 4 vertices",
        ),
        ({"split/other/train.csv.gz": "0\n"}, "has the splits other, time: name one."),
        ({"raw/triplet-type-list.csv.gz": ""}, "has several kinds of vertices"),
    ],
)
def test_an_ogb_folder_without_a_graph_is_one_sentence(
    more: dict[str, str], message: str, tmp_path: Path
) -> None:
    ogb(tmp_path / "o", **more)
    assert message in refused(tmp_path / "o")
    with pytest.raises(GraphError) as caught:
        gnn.convert(tmp_path / "o", tmp_path / "o.lux")
    assert message in str(caught.value) and not (tmp_path / "o.lux").exists()


def test_incomplete_ogb_folders_are_one_sentence(tmp_path: Path) -> None:
    ogb(tmp_path / "o")
    assert "has no split 'public': use time." in str(
        pytest.raises(GraphError, gnn.open, tmp_path / "o", split="public").value
    )
    (tmp_path / "o/split/time/valid.csv.gz").rename(tmp_path / "o/split/time/split_dict.pt")
    assert "has no valid.csv.gz, only a pickle, and Partita unpickles nothing" in refused(
        tmp_path / "o"
    )
    (tmp_path / "o/raw/num-node-list.csv.gz").unlink()
    assert "with the number of vertices: download the data set again." in refused(tmp_path / "o")
    (tmp_path / "o/raw/edge.csv.gz").unlink()
    assert "has neither edge.csv.gz nor data.npz" in refused(tmp_path / "o")


def test_a_missing_path_is_one_sentence(tmp_path: Path) -> None:
    gnn.save(PLAIN, tmp_path / "graph.lux")
    assert refused(tmp_path / "grpah.lux").endswith(
        f"grpah.lux'. Did you mean {str(tmp_path / 'graph.lux')!r}?"
    )
    assert (
        "is a folder without raw/: name a file, or an OGB folder with raw/ and split/."
        in refused(tmp_path)
    )
    for path, message in [
        ("g.txt", "'g.txt' does not end in .lux or .npz: call it 'g.lux'"),
        ("no/g.lux", "there is no folder"),
    ]:
        with pytest.raises(GraphError, match=message):
            gnn.save(PLAIN, tmp_path / path)
    gnn.save(PLAIN, tmp_path / "g.npz")
    with pytest.raises(GraphError, match="is no .lux file: convert it first, then transpose it."):
        gnn.transpose(tmp_path / "g.npz")


@pytest.mark.parametrize("first", [b"\xef\xbb\xbf0 1", b"+0 1", b"+0 +1", b"source target\n0 1"])
def test_the_first_edge_is_kept_behind_a_mark_or_a_sign(first: bytes, tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_bytes(first + b"\n1 2\n2 0\n")
    assert gnn.open(tmp_path / "e.txt").edges == 3


@pytest.mark.parametrize("first", [b".5 1", b"\xc2\xa00 1", b"\xe2\x88\x921 2", b"= 1"])
def test_a_first_line_that_is_neither_edge_nor_header_is_refused(
    first: bytes, tmp_path: Path
) -> None:
    (tmp_path / "e.txt").write_bytes(first + b"\n1 2\n2 0\n")
    with pytest.raises(GraphError, match="line 1.*is no edge"):
        gnn.open(tmp_path / "e.txt")


def test_a_header_that_claims_too_much_allocates_nothing(tmp_path: Path) -> None:
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 80
    with zipfile.ZipFile(tmp_path / "g.npz", "w") as archive:
        archive.writestr("offsets.npy", content)
    with pytest.raises(GraphError, match="'offsets.npy' claims 8,000,000,000,000 bytes"):
        gnn.open(tmp_path / "g.npz")


def test_an_emptied_gzip_file_of_a_split_is_refused(tmp_path: Path) -> None:
    folder = ogb(tmp_path / "ogbn_small")
    next(folder.rglob("valid.csv.gz")).write_bytes(b"")
    with pytest.raises(GraphError, match="valid.csv.gz' is truncated or damaged: it is empty"):
        gnn.open(folder)


def test_an_archive_that_claims_too_much_allocates_nothing(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (500_000_000,)}
    )
    with zipfile.ZipFile(tmp_path / "g.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("offsets.npy", header.getvalue() + bytes(800))
    content = (tmp_path / "g.npz").read_bytes()
    written, claimed = (len(header.getvalue()) + size for size in (800, 4_000_000_000))
    content = content.replace(written.to_bytes(4, "little"), claimed.to_bytes(4, "little"))
    (tmp_path / "g.npz").write_bytes(content)
    with pytest.raises(GraphError, match=f"'offsets.npy' claims {claimed:,} bytes"):
        gnn.open(tmp_path / "g.npz")


def test_targets_and_edge_features_come_back_from_npz(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    options = {"labels": generator.random((4, 2)), "edge_features": generator.random((3, 5))}
    graph = gnn.Graph.from_edges([0, 1, 2], [1, 2, 3], **options)
    gnn.save(graph, tmp_path / "graph.npz")
    opened = gnn.open(tmp_path / "graph.npz")
    assert np.array_equal(opened.labels, graph.labels)
    assert np.array_equal(opened.edge_features, graph.edge_features)


def test_a_link_to_a_missing_file_is_no_missing_table(tmp_path: Path) -> None:
    path = tmp_path / "g.lux"
    gnn.save(gnn.Graph.from_edges([0, 1], [1, 0], weights=[0.5, 2.0]), path)
    weights = tmp_path / "g.weights.bin"
    weights.unlink()
    weights.symlink_to("/nowhere/g.weights.bin")
    with pytest.raises(GraphError, match="g.weights.bin is a link to a file that is missing"):
        gnn.open(path)
    path.unlink()
    path.symlink_to("/nowhere/g.lux")
    with pytest.raises(GraphError, match="g.lux is a link to a file that is missing"):
        gnn.open(path)


@pytest.mark.parametrize("ending", [".label", ".mask", ".feats.csv", ".transposed.lux"])
def test_a_table_that_is_no_file_is_refused(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "g.lux"
    gnn.save(gnn.Graph.from_edges([0, 1], [1, 0]), path)
    table = tmp_path / f"g{ending}"
    table.symlink_to("/nowhere/table")
    with pytest.raises(GraphError, match=f"g{ending} is a link to a file that is missing"):
        gnn.open(path)
    table.unlink()
    table.mkdir()
    with pytest.raises(GraphError, match=f"g{ending} is a folder"):
        gnn.open(path)
    table.rmdir()
    os.mkfifo(table)
    with pytest.raises(GraphError, match=f"g{ending} is a device or a pipe"):
        gnn.open(path)


@pytest.mark.parametrize("name", ["g.txt", "g.npz", "g.lux", "g.parquet"])
def test_a_pipe_or_a_device_is_not_opened_as_a_graph(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(GraphError, match="is a device or a pipe"):
        gnn.open(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(GraphError, match="is a device or a pipe"):
        gnn.convert(tmp_path / name, tmp_path / "into.lux")


def test_rocs_tables_in_text_may_begin_with_a_mark(tmp_path: Path) -> None:
    gnn.save(gnn.Graph.from_edges([0, 1], [1, 0]), tmp_path / "g.lux")
    (tmp_path / "g.label").write_text("\ufeff1\n0\n", encoding="utf-8")
    (tmp_path / "g.mask").write_text("\ufeffTrain\nNone\n", encoding="utf-8")
    graph = gnn.open(tmp_path / "g.lux")
    assert graph.labels.tolist() == [1, 0]
    assert graph.train.tolist() == [True, False]


def test_an_emptied_table_of_features_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.lux"
    gnn.save(gnn.Graph.from_edges([0, 1], [1, 0], features=np.ones((2, 3))), path)
    (tmp_path / "g.feats.bin").write_bytes(b"")
    with pytest.raises(GraphError, match="features has no columns"):
        gnn.open(path)


def test_an_error_of_the_disk_names_the_file(monkeypatch: Any) -> None:
    def blocks(path: Path) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "blocks", blocks)
    with pytest.raises(GraphError, match=r"cannot be read: Input/output error\."):
        gnn.open(__file__)
