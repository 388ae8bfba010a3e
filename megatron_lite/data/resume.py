"""Checks whether a run may continue with changed data: every sample that it has already read must stay the same.

A checkpoint keeps `Blend.state()`. Phases that begin at or after `consumed_samples` may be added or changed,
with new sources too; everything that would change a sample already read is refused, naming the first sample that differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from fractions import Fraction
from typing import Any

from megatron_lite.data.blend import Blend, ProportionTree
from megatron_lite.data.phases import Phases, Segment

_OPTIONS = {"seed": "seed"} | {key: f"data.{key}" for key in ("seq_len", "reset_attention", "mask_eod_loss")}
_SCANNED = 100_000  # samples compared one by one in search of the first that differs


def resume_blend(
    blend: Blend, *, saved: Mapping[str, Any], consumed_samples: int, allow: Collection[str] = ()
) -> Blend:
    """The blend with which a run continues.

    Fractions of the run's length that became sample numbers at the first start keep them, whatever the length is now; to
    move the start of a phase that has not begun, write `until_samples`.

    Args:
        blend: opened from the present config.
        saved: `Blend.state()` of the checkpoint.
        allow: keys whose difference is accepted: `seed`, `data.seq_len`, `data.reset_attention`,
            `data.mask_eod_loss`, `data.groups` (a source's content) and `data.phases`.

    Raises:
        ValueError: a sample before `consumed_samples` would differ, or `saved` is not such a state.
    """
    try:
        continued = Blend(
            blend.sources,
            config=blend.config,
            seed=blend.seed,
            total_samples=blend.total_samples,
            kept_boundaries=saved["boundaries"],
        )
        check_resume(continued, saved=saved, consumed_samples=consumed_samples, allow=allow)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(
            f"the checkpoint's record of what was read cannot be used ({error!r}); it was edited or is of another version: "
            "resume from another checkpoint"
        ) from error
    return continued


def check_resume(blend: Blend, *, saved: Mapping[str, Any], consumed_samples: int, allow: Collection[str] = ()) -> None:
    """Raise ValueError if a sample of [0, consumed_samples) is another in `blend` than in `saved`."""
    if consumed_samples < 1:
        return
    present = blend.state()
    for option, key in _OPTIONS.items():
        if present[option] != saved[option] and key not in allow:
            raise ValueError(
                f"{key}={present[option]}, but the checkpoint was trained with {saved[option]}, and sample "
                f"0 would already differ; set it back to {saved[option]}, name {key} in resume_allow, or "
                "start a new run"
            )
    before = _segments(saved, consumed_samples)
    if "data.groups" not in allow:
        _check_sources(blend, saved, _counts(before, consumed_samples))
    if "data.phases" not in allow:
        _check_phases(blend.phases, before, consumed_samples)


def _segments(saved: Mapping[str, Any], consumed_samples: int) -> list[Segment]:
    """The saved phases that had begun."""
    return [
        Segment(phase["start"], {name: Fraction(share) for name, share in phase["shares"].items()})
        for phase in saved["phases"]
        if phase["start"] < consumed_samples
    ]


def _counts(segments: list[Segment], stop: int) -> Counter[str]:
    """How many of the samples [0, stop) each source gave; every segment begins before `stop`."""
    ends = [segment.start for segment in segments[1:]] + [stop]
    counts: Counter[str] = Counter()
    for segment, end in zip(segments, ends):
        counts += ProportionTree(segment.shares).counts(end - segment.start)
    return counts


def _check_sources(blend: Blend, saved: Mapping[str, Any], counts: Counter[str]) -> None:
    """Every source that has been read is there and has the content it had."""
    for name in sorted(counts):
        then = saved["sources"][name]
        if name not in blend.sources:
            raise ValueError(
                f"data.groups lacks {name}, which the run has read; put it back (a phase that begins later "
                "may leave it out), or start a new run"
            )
        now = blend.sources[name].state()
        if now["fingerprint"] != then["fingerprint"]:
            raise ValueError(
                f"{name} has changed since the checkpoint: {then['tokens']} tokens in {then['windows']} "
                f"windows then, {now['tokens']} in {now['windows']} now, fingerprint {then['fingerprint']} "
                f"then, {now['fingerprint']} now; restore the old files and min_document_tokens, add the new "
                "ones as another source in a later phase, or name data.groups in resume_allow"
            )


def _check_phases(phases: Phases, before: list[Segment], consumed_samples: int) -> None:
    present = [segment for segment in phases.segments if segment.start < consumed_samples]
    start = _first_changed(before, present)
    if start is None:
        return
    stop = min(consumed_samples, start + _SCANNED)
    then, now = _drawn(before, start, stop), _drawn(present, start, stop)
    for i, (old, new) in enumerate(zip(then, now), start):
        if old != new:
            raise ValueError(_rewritten(f"sample {i} came from {old} and would come from {new}", consumed_samples))
    if stop < consumed_samples:
        raise ValueError(_rewritten(f"the shares change from sample {start} on", consumed_samples))


def _rewritten(what: str, consumed_samples: int) -> str:
    return (
        f"data.phases or weights would rewrite what the run has read: {what}, the first that differs, but "
        f"{consumed_samples} samples are consumed; restore the weights of the phases that have begun, and "
        f"end the present one with until_samples={consumed_samples} or later to change them from there on"
    )


def _first_changed(before: list[Segment], present: list[Segment]) -> int | None:
    """The first sample from which on the two lists of phases are not the same."""
    for old, new in zip(before, present):
        if old != new:
            return min(old.start, new.start)
    longer = before if len(before) > len(present) else present
    common = min(len(before), len(present))
    return longer[common].start if len(longer) > common else None


def _drawn(segments: list[Segment], start: int, stop: int) -> Iterator[str]:
    """The source of each sample of [start, stop).

    Lists of phases that agree before `start` give the same sample as long as they give the same source: a
    sample's number within its source follows from the sources before it.
    """
    ends = [segment.start for segment in segments[1:]] + [stop]
    for segment, end in zip(segments, ends):
        tree = ProportionTree(segment.shares)
        for i in range(max(start, segment.start), min(end, stop)):
            yield tree.locate(i - segment.start)[0]
