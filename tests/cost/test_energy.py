"""Joules of a step: hand-worked sums, and the sentence for missing figures."""

from dataclasses import replace

import pytest

from partita.cost.energy import DeviceActivity, missing_power, require_power, step_energy
from partita.cost.predict import Prediction
from partita.errors import MachineError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import (
    Device,
    Domain,
    DomainPoint,
    Engine,
    Leakage,
    Level,
    Machine,
    Memory,
    OperatingPoint,
    load,
)
from partita.planning import predict_plan, resolve_plan

POINT = OperatingPoint("base", 1e9, power=100.0, idle_power=10.0)
MEMORY = Memory("main", 1 << 30, 1e9, energy_per_bit=1e-9)
BOARDS = Machine(
    "boards",
    Device("board", 0.0, (MEMORY,), (Engine("*", "*", 1e9, 1.0),), (POINT,)),
    (Level("net", 4, "switch", 0.0, 1e9, energy_per_bit=1e-8),),
)
ACTIVITY = DeviceActivity(devices=4, seconds=2.0, busy=1.5, memory_bytes=1e6, link_bytes=1e6)
CORES = Domain(
    "cores",
    "clock",
    4,
    watts=0.5,
    points=(DomainPoint("fast", 1e9, 1.0, (3.0, 5.0, 6.0, 7.0)),),
    leakage=Leakage(scale=0.0, activation=1.0, gate=0.25),
)


def test_boards_draw_busy_power_then_idle_power_and_send_bits() -> None:
    energy = step_energy(BOARDS, ACTIVITY)
    assert energy is not None
    assert energy.kernels == 1.5 * 4 * 100
    assert energy.idle == 0.5 * 4 * 10
    assert energy.memory == 0  # in the board's power
    assert energy.links == pytest.approx(4 * 1e6 * 8 * 1e-8)
    assert energy.joules == pytest.approx(600 + 20 + 0.32)


def test_two_of_four_boards_leave_two_idle() -> None:
    energy = step_energy(BOARDS, replace(ACTIVITY, devices=2))
    assert energy is not None and energy.kernels == 1.5 * (2 * 100 + 2 * 10)


def test_domains_draw_by_active_devices_and_memory_is_added() -> None:
    machine = replace(BOARDS, domains=(CORES,))
    energy = step_energy(machine, replace(ACTIVITY, devices=3))
    assert energy is not None
    assert energy.kernels == 1.5 * 6.0
    assert energy.idle == 0.5 * 0.25 + 2.0 * 0.5
    assert energy.memory == pytest.approx(3 * 1e6 * 8 * 1e-9)


def test_missing_figures_are_named() -> None:
    silent = replace(BOARDS, device=replace(BOARDS.device, points=()))
    assert missing_power(silent) == ("device.operating_point",)
    assert step_energy(silent, ACTIVITY) is None
    with pytest.raises(MachineError) as error:
        require_power(load("h100:8"))
    assert str(error.value) == (
        "The joules of 'h100:8' are unknown: it lacks device.operating_point.boost.idle_power, "
        "level.node.energy_per_bit. Add them to its description, or use a machine with power "
        "figures, as odroid-xu3."
    )


def predicted(machine: Machine, plan: str) -> Prediction:
    graph = OperatorGraph.load("tests/data/mlp.graph.json")
    return predict_plan(graph, machine, resolve_plan(plan, graph, machine))


def test_predictions_have_joules_where_machines_have_power_figures() -> None:
    phone = predicted(load("odroid-xu3"), "dp").to_json()
    assert phone["joules"] == pytest.approx(sum(phone["joules_by_cause"].values()))
    assert phone["provenance"]["joules"] == (
        "odroid-xu3's power figures (assumed at worst), at its first operating points"
    )
    assert "joules" not in predicted(load("h100:8"), "dp").to_json()


def test_more_power_is_never_less_energy() -> None:
    dearer = replace(BOARDS.device, points=(replace(POINT, power=200.0),))
    cheap = predicted(BOARDS, "dp").energy
    dear = predicted(replace(BOARDS, device=dearer), "dp").energy
    assert cheap is not None and dear is not None
    assert dear.kernels == pytest.approx(2 * cheap.kernels) and dear.idle == cheap.idle
