"""The seconds of collectives that a bound counts: below every simulated step, whole if exposed."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from partita.cost.terms import cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Backend, load
from partita.search.exposed import Exposed
from partita.simulation.engine import run
from partita.simulation.structure import Slot, step_structure
from partita.simulation.tasks import step_tasks

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}


def backend(overlap: float) -> Backend:
    return replace(load("dgx-h100:1").backend, overlap=overlap)


def counted(slot: Slot, exposed: Exposed) -> float:
    """Share of a slot's seconds that a bound counts."""
    if slot.kind == "join":
        return 0.0
    if slot.kind == "compute":
        return 1.0
    if slot.kind == "move":
        key = slot.operator, slot.reader, slot.phase, slot.read_phase
        return exposed.of_moves.get(key, exposed.visible)
    return exposed.visible


@pytest.mark.parametrize("overlap", [0.5, 0.8])
@pytest.mark.parametrize("name", GRAPHS)
def test_no_step_is_shorter_than_the_seconds_counted(name: str, overlap: float) -> None:
    graph = GRAPHS[name]
    terms = cost_terms(graph, backend(overlap))
    exposed = Exposed.of(graph, terms, backend(overlap))
    structure = step_structure(graph, terms)
    shares = np.array([counted(slot, exposed) for slot in structure.slots])
    kernels = np.array([slot.kind == "compute" for slot in structure.slots])
    joins = np.array([slot.kind == "join" for slot in structure.slots])
    draw = np.random.default_rng(0)
    for first, reach in itertools.product(np.flatnonzero(~kernels & ~joins), range(4)):
        # Two collectives that begin side by side, and some kernels that may hide them.
        seconds = np.where(kernels, draw.choice([0.01, 2.0], len(shares)), 0.0)
        seconds[first] = 1.0
        other = min(first + reach, len(shares) - 1)
        seconds[other] = 0.0 if joins[other] else max(seconds[other], draw.random())
        step = run(step_tasks(structure, seconds, overlap).tasks).seconds
        assert shares @ seconds <= step * (1 + 1e-9)


def test_a_move_to_the_next_kernel_counts_whole_and_one_to_later_kernels_for_its_share() -> None:
    graph = GRAPHS["transformer"]
    terms = cost_terms(graph, backend(0.75))
    names = [operator.name for operator in graph.operators]

    def share(home: str, reader: str, overlap: float) -> float:
        ends = names.index(home), names.index(reader)
        forward = (m for m in terms.edges if m.phase == m.read_phase == "forward")
        move = next(m for m in forward if (m.home, m.reader) == ends)
        return Exposed.of(graph, terms, backend(overlap)).share(move)

    query, scores = "multi_head_attention/query", "multi_head_attention:1"
    output, dense = "multi_head_attention/attention_output", "dense_6"
    assert share(output, dense, 0.75) == 1.0
    assert share(query, scores, 0.75) == 0.25
    assert share(query, scores, 0.0) == 1.0
    # The residual value beside the exposed one.
    assert share(output, "dense_5", 0.75) == 0.0
