"""Compiles requests in a child process, and keeps the compiled programs on disk."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from partita.errors import CompilerError
from partita.execute.calibrate import cache_folder
from partita.execute.compilers.base import ProgramCompiler, base_environment
from partita.execute.compilers.family import COMPILERS
from partita.execute.compilers.request import (
    PROGRAM_FILE,
    RESULT_FILE,
    TEXT_FILE,
    CompileRequest,
)
from partita.files.checksums import sealed
from partita.files.reading import FileKind, fail, read_bytes, read_json
from partita.files.schema import Schema, number, of_type, table, text, whole_number

SECONDS = 1800
"""Time limit of a compilation."""
ABORT_LINES = 40
"""Last lines of a log in which the reason of an abort is looked for."""


@dataclass(frozen=True)
class ProgramMemory:
    """Memory of one device that a compiled program takes, bytes."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    """Outputs that reuse the memory of an argument."""
    code: int = 0
    """The program itself, where it takes main memory of a device."""

    @property
    def peak(self) -> int:
        """Arguments, outputs, temporaries and the program, aliases counted once."""
        return self.arguments + self.outputs + self.temporaries + self.code - self.aliased


@dataclass(frozen=True)
class CompiledProgram:
    """A program as a compiler made it."""

    text: str
    """Its HLO text."""
    memory: ProgramMemory
    seconds: float
    """Of the compilation."""
    compiler: str
    version: str


class ProgramTooLarge(CompilerError):
    """A program that the compiler refuses, because a device has too little memory."""

    def __init__(self, sentence: str, needed_bytes: int) -> None:
        """`needed_bytes`: memory of a device that the program needs, by the compiler."""
        super().__init__(sentence)
        self.needed_bytes = needed_bytes


def compile_program(request: CompileRequest) -> CompiledProgram:
    """The compiled program of a request, from the cache if it was compiled before.

    Raises a CompilerError if the compiler is not installed or does not compile the program, and
    its subclass ProgramTooLarge if a device has too little memory.
    """
    return compile_programs([request])[0]


def compile_programs(requests: Sequence[CompileRequest]) -> list[CompiledProgram]:
    """The compiled programs of requests for one target. One process compiles all that are not in
    the cache.

    Raises the errors of `compile_program`, for the first program that has one.
    """
    target = requests[0].target
    compiler = COMPILERS[target.platform]
    compiler.check()
    environment = compiler.environment(target)
    version = compiler.version()
    flags = json.dumps([environment, dict(compiler.dump_options)], sort_keys=True)
    results: dict[int, _Result] = {}
    with tempfile.TemporaryDirectory(prefix="partita-") as name:
        new: dict[int, tuple[Path, Path]] = {}
        """Number of a request -> the folder of its result, and that in the cache."""
        for number, request in enumerate(requests):
            cached = cache_folder() / "compiled" / request.digest(version, flags)
            result = _whole_result(cached)
            if result is not None:
                results[number] = result
                continue
            work = Path(name) / str(number)
            work.mkdir()
            request.write(work)
            new[number] = work, cached
        if new:
            folders = [work for work, _ in new.values()]
            _run_child(folders, compiler, environment, Path(name) / "log")
        for number, (work, cached) in new.items():
            results[number] = _result(work)
            (work / PROGRAM_FILE).unlink()
            # A cache that cannot be written costs time, not the result.
            with contextlib.suppress(OSError):
                _store(work, cached)
    return [_program(results[n], compiler, version) for n in range(len(requests))]


class _DamagedError(CompilerError):
    """A result that is not as the child process wrote it."""


COMPILED_FILE = FileKind(
    "a compiled program",
    "compile it again",
    _DamagedError,
    by_hand=False,
    most_bytes=2**32,
)
_MEMORY = table({part: of_type(hint) for part, hint in get_type_hints(ProgramMemory).items()})
_PROGRAM = table({"seconds": number(0), "memory": _MEMORY, "text": whole_number(0, 2**32 - 1)})
_REFUSAL = table({"error": text(longest=2**24)})


def _result_schema(value: Any) -> Any:
    """The figures of a program and the checksum of its text, or the compiler's error."""
    schema: Schema = _REFUSAL if isinstance(value, dict) and "error" in value else _PROGRAM
    return schema(value)


