"""Edge lists in Parquet files, read by pyarrow where it is installed, a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.stream import PIECE, EdgeStream, Piece

ENDS = (
    {"source", "src", "from", "u", "head", "row"},
    {"target", "dst", "to", "v", "tail", "col", "destination"},
)
HEAVY = {"weight", "weights", "w", "value"}


def edge_table(path: Path) -> EdgeStream:
    """The edges of a Parquet file: the columns source and target (or src and dst, from and to, ...), and weight where there is one."""
    file = _opened(path)
    names: list[str] = file.schema_arrow.names
    columns = [next((n for n in names if n.lower() in known), None) for known in (*ENDS, HEAVY)]
    if columns[0] is None or columns[1] is None:
        raise GraphError(
            f"{str(path)!r} has the columns {', '.join(names)}: call the ends of an edge source and target, and its weight weight."
        )

    def pieces() -> Iterator[Piece]:
        done = 0
        for batch in _opened(path).iter_batches(
            PIECE, columns=[c for c in columns if c is not None]
        ):
            arrays = [None if name is None else batch.column(name) for name in columns]
            for name, array in zip(columns, arrays, strict=True):
                if array is not None and array.null_count:
                    raise GraphError(
                        f"{str(path)!r}: {name} has an empty entry in the rows from {done:,}: every edge needs one."
                    )
            source, target, weights = (
                None if array is None else array.to_numpy(zero_copy_only=False) for array in arrays
            )
            assert source is not None and target is not None
            for name, ids in zip(columns, (source, target), strict=False):
                if ids.dtype.kind not in "iu":
                    raise GraphError(
                        f"{str(path)!r}: {name} is {ids.dtype}: ids are whole numbers."
                    )
            done += len(source)
            yield source, target, None if weights is None else weights.astype(np.float32)

    return EdgeStream(pieces, None, file.metadata.num_rows, name=path.stem)


def _opened(path: Path) -> Any:
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise GraphError(
            f"{str(path)!r} is a Parquet file, which pyarrow reads: pip install pyarrow, or save the edges as text or .npz."
        ) from None
    try:
        return parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
        raise GraphError(
            f"{str(path)!r} is truncated or no Parquet file: {str(error).splitlines()[0].rstrip('.')}."
        ) from None
