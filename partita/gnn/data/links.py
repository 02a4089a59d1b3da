"""Link prediction: pairs of vertices as vertices of their own, which no edge leaves.

A pair (u, v) is a vertex with an edge from u and one from v. Its score is a function of what it
receives, so that losses, masks, metrics and parts are those of any graph: `with_pairs` makes the
graph, and a model with `links=True` scores the pairs. `split_links` hides some edges for validation
and test, and draws vertex pairs without an edge for each, by a seed.

A pair costs a row in every layer.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import MASKS, as_array, as_ids, as_labels, as_mask, check_ids
from partita.gnn.data.csr import aligned
from partita.gnn.data.graph import Graph, check

DRAWS = 100
"""Rounds of drawing pairs without an edge, after which the graph counts as complete."""


def with_pairs(graph: Graph, source: Any, target: Any, labels: Any = None, **masks: Any) -> Graph:
    """The graph with a vertex for each pair (`source[i]`, `target[i]`), behind its own vertices.

    labels      0 or 1 of each pair, or None
    masks       train, validation and test: bool [pairs] or numbers of pairs

    Labels and masks of the graph itself do not count. `model.predict(graph)[vertices:]` are the
    scores of the pairs. GraphError names the first bad entry.

    >>> path = Graph.from_edges([0, 1], [1, 2], features=[[1.0], [2.0], [3.0]])
    >>> pairs = with_pairs(path, [0, 0], [1, 2], labels=[1, 0], train=[0, 1])
    >>> pairs.vertices, pairs.sources.tolist(), pairs.labels.tolist()
    (5, [0, 1, 0, 1, 0, 2], [-1, -1, -1, 1, 0])
    """
    if graph.members is not None:
        raise GraphError(f"'{graph.name}' is a batch: predict links of a graph that is none.")
    source, target = as_ids("source", source), as_ids("target", target)
    if len(source) != len(target):
        raise GraphError(
            f"source has {len(source):,} entries and target has {len(target):,}: give one of each "
            "per pair."
        )
    check_ids(source, target, graph.vertices)
    count = len(source)
    ends = np.stack([source, target], axis=1).reshape(-1)
    pair_offsets = graph.offsets[-1] + 2 * np.arange(1, count + 1)
    arrays: dict[str, Any] = {
        "features": _with_zeros(graph.features, count),
        "weights": _with_ones(graph.weights, 2 * count),
        "edge_features": _with_zeros(graph.edge_features, 2 * count),
        "labels": _behind(graph.vertices, -1, _pair_labels(labels, count)),
    }
    for name in MASKS:
        marked = masks.pop(name, None)
        pairs = None if marked is None else as_mask(name, as_array(marked), count)
        arrays[name] = _behind(graph.vertices, False, pairs)
    if masks:
        raise GraphError(f"A pair has no table {next(iter(masks))!r}: use {', '.join(MASKS)}.")
    return check(
        Graph(
            np.append(graph.offsets, pair_offsets),
            np.append(graph.sources, ends.astype(graph.sources.dtype)),
            **arrays,
            name=graph.name,
        )
    )


def _pair_labels(labels: Any, count: int) -> np.ndarray | None:
    if labels is None:
        return None
    values = as_labels(as_array(labels))
    if values.shape != (count,) or not np.isin(values, (0, 1)).all():
        raise GraphError(
            f"labels of {count:,} pairs have the shape {list(values.shape)} or another value than "
            "0 and 1: give 1 for a pair with an edge, and 0 without."
        )
    return values.astype(np.int32)


def _behind(vertices: int, filling: Any, values: np.ndarray | None) -> np.ndarray | None:
    """Values of pairs behind those of the vertices, which are all alike."""
    if values is None:
        return None
    return np.append(np.full(vertices, filling, values.dtype), values)


def _with_zeros(table: np.ndarray | None, count: int) -> np.ndarray | None:
    if table is None:
        return None
    extended = aligned((len(table) + count) * table.shape[1], np.float32)
    extended = extended.reshape(-1, table.shape[1])
    extended[: len(table)] = table
    return extended


def _with_ones(weights: np.ndarray | None, count: int) -> np.ndarray | None:
    return None if weights is None else np.append(weights, np.ones(count, np.float32))


# --------------------------------------------------------------------------------- split of links


@dataclass(frozen=True)
class LinkSplit:
    """Edges of a graph as samples of link prediction.

    graph       the graph without the edges of validation and test: messages pass along it
    undirected  whether a pair stands for edges in both directions
    pairs       int64 [2, n] of each mask: pairs with an edge
    negatives   int64 [2, n] of validation and test: as many pairs without an edge
    """

    graph: Graph
    undirected: bool
    pairs: dict[str, np.ndarray] = field(repr=False)
    negatives: dict[str, np.ndarray] = field(repr=False)
    known: np.ndarray = field(repr=False)
    """Ascending keys of all edges, those of validation and test included."""

    def samples(self, seed: int = 0, negatives: float = 1.0) -> Graph:
        """The graph to train on, with pairs of all masks.

        seed        of the training pairs without an edge, drawn anew for each seed
        negatives   their number, as a share of the training pairs with an edge
        """
        count = round(self.pairs["train"].shape[1] * negatives)
        random = np.random.default_rng(seed)
        drawn = {"train": _drawn(self, random, count), **self.negatives}
        groups = [part for name in MASKS for part in (self.pairs[name], drawn[name])]
        sizes = [part.shape[1] for part in groups]
        source, target = np.concatenate(groups, axis=1)
        labels = np.repeat([1, 0] * len(MASKS), sizes)
        mask = np.repeat(np.arange(len(groups)) // 2, sizes)
        masks = {name: mask == number for number, name in enumerate(MASKS)}
        return with_pairs(self.graph, source, target, labels, **masks)


def split_links(
    graph: Graph, validation: float = 0.05, test: float = 0.1, seed: int = 0
) -> LinkSplit:
    """The edges of a graph split into training, validation and test by a seed.

    A graph with the reverse of every edge is undirected: a pair is hidden in both directions. Self
    edges stay, and are no samples. GraphError for shares that leave no training edge.

    >>> ring = Graph.from_edges([0, 1, 2, 3], [1, 2, 3, 0], features=[[1.0]] * 4)
    >>> links = split_links(ring.with_reverse_edges(), validation=0, test=0.25)
    >>> links.graph.edges, links.undirected, [pairs.shape[1] for pairs in links.pairs.values()]
    (6, True, [3, 0, 1])
    """
    graph = graph.as_it_is()
    are_numbers = all(isinstance(share, numbers.Real) for share in (validation, test))
    if not are_numbers or not (min(validation, test) >= 0 and validation + test < 1):
        raise GraphError(
            f"validation={validation!r} and test={test!r} are no shares of the edges: use numbers "
            "of at least 0 whose sum is below 1."
        )
    source = graph.sources.astype(np.int64)
    target = np.repeat(np.arange(graph.vertices), np.diff(graph.offsets))
    keys = source * graph.vertices + target
    known = np.unique(keys)
    undirected = np.array_equal(known, np.unique(target * graph.vertices + source))
    is_sample = source < target if undirected else source != target
    pair_keys = np.unique(keys[is_sample])
    random = np.random.default_rng(seed)
    random.shuffle(pair_keys)
    ends = np.cumsum([round(len(pair_keys) * share) for share in (validation, test)])
    hidden_validation, hidden_test, train = np.split(pair_keys, ends)
    if not len(train):
        raise GraphError(
            f"'{graph.name}' has {len(pair_keys):,} edges to split, and none is left to train on: "
            "use smaller shares, or a larger graph."
        )
    hidden = np.concatenate([hidden_validation, hidden_test])
    lower = np.minimum(source, target) * graph.vertices + np.maximum(source, target)
    stays = ~np.isin(lower if undirected else keys, hidden)
    by_mask = {"train": train, "validation": hidden_validation, "test": hidden_test}
    pairs = {name: np.stack(np.divmod(part, graph.vertices)) for name, part in by_mask.items()}
    links = LinkSplit(_with_edges(graph, stays), undirected, pairs, {}, known)
    negatives = {}
    for name in MASKS[1:]:
        negatives[name] = _drawn(links, random, pairs[name].shape[1])
    return replace(links, negatives=negatives)


def _with_edges(graph: Graph, stays: np.ndarray) -> Graph:
    """The graph with some of its edges, bool [edges]."""
    before = np.append(0, np.cumsum(stays))
    return replace(
        graph,
        offsets=before[graph.offsets],
        sources=graph.sources[stays],
        labels=None,
        train=None,
        validation=None,
        test=None,
        **graph.edge_tables(lambda values, padding: values[stays]),
    )


def _drawn(links: LinkSplit, random: np.random.Generator, count: int) -> np.ndarray:
    """int64 [2, count]: pairs of different vertices without an edge, drawn with equal chances."""
    vertices = links.graph.vertices
    drawn = np.zeros((2, 0), np.int64)
    for _ in range(DRAWS):
        missing = count - drawn.shape[1]
        if missing <= 0:
            return drawn[:, :count]
        pairs = random.integers(0, vertices, (2, 2 * missing + 8))
        if links.undirected:
            pairs = np.sort(pairs, axis=0)
        keys = pairs[0] * vertices + pairs[1]
        positions = np.searchsorted(links.known, keys)
        is_edge = links.known[np.minimum(positions, len(links.known) - 1)] == keys
        drawn = np.concatenate([drawn, pairs[:, ~is_edge & (pairs[0] != pairs[1])]], axis=1)
    raise GraphError(
        f"'{links.graph.name}' has almost all possible edges, and {count:,} pairs without one "
        "cannot be drawn: use samples(negatives=0), and smaller shares of validation and test."
    )
