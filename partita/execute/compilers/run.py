"""Compiles a request in a child process, and keeps the compiled program on disk."""

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
from dataclasses import dataclass
from pathlib import Path

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
    peak_live: int = 0
    """The highest sum of live values, by the compiler; 0 if it does not say."""

    @property
    def peak(self) -> int:
        """Arguments, outputs and temporaries, aliases counted once."""
        return self.arguments + self.outputs + self.temporaries - self.aliased


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
    compiler = COMPILERS[request.target.platform]
    compiler.check()
    environment = compiler.environment(request.target)
    version = compiler.version()
    key = request.digest(version, json.dumps(environment, sort_keys=True))
    cached = cache_folder() / "compiled" / key
    if (cached / RESULT_FILE).is_file():
        return _read(cached, compiler, version)
    with tempfile.TemporaryDirectory(prefix="partita-") as name:
        work = Path(name)
        request.write(work)
        _run_child(work, compiler, environment)
        (work / PROGRAM_FILE).unlink()
        # A cache that cannot be written costs time, not the result.
        with contextlib.suppress(OSError):
            _store(work, cached)
        return _read(work, compiler, version)


def _read(folder: Path, compiler: ProgramCompiler, version: str) -> CompiledProgram:
    """The program in a folder. CompilerError if the compiler refused it."""
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    if "error" in result:
        raise _refusal(compiler, str(result["error"]))
    text = gzip.decompress((folder / TEXT_FILE).read_bytes()).decode()
    memory = ProgramMemory(**result["memory"])
    return CompiledProgram(text, memory, result["seconds"], compiler.name, version)


def _store(work: Path, cached: Path) -> None:
    """Moves a copy of a result into the cache. OSError if it cannot be written, or is there."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=cached.parent, prefix="new-"))
    try:
        shutil.copytree(work, beside, dirs_exist_ok=True)
        os.replace(beside, cached)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _run_child(work: Path, compiler: ProgramCompiler, environment: dict[str, str]) -> None:
    """Runs the child process. CompilerError if it ends without a result."""
    paths = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[3])]
    variables = {
        **base_environment(),
        **environment,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    log = work / "log"
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "partita.execute.compilers.child", str(work)],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise CompilerError(
                f"{compiler.name} did not finish within {SECONDS} s. Use a smaller model."
            ) from None
    if done.returncode or not (work / RESULT_FILE).is_file():
        reason = abort_reason(log.read_text(errors="replace"))
        problem = compiler.version_problem()
        raise CompilerError(f"{compiler.name} aborted: {reason.rstrip('.')}.{problem}")
    log.unlink()


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
