"""The seconds of collectives that a bound counts: below every simulated step, whole if exposed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from partita.cost.terms import Terms, cost_terms
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
STEPS = 60


def backend(overlap: float) -> Backend:
    return replace(load("dgx-h100:1").backend, overlap=overlap)


def counted(slot: Slot, exposed: Exposed, terms: Terms) -> float:
    """Share of a slot's seconds that a bound counts."""
    if slot.kind == "join":
        return 0.0
    if slot.kind == "compute":
        return 1.0
    if slot.kind == "move":
        key = slot.operator, slot.reader, slot.phase, slot.read_phase
        return exposed.of_moves.get(key, exposed.visible)
    is_variable = slot.kind in ("sum", "gather")
    is_left_out = is_variable and exposed.leaves_out(terms.operators[slot.operator])
    return 0.0 if is_left_out else exposed.visible


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", GRAPHS)
def test_no_step_is_shorter_than_the_seconds_counted(name: str, overlap: float) -> None:
    graph = GRAPHS[name]
    terms = cost_terms(graph, backend(overlap))
    exposed = Exposed.of(graph, terms, backend(overlap))
    structure = step_structure(graph, terms)
    shares = np.array([counted(slot, exposed, terms) for slot in structure.slots])
    kernels = np.array([slot.kind == "compute" for slot in structure.slots])
    joins = np.array([slot.kind == "join" for slot in structure.slots])
    draw = np.random.default_rng(0)
    for _ in range(STEPS):
        seconds = draw.exponential(size=len(shares)) * (draw.random(len(shares)) < draw.random())
        seconds = np.where(kernels, seconds + 1e-3, np.where(joins, 0.0, seconds))
        step = run(step_tasks(structure, seconds, overlap).tasks).seconds
        assert shares @ seconds <= step * (1 + 1e-9)


def test_a_move_to_the_next_kernel_counts_whole_and_one_to_later_kernels_for_its_share() -> None:
    graph = GRAPHS["mlp"]
    terms = cost_terms(graph, backend(0.5))
    exposed = Exposed.of(graph, terms, backend(0.5))
    assert exposed.of_moves[0, 1, "forward", "forward"] == 1.0
    forward = next(move for move in terms.edges if (move.home, move.reader) == (0, 1))
    assert exposed.share(forward) == 1.0
    back = next(move for move in terms.edges if (move.home, move.reader) == (2, 1))
    assert exposed.share(back) == 0.5
    assert Exposed.of(graph, terms, backend(0.0)).share(back) == 1.0
