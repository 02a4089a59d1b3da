"""Megatron's tensor parallelism on a transformer: heads, tables of words, two sums in each pass."""

from collections import Counter
from pathlib import Path

import pytest

from partita.cost.collectives import collectives
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.plans.baselines import megatron
from partita.plans.layout import layout_of
from partita.plans.plan import Plan
from partita.search.find import mesh_of

MACHINE = load("h100:4")
BLOCKS = 2
ACTIVATION = 32 * 16 * 32 * 4
"""Bytes of the values between layers: samples, positions, width."""


@pytest.fixture(scope="module")
def transformer() -> OperatorGraph:
    return OperatorGraph.load(Path(__file__).parents[1] / "data/transformer.graph.json")


def megatron_plan(graph: OperatorGraph, sample_axes: int) -> Plan:
    return megatron(graph, MACHINE.name, mesh_of(MACHINE), "Megatron", sample_axes)


def test_a_block_sums_activations_twice_in_each_pass(transformer):
    plan = megatron_plan(transformer, sample_axes=0)
    sent = collectives(transformer, plan.mesh, layout_of(transformer, plan), MACHINE.backend)
    large = Counter((c.kind, c.phase) for c in sent if c.nbytes == ACTIVATION)
    # The table of words adds one in the forward pass, the logits one in the backward pass.
    assert large == {
        ("all_reduce", "forward"): 2 * BLOCKS + 1,
        ("all_reduce", "backward"): 2 * BLOCKS + 1,
    }
    assert max(c.nbytes for c in sent) == ACTIVATION


def test_attention_is_split_by_heads(transformer):
    choices = megatron_plan(transformer, sample_axes=1).choices
    outer, inner = (axis.name for axis in mesh_of(MACHINE).axes)
    layer = "multi_head_attention"
    for name, factor in (
        (f"{layer}/query", "P1"),
        (f"{layer}/value", "P1"),
        (f"{layer}:1", "A1"),
        (f"{layer}/attention_output", "R1"),
    ):
        assert choices[name] == {outer: "S", inner: factor}
