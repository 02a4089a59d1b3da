"""The child process that compiles: `python -m partita.execute.compilers.child FOLDER ...`.

XLA reads its flags once, and a plugin's devices are made once, so a process that trains cannot
compile for another machine. A folder has a request; the result goes there too: `result.json`, and
the text of the compiled program in `program.hlo.gz`.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from partita.capture.jax_functions import Text
from partita.execute.compilers.family import COMPILERS
from partita.execute.compilers.request import (
    RESULT_FILE,
    TEXT_FILE,
    ArrayText,
    CompileRequest,
    SpecText,
)
from partita.execute.piece_function import lower_device_sums, lower_piece
from partita.execute.sharding import PINNED_HOST, moved
from partita.files.checksums import with_checksum

MEMORY = {
    "arguments": "argument_size_in_bytes",
    "outputs": "output_size_in_bytes",
    "temporaries": "temp_size_in_bytes",
    "aliased": "alias_size_in_bytes",
    "code": "generated_code_size_in_bytes",
}
"""Part of a program's memory -> XLA's name for it."""


def compile_request(request: CompileRequest) -> tuple[dict[str, Any], str]:
    """(figures of the compiled program, its text)."""
    compiler = COMPILERS[request.target.platform]
    devices = list(compiler.devices(request.target))
    shape = tuple(size for _, size in request.axes)
    mesh = Mesh(
        np.array(devices[: math.prod(shape)], dtype=object).reshape(shape),
        tuple(name for name, _ in request.axes),
        axis_types=(AxisType.Auto,) * len(shape),
    )
    lowered = (
        _lowered_step(request, mesh) if request.piece is None else _lowered_piece(request, mesh)
    )
    with tempfile.TemporaryDirectory(prefix="partita-") as dump:
        options = dict(compiler.dump_options)
        if options:
            options["xla_dump_to"] = dump
        start = time.perf_counter()
        compiled = lowered.compile(compiler_options=options or None)
        seconds = time.perf_counter() - start
        allocated = compiler.allocated_bytes(Path(dump))
    analysis = compiled.memory_analysis()
    memory = {part: int(getattr(analysis, name, 0)) for part, name in MEMORY.items()}
    if allocated is not None:
        memory["temporaries"] = allocated
    return {"seconds": seconds, "memory": memory}, compiled.as_text() or ""


def _lowered_step(request: CompileRequest, mesh: Mesh) -> Any:
    """A whole step on a mesh, lowered."""
    shardings = [_named_sharding(spec, mesh) for spec in request.shardings]
    for leaf in request.host:
        shardings[leaf] = shardings[leaf].with_memory_kind(PINNED_HOST)
    state_count = request.state_count
    other_outputs = len(request.outputs) - state_count
    call = program_of(request).call

    def step_of_leaves(*inputs: Any) -> tuple[Any, ...]:
        outputs: Any = call(*moved(inputs, request.host, jax.memory.Space.Device))
        host = {other_outputs + leaf for leaf in request.host}
        return tuple(moved(outputs, host, jax.memory.Space.Host))

    step = jax.jit(
        step_of_leaves if request.host else call,
        in_shardings=tuple(shardings),
        out_shardings=(*((None,) * other_outputs), *shardings[:state_count]),
        donate_argnums=tuple(range(state_count)),
    )
    return step.lower(*(_shape(array) for array in request.inputs))


def _lowered_piece(request: CompileRequest, mesh: Mesh) -> Any:
    """A piece of a step on a mesh, or the sums over devices that it waits for, lowered."""
    piece = request.piece
    assert piece is not None, "a request of a piece"
    inputs = [
        _shape(array, _named_sharding(spec, mesh))
        for array, spec in zip(request.inputs, request.shardings, strict=True)
    ]
    if piece.role is None:
        return lower_device_sums(inputs, piece.partial)
    outputs = [
        _shape(array, _named_sharding(spec, mesh))
        for array, spec in zip(request.outputs, piece.shardings, strict=True)
    ]
    call = program_of(request).call
    return lower_piece(
        lambda arguments: list(call(*arguments)),
        "piece",
        piece.role,
        piece.scale,
        inputs,
        outputs,
        {n: names for n, names in enumerate(piece.partial) if names},
    )


def program_of(request: CompileRequest) -> Text:
    """The program of a request, ready to call.

    JAX exports a step of the same arrays, and the request's module takes its place.
    """

    def same_arrays(*inputs: Any) -> tuple[Any, ...]:
        return tuple(jnp.zeros(shape, dtype) for shape, dtype in request.outputs)

    disabled = [export.DisabledSafetyCheck.platform()]
    shapes = [_shape(array) for array in request.inputs]
    exported = export.export(jax.jit(same_arrays), disabled_checks=disabled)(*shapes)
    text = Text.of(exported, request.program)
    return dataclasses.replace(text, module_kept_var_idx=request.kept)


def _shape(array: ArrayText, sharding: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
    shape, dtype = array
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _named_sharding(spec: SpecText, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(tuple(axes) or None for axes in spec)))


def main(folder: Path) -> None:
    """Compiles the request of a folder, and writes the result or the compiler's reason."""
    try:
        result, text = compile_request(CompileRequest.read(folder))
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    else:
        content = gzip.compress(text.encode(), 6, mtime=0)
        (folder / TEXT_FILE).write_bytes(content)
        result["text"] = zlib.crc32(content)
    (folder / RESULT_FILE).write_text(json.dumps(with_checksum(result)), encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
