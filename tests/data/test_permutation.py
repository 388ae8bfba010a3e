"""The shuffle is a bijection for every size, and looks random."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.permutation import MAX_SIZE, make_key, permute


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_bijection(n: int, seed: int) -> None:
    key = make_key(seed, "english/wiki", 3)
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_bijection_for_every_small_size() -> None:
    key = make_key(1, "x", 0)
    for n in range(1, 200):
        assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


@given(n=st.integers(1, MAX_SIZE), data=st.data())
def test_large_sizes_stay_inside_and_apart(n: int, data: st.DataObject) -> None:
    """The whole domain can't be walked here; no two of some drawn indices meet."""
    key = make_key(5, "x", 0)
    indices = data.draw(st.lists(st.integers(0, n - 1), unique=True, min_size=1, max_size=50))
    images = {permute(i, n, key) for i in indices}
    assert len(images) == len(indices)
    assert all(0 <= image < n for image in images)


def chi_square(observed: list[int], expected: float) -> float:
    return sum((count - expected) ** 2 / expected for count in observed)


def test_all_orders_of_four_are_equally_frequent() -> None:
    draws = 12_000
    orders = Counter(tuple(permute(i, 4, make_key(seed, "x", 0)) for i in range(4)) for seed in range(draws))
    observed = [orders[order] for order in permutations(range(4))]
    # 23 degrees of freedom: the statistic is above 49.7 once in 1,000 times; the seeds are fixed.
    assert chi_square(observed, draws / 24) < 49.7


def test_images_are_uniform_and_neighbors_independent() -> None:
    """Where i and i + 1 go, in a grid of 10 x 10 cells."""
    n = 40_009
    key = make_key(2, "code/python", 1)
    image = [permute(i, n, key) * 10 // n for i in range(n)]
    pairs = Counter(pairwise(image))
    # 99 degrees of freedom: above 148.2 once in 1,000 times.
    assert chi_square([pairs[a, b] for a in range(10) for b in range(10)], n / 100) < 148.2


def test_few_points_stay_and_keys_differ() -> None:
    n = 10_000
    keys = [make_key(*what) for what in [(1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1)]]
    assert len(set(keys)) == 4
    images = [[permute(i, n, key) for i in range(n)] for key in keys]
    # A random permutation has a Poisson(1) number of fixed points, and so have two of them in common: > 8 once in 10^6.
    assert all(sum(i == image for i, image in enumerate(one)) <= 8 for one in images)
    for a in range(4):
        for b in range(a):
            assert sum(x == y for x, y in zip(images[a], images[b])) <= 8


def test_values_are_the_same_on_every_machine() -> None:
    """Changing these breaks the data order of every run in progress."""
    key = make_key(1234, "english/wiki", 0)
    assert [permute(i, 10, key) for i in range(10)] == GOLDEN_10
    assert [permute(i, 10**12, key) for i in (0, 1, 10**12 - 1)] == GOLDEN_LARGE


GOLDEN_10 = [2, 3, 5, 6, 1, 9, 0, 4, 8, 7]
GOLDEN_LARGE = [710807142213, 400879998496, 762633310398]


@pytest.mark.parametrize(("i", "n"), [(-1, 5), (5, 5), (0, 0), (0, MAX_SIZE + 1)])
def test_out_of_range_is_refused(i: int, n: int) -> None:
    with pytest.raises(ValueError, match="must be in"):
        permute(i, n, make_key(0, "x", 0))
