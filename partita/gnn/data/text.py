"""Numbers in text files, read at the speed of a disk: edge lists, and tables of numbers.

An edge list has an edge a line: source, target and perhaps a weight, with spaces, tabs, commas or semicolons between them. Lines that begin
with # or % or // are comments, and a first line of words is a header. Files are gone through 16 MiB at a time, packed with gzip or not; what is
wrong is refused with its line.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numba import njit

from partita.errors import GraphError
from partita.gnn.data.stream import EdgeStream, Piece

BYTES = 2**24
"""Bytes that are read and made numbers of in one go."""

LONGEST = 2**20
"""Bytes of the longest line that is still believed to be one."""

GOOD, WORD, FEW, MANY, NEGATIVE, LARGE, MIXED = range(7)


def edge_list(path: Path, name: str | None = None, vertices: int | None = None) -> EdgeStream:
    """The edges of a text file. GraphError, with its line, for the first that is none, when it is reached."""
    return EdgeStream(lambda: _edges(path), vertices, name=name or path.name.split(".")[0])


def _edges(path: Path) -> Iterator[Piece]:
    heavy, before = -1, 0
    for text in blocks(path):
        if before == 0 and bytes(text[:14]) == b"%%MatrixMarket":
            raise GraphError(
                f"{str(path)!r} is a MatrixMarket file: Graph.from_scipy(scipy.io.mmread(...)) makes a graph of it."
            )
        lines = int(np.count_nonzero(text == 10))
        source, target, weights = (
            np.empty(lines, np.int64),
            np.empty(lines, np.int64),
            np.empty(lines, np.float32),
        )
        done, heavy, wrong, at = _parse_edges(text, before == 0, heavy, source, target, weights)
        if wrong:
            raise GraphError(_sentence(path, text, before, at, wrong, heavy))
        before += lines
        yield source[:done], target[:done], weights[:done] if heavy == 1 else None


def table(path: Path, dtype: type[np.generic]) -> Iterator[np.ndarray]:
    """The rows of a text file of numbers, [rows, columns] at a time; every line has as many as the first. "nan" is a number."""
    columns, before = 0, 0
    for text in blocks(path):
        if not columns:
            columns = len(bytes(text[: int(np.argmax(text == 10))]).replace(b",", b" ").split())
        lines = int(np.count_nonzero(text == 10))
        values = np.empty((lines, columns), dtype)
        wrong, at = _parse_table(text, values)
        if wrong:
            what = (
                "has another number of columns than the first"
                if wrong == FEW
                else "is not made of numbers"
            )
            raise GraphError(f"{_place(path, text, before, at)} {what} ({columns}).")
        before += lines
        yield values


def blocks(path: Path) -> Iterator[np.ndarray]:
    """A file's bytes, unpacked, in blocks of whole lines."""
    rest = b""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            while block := file.read(BYTES):
                end = block.rfind(b"\n") + 1
                if not end and len(rest) + len(block) > LONGEST + BYTES:
                    raise GraphError(
                        f"{str(path)!r} has a line of more than {LONGEST:,} bytes: it is no text of numbers."
                    )
                if end:
                    yield np.frombuffer(rest + block[:end], np.uint8)
                    rest = block[end:]
                else:
                    rest += block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise GraphError(f"{str(path)!r} is truncated or damaged: {error}.") from None
    if rest:
        yield np.frombuffer(rest + b"\n", np.uint8)


# ------------------------------------------------------------------------------------------------------------- what is wrong


def _place(path: Path, text: np.ndarray, before: int, at: int) -> str:
    """Where a line is and what it says."""
    number = before + int(np.count_nonzero(text[:at] == 10)) + 1
    begin = int(np.flatnonzero(text[:at] == 10)[-1]) + 1 if number > before + 1 else 0
    line = bytes(text[begin : begin + 200]).split(b"\n")[0].decode("utf-8", "replace").strip()
    return f"{str(path)!r}, line {number:,}: {line if len(line) <= 60 else line[:57] + '...'!r}"


def _sentence(path: Path, text: np.ndarray, before: int, at: int, wrong: int, heavy: int) -> str:
    said = {
        WORD: "is no edge: write two whole numbers, source and target, and perhaps a weight",
        FEW: "has no target: write two whole numbers, source and target",
        MANY: "has more than three numbers: an edge is source, target and perhaps a weight, so leave the other columns away",
        NEGATIVE: "has a negative id: vertices are numbered from 0",
        LARGE: "has an id of 2^32 or more: number the vertices from 0, without gaps",
        MIXED: f"has {'no' if heavy == 1 else 'a'} weight and the edges before have {'one' if heavy == 1 else 'none'}: give all edges one, or none",
    }
    return f"{_place(path, text, before, at)} {said[wrong]}."


