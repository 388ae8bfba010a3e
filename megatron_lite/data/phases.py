"""From the configured weights to exact shares of the blend for each phase, with the ends of phases as sample numbers.

Shares are fractions: a weight is the fraction that its decimal text says (0.7 is 7/10), so counts are exact
however far the run goes. Only the shares of tokens^alpha are rounded, once, to multiples of 10^-9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from megatron_lite.data.config import DataConfig, GroupConfig, PhaseConfig

Shares = dict[str, Fraction]  # source name -> its share of the samples; positive, the sum is 1, sorted by name
ALPHA_UNITS = 10**9


@dataclass(frozen=True)
class Segment:
    """Samples from `start` to the next segment's start are drawn with `shares`."""

    start: int
    shares: Shares


@dataclass(frozen=True)
class Phases:
    """All segments of a run. boundaries: text of each `until_fraction` -> the sample number that it became."""

    segments: tuple[Segment, ...]
    boundaries: dict[str, int]


def resolve(
    config: DataConfig,
    tokens: Mapping[str, int],
    *,
    total_samples: int,
    kept: Mapping[str, int] | None = None,
) -> Phases:
    """The phases of a run in sample numbers.

    Args:
        tokens: source name -> its number of tokens.
        total_samples: samples of the whole run, of which `until_fraction` is a fraction.
        kept: `boundaries` of the run's first start. A fraction that is in it keeps its sample number, whatever the length of
        the run is now.

    Raises:
        ValueError: a phase ends before it begins.
    """
    segments: list[Segment] = []
    boundaries: dict[str, int] = {}
    start = 0
    for number, phase in enumerate(config.phases or [PhaseConfig()]):
        end = phase.until_samples
        if phase.until_fraction is not None:
            fraction = exact(phase.until_fraction)
            end = (kept or {}).get(str(fraction), round(fraction * total_samples))
            boundaries[str(fraction)] = end
        shares = phase_shares(config, phase, tokens)
        if end is not None and (end < start or (end == start and phase.until_fraction is None)):
            raise ValueError(
                f"data.phases[{number}] would run from sample {start} to sample {end}; raise its until_*, "
                "or lower that of the phase before"
            )
        # Two neighbors with equal shares are one phase: where it is cut must not matter.
        if end != start and not (segments and segments[-1].shares == shares):
            segments.append(Segment(start, shares))
        start = start if end is None else end
    return Phases(tuple(segments), boundaries)


def phase_shares(config: DataConfig, phase: PhaseConfig, tokens: Mapping[str, int]) -> Shares:
    """The share of every source that a phase reads.

    Raises:
        ValueError: nothing would be read.
    """
    weights = phase.weights or {name: group.weight for name, group in config.groups.items()}
    total = sum(exact(weight) for weight in weights.values())
    if not total:
        raise ValueError("data.groups: every weight is 0, so nothing would be read; raise one")
    shares = dict.fromkeys(config.sources(), Fraction(0))
    for name, weight in weights.items():
        share = exact(weight) / total
        if name in config.groups:
            alone = {other for other in weights if other.startswith(f"{name}/")}
            for source, part in _inside(name, config.groups[name], tokens, alone).items():
                shares[source] += share * part
        else:
            shares[name] += share
    if sum(shares.values()) != 1:
        raise ValueError(
            f"data.phases: weights {dict(weights)} give a share to a group in which no source is left to "
            "read; name its sources, or set the group's weight to 0"
        )
    return {name: share for name, share in shares.items() if share}


def _inside(name: str, group: GroupConfig, tokens: Mapping[str, int], alone: set[str]) -> Shares:
    """How a group's share is split over its sources, but for those that have a share of their own."""
    members = {f"{name}/{key}": source.weight for key, source in group.sources.items()}
    members = {source: weight for source, weight in members.items() if source not in alone and weight != 0}
    parts: dict[str, Fraction] = {}
    if all(weight is not None for weight in members.values()):
        parts = {source: exact(weight) for source, weight in members.items() if weight is not None}
    else:
        alpha = 1.0 if group.alpha is None else group.alpha
        powers = {source: float(tokens[source]) ** alpha for source in members}
        unit = sum(powers.values()) / ALPHA_UNITS
        parts = {source: Fraction(max(1, round(power / unit))) for source, power in powers.items()}
    total = sum(parts.values())
    return {source: part / total for source, part in parts.items()}


def exact(number: float) -> Fraction:
    """The number that the shortest decimal text of a float says."""
    return Fraction(str(number))
