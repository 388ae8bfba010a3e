from collections.abc import Iterator

import pytest

from tests.checkpoint.rank_pool import RankPool


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture
def two_ranks() -> Iterator[RankPool]:
    """Fresh ones: the tests with this fixture break them."""
    pool = RankPool(2)
    yield pool
    pool.close()
