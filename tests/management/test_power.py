"""Heat, settings and simulated runs: laws and hand-worked examples."""

from dataclasses import replace

import numpy as np
import pytest

from partita.errors import MachineError, PlanError
from partita.machine import (
    Device,
    Domain,
    DomainPoint,
    Engine,
    Level,
    Machine,
    Memory,
    OperatingPoint,
    Thermal,
    Trip,
    load,
)
from partita.machine.routing import Tile
from partita.management.comparison import compare_policies
from partita.management.hardware import Assumptions, hardware_of
from partita.management.heat import ThermalModel, active_trips
from partita.management.placement import placement_of
from partita.management.policies.performance import Performance
from partita.management.power import run_policy
from partita.management.program import Kernel, Program
from partita.management.registry import POLICIES, RunContext, policy_names
from partita.management.schedule import best_schedule
from partita.management.workload import Workload, workload_of

COMPUTE = Kernel("dense", "forward", "dot", "float32", 6e9, 1e6)
MEMORY = Kernel("update", "update", "elementwise", "float32", 1e6, 2e9)
PROGRAM = Program("two kernels", (COMPUTE, MEMORY))
_THERMAL = load("odroid-xu3").thermal
assert _THERMAL is not None
THERMAL: Thermal = _THERMAL
EXACT = Assumptions(serial=0.0, exposed=0.0, batch_seconds=1e-9)
CORES = Domain(
    "cores",
    "clock",
    2,
    points=(DomainPoint("fast", 2e9, 1.0, (3.0, 5.0)), DomainPoint("slow", 1e9, 0.8, (1.0, 1.5))),
)
TWO_CORES = Machine(
    "two-cores",
    Device(
        "core",
        0.0,
        (Memory("main", 1 << 30, 1e12, energy_per_bit=1e-30),),
        (Engine("*", "*", 1e9, 1.0),),
    ),
    (Level("soc", 2, "bus", 0.0, 1e9, energy_per_bit=1e-12),),
    domains=(CORES,),
)


def test_one_step_of_the_heat_is_the_description() -> None:
    transition, gain = ThermalModel(THERMAL).propagator(THERMAL.step)
    assert transition == pytest.approx(np.array(THERMAL.transition), abs=1e-9)
    assert gain == pytest.approx(np.array(THERMAL.gain), abs=1e-9)


def test_heat_of_two_halves_is_heat_of_the_whole() -> None:
    model = ThermalModel(THERMAL)
    watts = np.array([4.0, 0.5, 0.1, 0.1])
    rise = np.full(5, 8.0)
    for seconds in (0.3, 0.7):
        transition, gain = model.propagator(seconds)
        rise = transition @ rise + gain @ watts
    transition, gain = model.propagator(1.0)
    assert rise == pytest.approx(transition @ np.full(5, 8.0) + gain @ watts)


def test_heat_settles_where_power_and_loss_are_equal() -> None:
    model = ThermalModel(THERMAL)
    watts = np.array([1.78, 0.0, 0.1, 0.1])
    transition, gain = model.propagator(1e5)
    rise = transition @ np.zeros(5) + gain @ watts
    kept = np.array(THERMAL.transition) @ rise + np.array(THERMAL.gain) @ watts
    assert rise.min() > 0 and kept == pytest.approx(rise)


def test_a_trip_ends_below_its_temperature() -> None:
    trips = (Trip("hot", "cores", 85.0, 3.0, 1e9),)
    assert active_trips(trips, frozenset(), 84.0) == frozenset()
    assert active_trips(trips, frozenset({"hot"}), 84.0) == {"hot"}
    assert active_trips(trips, frozenset({"hot"}), 81.9) == frozenset()


def test_settings_of_the_odroid() -> None:
    """(4 counts x 8 points + off) x (5 points + off) - all off."""
    hardware = hardware_of(load("odroid-xu3"))
    assert len(hardware.settings) == 33 * 6 - 1
    fastest = hardware.all_active([1.0, 1.0])
    assert fastest.active == (4, 4) and fastest.points == (7, 4)
    limited = hardware.limited(fastest, {"big": 1e9})
    assert limited.points == (2, 4)


def test_equal_groups_of_a_domain_are_exchangeable() -> None:
    """Two groups of one core at 2 points or off: 3 x 3 - off, less 3 mirror images."""
    one_each = replace(
        CORES,
        devices=1,
        points=(DomainPoint("fast", 2e9, 1.0, (3.0,)), DomainPoint("slow", 1e9, 0.8, (1.0,))),
    )
    assert len(hardware_of(replace(TWO_CORES, domains=(one_each,))).settings) == 5


