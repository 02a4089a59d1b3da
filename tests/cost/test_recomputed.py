"""Values that a compiler computes again, by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from partita.cost.backends import compiler_of
from partita.cost.laid_out_fusion import fused_under
from partita.cost.lifetimes import lifetimes_under
from partita.cost.memory import _allocations, _recomputable, memory
from partita.cost.recomputed import Drop, Lifetime, Recomputable, Recomputation, drops
from partita.cost.terms import cost_terms
from partita.graph.clones import BARRIER
from partita.graph.operator_graph import IdentityKey, OperatorGraph
from partita.graph.rematerialize import rematerialized
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import mesh_of
from partita.search.rematerialization import groupings

PRODUCT, GATE, OUTPUT, LOSS = range(4)
LIFETIMES = {
    0: Lifetime(PRODUCT, 10, 0, 9),
    1: Lifetime(GATE, 6, 1, 9),
    2: Lifetime(OUTPUT, 8, 2, 7),
    3: Lifetime(LOSS, 5, 4, 5),
}
RECOMPUTABLE = [
    Recomputable({GATE: (2, 9)}, (PRODUCT,)),
    Recomputable({OUTPUT: (3, 7)}, (PRODUCT, GATE)),
]


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
    assert dropped(LIFETIMES, 15).drops == (Drop(1, 2, 7), Drop(2, 3, 7))


def test_a_value_stays_if_its_source_is_gone_and_larger():
    short = {**LIFETIMES, 0: Lifetime(PRODUCT, 10, 0, 2)}
    assert dropped(short, 0) == Recomputation((), {})


def test_results_of_one_kernel_are_dropped_together_until_one_is_read():
    joined = [Recomputable({GATE: (2, 9), OUTPUT: (3, 7)}, (PRODUCT,))]
    # Both results are in memory from instruction 2 on, and again from the first read of either.
    both = drops(LIFETIMES, joined, course(LIFETIMES), 24)
    assert both.drops == (Drop(1, 2, 7), Drop(2, 3, 7))


def test_results_of_one_kernel_stay_where_the_instruction_reads_one():
    joined = [Recomputable({GATE: (2, 5, 9), OUTPUT: (3, 4, 6, 7)}, (PRODUCT,))]
    # Instructions 4 and 5 are beyond the limit; at each, one of the results is read.
    assert drops(LIFETIMES, joined, course(LIFETIMES), 24) == Recomputation((), {})


def test_a_value_stays_where_the_instruction_reads_it():
    output = {2: LIFETIMES[2]}
    often_read = [Recomputable({OUTPUT: (3, 4, 5, 6, 7)}, ())]
    assert drops(output, often_read, course(output), 0) == Recomputation((), {})
    read_twice = [Recomputable({OUTPUT: (4, 7)}, ())]
    assert drops(output, read_twice, course(output), 0).drops == (Drop(2, 2, 4),)


def test_a_sum_that_nothing_has_read_keeps_its_gradient_in_memory():
    # Instruction 3 reads the gradient, too, so that storing it longer seems to cost nothing.
    gradient, total = range(2)
    lifetimes = {0: Lifetime(gradient, 10, 0, 3), 1: Lifetime(total, 1, 1, 8)}
    sums = [Recomputable({total: (8,)}, (gradient,))]
    moved = drops(lifetimes, sums, course(lifetimes), 9)
    assert moved == Recomputation((Drop(1, 1, 8),), {0: 8})
    short = {**lifetimes, 0: Lifetime(gradient, 10, 0, 1)}
    assert drops(short, sums, course(short), 9) == Recomputation((), {})


def test_what_a_rematerialized_run_reads_behind_its_barrier_stays():
    graph = OperatorGraph.load(Path(__file__).parents[1] / "data/transformer.graph.json")
    machine = load("h100:4")
    runs = groupings(graph, cost_terms(graph, machine.backend))[0]
    again = rematerialized(graph, runs)
    plan = BASELINES["data parallel"](graph, machine.name, mesh_of(machine))
    layout = layout_of(again, replace(plan, recompute=runs))
    fused = fused_under(again, layout, compiler_of(machine.backend).fusion_rules)
    keys = IdentityKey(again), IdentityKey(layout)
    recomputable = _recomputable(
        again, layout, fused, lifetimes_under(*keys, plan.mesh, machine.backend)
    )
    stored = set()
    for instruction in again.instructions:
        if instruction.name == BARRIER:
            stored.update(instruction.operands)
    assert stored
    assert recomputable
    assert stored.isdisjoint(tensor for kernel in recomputable for tensor in kernel.results)


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


def test_the_sum_of_the_loss_may_move_beyond_the_limit():
    graph = OperatorGraph.load(Path(__file__).parents[1] / "data/transformer.graph.json")
    machine = load("h100:4")
    plan = BASELINES["data parallel"](graph, machine.name, mesh_of(machine))
    keys = IdentityKey(graph), IdentityKey(layout_of(graph, plan))

    def has_scalars(is_limited):
        allocated = _allocations(*keys, plan.mesh, machine.backend, is_limited).tensor
        return any(graph.tensors[tensor].shape == () for tensor in allocated if tensor >= 0)

    assert has_scalars(is_limited=True)
    assert not has_scalars(is_limited=False)


def test_the_limit_is_that_of_the_scheduler():
    # MPT-7B on 8 H100s: 53,149 MiB of temporaries live in the program of XLA:GPU.
    limit = compiler_of(load("h100:8").backend).temporary_limit_bytes(80 << 30, 9986617360)
    assert round(limit / 2**20) == 53211
    assert compiler_of(load("tpu-v5e:8").backend).temporary_limit_bytes(80 << 30, 0) == math.inf
