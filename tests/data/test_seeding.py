import numpy as np
import pytest

from jkd.data.seeding import epoch_order, random_state
from jkd.errors import UserError


def test_streams_are_pinned():
    # Golden: a change here would silently change every split and every shuffle.
    assert epoch_order(0, 0, 8).tolist() == [0, 6, 5, 4, 1, 3, 2, 7]
    assert random_state("split", 2**40, 3).randint(1000, size=3).tolist() == [560, 583, 627]


def test_every_part_of_the_name_matters():
    streams = [("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1), ("a", 2**32, 0), ("a", 0, 2**32)]
    draws = {tuple(random_state(*stream).randint(2**31, size=4)) for stream in streams}
    assert len(draws) == len(streams)


def test_no_seed_is_data_set_order():
    order = epoch_order(None, 5, 4)
    assert order.tolist() == [0, 1, 2, 3]
    assert order.dtype == np.int32


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed):
    with pytest.raises(UserError, match=r"seed must be in \[0, 2\*\*64\)"):
        random_state("split", seed)
