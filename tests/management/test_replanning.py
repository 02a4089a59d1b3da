"""Plans for links that explain the seconds of a step: laws on a simulated machine."""

import functools
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.management.plan_costs import CorrectedCosts
from partita.management.plan_table import in_state
from partita.management.program_table import ProgramTable
from partita.management.replanning import (
    SEARCH,
    Proposal,
    Replanner,
    Situation,
    link_factor,
    plan_for_slow_links,
    propose,
)
from partita.management.traces import MachineState
from partita.plans.baselines import BASELINES
from partita.plans.plan import Plan
from partita.search.find import find
from partita.simulation.simulate import predicted

DATA = Path(__file__).parents[1] / "data" / "mlp.graph.json"
GRAPH = OperatorGraph.load(DATA)
MACHINE = load("host:4")
LEVEL = MACHINE.levels[0].name


@functools.cache
def best_plan() -> Plan:
    return find(GRAPH, MACHINE).plan


def slowed(factor: float) -> Situation:
    """The best plan's step, before and after the links have a part of their bandwidth."""
    plan = best_plan()
    machine = in_state(MACHINE, MachineState(links=((LEVEL, factor),)), MACHINE.devices)
    earlier = predicted(GRAPH, MACHINE, plan).seconds
    now = predicted(GRAPH, machine, plan).seconds
    # A real machine is 1.3 x slower than its description.
    return Situation(GRAPH, MACHINE, plan, 1.3 * now, 1.3 * earlier, 1.0, change_seconds=2.0)


@pytest.mark.parametrize("factor", [0.5, 0.1, 0.02])
def test_the_factor_of_a_link_is_found_from_the_seconds_of_a_step(factor: float):
    assert link_factor(slowed(factor), CorrectedCosts()) == pytest.approx(factor, rel=0.02)


def test_no_expert_plan_of_as_many_devices_is_faster_than_the_proposal():
    situation = slowed(0.02)
    machine = in_state(MACHINE, MachineState(links=((LEVEL, 0.02),)), MACHINE.devices)
    proposal = propose(situation, CorrectedCosts())
    assert proposal is not None
    best = proposal.plan
    assert best.devices == 4
    for name in ("data parallel", "tensor parallel", "one weird trick", "ZeRO-3"):
        expert = BASELINES[name](GRAPH, "host", situation.plan.mesh)
        seconds = [predicted(GRAPH, machine, plan).seconds for plan in (best, expert)]
        assert seconds[0] <= 1.001 * seconds[1]
    before = predicted(GRAPH, machine, situation.plan).seconds
    assert proposal.gain == pytest.approx(
        before / predicted(GRAPH, machine, best).seconds, rel=0.05
    )
    lost = 1 - 1 / proposal.gain
    assert proposal.wait_seconds == pytest.approx(2.0 / lost, rel=0.05)
    assert f"x longer, as with '{LEVEL}' at 2% of its bandwidth" in proposal.reason
    assert Proposal.from_json(proposal.to_json()) == proposal


def test_a_plan_that_is_prepared_for_slow_links_is_taken_at_once():
    situation = slowed(0.1)
    prepared = plan_for_slow_links(GRAPH, MACHINE, situation.plan)
    proposal = propose(replace(situation, prepared=prepared), CorrectedCosts())
    assert proposal is not None and proposal.plan == prepared != situation.plan
    assert proposal.wait_seconds == 0.0
    # A plan that is not among the fastest is not taken because it is free.
    machine = in_state(MACHINE, MachineState(links=((LEVEL, 0.1),)), MACHINE.devices)
    slow = max(
        (BASELINES[name](GRAPH, "host", situation.plan.mesh) for name in ("ZeRO-3", "ZeRO-1")),
        key=lambda plan: predicted(GRAPH, machine, plan).seconds,
    )
    proposal = propose(replace(situation, prepared=slow), CorrectedCosts())
    assert proposal is not None and proposal.plan != slow and proposal.wait_seconds > 0


def test_a_link_that_recovers_has_its_bandwidth_again():
    slow = slowed(0.1)
    recovered = replace(
        slow,
        step_seconds=slow.earlier_seconds,
        earlier_seconds=slow.step_seconds,
        earlier_factor=0.1,
    )
    assert link_factor(recovered, CorrectedCosts()) == pytest.approx(1.0, rel=0.02)
    assert propose(recovered, CorrectedCosts()) is None


def test_a_plan_that_sends_nothing_does_not_show_its_links():
    one = find(GRAPH, MACHINE.with_devices(1)).plan
    situation = replace(slowed(0.1), plan=one, earlier_factor=0.3)
    assert link_factor(situation, CorrectedCosts()) == 0.3


def test_an_unchanged_link_proposes_nothing():
    assert propose(slowed(1.0), CorrectedCosts()) is None


def wait_for_search(table: ProgramTable) -> None:
    while not table.is_done(SEARCH):
        time.sleep(0.001)


def test_a_proposal_is_due_after_its_wait_once():
    seconds = [0.0]
    replanner = Replanner(lambda: seconds[0])
    situation = slowed(0.02)
    table = ProgramTable()
    replanner.begin(situation, table)
    wait_for_search(table)
    assert replanner.due() is None
    seconds[0] = 1000.0
    proposal = replanner.due()
    assert proposal is not None and isinstance(proposal.plan, Plan)
    assert replanner.due() is None
    replanner.begin(replace(situation, change_seconds=0.0), table)
    wait_for_search(table)
    replanner.cancel()
    assert replanner.due() is None


def test_a_search_ends_with_the_script():
    code = f"""
import threading
from pathlib import Path
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.management.program_table import ProgramTable
from partita.management.replanning import plan_for_slow_links
from partita.plans.baselines import BASELINES
from partita.plans.plan import mesh_for

graph, machine = OperatorGraph.load(Path({str(DATA)!r})), load("host:4")
plan = BASELINES["data parallel"](graph, "host", mesh_for((4,)))

begins = threading.Event()

def search():
    begins.set()
    threading.main_thread().join()
    plan_for_slow_links(graph, machine, plan)
    print("the search has a result")

ProgramTable().begin("search", search)
begins.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
