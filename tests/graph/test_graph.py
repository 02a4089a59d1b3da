"""Graphs as values: saving and loading, checks, kinds of factors, and halos counted by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import PartitaError
from partita.graph.check import check
from partita.graph.operator_graph import OperatorGraph, Window, operator_arguments

DATA = Path(__file__).parent.parent / "data"
GRAPHS = {p.name.split(".")[0]: OperatorGraph.load(p) for p in sorted(DATA.glob("*.graph.json"))}


@pytest.mark.parametrize("name", GRAPHS)
def test_saving_and_loading_is_the_identity(name, tmp_path):
    graph = check(GRAPHS[name])
    graph.save(tmp_path / "graph.json")
    assert OperatorGraph.load(tmp_path / "graph.json") == graph
    assert len(str(graph).splitlines()) == 1 + len(graph.operators)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_layer_owns_its_forward_backward_and_update(name):
    graph = GRAPHS[name]
    for index, operator in enumerate(graph.operators):
        phases = {graph.instructions[i].phase for i in operator.instructions}
        if any(a.role == "parameter" for a in operator_arguments(graph)[index]):
            assert phases == {"forward", "backward", "update"}, operator.name


def test_factors_have_their_kinds():
    kinds = {
        o.name: {GRAPHS["cnn"].factors[f].name for f in o.factors} for o in GRAPHS["cnn"].operators
    }
    assert kinds["conv2d"] >= {"S", "A1", "A2", "P", "R"}
    dense = {
        o.name: {GRAPHS["mlp"].factors[f].name for f in o.factors} for o in GRAPHS["mlp"].operators
    }
    assert dense["dense"] == {"S", "P", "R"}
    embedding = next(o for o in GRAPHS["transformer"].operators if o.kind == "gather")
    assert {GRAPHS["transformer"].factors[f].kind for f in embedding.factors} >= {"S", "P"}


@pytest.mark.parametrize("breakage", ["owner", "label", "factor"])
def test_a_broken_graph_fails_its_check(breakage):
    graph = GRAPHS["mlp"]
    if breakage == "owner":
        broken = replace(graph, owner=(0,) * len(graph.owner))
    elif breakage == "label":
        t = next(t for t, label in enumerate(graph.labels) if len(label) == 2)
        broken = replace(graph, labels=(*graph.labels[:t], (0,), *graph.labels[t + 1 :]))
    else:
        broken = replace(graph, factors=graph.factors[:-1])
    with pytest.raises((AssertionError, IndexError)):
        check(broken)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "There is no file '.*graph.json': capture the program again."),
        ("{", r"is not a graph \(.* in line 1, column 2\): capture"),
        ("[]", "the content is a list of 0: capture the program again."),
        (
            json.dumps({"schema": 99, "graph": []}),
            "schema is 99: capture the program again.",
        ),
    ],
)
def test_a_file_without_a_graph_is_refused(text, sentence, tmp_path):
    path = tmp_path / "graph.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PartitaError, match=sentence):
        OperatorGraph.load(path)


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([2, 3, 4, 8]),
)
def test_a_halo_has_the_elements_of_neighbours(each, step, low, reach, base, parts):
    """Counted element by element.

    A device reads from the first element of its first position to the last element of its last
    position, and stores an even part of all elements.
    """
    count = each * parts
    size = max(1, ((count - 1) * step + reach - low - 1) // base + 1)
    window = Window(size, count, step, low, reach, base)
    held = -(-size // parts)
    before = after = 0
    for device in range(parts):
        start, stop = device * each * step - low, ((device + 1) * each - 1) * step - low + reach
        elements = [q // base for q in range(start, stop) if q % base == 0]
        if elements:
            before = max(before, device * held - min(elements) if device else 0)
            after = max(after, max(elements) + 1 - (device + 1) * held if device < parts - 1 else 0)
    assert window.halo_elements(parts) == (before, after)
