"""Link prediction: pairs of vertices as samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from partita import gnn  # before Keras, which it starts on JAX
from partita.errors import GraphError
from partita.gnn.nn.block import as_block


def blocks() -> gnn.Graph:
    """Communities, whose links can be learned from features and from edges."""
    stream = gnn.generate.blocks(300, 2000, classes=5, features=8, seed=1)
    return stream.with_reverse_edges().graph()


def model(**options: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    made = gnn.GCN(hidden=16, classes=8, dropout=0.0, links=True, **options)
    made.compile(
        keras.optimizers.Adam(0.02), "binary_crossentropy", metrics=[keras.metrics.AUC(name="auc")]
    )
    made.build((None, 8))
    return made


def keys(pairs: np.ndarray) -> set[tuple[int, int]]:
    return set(zip(*pairs.tolist(), strict=True))


def test_a_split_hides_edges_in_both_directions_and_draws_pairs_without_an_edge() -> None:
    graph = blocks()
    links = gnn.split_links(graph, validation=0.1, test=0.2, seed=3)
    target = np.repeat(np.arange(graph.vertices), np.diff(graph.offsets))
    edges = keys(np.stack([graph.sources, target]))
    left = np.repeat(np.arange(graph.vertices), np.diff(links.graph.offsets))
    messages = keys(np.stack([links.graph.sources, left]))
    assert links.undirected and messages < edges
    for name in ("validation", "test"):
        hidden = keys(links.pairs[name])
        assert hidden <= edges and not hidden & messages
        assert not {(v, u) for u, v in hidden} & messages
        assert links.negatives[name].shape == links.pairs[name].shape
        assert not keys(links.negatives[name]) & edges
    everything = set().union(*(keys(pairs) for pairs in links.pairs.values()))
    assert everything == {(u, v) for u, v in edges if u < v}


def test_a_seed_decides_the_samples() -> None:
    links = gnn.split_links(blocks(), seed=3)
    assert links.samples(1).digest == links.samples(1).digest != links.samples(2).digest
    assert gnn.split_links(blocks(), seed=3).samples(1).digest == links.samples(1).digest


def test_the_score_is_the_product_of_the_embeddings_of_both_ends() -> None:
    graph = gnn.with_pairs(blocks(), [0, 5, 7], [1, 200, 7])
    made = model()
    scores = made.predict(graph)[300:, 0]
    x = graph.features
    for stage in made.stages()[:-1]:
        x = stage(x, as_block(graph, x), False)
    x = np.asarray(x)
    products = (x[[0, 5, 7]] * x[[1, 200, 7]]).sum(axis=1)
    assert np.allclose(scores, 1 / (1 + np.exp(-products)), rtol=1e-5)


def test_losses_and_auc_are_those_of_one_device_on_any_number() -> None:
    samples = gnn.split_links(blocks()).samples()
    one, three = model(), model()
    history = one.fit(samples, epochs=20, verbose=0).history
    losses = three.fit(samples, epochs=3, devices=3, verbose=0).history["loss"]
    assert np.allclose(losses, history["loss"][:3], rtol=1e-5)
    assert history["val_auc"][-1] > history["val_auc"][0]
    assert one.evaluate(samples, return_dict=True)["auc"] > 0.7


def test_a_graph_without_pairs_is_refused() -> None:
    with pytest.raises(GraphError, match=r"train mask .* no pairs, .* use gnn.split_links"):
        model().fit(blocks(), verbose=0)


def test_bad_pairs_are_one_sentence() -> None:
    graph = blocks()
    with pytest.raises(GraphError, match="give 1 for a pair with an edge, and 0 without"):
        gnn.with_pairs(graph, [0], [1], labels=[2])
    with pytest.raises(GraphError, match="give one of each per pair"):
        gnn.with_pairs(graph, [0, 1], [1])
    with pytest.raises(GraphError, match="numbers of at least 0 whose sum is below 1"):
        gnn.split_links(graph, validation=0.5, test=0.5)
    with pytest.raises(GraphError, match="which would count pairs as vertices"):
        model(norm="batch")
    complete = gnn.Graph.from_edges(*np.divmod(np.arange(9), 3), features=np.ones((3, 1)))
    with pytest.raises(GraphError, match="has almost all possible edges"):
        gnn.split_links(complete, test=0.4)
