"""Numbers with units, for people: `parse` reads "80 GiB", the `format_*` functions write "512
MiB".

Inside Partita every number is plain, in the base unit of its dimension: bytes, bytes per second,
FLOP, FLOP per second, seconds, watts, joules, joules per bit, hertz, volts, degrees Celsius,
kelvins. Only this module knows prefixes."""

from __future__ import annotations

import difflib
import math
import re
from numbers import Integral
from typing import Any

from partita.errors import PartitaError

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9, "p": 1e-12}


def _scales(
    unit: str,
    prefixes: dict[str, float],
    factor: float = 1.0,
) -> dict[str, float]:
    return {prefix + unit: scale * factor for prefix, scale in prefixes.items()}


UNITS: dict[str, dict[str, float]] = {
    "B": {**_scales("B", _DECIMAL), **_scales("B", _BINARY)},
    "B/s": {
        **_scales("B/s", _DECIMAL),
        **_scales("B/s", _BINARY),
        **_scales("bit/s", _DECIMAL, 1 / 8),
    },
    "FLOP": _scales("FLOP", _DECIMAL),
    "FLOP/s": _scales("FLOP/s", _DECIMAL),
    "s": _scales("s", _SMALL),
    "W": _scales("W", {**_SMALL, **_DECIMAL}),
    "J": _scales("J", {**_SMALL, **_DECIMAL}),
    "J/bit": _scales("J/bit", _SMALL),
    "Hz": _scales("Hz", _DECIMAL),
    "V": _scales("V", _SMALL),
    "degC": {"degC": 1.0, "°C": 1.0},
    "K": {"K": 1.0},
}
"""Base unit of a dimension -> its units -> their size in the base unit."""

EXAMPLES = {
    "B": "80 GiB",
    "B/s": "900 GB/s",
    "FLOP": "3 GFLOP",
    "FLOP/s": "312 TFLOP/s",
    "s": "5 us",
    "W": "700 W",
    "J": "2 J",
    "J/bit": "4 pJ/bit",
    "Hz": "1.4 GHz",
    "V": "900 mV",
    "degC": "85 °C",
    "K": "3 K",
}

SHORTEST_SECONDS = 5e-12
"""Shorter times are rounding errors of sums, and are written as 0 s."""

_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?(?:[eE][+-]?\d+)?")
_QUANTITY = re.compile(r"\s*([+-]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S*)\s*")


