"""Files that are read: text, JSON and TOML, with one sentence for whatever is wrong.

The sentence is `<file>: <field> is <problem>: <fix>.` The caller's exception carries it. A file is
opened only if it is a regular one of a bounded size, so a pipe cannot hang a command and a device
cannot fill the memory. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from partita.errors import PartitaError
from partita.files.schema import FieldError, Schema

DIGITS = 4300
"""Digits of the longest whole number that Python converts."""
LONGEST_REASON = 200
"""Characters of another library's error that a message repeats."""


@dataclass(frozen=True)
class FileKind:
    """A kind of file: its name in messages, and what to do about a wrong one."""

    noun: str
    """With its article: "a plan"."""
    fix: str
    """A clause that begins with a verb: "plan again"."""
    error: type[PartitaError] = PartitaError
    by_hand: bool = True
    """Whether people write such files, so that a wrong field has a fix of its own."""
    most_bytes: int = 2**28
    """Size of the largest file of the kind."""


def read_bytes(path: str | Path, kind: FileKind) -> bytes:
    """The content of a file, at most `kind.most_bytes`."""
    if not isinstance(path, (str, os.PathLike)):
        fail(repr(path), kind, f"of type '{type(path).__name__}', no name of a file", "name a file")
    try:
        status = os.stat(path)
        _check_regular(path, status.st_mode, kind)
        if status.st_size > kind.most_bytes:
            size = f"{status.st_size:,} bytes, and {kind.noun} has at most {kind.most_bytes:,}"
            fail(path, kind, f"too large ({size})")
        with open(path, "rb") as file:
            return file.read(kind.most_bytes + 1)
    except FileNotFoundError:
        raise kind.error(f"There is no file '{path}': {kind.fix}.") from None
    except OSError as error:
        reason = error.strerror or str(error)
        fail(path, kind, f"unreadable ({reason})")
    except ValueError:
        fail(ascii(str(path)), kind, "no name of a file", "name a file")


def read_text(path: str | Path, kind: FileKind) -> str:
    """The text of a file in UTF-8, without a byte order mark."""
    content = read_bytes(path, kind)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(path, kind, f"no text in UTF-8 (byte {error.start:,} is {content[error.start]:#04x})")


def read_json(path: str | Path, kind: FileKind, schema: Schema) -> Any:
    """The value of a JSON file, checked."""
    return checked(parse_json(read_text(path, kind), path, kind), schema, path, kind)


def parse_json(content: str, path: str | Path, kind: FileKind) -> Any:
    """The value of a JSON text; `path` names it in messages."""
    try:
        return json.loads(
            content,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique,
        )
    except FieldError as error:
        fail_field(path, kind, error)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno:,}, column {error.colno:,}"
        fail(path, kind, f"not {kind.noun} ({error.msg} in {place})")
    except ValueError:
        fail(path, kind, f"not {kind.noun} (it has a number of more than {DIGITS:,} digits)")
    except (RecursionError, MemoryError):
        fail(path, kind, f"not {kind.noun} (it is nested too deeply)")


def _refuse_constant(name: str) -> NoReturn:
    raise FieldError(f"not finite ({name})", "give finite numbers")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some pairs; FieldError for a key that occurs twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FieldError("given twice", "give it once").inside(twice)
    return result


def parse_toml(content: str, path: str | Path, kind: FileKind) -> dict[str, Any]:
    """The table of a TOML text; `path` names it in messages."""
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        fail(path, kind, f"not TOML ({error})")
    except ValueError:
        fail(path, kind, "not TOML (it has a number or a date that is out of range)")
    except (RecursionError, MemoryError):
        fail(path, kind, "not TOML (it is nested too deeply)")


def checked(value: Any, schema: Schema, path: str | Path, kind: FileKind) -> Any:
    """A value by its schema; the error names the file."""
    try:
        return schema(value)
    except FieldError as error:
        fail_field(path, kind, error)


def fail_field(path: str | Path, kind: FileKind, error: FieldError) -> NoReturn:
    """Raises the error of a kind of file for a wrong field."""
    if not kind.by_hand:
        error.fix = kind.fix
    raise kind.error(f"{path}: {error}") from None


def fail(path: str | Path, kind: FileKind, problem: str, fix: str = "") -> NoReturn:
    """Raises the error of a kind of file for a file that is wrong as a whole."""
    raise kind.error(f"{path} is {problem}: {fix or kind.fix}.") from None


def is_file(path: Path, kind: FileKind) -> bool:
    """Whether there is a file that can be read; the kind's error for a folder, a device, a pipe, or
    a link to nothing."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            fix = "put the file there, or remove the link"
            fail(path, kind, "a link to a file that is missing", fix)
        return False
    except OSError as error:
        fail(path, kind, f"unreadable ({error.strerror or error})")
    _check_regular(path, mode, kind)
    return True


def _check_regular(path: str | Path, mode: int, kind: FileKind) -> None:
    """The kind's error unless `mode` is that of a regular file."""
    if not stat.S_ISREG(mode):
        problem = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        fail(path, kind, problem, "name a file")


def short_reason(text: str) -> str:
    """The first line of another library's error, without its full stop, for a message of ours.

    >>> short_reason("Bad CRC-32 for file 'x.npy'.\\nSee the log.")
    "Bad CRC-32 for file 'x.npy'"
    """
    line = text.strip().partition("\n")[0].rstrip(".")
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]} ..."
