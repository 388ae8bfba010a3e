"""Weights become exact shares, and ends become sample numbers."""

from __future__ import annotations

from fractions import Fraction as F

import pytest

from megatron_lite.data.config import DataConfig, GroupConfig, PhaseConfig, SourceConfig
from megatron_lite.data.phases import phase_shares, resolve

TOKENS = {"english/wiki": 9_000, "english/books": 1_000, "code/python": 500, "multi/de": 100, "multi/th": 400}


def config() -> DataConfig:
    english = GroupConfig(70, sources={"wiki": SourceConfig("w", weight=2), "books": SourceConfig("b", weight=1)})
    multi = GroupConfig(15, alpha=0.5, sources={"de": SourceConfig("d"), "th": SourceConfig("t")})
    code = GroupConfig(15, sources={"python": SourceConfig("p")})
    return DataConfig(groups={"english": english, "multi": multi, "code": code})


def test_default_shares_are_group_times_inside() -> None:
    """multi: alpha 0.5, so sqrt(100) : sqrt(400) = 1 : 2, rounded to multiples of 10^-9."""
    shares = phase_shares(config(), PhaseConfig(), TOKENS)
    assert sum(shares.values()) == 1
    assert shares["english/wiki"] == F(7, 10) * F(2, 3)
    assert shares["code/python"] == F(15, 100)
    assert shares["multi/th"] == F(15, 100) * F(666_666_667, 10**9)


def test_decimal_weights_are_taken_at_their_word() -> None:
    data = config()
    for group, weight in [("english", 0.7), ("multi", 0.15), ("code", 0.15)]:
        data.groups[group].weight = weight
    assert phase_shares(data, PhaseConfig(), TOKENS) == phase_shares(config(), PhaseConfig(), TOKENS)


@pytest.mark.parametrize(("alpha", "share"), [(None, F(9, 10)), (1.0, F(9, 10)), (0.0, F(1, 2))])
def test_alpha(alpha: float | None, share: F) -> None:
    data = config()
    data.groups["english"].alpha = alpha
    for source in data.groups["english"].sources.values():
        source.weight = None
    assert phase_shares(data, PhaseConfig(weights={"english": 1}), TOKENS)["english/wiki"] == share


def test_a_named_source_has_its_own_share_and_leaves_its_group() -> None:
    weights = {"english": 0.6, "english/books": 0.1, "code": 0.3}
    shares = phase_shares(config(), PhaseConfig(weights=weights), TOKENS)
    assert shares == {"english/wiki": F(6, 10), "english/books": F(1, 10), "code/python": F(3, 10)}


def test_weight_0_leaves_a_source_out_until_a_phase_names_it() -> None:
    data = config()
    data.groups["multi"].sources["th"].weight = 0
    assert "multi/th" not in phase_shares(data, PhaseConfig(), TOKENS)
    assert phase_shares(data, PhaseConfig(weights={"multi/th": 3}), TOKENS) == {"multi/th": 1}


def test_ends_become_sample_numbers() -> None:
    data = config()
    data.phases = [PhaseConfig(until_samples=30), PhaseConfig(until_fraction=0.7, weights={"code": 1})]
    data.phases.append(PhaseConfig(weights={"english": 1}))
    phases = resolve(data, TOKENS, total_samples=101)
    assert [segment.start for segment in phases.segments] == [0, 30, 71]
    assert phases.boundaries == {"7/10": 71}
    longer = resolve(data, TOKENS, total_samples=1000, kept=phases.boundaries)
    assert longer == phases


def test_neighbors_with_equal_shares_are_one_phase_and_empty_phases_vanish() -> None:
    data = config()
    data.phases = [PhaseConfig(until_fraction=0.2), PhaseConfig(until_fraction=0.3, weights={"code": 2})]
    data.phases += [PhaseConfig(until_fraction=0.31, weights={"code": 1}), PhaseConfig(weights={"english": 1})]
    assert [s.start for s in resolve(data, TOKENS, total_samples=100).segments] == [0, 20, 31]
    assert [s.start for s in resolve(data, TOKENS, total_samples=1).segments] == [0]


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([30, 20], r"phases\[1\] would run from sample 30 to sample 20"),
        ([30, 30], r"phases\[1\] would run from sample 30 to sample 30"),
        ([0.5, 0.4], r"phases\[1\] would run from sample 50 to sample 40"),
    ],
)
def test_phases_that_run_backwards_are_refused(ends: list, message: str) -> None:
    data = config()
    for end, weights in zip(ends, [{"code": 1.0}, {"english": 1.0}]):
        key = "until_samples" if isinstance(end, int) else "until_fraction"
        data.phases.append(PhaseConfig(weights=weights, **{key: end}))
    data.phases.append(PhaseConfig())
    with pytest.raises(ValueError, match=message):
        resolve(data, TOKENS, total_samples=100)


def test_nothing_to_read_is_refused() -> None:
    data = config()
    with pytest.raises(ValueError, match="no source is left to read"):
        phase_shares(data, PhaseConfig(weights={"code": 1, "code/python": 1}), TOKENS)
    for group in data.groups.values():
        group.weight = 0
    with pytest.raises(ValueError, match=r"data\.groups: every weight is 0"):
        phase_shares(data, PhaseConfig(), TOKENS)
