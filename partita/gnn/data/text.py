"""Numbers in text files, read at the speed of a disk: edge lists, and tables of numbers.

An edge list has one edge per line: source, target and perhaps a weight, separated by spaces, tabs,
commas or semicolons. Lines that begin with #, % or // are comments. A first line that begins with a
letter or a quote is a header. A byte order mark and plus signs are allowed. Files, gzipped or not,
are read 16 MiB at a time. An error names its line.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numba import njit

from partita.errors import GraphError
from partita.gnn.data.stream import EdgeStream, Piece

BYTES = 2**24
"""Bytes that are read and parsed at a time."""

LONGEST = 2**20
"""Bytes of the longest line that may be a line of numbers."""

# results of the parsers
GOOD = 0
WORD = 1
FEW = 2
MANY = 3
NEGATIVE = 4
LARGE = 5
MIXED = 6

PROBLEMS = {
    WORD: "is no edge: write two integers, source and target, and perhaps a weight",
    FEW: "has no target: write two integers, source and target",
    MANY: "has more than three numbers: write source, target and perhaps a weight",
    NEGATIVE: "has a negative id: number the vertices from 0",
    LARGE: "has an id of 2^32 or more: number the vertices from 0, without gaps",
}
"""Messages for lines that are no edge; MIXED depends on the lines before."""

NEWLINE = 10


def text_edges(path: Path, name: str | None = None, vertices: int | None = None) -> EdgeStream:
    """The edges of a text file. Reading raises GraphError with the first line that is no edge."""
    return EdgeStream(lambda: _edges(path), vertices, name=name or path.name.split(".")[0])


def _edges(path: Path) -> Iterator[Piece]:
    weighted = -1
    lines_before = 0
    for text in blocks(path):
        if lines_before == 0 and bytes(text[:14]) == b"%%MatrixMarket":
            raise GraphError(
                f"{str(path)!r} is a MatrixMarket file: use Graph.from_scipy(scipy.io.mmread(...))."
            )
        lines = int(np.count_nonzero(text == NEWLINE))
        source = np.empty(lines, np.int64)
        target = np.empty(lines, np.int64)
        weights = np.empty(lines, np.float32)
        edges, weighted, problem, position = _parse_edges(
            text, lines_before == 0, weighted, source, target, weights
        )
        if problem:
            line = _describe_line(path, text, lines_before, position)
            raise GraphError(f"{line} {_problem_text(problem, weighted)}.")
        lines_before += lines
        yield source[:edges], target[:edges], weights[:edges] if weighted == 1 else None


def _problem_text(problem: int, weighted: int) -> str:
    if problem != MIXED:
        return PROBLEMS[problem]
    if weighted == 1:
        return "has no weight, unlike the edges before: give a weight to all edges, or to none"
    return "has a weight, unlike the edges before: give a weight to all edges, or to none"


def table(path: Path, dtype: type[np.generic]) -> Iterator[np.ndarray]:
    """The rows of a text file of numbers, [rows, columns] at a time. "nan" is a number.

    Every line must have the same number of columns.
    """
    columns = 0
    lines_before = 0
    is_whole = np.issubdtype(dtype, np.integer)
    for text in blocks(path):
        if not columns:
            first_line = bytes(text[: int(np.argmax(text == NEWLINE))])
            columns = len(first_line.replace(b",", b" ").split())
        lines = int(np.count_nonzero(text == NEWLINE))
        values = np.empty((lines, columns), np.float64 if is_whole else dtype)
        problem, position = _parse_table(text, values)
        if problem:
            line = _describe_line(path, text, lines_before, position)
            if problem == FEW:
                raise GraphError(f"{line} has another number of columns than line 1 ({columns}).")
            raise GraphError(f"{line} is not made of numbers: write {columns} numbers.")
        if is_whole:
            values = _whole_numbers(path, values, lines_before).astype(dtype)
        lines_before += lines
        yield values


def _whole_numbers(path: Path, values: np.ndarray, lines_before: int) -> np.ndarray:
    """The values; GraphError for the first that is no whole number below 2^53."""
    wrong = (values != np.floor(values)) | ~(np.abs(values) < 2.0**53)
    if wrong.any():
        row = int(np.argmax(wrong.any(1)))
        value = values[row][wrong[row]][0]
        line = f"{str(path)!r}, line {lines_before + row + 1:,}"
        raise GraphError(f"{line}: {value:g} is no whole number: write whole numbers.")
    return values


def blocks(path: Path) -> Iterator[np.ndarray]:
    """A file's bytes, unpacked, in blocks of whole lines."""
    rest = b""
    with path.open("rb") as file:
        first_bytes = file.read(2)
        gzipped = first_bytes == b"\x1f\x8b"
    if path.suffix == ".gz" and not gzipped:
        problem = "is no gzip file" if first_bytes else "is empty"
        raise GraphError(f"{str(path)!r} is truncated or damaged: it {problem}.")
    try:
        with gzip.open(path) if gzipped else path.open("rb") as file:
            first = True
            while block := file.read(BYTES):
                if first:
                    block = block.removeprefix(codecs.BOM_UTF8)
                    first = False
                end = block.rfind(b"\n") + 1
                if not end and len(rest) + len(block) > LONGEST + BYTES:
                    raise GraphError(
                        f"{str(path)!r} has a line of more than {LONGEST:,} bytes: it is no text "
                        "of numbers."
                    )
                if end:
                    yield np.frombuffer(rest + block[:end], np.uint8)
                    rest = block[end:]
                else:
                    rest += block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise GraphError(f"{str(path)!r} is truncated or damaged: {error}.") from None
    except OSError as error:
        raise GraphError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    if rest:
        yield np.frombuffer(rest + b"\n", np.uint8)


