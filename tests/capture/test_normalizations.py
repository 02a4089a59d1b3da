"""Sequence parallelism: normalizations are operators beside products, and split by position."""

from collections import Counter
from dataclasses import replace

import keras
import pytest
from keras import layers

import partita
from partita.cost.collectives import collectives
from partita.cost.memory import memory
from partita.cost.moves import Placement, move_seconds, planned_moves
from partita.cost.terms import cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.plans.adapt import with_normalizations
from partita.plans.baselines import BASELINES, baselines_of
from partita.plans.check import check
from partita.plans.layout import label_sharding, layout_of
from partita.search.find import mesh_of

SAMPLES, POSITIONS, WIDTH, BLOCKS = 4, 16, 32, 1
MACHINE = load("h100:4")
VALUES = SAMPLES * POSITIONS * WIDTH * 4
"""Bytes of the values between layers."""
SEQUENCE = "tensor parallel with sequence"


def transformer_graph(target: str) -> OperatorGraph:
    with partita.abstract():
        tokens = keras.Input((POSITIONS,), dtype="int32")
        x = layers.Embedding(64, WIDTH, name="words")(tokens)
        for i in range(BLOCKS):
            a = layers.LayerNormalization(name=f"before_attention{i}")(x)
            x = x + layers.MultiHeadAttention(4, 8, name=f"attention{i}")(a, a)
            b = layers.LayerNormalization(name=f"before_up{i}")(x)
            up = layers.Dense(4 * WIDTH, "gelu", name=f"up{i}")(b)
            x = x + layers.Dense(WIDTH, name=f"down{i}")(up)
        x = layers.LayerNormalization(name="last")(x)
        model = keras.Model(tokens, layers.Dense(64, name="logits")(x))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return partita.capture_program(model, SAMPLES, target=target).graph


@pytest.fixture(scope="module")
def graph() -> OperatorGraph:
    return transformer_graph("cuda:9.0")


def normalization_names(graph: OperatorGraph) -> list[str]:
    return [operator.name for operator in graph.operators if operator.kind == "reduce"]


def test_normalizations_after_products_are_operators(graph):
    assert normalization_names(graph) == [
        "before_attention0",
        "before_up0",
        "last",
    ]
    operator = next(o for o in graph.operators if o.name == "before_up0")
    factors = {graph.factors[f].name: graph.factors[f].size for f in operator.factors}
    assert factors == {"S": SAMPLES, "A": POSITIONS, "P": WIDTH}
    paths = {graph.instructions[i].path for i in operator.instructions}
    # The residual sum and the bias before it move along.
    assert "attention0/attention_output" in paths


def test_sums_become_reduce_scatters_and_gathers(graph):
    plan = check(BASELINES[SEQUENCE](graph, MACHINE.name, mesh_of(MACHINE)), graph)
    sent = collectives(graph, plan.mesh, layout_of(graph, plan), MACHINE.backend)
    large = Counter((c.kind, c.phase) for c in sent if c.nbytes >= VALUES)
    # Beside two of each in a block: the table of words and the logits, and the gradients of both.
    # An all-gather is labelled by the phase of its value.
    assert large == {
        ("reduce_scatter", "forward"): 2 * BLOCKS + 1,
        ("reduce_scatter", "backward"): 2 * BLOCKS + 1,
        ("all_gather", "forward"): 2 * BLOCKS + 1,
        ("all_gather", "backward"): 2 * BLOCKS + 1,
    }


@pytest.mark.parametrize("name", ["tensor parallel", SEQUENCE])
def test_moves_are_charged_what_is_emitted(graph, name):
    """Query, key and value share a gather, and their gradients a sum."""
    plan = BASELINES[name](graph, MACHINE.name, mesh_of(MACHINE))
    layout = layout_of(graph, plan)
    placement = Placement(MACHINE, plan.mesh)
    emitted_seconds = 0.0
    for sent in collectives(graph, plan.mesh, layout, MACHINE.backend):
        if sent.nbytes >= VALUES:
            group = placement.group(sent.axes)
            emitted_seconds += placement.seconds(sent.kind, sent.nbytes, group)
    charged_seconds = 0.0
    for move in planned_moves(cost_terms(graph, MACHINE.backend).edges, layout):
        source = label_sharding(move.source, layout.assignments[move.home])
        target = label_sharding(move.target, layout.assignments[move.reader])
        charged_seconds += move_seconds(move, placement, source, target)
    assert charged_seconds == pytest.approx(emitted_seconds)


def test_unequal_readers_share_nothing(graph):
    """Query is split by heads, key and value by sample: each gathers for itself."""
    plan = BASELINES[SEQUENCE](graph, MACHINE.name, mesh_of(MACHINE))
    axes = [axis.name for axis in plan.mesh.axes]
    choices = dict(plan.choices)
    for name in ("key", "value"):
        choices[f"attention0/{name}"] = dict.fromkeys(axes, "S")
    layout = layout_of(graph, replace(plan, choices=choices))
    shares = Counter()
    for move in planned_moves(cost_terms(graph, MACHINE.backend).edges, layout):
        names = {graph.operators[o].name for o in (move.home, move.reader)}
        projections = {f"attention0/{name}" for name in ("query", "key", "value")}
        for name in names & projections:
            if "before_attention0" in names:
                shares[name, move.sums > 0, move.share] += 1
    assert shares == {
        ("attention0/query", False, 1): 1,
        ("attention0/key", False, 2): 1,
        ("attention0/value", False, 2): 1,
        ("attention0/query", True, 1): 1,
        ("attention0/key", True, 1): 1,
        ("attention0/value", True, 1): 1,
    }


def test_a_cpu_keeps_one_operator():
    graph = transformer_graph("cpu")
    assert not normalization_names(graph)
    assert SEQUENCE not in baselines_of(graph)


def test_a_plan_without_normalizations_is_completed(graph):
    plan = BASELINES["data parallel"](graph, MACHINE.name, mesh_of(MACHINE))
    old = {name: c for name, c in plan.choices.items() if name not in normalization_names(graph)}
    completed = with_normalizations(old, graph)
    assert completed == plan.choices


def test_query_key_and_value_read_one_gathered_copy(graph):
    plan = BASELINES[SEQUENCE](graph, MACHINE.name, mesh_of(MACHINE))
    layout = layout_of(graph, plan)
    query = next(o for o in graph.operators if o.name == "attention0/query")
    first_reads = [r for r in layout.reads if r.tensor in graph.instructions[query.heavy].operands]
    (gathered,) = {
        read.tensor for read in first_reads if graph.tensors[read.tensor].size > WIDTH**2
    }
    others = [read for read in layout.reads if read.tensor != gathered]
    once = [next(read for read in layout.reads if read.tensor == gathered)]
    courses = []
    for reads in (layout.reads, (*others, *once), others):
        one = replace(layout, reads=tuple(reads))
        courses.append(memory(graph, plan.mesh, one, MACHINE.backend).course)
    product = query.heavy
    assert courses[0][product] == courses[1][product]
    assert courses[1][product] - courses[2][product] == pytest.approx(VALUES, rel=0.1)
