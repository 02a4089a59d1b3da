"""A flipped bit in a file that nobody edits is an error; checksums of parts add up."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from partita.errors import PartitaError
from partita.files.checksums import MODULUS, array_checksum
from partita.graph.operator_graph import OperatorGraph

GRAPH = OperatorGraph.load(Path(__file__).parents[1] / "data" / "mlp.graph.json")
TYPES = st.sampled_from(["bool", "int8", "uint16", "float32", "float64", "complex128"])


@given(arrays.arrays(TYPES, arrays.array_shapes(min_dims=0, max_side=6)), st.data())
def test_every_flipped_bit_changes_the_checksum(array: np.ndarray, data: st.DataObject) -> None:
    start = (0,) * array.ndim
    before = array_checksum(array, start, array.shape)
    flipped = bytearray(array.tobytes())
    byte = data.draw(st.integers(0, len(flipped) - 1))
    flipped[byte] ^= 1 << data.draw(st.integers(0, 7))
    other = np.frombuffer(bytes(flipped), array.dtype).reshape(array.shape)
    assert array_checksum(other, start, array.shape) != before


@given(arrays.arrays("float32", arrays.array_shapes(min_dims=2, max_dims=3)), st.data())
def test_checksums_of_parts_add_up(array: np.ndarray, data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, array.ndim - 1))
    cut = data.draw(st.integers(0, array.shape[dim]))
    left, right = np.split(array, [cut], axis=dim)
    origin = [0] * array.ndim
    place = [*origin]
    place[dim] = cut
    total = array_checksum(left, origin, array.shape) + array_checksum(right, place, array.shape)
    assert total % MODULUS == array_checksum(array, origin, array.shape)


def test_a_changed_graph_is_refused_and_one_without_checksum_is_read(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    GRAPH.save(path)
    assert OperatorGraph.load(path) == GRAPH
    content = path.read_text()
    path.write_text(content.replace('"dense"', '"dence"', 1))
    with pytest.raises(PartitaError, match="checksum is '.*', and its content has .*: capture the"):
        OperatorGraph.load(path)
    path.write_text(json.dumps(GRAPH.to_json()))
    assert OperatorGraph.load(path) == GRAPH


def test_a_graph_that_reads_a_later_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    content = GRAPH.to_json()
    instructions = content["graph"][2]
    first, last = instructions[0], instructions[-1]
    operands, results = 3, 4
    first[operands] = [*last[results][:1], *first[operands][1:]]
    path.write_text(json.dumps(content))
    with pytest.raises(PartitaError, match=r"graph is unsound \(instruction 0 .* computed later\)"):
        OperatorGraph.load(path)
