"""Edge lists in Parquet files, read by pyarrow if it is installed, one batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.stream import PIECE, EdgeStream, Piece

SOURCE_NAMES = {"source", "src", "from", "u", "head", "row"}
TARGET_NAMES = {"target", "dst", "to", "v", "tail", "col", "destination"}
WEIGHT_NAMES = {"weight", "weights", "w", "value"}


def parquet_edges(path: Path) -> EdgeStream:
    """The edges of a Parquet file with the columns source and target (or src and dst, ...).

    A column weight is used where there is one.
    """
    file = _open_parquet(path)
    try:
        names: list[str] = file.schema_arrow.names
    except (ValueError, OSError, NotImplementedError) as error:
        raise _damaged(path, error) from None
    source = _column(names, SOURCE_NAMES)
    target = _column(names, TARGET_NAMES)
    weight = _column(names, WEIGHT_NAMES)
    if source is None or target is None:
        raise GraphError(
            f"{str(path)!r} has the columns {', '.join(names)}: call the ends of an edge source "
            "and target, and its weight weight."
        )
    columns = [source, target] if weight is None else [source, target, weight]

    def pieces() -> Iterator[Piece]:
        first_row = 0
        for batch in _batches(path, columns):
            arrays = [_numbers(path, batch, name, first_row) for name in columns]
            source_ids, target_ids = arrays[:2]
            for name, ids in ((source, source_ids), (target, target_ids)):
                if ids.dtype.kind not in "iu":
                    raise GraphError(f"{str(path)!r}: {name} is {ids.dtype}: use integers.")
            first_row += len(source_ids)
            weights = None if weight is None else arrays[2].astype(np.float32)
            yield source_ids, target_ids, weights

    return EdgeStream(pieces, None, file.metadata.num_rows, name=path.stem)


def _batches(path: Path, columns: list[str]) -> Iterator[Any]:
    """The rows of a file, in batches; GraphError for a damaged page."""
    batches = _open_parquet(path).iter_batches(PIECE, columns=columns)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ValueError, OSError, NotImplementedError, MemoryError) as error:
            raise _damaged(path, error) from None
        yield batch


def _damaged(path: Path, error: Exception) -> GraphError:
    lines = str(error).splitlines() or [type(error).__name__]
    return GraphError(f"{str(path)!r} is truncated or no Parquet file: {lines[0].rstrip('.')}.")


def _column(names: list[str], known_names: set[str]) -> str | None:
    """The first column with one of these names, in any case."""
    return next((name for name in names if name.lower() in known_names), None)


def _numbers(path: Path, batch: Any, name: str, first_row: int) -> np.ndarray:
    """A column of a batch; GraphError for an empty entry."""
    column = batch.column(name)
    if column.null_count:
        raise GraphError(
            f"{str(path)!r}: {name} has an empty entry in the rows from {first_row:,}: fill it in."
        )
    numbers = column.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind not in "iuf":
        raise GraphError(f"{str(path)!r}: {name} is {column.type}: use numbers.")
    return numbers


def _open_parquet(path: Path) -> Any:
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise GraphError(
            f"{str(path)!r} is a Parquet file, which needs pyarrow: run `pip install pyarrow`, or "
            "save the edges as text or .npz."
        ) from None
    try:
        return parquet.ParquetFile(path, page_checksum_verification=True)
    except (ValueError, OSError, NotImplementedError, MemoryError) as error:
        # ArrowInvalid is a ValueError.
        raise _damaged(path, error) from None
