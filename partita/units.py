"""Numbers with units, for people: `parse` reads "80 GiB", the `format_*` functions write "512.0 MiB".

Inside Partita every number is plain, in the base unit of its dimension: bytes, bytes per second, FLOP, FLOP per second,
seconds, watts, joules, joules per bit, hertz, volts. Only this module knows prefixes.
"""

from __future__ import annotations

import difflib
import math
import re

from partita.errors import PartitaError

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9, "p": 1e-12}


def _scales(unit: str, prefixes: dict[str, float], factor: float = 1.0) -> dict[str, float]:
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
}
"""Per dimension, named by its base unit: every unit that may be written, and what one of it is in the base unit."""

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
}

_QUANTITY = re.compile(r"\s*([+-]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S*)\s*")


def parse(text: str, dimension: str | None = None) -> float:
    """The number that `text` ("80 GiB", "100 Gbit/s", "312 TFLOP/s", "5 us") means, in the base unit of its dimension.

    `dimension` is the base unit that is needed (a key of `UNITS`); any dimension will do without it.

    >>> parse("80 GiB")
    85899345920.0
    >>> parse("100 Gbit/s", "B/s")
    12500000000.0
    """
    example = f'write for example "{EXAMPLES[dimension or "B"]}"'
    match = _QUANTITY.fullmatch(text)
    if not match:
        raise PartitaError(f"'{text}' is not a number with a unit: {example}.")
    number, unit = float(match[1].replace(",", "").replace("_", "")), match[2]
    if not unit:
        raise PartitaError(f"'{text}' has no unit: {example}.")
    found = next((base for base, scales in UNITS.items() if unit in scales), None)
    if found is None:
        raise PartitaError(
            f"'{unit}' in '{text}' is not a unit that Partita knows: {_suggestion(unit, dimension)}"
        )
    if dimension is not None and found != dimension:
        raise PartitaError(f"'{text}' is in {found}, but {dimension} is needed: {example}.")
    return _scaled(number, UNITS[found][unit])


def parse_count(text: str) -> int:
    """The whole number that is meant by "16M", "2.4 G", "1e9" or "10,556".

    >>> parse_count("16M"), parse_count("2.4 G"), parse_count("1e9"), parse_count("10,556")
    (16000000, 2400000000, 1000000000, 10556)
    """
    match = _QUANTITY.fullmatch(text)
    number = (
        float(match[1].replace(",", "").replace("_", "")) * _DECIMAL.get(match[2], math.nan)
        if match
        else math.nan
    )
    if not number.is_integer():
        raise PartitaError(
            f'\'{text}\' is not a whole number: write for example "16M", "2.4G" or "10,556".'
        )
    return int(number)


def _scaled(number: float, scale: float) -> float:
    # 1e-6 has no exact float, 1e6 has: dividing gives the float nearest to what was written, multiplying may not
    return number / round(1 / scale) if scale < 1 else number * scale


def _suggestion(unit: str, dimension: str | None) -> str:
    if "b" in unit and "bit" not in unit:  # Gb/s: bits or bytes?
        return (
            f"write '{unit.replace('b', 'B')}' for bytes or '{unit.replace('b', 'bit')}' for bits."
        )
    known = [name for base, scales in UNITS.items() if dimension in (None, base) for name in scales]
    alike = {name.lower(): name for name in reversed(known)}
    near = difflib.get_close_matches(unit.lower(), alike, 1)
    return f"did you mean '{alike[near[0]]}'?" if near else f"use one of {', '.join(known)}."


def exact(value: float, dimension: str) -> str:
    """The shortest text that `parse` reads back as exactly this number.

    >>> exact(312e12, "FLOP/s"), exact(2.0**34, "B")
    ('312 TFLOP/s', '16 GiB')
    """
    texts = [f"{value!r} {dimension}"]
    for unit, scale in UNITS[dimension].items():
        text = f"{value / scale:.12g} {unit}"
        if (
            "bit/s" not in unit
            and "µ" not in unit
            and "e" not in text.split()[0]
            and parse(text, dimension) == value
        ):
            texts.append(text)
    return min(texts, key=len)


def format_bytes(count: float) -> str:
    """Bytes with a binary prefix.

    >>> format_bytes(3 * 2**19), format_bytes(512), format_bytes(80 * 2**30)
    ('1.5 MiB', '512 B', '80.0 GiB')
    """
    return _prefixed(count, "B", {"": 1.0, **_BINARY}, whole=1024)


def format_bandwidth(rate: float) -> str:
    """Bytes per second, in powers of ten as vendors write them.

    >>> format_bandwidth(300e9)
    '300.0 GB/s'
    """
    return _prefixed(rate, "B/s", _DECIMAL, whole=1000)


def format_seconds(seconds: float) -> str:
    """Seconds in the unit that suits them.

    >>> format_seconds(0.0123), format_seconds(4.2e-6), format_seconds(90)
    ('12.30 ms', '4.20 us', '90.00 s')
    """
    if seconds == 0 or not math.isfinite(seconds):
        return f"{seconds:g} s"
    size = abs(seconds)
    unit = "s" if size >= 1 else "ms" if size >= 1e-3 else "us" if size >= 1e-6 else "ns"
    return f"{seconds / UNITS['s'][unit]:.2f} {unit}"


def format_flops(count: float) -> str:
    """Floating-point operations (add "/s" for a rate).

    >>> format_flops(7.7e9), format_flops(312e12) + "/s"
    ('7.7 GFLOP', '312.0 TFLOP/s')
    """
    return _prefixed(count, "FLOP", _DECIMAL, whole=1000)


def format_count(count: float) -> str:
    """A number of things.

    >>> format_count(25_600_000), format_count(12), format_count(1e9)
    ('25.6 M', '12', '1.0 G')
    """
    return _prefixed(count, "", _DECIMAL, whole=1000).rstrip()


def _prefixed(value: float, unit: str, prefixes: dict[str, float], whole: int) -> str:
    if abs(value) < whole or not math.isfinite(value):
        return f"{value:.4g} {unit}"
    prefix, scale = max(
        ((p, s) for p, s in prefixes.items() if p != "k" and s <= abs(value)),
        key=lambda item: item[1],
    )
    return f"{value / scale:.1f} {prefix}{unit}"