def is_whole_number(value: Any, least: float = -math.inf) -> bool:
    """Whether a value is a whole number of at least `least`, of Python or NumPy; True is none.

    >>> is_whole_number(3, 1), is_whole_number(3.0), is_whole_number(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def parse(text: str, dimension: str | None = None) -> float:
    """The number in `text` ("80 GiB", "100 Gbit/s", "312 TFLOP/s", "5 us"), in its base unit.

    `dimension`: the expected base unit (a key of `UNITS`), None for any.

    >>> parse("80 GiB")
    85899345920.0
    >>> parse("100 Gbit/s", "B/s")
    12500000000.0
    """
    example = f'write for example "{EXAMPLES[dimension or "B"]}"'
    match = _QUANTITY.fullmatch(text)
    if not match:
        raise PartitaError(f"'{text}' is not a number with a unit: {example}.")
    unit = match[2]
    if not unit:
        raise PartitaError(f"'{text}' has no unit: {example}.")
    base_unit = _base_unit(unit)
    if base_unit is None:
        suggestion = _suggestion(unit, dimension)
        raise PartitaError(f"'{unit}' in '{text}' is an unknown unit: {suggestion}")
    if dimension is not None and base_unit != dimension:
        raise PartitaError(f"'{text}' is in {base_unit}, but {dimension} is needed: {example}.")
    if not _has_whole_thousands(match[1]):
        raise PartitaError(
            f"'{text}' has a comma that separates no thousands: write a decimal point, as in 1.5."
        )
    return _scaled(_plain_number(match[1]), UNITS[base_unit][unit])


def parse_count(text: str) -> int:
    """The whole number in "16M", "2.4 G", "1e9" or "10,556".

    >>> parse_count("16M"), parse_count("2.4 G"), parse_count("1e9"), parse_count("10,556")
    (16000000, 2400000000, 1000000000, 10556)
    """
    match = _QUANTITY.fullmatch(text)
    number = math.nan
    if match and _has_whole_thousands(match[1]):
        number = _plain_number(match[1]) * _DECIMAL.get(match[2], math.nan)
    if not number.is_integer():
        raise PartitaError(
            f'\'{text}\' is not a whole number: write for example "16M", "2.4G" or "10,556".'
        )
    return int(number)


def _has_whole_thousands(digits: str) -> bool:
    """Whether each comma in a number separates thousands.

    >>> _has_whole_thousands("10,556.5"), _has_whole_thousands("1,5"), _has_whole_thousands("1e9")
    (True, False, True)
    """
    return "," not in digits or bool(_THOUSANDS.fullmatch(digits))


def _plain_number(digits: str) -> float:
    return float(digits.replace(",", "").replace("_", ""))


def _base_unit(unit: str) -> str | None:
    for base_unit, scales in UNITS.items():
        if unit in scales:
            return base_unit
    return None


def _scaled(number: float, scale: float) -> float:
    # 1e-6 has no exact float, 1e6 has: division gives the float nearest to the text, multiplication
    # may not.
    return number / round(1 / scale) if scale < 1 else number * scale


def _suggestion(unit: str, dimension: str | None) -> str:
    if "b" in unit and "bit" not in unit:  # Gb/s: bits or bytes?
        in_bytes = unit.replace("b", "B")
        in_bits = unit.replace("b", "bit")
        return f"write '{in_bytes}' for bytes or '{in_bits}' for bits."
    names: list[str] = []
    for base_unit, scales in UNITS.items():
        if dimension in (None, base_unit):
            names += scales
    by_lower_case = {name.lower(): name for name in reversed(names)}
    matches = difflib.get_close_matches(unit.lower(), by_lower_case, 1)
    if matches:
        return f"did you mean '{by_lower_case[matches[0]]}'?"
    return f"use one of {', '.join(names)}."


def exact(value: float, dimension: str) -> str:
    """The shortest text that `parse` reads back as exactly this number.

    >>> exact(312e12, "FLOP/s"), exact(2.0**34, "B")
    ('312 TFLOP/s', '16 GiB')
    """
    texts = [f"{value!r} {dimension}"]
    for unit, scale in UNITS[dimension].items():
        if "bit/s" in unit or "µ" in unit:
            continue
        number = f"{value / scale:.12g}"
        text = f"{number} {unit}"
        if "e" not in number and parse(text, dimension) == value:
            texts.append(text)
    return min(texts, key=len)


def three_digits(value: float) -> str:
    """A number from 1 to 1000 with three digits.

    >>> three_digits(4.2), three_digits(12.345), three_digits(895.36)
    ('4.20', '12.3', '895')
    """
    size = abs(value)
    decimals = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:.{decimals}f}"


def format_bytes(count: float) -> str:
    """Bytes with a binary prefix.

    >>> format_bytes(3 * 2**19), format_bytes(512), format_bytes(80 * 2**30)
    ('1.5 MiB', '512 B', '80.0 GiB')
    """
    return _prefixed(
        count,
        "B",
        {"": 1.0, **_BINARY},
        first_prefix=1024,
    )


def format_bandwidth(rate: float) -> str:
    """Bytes per second with a decimal prefix, as vendors write them.

    >>> format_bandwidth(300e9)
    '300 GB/s'
    """
    return _prefixed(
        rate,
        "B/s",
        _DECIMAL,
        first_prefix=1000,
    )


def format_seconds(seconds: float) -> str:
    """Seconds, as s, ms, us or ns.

    >>> format_seconds(0.0123), format_seconds(4.2e-6), format_seconds(90), format_seconds(1e-15)
    ('12.3 ms', '4.20 us', '90.0 s', '0 s')
    """
    if not math.isfinite(seconds):
        return f"{seconds:g} s"
    if abs(seconds) < SHORTEST_SECONDS:
        return "0 s"
    for unit in ("s", "ms", "us"):
        if abs(seconds) >= UNITS["s"][unit]:
            return f"{three_digits(seconds / UNITS['s'][unit])} {unit}"
    return f"{three_digits(seconds / UNITS['s']['ns'])} ns"


def format_joules(joules: float) -> str:
    """Joules with a decimal prefix, or mJ, uJ.

    >>> format_joules(0.0123), format_joules(4.2e-6), format_joules(90), format_joules(15e3)
    ('12.3 mJ', '4.20 uJ', '90.0 J', '15.0 kJ')
    """
    scales = UNITS["J"]
    for unit in ("MJ", "kJ", "J", "mJ"):
        if abs(joules) >= scales[unit]:
            return f"{three_digits(joules / scales[unit])} {unit}"
    return f"{three_digits(joules / scales['uJ'])} uJ"


def format_flops(count: float) -> str:
    """Floating-point operations (add "/s" for a rate).

    >>> format_flops(7.7e9), format_flops(312e12) + "/s"
    ('7.7 GFLOP', '312 TFLOP/s')
    """
    return _prefixed(
        count,
        "FLOP",
        _DECIMAL,
        first_prefix=1000,
    )


def _prefixed(
    value: float,
    unit: str,
    prefixes: dict[str, float],
    first_prefix: int,
) -> str:
    """A number with its largest prefix; none below `first_prefix`."""
    if abs(value) < first_prefix or not math.isfinite(value):
        return f"{value:.4g} {unit}"
    fitting = [(s, p) for p, s in prefixes.items() if p != "k" and s <= abs(value)]
    scale, prefix = max(fitting)
    decimals = 1 if abs(value) < 99.95 * scale else 0
    return f"{value / scale:.{decimals}f} {prefix}{unit}"
