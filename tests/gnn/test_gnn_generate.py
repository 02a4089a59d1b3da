"""Generated graphs: independent of the pieces, and distributed as specified."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_gnn_graph import equal

from partita.errors import GraphError
from partita.gnn import EdgeStream
from partita.gnn.data import generate
from partita.gnn.data.generate import blocks, erdos_renyi, rmat

EDGES = 40_000


def ends(stream: EdgeStream) -> tuple[np.ndarray, np.ndarray]:
    source, target, _ = zip(*stream.pieces(), strict=True)
    return np.concatenate(source), np.concatenate(target)


def near(count: int, share: float, of: int) -> bool:
    """Whether a count is within five standard deviations of a share of the draws."""
    return abs(count - share * of) <= 5 * (of * share * (1 - share)) ** 0.5 + 1


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: rmat(9, 1000, features=3, seed=seed),
        lambda seed: erdos_renyi(700, 1000, features=3, seed=seed),
        lambda seed: blocks(700, 1000, features=3, seed=seed),
    ],
)
def test_a_graph_depends_on_its_seed_and_not_on_its_pieces(
    make: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = make(1).graph()
    assert not equal(graph, make(2).graph())
    assert equal(make(1).save(tmp_path / "g.lux", memory=100), graph)
    monkeypatch.setattr(generate, "PIECE", 77)
    assert equal(make(1).graph(), graph)


@pytest.mark.parametrize(
    "quadrants", [generate.QUADRANTS, (0.1, 0.2, 0.3, 0.4), (0.0, 0.5, 0.5, 0.0)]
)
def test_every_bit_of_an_rmat_edge_falls_into_its_quadrant(quadrants: Any) -> None:
    source, target = ends(rmat(7, EDGES, quadrants=quadrants))
    for bit in range(7):
        drawn = 2 * (source >> bit & 1) + (target >> bit & 1)
        assert all(
            near(int(np.count_nonzero(drawn == q)), share, EDGES)
            for q, share in enumerate(quadrants)
        )


def test_the_bits_of_an_rmat_edge_are_independent() -> None:
    source, _ = ends(rmat(6, EDGES, quadrants=(0.25, 0.25, 0.25, 0.25)))
    assert all(near(int(n), 1 / 64, EDGES) for n in np.bincount(source, minlength=64))


def test_the_ends_of_an_erdos_renyi_edge_are_uniform_and_independent() -> None:
    source, target = ends(erdos_renyi(7, EDGES))
    assert all(near(int(n), 1 / 49, EDGES) for n in np.bincount(7 * source + target, minlength=49))


@pytest.mark.parametrize("within", [0.0, 0.7, 1.0])
def test_a_share_of_the_edges_stays_within_a_class(within: float) -> None:
    source, target = ends(blocks(23, EDGES, classes=5, within=within))
    sizes = np.bincount(np.arange(23) % 5)
    share = within + (1 - within) * float((sizes / 23 * sizes / 23).sum())
    assert near(int(np.count_nonzero(source % 5 == target % 5)), share, EDGES)
    assert all(near(int(n), 1 / 23, EDGES) for n in np.bincount(target, minlength=23))
    assert source.max() < 23 and (within == 1 or len(np.unique(source)) == 23)


@pytest.mark.parametrize(
    "make",
    [
        lambda: rmat(13, 10, features=24, classes=6),
        lambda: blocks(2**13, 10, features=24, classes=6),
    ],
)
def test_features_depend_on_the_class_and_masks_divide_the_vertices(make: Any) -> None:
    graph = make().graph()
    x, labels = graph.features, graph.labels
    centres = np.stack([x[labels == c].mean(0) for c in range(6)])
    nearest_class = np.argmin(((x[:, None] - centres) ** 2).sum(-1), 1)
    assert 0.5 < (nearest_class == labels).mean() < 0.99
    assert abs(float((x - centres[labels]).std()) - 1) < 0.02
    masks = [graph.train, graph.validation, graph.test]
    assert (np.sum(masks, 0) == 1).all() and graph.train[0]
    assert all(
        near(int(m.sum()), share, 2**13) for m, share in zip(masks, (0.5, 0.25, 0.25), strict=True)
    )


def test_many_rows_of_features_come_in_pieces() -> None:
    rows = [len(part) for part in rmat(17, 1, features=1).tables["features"]()]
    assert rows == [2**16, 2**16]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: rmat(0, 5),
            "scale=0 is out of range: use 1 to 31, for a graph of 2^scale vertices.",
        ),
        (lambda: rmat(40, 5), "scale=40 is out of range"),
        (
            lambda: rmat(4, 5, quadrants=(0.5, 0.5, 0.5, 0.5)),
            "are no probabilities: give four numbers from 0 with the sum 1.",
        ),
        (
            lambda: erdos_renyi(0, 5),
            "A graph of 0 vertices is impossible: give 1 to 4,294,967,295.",
        ),
        (
            lambda: erdos_renyi(5, -1),
            "A graph of -1 edges is impossible: give 0 to 9,223,372,036,854,775,807.",
        ),
        (
            lambda: blocks(5, 5, within=1.5),
            "within=1.5 is no share of the edges: give a number from 0 to 1.",
        ),
        (lambda: blocks(3, 5, classes=4), "3 vertices cannot have 4 classes: use 1 to 3."),
    ],
)
def test_an_impossible_graph_is_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        make()
    assert message in str(caught.value)
