"""Routes and link loads of grids: hand-worked examples."""

from dataclasses import replace

import pytest

from partita.errors import MachineError
from partita.machine import Grid, load
from partita.machine.routing import Message, Tile, grid_joules, grid_seconds, link_loads, route

MESH = Grid("mesh", columns=4, rows=3, bandwidth=1e9, hop_latency=1e-9, energy_per_bit=1e-12)


def sides(grid: Grid, source: Tile, target: Tile) -> str:
    return " ".join(link.side for link in route(grid, source, target))


def test_xy_goes_along_the_row_first() -> None:
    assert sides(MESH, Tile(0, 0), Tile(2, 1)) == "out east east south in"
    yx = replace(MESH, routing="yx")
    assert sides(yx, Tile(0, 0), Tile(2, 1)) == "out south east east in"
    assert sides(MESH, Tile(3, 2), Tile(3, 0)) == "out north north in"


def test_a_torus_goes_the_shorter_way_and_one_direction_goes_around() -> None:
    torus = replace(MESH, closed=True)
    assert sides(torus, Tile(3, 0), Tile(0, 0)) == "out east in"
    down = replace(torus, direction="down")
    assert sides(down, Tile(3, 0), Tile(0, 0)) == "out west west west in"


def test_the_most_loaded_link_decides() -> None:
    """Two messages of 1 GB share the link east of (1, 0); a third is alone."""
    messages = [
        Message(Tile(0, 0), Tile(2, 0), 1e9),
        Message(Tile(1, 0), Tile(3, 0), 1e9),
        Message(Tile(0, 2), Tile(0, 1), 1e9),
    ]
    loads = link_loads(MESH, messages)
    assert max(loads.values()) == 2e9
    assert grid_seconds(MESH, messages) == pytest.approx(2.0 + 2e-9)
    assert grid_joules(MESH, messages) == pytest.approx(8e9 * 5 * 1e-12)
    assert grid_seconds(MESH, []) == 0.0


def test_the_networks_of_wormhole_run_in_opposite_directions() -> None:
    first, second = load("wormhole-n150").grids
    for source, target in [(Tile(1, 2), Tile(7, 9)), (Tile(9, 0), Tile(0, 11))]:
        back = [link.tile for link in route(second, target, source)]
        assert len(back) == len(route(first, source, target))
    assert sides(first, Tile(0, 0), Tile(1, 1)) == "out east south in"
    assert sides(second, Tile(1, 1), Tile(0, 0)) == "out north west in"


def test_sentences() -> None:
    with pytest.raises(MachineError, match=r"Tile \(4, 0\) is outside grid 'mesh': it has 4 col"):
        route(MESH, Tile(0, 0), Tile(4, 0))
    one_way = replace(MESH, direction="up")
    with pytest.raises(MachineError, match="no route from 2 to 0: its links lead up and it is not"):
        route(one_way, Tile(2, 0), Tile(0, 0))