def _describe_line(path: Path, text: np.ndarray, lines_before: int, position: int) -> str:
    """The number and the content of the line at a position of a block."""
    newlines = np.flatnonzero(text[:position] == NEWLINE)
    number = lines_before + len(newlines) + 1
    begin = int(newlines[-1]) + 1 if len(newlines) else 0
    line = bytes(text[begin : begin + 200]).split(b"\n")[0].decode("utf-8", "replace").strip()
    if len(line) > 60:
        line = line[:57] + "..."
    return f"{str(path)!r}, line {number:,}: {line!r}"


# --------------------------------------------------------------------------------------- parsers
#
# Characters by number: 10 newline, 32 space, 9 tab, 13 carriage return, 44 comma, 59 semicolon,
# 35 #, 37 %, 47 /, 43 +, 45 -, 46 point, 101 e. Every block ends in a newline, so a parser may look
# at the character after a digit, a sign or a separator.


@njit(cache=True)
def _is_separator(c):
    return c == 32 or c == 9 or c == 13 or c == 44 or c == 59


@njit(cache=True)
def _is_digit(c):
    return 48 <= c <= 57


@njit(cache=True)
def _begins_word(c):
    """Whether a character begins a word of a header: a letter, an underscore or a quote."""
    return 65 <= c | 32 <= 122 and c | 32 >= 97 or c == 95 or c == 34 or c == 39


@njit(cache=True)
def _ends_number(c):
    return _is_separator(c) or c == 10


@njit(cache=True)
def _skip_separators(text, i):
    """The position of the next character that is no separator."""
    while _is_separator(text[i]):
        i += 1
    return i


@njit(cache=True)
def _parse_id(text, i):
    """The integer that begins at i, its end, and a problem or GOOD."""
    if text[i] == 45 and _is_digit(text[i + 1]):
        return 0, i, NEGATIVE
    if text[i] == 43:
        i += 1
    value = 0
    begin = i
    while _is_digit(text[i]):
        value = value * 10 + (text[i] - 48)
        if value >= 2**32:
            return 0, i, LARGE
        i += 1
    if i == begin or not _ends_number(text[i]):
        return 0, i, WORD
    return value, i, GOOD


