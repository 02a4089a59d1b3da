"""The pause of full garbage collections."""

import gc

from partita.search.garbage import NEVER, young_collections_only


def test_pauses_inside_each_other_end_with_the_outer_one() -> None:
    before = gc.get_threshold()
    with young_collections_only():
        with young_collections_only():
            assert gc.get_threshold() == (*before[:2], NEVER)
        assert gc.get_threshold() == (*before[:2], NEVER)
    assert gc.get_threshold() == before