_Result = tuple[dict[str, Any], bytes]
"""The result of a compilation, and the packed text of the program."""


def _result(folder: Path) -> _Result:
    """The result in a folder; _DamagedError for one that cannot be read."""
    result = read_json(folder / RESULT_FILE, COMPILED_FILE, sealed(_result_schema, required=True))
    if "error" in result:
        return result, b""
    content = read_bytes(folder / TEXT_FILE, COMPILED_FILE)
    if zlib.crc32(content) != result["text"]:
        fail(folder / TEXT_FILE, COMPILED_FILE, "damaged")
    return result, content


def _whole_result(folder: Path) -> _Result | None:
    """The result in a folder, None for a damaged one, which is compiled again."""
    try:
        return _result(folder)
    except _DamagedError:
        return None


def _program(compiled: _Result, compiler: ProgramCompiler, version: str) -> CompiledProgram:
    """The program of a result. CompilerError if the compiler refused it."""
    result, content = compiled
    if "error" in result:
        raise _refusal(compiler, result["error"])
    memory = ProgramMemory(**result["memory"])
    if not compiler.stores_program:
        memory = replace(memory, code=0)
    program_text = gzip.decompress(content).decode()
    return CompiledProgram(program_text, memory, result["seconds"], compiler.name, version)


def _store(work: Path, cached: Path) -> None:
    """Moves a copy of a result into the cache. OSError if it cannot be written, or is there."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=cached.parent, prefix="new-"))
    try:
        shutil.copytree(work, beside, dirs_exist_ok=True)
        if _whole_result(cached) is None:
            shutil.rmtree(cached, ignore_errors=True)
        os.replace(beside, cached)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _run_child(
    folders: Sequence[Path],
    compiler: ProgramCompiler,
    environment: dict[str, str],
    log: Path,
) -> None:
    """Runs the child process. CompilerError if it ends without a result in every folder."""
    paths = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[3])]
    variables = {
        **base_environment(),
        **environment,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    module = "partita.execute.compilers.child"
    limit_seconds = SECONDS * len(folders)
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", module, *map(str, folders)],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                timeout=limit_seconds,
            )
        except subprocess.TimeoutExpired:
            raise CompilerError(
                f"{compiler.name} did not finish within {limit_seconds} s. Use a smaller model."
            ) from None
    is_complete = all((folder / RESULT_FILE).is_file() for folder in folders)
    if done.returncode or not is_complete:
        reason = abort_reason(log.read_text(errors="replace"))
        problem = compiler.version_problem()
        raise CompilerError(f"{compiler.name} aborted: {reason.rstrip('.')}.{problem}")


def abort_reason(log: str) -> str:
    """The line of a log that says why a compiler ended the process.

    >>> abort_reason("I0000 loading\\nF1128 08:20:01.1 55 scheduler.cc:12] Check failed: a == b\\n")
    'Check failed: a == b'
    """
    lines = [line for line in log.splitlines() if line.strip()][-ABORT_LINES:]
    for line in lines:
        match = re.match(r"F\d{4} .*?\] (.*)", line)
        if match:
            return match[1]
    for line in reversed(lines):
        if re.match(r"\w*(Error|Exception)\b", line.split(".")[-1]) or "Error:" in line:
            return line
    return lines[-1] if lines else "it wrote no reason"


def _refusal(compiler: ProgramCompiler, error: str) -> CompilerError:
    """The error of a program that a compiler does not compile."""
    first_line = error.splitlines()[0]
    needed = compiler.needed_bytes(error)
    if needed is not None:
        return ProgramTooLarge(f"{compiler.name} refuses the program: {first_line}", needed)
    return CompilerError(
        f"{compiler.name} does not compile the program: {first_line.rstrip('.')}."
        f"{compiler.version_problem()}"
    )
