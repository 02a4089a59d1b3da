"""Compute attached to memory: where a product is faster there, and the sentences of plans."""

import math
from dataclasses import replace

import numpy as np
import pytest

from partita.cost.attached import (
    SECONDS_OF_A_YEAR,
    AttachedUse,
    attached_rate,
    attached_seconds,
    endurance_years,
    kernel_bytes,
)
from partita.cost.energy import DeviceActivity, missing_power, step_energy
from partita.cost.operator_terms import Work
from partita.machine import Attached, Engine, Machine, load


def product(rows: int, size: int, dtype: str, item: int, frozen: bool) -> Work:
    """Vectors [rows, size] times a matrix [size, size] that is stored."""
    weights = size * size * item
    result = rows * size * (4 if dtype == "int8" else item)
    return Work(
        "dot",
        dtype,
        2.0 * rows * size * size,
        (),
        ((weights + rows * size * item + result, ()),),
        trips=1,
        phase="forward",
        stored_bytes=weights,
        frozen_bytes=weights if frozen else 0,
        written_bytes=result,
    )


def runs_in_memory(machine: Machine, work: Work) -> bool:
    total = np.array([float(work.traffic[0][0])])
    flops = np.array([work.flops])
    compute = flops / machine.rate(work.op_class, work.dtype)
    on_device = np.maximum(compute, total / machine.bandwidth_for(total)) + machine.overhead
    nbytes = kernel_bytes(work, total)
    part = machine.attached[0]
    return bool((attached_seconds(machine, part, work, flops, nbytes) < on_device)[0])


SIZES = (1024, 4096, 8192, 16384)


def test_upmem_multiplies_resident_int8_by_a_vector_and_never_float32() -> None:
    upmem = load("upmem")
    assert runs_in_memory(upmem, product(1, 8192, "int8", 1, frozen=True))
    assert not runs_in_memory(upmem, product(1, 8192, "int8", 1, frozen=False))
    assert not runs_in_memory(upmem, product(64, 8192, "int8", 1, frozen=True))
    for size in SIZES:
        for rows in (1, 2, 8, 64, 1024):
            assert not runs_in_memory(upmem, product(rows, size, "float32", 4, frozen=True))


def test_hbm_pim_gains_for_batches_of_1_to_3() -> None:
    hbm_pim = load("hbm-pim")
    for size in SIZES[1:]:
        fast = [
            n
            for n in range(1, 65)
            if runs_in_memory(hbm_pim, product(n, size, "float16", 2, False))
        ]
        assert fast == [1, 2, 3]
    assert not runs_in_memory(hbm_pim, product(1, 4096, "float32", 4, frozen=True))


def test_reram_gains_for_frozen_weights_and_loses_to_its_writes_in_training() -> None:
    reram = load("reram")
    assert runs_in_memory(reram, product(64, 4096, "int8", 1, frozen=True))
    assert not runs_in_memory(reram, product(64, 4096, "int8", 1, frozen=False))
    assert not runs_in_memory(reram, product(64, 16384, "int8", 1, frozen=True))  # does not fit


PART = Attached(
    "pim",
    units=4,
    lockstep=2,
    capacity=10**6,
    bandwidth=1e3,
    up=100.0,
    down=200.0,
    broadcast=400.0,
    launch=0.5,
    power=7.0,
    endurance_writes=10**6,
    engines=(Engine("dot", "float32", 1e3, 1.0),),
)
HOST = replace(load("upmem"), attached=(PART,))


def test_seconds_by_hand() -> None:
    """8 results keep all units busy: launch .5, compute 8000 / 4000, broadcast 4 x 40 / 400, gather
    32 / 100, new weights 400 / 200."""
    work = Work(
        "dot",
        "float32",
        8000.0,
        (),
        ((472, ()),),
        trips=1,
        phase="forward",
        stored_bytes=400,
        written_bytes=32,
    )
    nbytes = kernel_bytes(work, np.array([472.0]))
    seconds = attached_seconds(HOST, PART, work, np.array([8000.0]), nbytes)
    assert seconds == pytest.approx(0.5 + 2.0 + 0.4 + 0.32 + 2.0)
    main = replace(PART, in_main_memory=True)
    assert attached_seconds(HOST, main, work, np.array([8000.0]), nbytes) == pytest.approx(3.22)
    one_result = replace(work, written_bytes=4)
    nbytes = kernel_bytes(one_result, np.array([472.0]))
    alone = attached_seconds(HOST, main, one_result, np.array([8000.0]), nbytes)
    assert alone == pytest.approx(0.5 + 4.0 + 4 * 68 / 400 + 0.04)  # one lockstep group of two


def test_classes_without_an_engine_stay_on_the_devices() -> None:
    assert attached_rate(PART, "elementwise", "float32") is None
    work = product(1, 64, "int8", 1, frozen=True)
    nbytes = kernel_bytes(work, np.array([100.0]))
    assert attached_seconds(HOST, PART, work, np.array([1.0]), nbytes) == math.inf


def test_years_of_endurance() -> None:
    assert endurance_years(PART, SECONDS_OF_A_YEAR / 10**6) == pytest.approx(1.0)
    assert endurance_years(replace(PART, endurance_writes=None), 1.0) is None
    use = AttachedUse(PART, kernels=2, seconds=1.0)
    assert use.note(4.0, trained_bytes=100.0) == (
        "pim runs 2 kernels, 25% of the step; training is limited by writes: new weights take "
        "500 ms a step, and cells that are written in every step last 0.13 years"
    )
    assert replace(use, kernels=0).note(4.0, 0.0) == "pim runs no kernel: the devices are faster"


def test_attached_compute_draws_power_while_the_device_waits() -> None:
    activity = DeviceActivity(
        devices=1, seconds=4.0, busy=3.0, memory_bytes=0.0, link_bytes=0.0, attached_seconds=(1.0,)
    )
    energy = step_energy(HOST, activity)
    assert energy is not None
    assert (energy.kernels, energy.idle, energy.attached) == (2.0 * 200, 2.0 * 80, 7.0)
    unknown = replace(HOST, attached=(replace(PART, power=None),))
    assert missing_power(unknown) == ("attached.pim.power",)