# ---------------------------------------------------------------------------------------------------------------- kernels
#
# 10 newline, 32 space, 9 tab, 13 carriage return, 44 comma, 59 semicolon, 35 #, 37 %, 47 /, 43 +, 45 -, 46 point


@njit(cache=True)
def _blank(c):
    return c == 32 or c == 9 or c == 13 or c == 44 or c == 59


@njit(cache=True)
def _digit(c):
    return 48 <= c <= 57


@njit(cache=True)
def _id(text, i):
    """The whole number that begins at i, where it ends, and what is wrong with it."""
    if text[i] == 45 and _digit(text[i + 1]):
        return 0, i, NEGATIVE
    value, begin = 0, i
    while _digit(text[i]):
        value = value * 10 + (text[i] - 48)
        if value >= 2**32:
            return 0, i, LARGE
        i += 1
    if i == begin or not (_blank(text[i]) or text[i] == 10):
        return 0, i, WORD
    return value, i, GOOD


@njit(cache=True)
def _number(text, i):
    """The number that begins at i, where it ends, and what is wrong with it."""
    negative = text[i] == 45
    if text[i] == 45 or text[i] == 43:
        i += 1
    if text[i] | 32 == 110 and text[i + 1] | 32 == 97 and text[i + 2] | 32 == 110:  # nan
        i += 3
        return np.nan, i, GOOD if _blank(text[i]) or text[i] == 10 else WORD
    value, digits, power, past = 0.0, 0, 0, False
    while _digit(text[i]) or (text[i] == 46 and not past):
        if text[i] == 46:
            past = True
        else:
            value = value * 10 + (text[i] - 48)
            digits += 1
            power -= past
        i += 1
    if text[i] | 32 == 101 and digits:  # e
        i += 1
        minus = text[i] == 45
        if text[i] == 45 or text[i] == 43:
            i += 1
        begin, exponent = i, 0
        while _digit(text[i]):
            exponent = min(exponent * 10 + (text[i] - 48), 9999)
            i += 1
        if i == begin:
            digits = 0
        power += -exponent if minus else exponent
    if not digits or not (_blank(text[i]) or text[i] == 10):
        return 0.0, i, WORD
    value = (
        value * 10.0**power
        if power >= 0
        else value / 10.0**-power
        if power > -300
        else value * 10.0**power
    )
    return -value if negative else value, i, GOOD


@njit(cache=True)
def _parse_edges(text, first, heavy, source, target, weights):
    """Fills in the edges of whole lines; how many, whether they have weights (-1: not known yet), what is wrong and where."""
    i, n, done = 0, len(text), 0
    while i < n:
        while _blank(text[i]):
            i += 1
        c = text[i]
        if c == 10:
            i += 1
            continue
        if (
            c == 35
            or c == 37
            or (c == 47 and text[i + 1] == 47)
            or (first and done == 0 and not _digit(c) and c != 45)
        ):
            if not (c == 35 or c == 37 or c == 47):
                first = False
            while text[i] != 10:
                i += 1
            continue
        line = i
        source[done], i, wrong = _id(text, i)
        if wrong:
            return done, heavy, wrong, line
        while _blank(text[i]):
            i += 1
        if text[i] == 10:
            return done, heavy, FEW, line
        target[done], i, wrong = _id(text, i)
        if wrong:
            return done, heavy, wrong, line
        while _blank(text[i]):
            i += 1
        has = 0 if text[i] == 10 else 1
        if heavy >= 0 and has != heavy:
            return done, heavy, MIXED, line
        heavy = has
        if has:
            weights[done], i, wrong = _number(text, i)
            if wrong:
                return done, heavy, wrong, line
            while _blank(text[i]):
                i += 1
            if text[i] != 10:
                return done, heavy, MANY, line
        done += 1
        i += 1
    return done, heavy, GOOD, 0


@njit(cache=True)
def _parse_table(text, values):
    """Fills in the numbers of whole lines; what is wrong and where."""
    i, (rows, columns) = 0, values.shape
    for row in range(rows):
        line = i
        for column in range(columns):
            while _blank(text[i]):
                i += 1
            if text[i] == 10:
                return FEW, line
            value, i, wrong = _number(text, i)
            if wrong:
                return wrong, line
            values[row, column] = value
        while _blank(text[i]):
            i += 1
        if text[i] != 10:
            return FEW, line
        i += 1
    return GOOD, 0
