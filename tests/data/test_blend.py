"""The blend, held against counting by hand."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.blend import Blend, ProportionTree

names = [f"{group}/{source}" for group in "abc" for source in "xyz"]
some_shares = st.dictionaries(st.sampled_from(names), st.integers(1, 10**6), min_size=1).map(
    lambda weights: {name: Fraction(w, sum(weights.values())) for name, w in weights.items()}
)


@given(shares=some_shares)
def test_every_sample_continues_its_source_and_every_prefix_keeps_the_shares(shares: dict) -> None:
    tree = ProportionTree(shares)
    seen: Counter[str] = Counter()
    for i in range(400):
        assert tree.counts(i) == seen
        name, n = tree.locate(i)
        assert n == seen[name]
        seen[name] += 1
        for source, share in shares.items():
            assert abs(seen[source] - share * (i + 1)) <= Fraction(max(tree.depth, 1), 2)


@given(shares=some_shares, start=st.integers(10**13, 10**13 + 10**6))
def test_exact_at_ten_to_the_thirteen(shares: dict, start: int) -> None:
    tree = ProportionTree(shares)
    seen = tree.counts(start)
    assert sum(seen.values()) == start
    for i in range(start, start + 50):
        name, n = tree.locate(i)
        assert n == seen[name]
        seen[name] += 1
    for source, share in shares.items():
        assert abs(seen[source] - share * (start + 50)) <= Fraction(max(tree.depth, 1), 2)


def test_groups_keep_their_shares_as_closely_as_sources() -> None:
    """20 sources in three groups: the three groups' counts stay within half of their own depth, 2."""
    shares = {f"a/{k}": Fraction(7, 100) for k in range(10)} | {f"b/{k}": Fraction(3, 100) for k in range(5)}
    shares |= {f"c/{k}": Fraction(3, 100) for k in range(5)}
    tree, groups = ProportionTree(shares), Counter()
    for i in range(2_000):
        groups[tree.locate(i)[0][0]] += 1
        for group, share in [("a", 0.70), ("b", 0.15), ("c", 0.15)]:
            assert abs(groups[group] - share * (i + 1)) <= 1 + 1e-9  # 1e-9: floats here, integers there


THREE_PHASES = [
    (30_000, {"english/w": 0.6, "english/b": 0.1, "code/p": 0.15, "multi/d": 0.15}),
    (80_000, {"english/w": 5, "code/p": 2.5, "multi/d": 2.5}),
    (None, {"english/b": 0.2, "multi/d": 0.5, "code/new": 0.3}),
]
WINDOWS = {"english/w": 50_021, "english/b": 1_500, "code/p": 400, "multi/d": 26_999, "code/new": 7}


@pytest.fixture
def three_phases(blended: Callable, stub: Callable) -> Blend:
    config = blended(dict.fromkeys(WINDOWS, 1.0), THREE_PHASES)
    config.validate()
    sources = {name: stub(num_windows=windows) for name, windows in WINDOWS.items()}
    return Blend(sources, config=config, seed=3, total_samples=100_000)


def test_a_hundred_thousand_samples_of_three_phases(three_phases: Blend) -> None:
    """Weights in every phase, no window twice within an epoch, none left out before the next epoch begins."""
    draws = [three_phases.draw(i) for i in range(100_000)]
    ends = [0, 30_000, 80_000, 100_000]
    for (_, weights), start, end in zip(THREE_PHASES, ends, ends[1:]):
        counts = Counter(draw.source for draw in draws[start:end])
        assert set(counts) == set(weights)
        for source, weight in weights.items():
            assert abs(counts[source] - weight / sum(weights.values()) * (end - start)) <= 2
        assert three_phases.counts(start, end) == dict.fromkeys(WINDOWS, 0) | counts
    windows: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for draw in draws:
        windows[draw.source][draw.epoch].append(draw.window)
    for source, epochs in windows.items():
        assert list(epochs) == list(range(len(epochs)))
        for epoch, seen in epochs.items():
            assert len(set(seen)) == len(seen)
            if epoch < len(epochs) - 1:
                assert sorted(seen) == list(range(WINDOWS[source]))
        if len(epochs) > 1:
            assert epochs[0][:5] != epochs[1][:5]  # every epoch has its own order
    assert len(windows["code/new"]) > 800  # 6,000 samples of 7 windows


def test_counts_of_any_stretch(three_phases: Blend) -> None:
    sources = [three_phases.locate(i)[0] for i in range(29_000, 31_000)]
    for start, stop in [(29_000, 29_000), (29_000, 30_000), (29_990, 30_010), (30_000, 31_000), (29_001, 30_999)]:
        expected = dict.fromkeys(WINDOWS, 0) | Counter(sources[start - 29_000 : stop - 29_000])
        assert three_phases.counts(start, stop) == expected


def test_numbers_run_on_over_a_change_of_phase(three_phases: Blend) -> None:
    before = three_phases.counts(0, 79_990)
    for i in range(79_990, 80_100):
        source, n = three_phases.locate(i)
        assert n == before[source]
        before[source] += 1


def test_weights_are_proportions_and_order_of_writing_does_not_matter(blended: Callable, stub: Callable) -> None:
    sources = {name: stub(num_windows=50) for name in ("a/x", "a/y", "b/z")}
    one = blended({"a/x": 0.5, "a/y": 0.25, "b/z": 0.25})
    two = blended({"b/z": 10, "a/y": 10, "a/x": 20})
    first = Blend(sources, config=one, seed=0, total_samples=1)
    second = Blend(dict(reversed(sources.items())), config=two, seed=0, total_samples=1)
    assert [first.draw(i) for i in range(300)] == [second.draw(i) for i in range(300)]
    other_seed = Blend(sources, config=one, seed=1, total_samples=1)
    assert [first.draw(i) for i in range(300)] != [other_seed.draw(i) for i in range(300)]


def test_weight_zero_is_never_drawn(blended: Callable, stub: Callable) -> None:
    config = blended({"a/x": 1, "a/y": 0, "b/z": 0})
    blend = Blend({n: stub(num_windows=9) for n in config.sources()}, config=config, seed=0, total_samples=1)
    assert blend.counts(0, 10**13) == {"a/x": 10**13, "a/y": 0, "b/z": 0}


def test_negative_samples_are_refused(three_phases: Blend) -> None:
    with pytest.raises(IndexError, match="sample -1"):
        three_phases.draw(-1)
