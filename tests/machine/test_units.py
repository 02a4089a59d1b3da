import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita import units
from partita.errors import PartitaError
from partita.units import (
    UNITS,
    exact,
    format_bytes,
    format_flops,
    format_seconds,
    parse,
)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(units).failed == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("80 GiB", 80 * 2**30),
        ("16 GB", 16e9),
        ("12 B", 12),
        ("900 GB/s", 900e9),
        ("100 Gbit/s", 12.5e9),
        ("312 TFLOP/s", 312e12),
        ("1.5 s", 1.5),
        ("5 ms", 5e-3),
        ("936 ns", 936e-9),
        ("4us", 4e-6),
        ("250 W", 250),
        ("2 kJ", 2000),
        ("4 pJ/bit", 4e-12),
        ("1.41 GHz", 1.41e9),
        ("900 mV", 0.9),
        ("1_000 B", 1000),
        ("1e3 B", 1000),
    ],
)
def test_parse(text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("text", "dimension", "message"),
    [
        ("80", "B", "'80' has no unit: write for example \"80 GiB\"."),
        ("fast", "B/s", "'fast' is not a number with a unit: write for example \"900 GB/s\"."),
        ("80 GB", "B/s", "'80 GB' is in B, but B/s is needed: write for example \"900 GB/s\"."),
        (
            "100 Gb/s",
            "B/s",
            "'Gb/s' in '100 Gb/s' is an unknown unit: write 'GB/s' for bytes or 'Gbit/s' for bits.",
        ),
        (
            "3 gflop/s",
            "FLOP/s",
            "'gflop/s' in '3 gflop/s' is an unknown unit: did you mean 'GFLOP/s'?",
        ),
        (
            "3 parsec",
            "s",
            "'parsec' in '3 parsec' is an unknown unit: use one of s, ms, us, µs, ns, ps.",
        ),
    ],
)
def test_a_wrong_unit_is_refused_by_name(text, dimension, message):
    with pytest.raises(PartitaError) as error:
        parse(text, dimension)
    assert str(error.value) == message


@given(st.floats(1e-15, 1e18), st.sampled_from(sorted(UNITS)))
def test_exact_is_read_back_as_the_same_number(value, dimension):
    assert parse(exact(value, dimension), dimension) == value


def test_formats():
    assert format_bytes(408e6) == "389 MiB"
    assert format_bytes(0) == "0 B"
    assert format_seconds(0) == "0 s"
    assert format_seconds(1.1) == "1.10 s"
    assert format_seconds(1e-9) == "1.00 ns"
    assert format_seconds(float("inf")) == "inf s"
    assert format_flops(12) == "12 FLOP"


@pytest.mark.parametrize("text", ["1,5 TB/s", "1,50 TB/s", "12,3456 TB/s", "1,,000 TB/s"])
def test_a_comma_that_separates_no_thousands_is_refused(text: str) -> None:
    with pytest.raises(PartitaError, match="a comma that separates no thousands"):
        parse(text, "B/s")
    assert parse("1,500 GB/s", "B/s") == parse("1.5 TB/s", "B/s")
