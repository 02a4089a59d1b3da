"""Schemas of values that come from files: types, ranges, lengths, nesting.

A schema is a function. It takes a plain value of JSON or TOML and returns the checked value, or
raises FieldError with the field, its problem and the fix. Schemas combine: `items(whole_number(0))`
is a list of such numbers. `record(SomeDataclass)` is the schema that a dataclass's annotations
state, so a class that is saved needs no second description.

Why not msgspec or pydantic: both check types and ranges, but state no fix, and neither covers
TOML's units, NumPy's headers and text. This module has their idea (a compiled function for every
type) in a page, without another package in everybody's installation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

Schema = Callable[[Any], Any]

LARGEST = 2**63 - 1
"""The largest whole number of a field without a range of its own."""
MOST_ITEMS = 10**7
"""Items of a list without a limit of its own."""
LONGEST_TEXT = 10**5
"""Characters of a text without a limit of its own."""
SHOWN = 40
"""Characters of a wrong value that a message shows."""
SHOWN_NAME = 120
"""Characters of a name, such as a layer's path, that a message shows."""
DEEPEST = 8
"""Nesting of `plain` values."""


class FieldError(Exception):
    """A field of a file that is wrong: its path, the problem (after "is"), the fix."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix
        self.path = ""

    def inside(self, key: str | int) -> FieldError:
        """This error, for a field of an item or under a key."""
        if isinstance(key, int):
            outer = f"[{key}]"
        else:
            outer = key if re.fullmatch(r"[\w/.:*+-]{1,80}", key) else shown(key)
        joint = "." if self.path and not self.path.startswith("[") else ""
        self.path = f"{outer}{joint}{self.path}"
        return self

    def __str__(self) -> str:
        return f"{self.path or 'the content'} is {self.problem}: {self.fix}."


class Range(NamedTuple):
    """The range of an annotated number: `Annotated[int, Range(1, 8)]`."""

    low: float
    high: float = math.inf


def shown(value: Any, limit: int = SHOWN) -> str:
    """A wrong value in at most `limit` characters.

    >>> shown("a"), shown([1, 2]), shown(None), shown(10**100)
    ("'a'", 'a list of 2', 'null', 'a number of 101 digits')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return f"a number of {int(abs(value).bit_length() * math.log10(2)) + 1:,} digits"
    text = ascii(value) if isinstance(value, str) and not _is_printable(value) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _is_printable(text: str) -> bool:
    return text.isprintable() and _is_encodable(text)