@njit(cache=True)
def _parse_exponent(text, i):
    """The exponent that begins at i, its end, and whether it has digits."""
    negative = text[i] == 45
    if text[i] == 45 or text[i] == 43:
        i += 1
    begin = i
    exponent = 0
    while _is_digit(text[i]):
        exponent = min(exponent * 10 + (text[i] - 48), 9999)
        i += 1
    return -exponent if negative else exponent, i, i > begin


@njit(cache=True)
def _scale(value, power):
    """value * 10^power; a division for small negative powers rounds once."""
    if power >= 0 or power <= -300:
        return value * 10.0**power
    return value / 10.0**-power


@njit(cache=True)
def _parse_number(text, i):
    """The number that begins at i, its end, and a problem or GOOD."""
    negative = text[i] == 45
    if text[i] == 45 or text[i] == 43:
        i += 1
    if text[i] | 32 == 110 and text[i + 1] | 32 == 97 and text[i + 2] | 32 == 110:  # nan
        i += 3
        return np.nan, i, GOOD if _ends_number(text[i]) else WORD
    value = 0.0
    digits = 0
    power = 0
    after_point = False
    while _is_digit(text[i]) or (text[i] == 46 and not after_point):
        if text[i] == 46:
            after_point = True
        else:
            value = value * 10 + (text[i] - 48)
            digits += 1
            power -= after_point
        i += 1
    complete = digits > 0
    if complete and text[i] | 32 == 101:
        exponent, i, complete = _parse_exponent(text, i + 1)
        power += exponent
    if not complete or not _ends_number(text[i]):
        return 0.0, i, WORD
    value = _scale(value, power)
    return -value if negative else value, i, GOOD


@njit(cache=True)
def _is_comment(text, i):
    return text[i] == 35 or text[i] == 37 or (text[i] == 47 and text[i + 1] == 47)


@njit(cache=True)
def _parse_edges(text, first_block, weighted, source, target, weights):
    """Parses whole lines into edges.

    Returns their number, whether they have weights (1, 0, or -1: unknown so far), a problem or
    GOOD, and the position of the line with the problem.
    """
    i = 0
    edges = 0
    may_be_header = first_block
    while i < len(text):
        i = _skip_separators(text, i)
        if text[i] == 10:
            i += 1
            continue
        line = i
        is_header = may_be_header and edges == 0 and _begins_word(text[i])
        if is_header or _is_comment(text, i):
            if not _is_comment(text, i):
                may_be_header = False
            while text[i] != 10:
                i += 1
            continue
        source[edges], i, problem = _parse_id(text, i)
        if problem:
            return edges, weighted, problem, line
        i = _skip_separators(text, i)
        if text[i] == 10:
            return edges, weighted, FEW, line
        target[edges], i, problem = _parse_id(text, i)
        if problem:
            return edges, weighted, problem, line
        i = _skip_separators(text, i)
        has_weight = 0 if text[i] == 10 else 1
        if weighted >= 0 and has_weight != weighted:
            return edges, weighted, MIXED, line
        weighted = has_weight
        if has_weight:
            weights[edges], i, problem = _parse_number(text, i)
            if problem:
                return edges, weighted, problem, line
            i = _skip_separators(text, i)
            if text[i] != 10:
                return edges, weighted, MANY, line
        edges += 1
        i += 1
    return edges, weighted, GOOD, 0


@njit(cache=True)
def _parse_table(text, values):
    """Parses whole lines into rows.

    Returns a problem or GOOD, and the position of the line with the problem.
    """
    i = 0
    rows, columns = values.shape
    for row in range(rows):
        line = i
        for column in range(columns):
            i = _skip_separators(text, i)
            if text[i] == 10:
                return FEW, line
            value, i, problem = _parse_number(text, i)
            if problem:
                return problem, line
            values[row, column] = value
        i = _skip_separators(text, i)
        if text[i] != 10:
            return FEW, line
        i += 1
    return GOOD, 0
