"""Domains, heat, grids and attached compute in descriptions: sentences for what is wrong."""

from importlib import resources

import pytest

from partita.errors import MachineError
from partita.machine import load, read

PRESETS = resources.files("partita.machine").joinpath("presets")
PHONE = PRESETS.joinpath("odroid-xu3.toml").read_text(encoding="utf-8")
MANYCORE = PRESETS.joinpath("manycore-64.toml").read_text(encoding="utf-8")
WORMHOLE = PRESETS.joinpath("wormhole-n150.toml").read_text(encoding="utf-8")
UPMEM = PRESETS.joinpath("upmem.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "before", "after", "message"),
    [
        (
            PHONE,
            'power = { value = ["3.32 W", "5.05 W", "6.15 W", "6.91 W"]',
            'power = { value = ["3.32 W", "5.05 W", "6.15 W"]',
            "domain.big.operating_point.2000MHz.power has 3 numbers for 4 devices: write the power "
            "with 1, 2, ... of them active.",
        ),
        (
            PHONE,
            'members = "big"',
            'members = "bigg"',
            "domain.big.members has the unknown kind of device 'bigg': did you mean 'big'? Use one "
            "of little, big.",
        ),
        (
            PHONE,
            'domain = "big"\ntemperature = "85 °C"',
            'domain = "gpu"\ntemperature = "85 °C"',
            "thermal.trip.big-85.domain has the unknown domain with operating points 'gpu': Use one "
            "of big, little.",
        ),
        (
            PHONE,
            "    [0.01476, 0.03902, 0.01404, 0.03811],\n",
            "",
            "thermal.gain is not 5 x 4: write a row per node, with a number for each of big, "
            "little, memory, gpu.",
        ),
        (
            PHONE,
            "    [0.0007488, 0.003932, 8.654e-5, 0.002473, 0.9905],\n",
            "",
            "thermal.transition is not square: write a row per node.",
        ),
        (
            MANYCORE,
            "transition = [[0.992902]]",
            "transition = [[1.1]]",
            "thermal.transition lets temperatures grow by 1.1 each step: its eigenvalues must be "
            "below 1.",
        ),
        (
            WORMHOLE,
            'routing = "xy"',
            'routing = "zigzag"',
            "grid.noc0.routing has the unknown routing 'zigzag': Use one of xy, yx.",
        ),
        (
            WORMHOLE,
            'direction = "down"',
            'direction = "left"',
            "grid.noc1.direction has the unknown direction 'left': Use one of both, up, down.",
        ),
        (
            WORMHOLE,
            'closed = true\nenergy_per_bit = { value = "0.4 pJ/bit", source = "Gemini main.cpp, a hop at 12 nm", status = "verified" }\n\n[grid.noc1]',
            "closed = 1\n\n[grid.noc1]",
            "grid.noc0.closed is 1: write true or false.",
        ),
        (
            UPMEM,
            "[attached.upmem.engine.elementwise]",
            "[attached.upmem.engine.element]",
            "attached.upmem.engine.element has the unknown operator class 'element': did you mean "
            "'elementwise'? Use one of dot, conv, attention, elementwise, gather, reduce, sort, *.",
        ),
        (
            UPMEM,
            'power = "383 W"\n',
            'power = "-1 W"\n',
            "attached.upmem.power is -1 W: it must be more than zero.",
        ),
    ],
)
def test_a_mistake_is_refused_by_name(text: str, before: str, after: str, message: str) -> None:
    assert text.count(before) == 1
    with pytest.raises(MachineError) as error:
        read(text.replace(before, after), "m.toml")
    assert str(error.value).startswith("m.toml, line ")
    assert str(error.value).partition(": ")[2] == message


def test_a_smaller_machine_keeps_the_power_of_its_devices() -> None:
    four = load("manycore-64:4")
    (point, *_) = four.domains[0].points
    assert four.domains[0].devices == len(point.power) == 4
    assert point.power == load("manycore-64").domains[0].points[0].power[:4]


def test_islands_of_a_manycore_have_settings_of_their_own() -> None:
    """Four equal islands on a square, at one of five points or off, up to its two reflections:
    (6^4 + 3 * 6^2) / 4 (Burnside), without all off.
    """
    from partita.management.hardware import hardware_of

    assert len(hardware_of(load("manycore-64")).settings) == (6**4 + 3 * 6**2) // 4 - 1