def _is_encodable(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which no file or terminal takes."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


# ---------------------------------------------------------------------------------------- scalars


def whole_number(low: int = 0, high: int = LARGEST) -> Schema:
    """A whole number from `low` to `high`; 2.0 and true are none."""
    fix = f"give a whole number from {low:,} to {high:,}"
    if high == LARGEST:
        fix = f"give a whole number of at least {low:,}"

    def read(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise FieldError(shown(value), fix)
        return value

    return read


def number(low: float = -math.inf, high: float = math.inf) -> Schema:
    """A finite number from `low` to `high`."""
    fix = "give a finite number"
    if low > -math.inf:
        fix += f" of at least {low:g}"
    if high < math.inf:
        fix += f" and at most {high:g}" if low > -math.inf else f" of at most {high:g}"

    def read(value: Any) -> float:
        if type(value) is not float and not (type(value) is int and abs(value) < 2**1000):
            raise FieldError(shown(value), fix)
        if not (low <= value <= high and math.isfinite(value)):
            raise FieldError(shown(value), fix)
        return value

    return read


def positive_number(value: Any) -> float:
    """A finite number above 0."""
    result = number(0)(value)
    if result == 0:
        raise FieldError(shown(value), "give a number above 0")
    return result


def text(longest: int = LONGEST_TEXT, pattern: str = "", example: str = "") -> Schema:
    """A text, of a pattern if one is given; `example` shows it in the fix."""
    matches = re.compile(pattern).fullmatch if pattern else None
    fix = f"give a text of at most {longest:,} characters"
    if example:
        fix = f"give a text such as {example}"

    def read(value: Any) -> str:
        if type(value) is not str or len(value) > longest or not _is_encodable(value):
            raise FieldError(shown(value), fix)
        if matches is not None and matches(value) is None:
            raise FieldError(shown(value), fix)
        return value

    return read


def flag(value: Any) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise FieldError(shown(value), "give true or false")
    return value


def one_of(*allowed: Any) -> Schema:
    """One of some values, of the same type: 1 is neither 1.0 nor true."""
    fix = f"give {' or '.join(map(repr, allowed))}"
    types = {type(option) for option in allowed}

    def read(value: Any) -> Any:
        if type(value) not in types or value not in allowed:
            raise FieldError(shown(value), fix)
        return value

    return read


def version(supported: int, fix: str) -> Schema:
    """The number of the format that this version reads."""

    def read(value: Any) -> int:
        if type(value) is not int or value != supported:
            raise FieldError(shown(value), f"{fix}, because this version reads {supported}")
        return value

    return read


# ------------------------------------------------------------------------------------- containers


def optional(schema: Schema) -> Schema:
    """A value of a schema, or null."""

    def read(value: Any) -> Any:
        return None if value is None else schema(value)

    return read


def items(schema: Schema, most: int = MOST_ITEMS, least: int = 0) -> Schema:
    """A tuple of a list of equal items."""
    fix = f"give a list of at most {most:,} items"
    if least:
        fix = f"give a list of {least:,} to {most:,} items"

    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or not least <= len(value) <= most:
            raise FieldError(shown(value), fix)
        result: list[Any] = []
        try:
            for item in value:
                result.append(schema(item))
        except FieldError as error:
            raise error.inside(len(result)) from None
        return tuple(result)

    return read


def row(*schemas: Schema) -> Schema:
    """A tuple of a list with one schema per position."""
    fix = f"give a list of {len(schemas)}"

    def read(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) != len(schemas):
            raise FieldError(shown(value), fix)
        result: list[Any] = []
        try:
            for schema, item in zip(schemas, value, strict=True):
                result.append(schema(item))
        except FieldError as error:
            raise error.inside(len(result)) from None
        return tuple(result)

    return read


def mapping(schema: Schema, most: int = MOST_ITEMS, key: Schema | None = None) -> Schema:
    """An object with equal values under any keys, or under keys of a schema."""
    key_schema = text() if key is None else key

    def read(value: Any) -> dict[str, Any]:
        if type(value) is not dict or len(value) > most:
            raise FieldError(shown(value), f"give an object of at most {most:,} keys")
        result = {}
        for name, item in value.items():
            try:
                result[key_schema(name)] = schema(item)
            except FieldError as error:
                raise error.inside(name) from None
        return result

    return read


def table(
    required: Mapping[str, Schema],
    others: Mapping[str, Schema] = {},
    rest: Schema | None = None,
) -> Schema:
    """An object with known keys; the result has those that are given.

    Other keys are refused, or have values of the schema `rest`.
    """
    schemas = {**required, **others}

    def read(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            fix = f"give an object with {_listed(required or others)}"
            raise FieldError(shown(value), fix)
        for name in required:
            if name not in value:
                fix = f"give an object with {_listed(required)}"
                raise FieldError("missing", fix).inside(name)
        result = {}
        for name, item in value.items():
            schema = schemas.get(name, rest)
            if schema is None:
                fix = f"use only {_listed(schemas)}"
                raise FieldError("an unknown key", fix).inside(name)
            try:
                result[name] = schema(item)
            except FieldError as error:
                raise error.inside(name) from None
        return result

    return read


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names)


def plain(value: Any, depth: int = DEEPEST) -> Any:
    """Any JSON value that is finite, encodable and nested at most 8 deep."""
    if depth < 0:
        raise FieldError("nested too deeply", f"nest at most {DEEPEST} lists or objects")
    if type(value) is dict:
        return mapping(lambda item: plain(item, depth - 1))(value)
    if type(value) is list:
        return list(items(lambda item: plain(item, depth - 1))(value))
    if type(value) is str:
        return text()(value)
    if type(value) is int:
        return whole_number(-LARGEST)(value)
    if type(value) is float:
        return number()(value)
    return value


# ------------------------------------------------------------------------------------ annotations


@cache
def record(cls: type) -> Schema:
    """The schema of a dataclass that is saved as a list of its fields, by their annotations.

    Fields with a default may be missing at the end.
    """
    hints = get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)
    schemas = [of_type(hints[field.name]) for field in fields]
    least = sum(field.default is dataclasses.MISSING for field in fields)

    def read(value: Any) -> Any:
        if type(value) is not list or not least <= len(value) <= len(fields):
            raise FieldError(shown(value), f"give a list of {least} to {len(fields)}")
        result: list[Any] = []
        try:
            for schema, item in zip(schemas, value, strict=False):
                result.append(schema(item))
        except FieldError as error:
            raise error.inside(fields[len(result)].name) from None
        return cls(*result)

    return read


def of_type(hint: Any) -> Schema:
    """The schema that a type annotation states: numbers, texts, tuples, dataclasses, literals,
    and numbers with a `Range`."""
    origin = get_origin(hint)
    arguments = get_args(hint)
    if origin is Annotated:
        low, high = arguments[1]
        if arguments[0] is int:
            return whole_number(int(low), LARGEST if high == math.inf else int(high))
        return number(low, high)
    if origin is Literal:
        return one_of(*arguments)
    if origin in (Union, UnionType):
        (member,) = (argument for argument in arguments if argument is not NoneType)
        return optional(of_type(member))
    if origin is tuple:
        if arguments[1:] == (Ellipsis,):
            return items(of_type(arguments[0]))
        return row(*(of_type(argument) for argument in arguments))
    if dataclasses.is_dataclass(hint):
        return record(hint)  # type: ignore[arg-type]
    schemas = {int: whole_number(-LARGEST), float: number(), str: text(), bool: flag}
    return schemas[hint]
