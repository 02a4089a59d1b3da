"""Values that a compiler computes again, by hand."""

import math
from pathlib import Path

import numpy as np

from partita.cost.backends import compiler_of
from partita.cost.memory import memory
from partita.cost.recomputed import Drop, Lifetime, Recomputable, Recomputation, drops
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import mesh_of

PRODUCT, GATE, OUTPUT, LOSS = range(4)
LIFETIMES = {
    0: Lifetime(PRODUCT, 10, 0, 9),
    1: Lifetime(GATE, 6, 1, 9),
    2: Lifetime(OUTPUT, 8, 2, 7),
    3: Lifetime(LOSS, 5, 4, 5),
}
RECOMPUTABLE = {
    GATE: Recomputable((PRODUCT,), (2, 9)),
    OUTPUT: Recomputable((PRODUCT, GATE), (3, 7)),
}


def course(lifetimes):
    live = np.zeros(11, np.int64)
    for value in lifetimes.values():
        live[value.start : value.stop + 1] += value.nbytes
    return live


def dropped(lifetimes, limit_bytes):
    return drops(lifetimes, RECOMPUTABLE, course(lifetimes), limit_bytes)


def test_nothing_is_dropped_within_the_limit():
    assert dropped(LIFETIMES, 29) == Recomputation((), {})


def test_the_largest_value_is_dropped_between_its_readers():
    assert dropped(LIFETIMES, 24).drops == (Drop(2, 3, 7),)


def test_a_dropped_source_is_back_for_a_value_that_needs_it():
    # The gate, read again at 9, is needed at 7 to compute the output.
    assert dropped(LIFETIMES, 15).drops == (Drop(2, 3, 7), Drop(1, 2, 7))


def test_a_value_stays_if_its_source_is_gone_and_larger():
    short = {**LIFETIMES, 0: Lifetime(PRODUCT, 10, 0, 6)}
    assert dropped(short, 0) == Recomputation((), {})


def test_a_smaller_source_is_stored_until_the_value_is_computed_again():
    short = {**LIFETIMES, 0: Lifetime(PRODUCT, 5, 0, 6)}
    assert dropped(short, 20) == Recomputation((Drop(2, 3, 7),), {0: 7})


def test_a_step_on_a_smaller_gpu_takes_less():
    graph = OperatorGraph.load(Path(__file__).parents[1] / "data/transformer.graph.json")
    machine = load("h100:4")
    plan = BASELINES["data parallel"](graph, machine.name, mesh_of(machine))

    def peak(backend, device_bytes):
        layout = layout_of(graph, plan)
        return memory(graph, plan.mesh, layout, backend, device_bytes=device_bytes).peak

    ample = peak(machine.backend, math.inf)
    assert peak(machine.backend, machine.memory_bytes) == ample
    assert peak(machine.backend, 0) < ample


def test_the_limit_is_that_of_the_scheduler():
    # MPT-7B on 8 H100s: 53,149 MiB of temporaries live in the program of XLA:GPU.
    limit = compiler_of(load("h100:8").backend).temporary_limit_bytes(80 << 30, 9986617360)
    assert round(limit / 2**20) == 53211
    assert compiler_of(load("tpu-v5e:8").backend).temporary_limit_bytes(80 << 30, 0) == math.inf