def test_joules_are_watts_times_seconds() -> None:
    """2e9 FLOP on two cores of 1 GFLOP/s take a second of 5 W, or two of 1.5 W."""
    hardware = hardware_of(TWO_CORES, EXACT)
    program = Program("dense", (Kernel("dense", "forward", "dot", "float32", 2e9, 1.0),))
    workload = workload_of(program, hardware, passes=3)
    assert workload.steps_per_pass == 1
    run = run_policy(workload, Performance(hardware))
    assert (run.seconds, run.joules) == (pytest.approx(3.0), pytest.approx(15.0))
    assert run.peak_celsius is None and run.throttled == 0
    slow = run_policy(workload, POLICIES["powersave"](_context(workload)))
    assert (slow.seconds, slow.joules) == (pytest.approx(6.0), pytest.approx(9.0))


def _context(workload: Workload) -> RunContext:
    return RunContext(workload, best_schedule(workload), workload)


def test_no_policy_beats_the_oracle_and_the_schedule_is_near_it() -> None:
    names = [name for name in POLICIES if name not in ("imitation", "gated", "qlearning")]
    described, other = compare_policies(PROGRAM, load("odroid-xu3"), names)
    for comparison in (described, other):
        regrets = {run.policy: comparison.regret(run) for run in comparison.runs}
        assert set(regrets) == set(names)
        assert min(regrets.values()) == regrets["oracle"] == 0
        assert max(run.peak_celsius or 0.0 for run in comparison.runs) < 96
    # Measurements correct the schedule of hardware that is not as described.
    assert regrets["corrected"] < 0.02 < regrets["schedule"]
    regrets = {run.policy: described.regret(run) for run in described.runs}
    assert regrets["schedule"] < 0.01 < 0.1 < regrets["ondemand"]
    throttled = {run.policy: run.throttled for run in described.runs}
    assert throttled["performance"] > throttled["oracle"]


def test_neighbours_exchange_results_for_less_energy_than_diagonal_groups() -> None:
    """Mean hops within 4 x 4 tiles: 2 x 1.25. Of two groups in a row: 2.625 + 1.25, diagonal: half
    of the messages stay in a group, the others go 4 + 4 hops."""
    placement = placement_of(load("manycore-64"), 16)
    assert placement is not None and placement.groups[3][0] == Tile(4, 4)
    hop = 8 * 0.4e-12
    costs = {
        active: placement.byte_costs(active)
        for active in ((1, 0, 0, 0), (1, 1, 0, 0), (0, 0, 1, 1), (1, 0, 0, 1), (1, 1, 1, 1))
    }
    assert costs[1, 0, 0, 0][1] == pytest.approx(2.5 * hop)
    assert costs[1, 1, 0, 0] == pytest.approx((1 / 16 / 12.8e9, 3.875 * hop))
    assert costs[0, 0, 1, 1] == costs[1, 1, 0, 0]
    assert costs[1, 0, 0, 1][1] == pytest.approx(5.25 * hop)
    assert costs[1, 1, 1, 1] == pytest.approx((1 / 32 / 12.8e9, 5.25 * hop))


def test_a_schedule_places_operators_on_neighbouring_islands() -> None:
    """Two islands draw all bandwidth of the memory, and a third one only adds power."""
    manycore = load("manycore-64")
    memory = replace(manycore.device.memories[0], bandwidth=32e9, efficiency=1.0, device_limit=1e9)
    island = replace(manycore.domains[0], points=manycore.domains[0].points[:2])
    machine = replace(
        manycore,
        device=replace(manycore.device, memories=(memory,)),
        domains=(island, *manycore.domains[1:]),
    )
    hardware = hardware_of(machine, EXACT)
    copy = Kernel("copy", "forward", "elementwise", "float32", 1.0, 16e9, 8e9)
    schedule = best_schedule(workload_of(Program("copy", (copy,)), hardware))
    islands = {tuple(count > 0 for count in setting.active) for setting in schedule.settings[1:]}
    assert len(islands) == 1
    assert islands.pop() in {(True, True, False, False), (True, False, True, False)}


def test_boards_switch_between_their_points() -> None:
    points = (
        OperatingPoint("boost", 2e9, power=100.0, idle_power=10.0),
        OperatingPoint("base", 1e9, power=40.0),
    )
    board = replace(TWO_CORES.device, points=points)
    hardware = hardware_of(replace(TWO_CORES, device=board, domains=()), EXACT)
    assert len(hardware.settings) == 2
    workload = workload_of(Program("dense", (COMPUTE,)), hardware, passes=1)
    run = run_policy(workload, Performance(hardware))
    assert run.joules == pytest.approx(3.0 * 200)


def test_sentences() -> None:
    point = OperatingPoint("boost", 2e9, power=100.0, idle_power=10.0)
    board = replace(TWO_CORES.device, points=(point,))
    with pytest.raises(MachineError, match="'two-cores' has one operating point, so there is no"):
        hardware_of(replace(TWO_CORES, device=board, domains=()))
    with pytest.raises(MachineError, match="The joules of 'host' are unknown: it lacks"):
        hardware_of(load("host"))
    with pytest.raises(PlanError, match="no policy 'ondeman': did you mean 'ondemand'?"):
        policy_names("oracle,ondeman")
    with pytest.raises(PlanError, match="No policy is named: use all, or some of oracle, "):
        policy_names(",")
