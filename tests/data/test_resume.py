"""A run may change its future, never its past."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from megatron_lite.data.blend import Blend
from megatron_lite.data.config import DataConfig
from megatron_lite.data.resume import resume_blend

FIRST, SECOND = {"a/x": 0.5, "b/y": 0.5}, {"a/x": 0.25, "b/y": 0.75}


@pytest.fixture
def open_(stub: Callable) -> Callable[..., Blend]:
    def build(config: DataConfig, *, horizon: int = 100, seed: int = 0, fingerprint: str = "f") -> Blend:
        config.validate()
        sources = {n: stub(num_windows=40, fingerprint=fingerprint) for n in config.sources()}
        return Blend(sources, config=config, seed=seed, total_samples=horizon)

    return build


@pytest.fixture
def two_phases(blended: Callable) -> Callable[..., DataConfig]:
    return lambda first=FIRST, end=60, second=SECOND, **more: blended(FIRST | more, [(end, first), (None, second)])


def saved(blend: Blend) -> dict:
    """The state as it comes back from a checkpoint's JSON."""
    return json.loads(json.dumps(blend.state()))


def test_an_unchanged_config_resumes_anywhere(open_: Callable, two_phases: Callable) -> None:
    blend = open_(two_phases())
    for consumed in (0, 1, 59, 60, 61, 1000):
        resumed = resume_blend(blend, saved=saved(blend), consumed_samples=consumed)
        assert [resumed.draw(i) for i in range(200)] == [blend.draw(i) for i in range(200)]
        assert resumed.state() == blend.state()


@pytest.mark.parametrize("consumed", [10, 50, 90])
def test_fractions_keep_the_sample_numbers_of_the_first_start(
    open_: Callable, two_phases: Callable, consumed: int
) -> None:
    first = open_(two_phases(end=0.5), horizon=100)
    longer = open_(two_phases(end=0.5), horizon=300)
    assert longer.phases.segments[1].start == 150
    resumed = resume_blend(longer, saved=saved(first), consumed_samples=consumed)
    assert resumed.phases.segments[1].start == 50
    assert [resumed.draw(i) for i in range(200)] == [first.draw(i) for i in range(200)]
    again = resume_blend(longer, saved=saved(resumed), consumed_samples=consumed)
    assert again.state() == resumed.state()


@pytest.mark.parametrize("consumed", [40, 60])
def test_phases_that_have_not_begun_may_change(
    open_: Callable, two_phases: Callable, blended: Callable, consumed: int
) -> None:
    before = open_(two_phases())
    third = {"a/x": 1.0, "c/new": 2.0}
    changed = [
        two_phases(second={"b/y": 1}),
        two_phases(end=80),
        blended(FIRST),
        blended(FIRST | {"c/new": 0}, [(60, {}), (70, SECOND), (None, third)]),
        blended(FIRST | {"c/new": 1}, [(60, FIRST), (None, third)]),
    ]
    for config in changed:
        after = resume_blend(open_(config), saved=saved(before), consumed_samples=consumed)
        assert [after.draw(i) for i in range(60)] == [before.draw(i) for i in range(60)]


def test_a_changed_future_repeats_and_skips_nothing(open_: Callable, two_phases: Callable) -> None:
    before = open_(two_phases())
    after = resume_blend(open_(two_phases(second={"a/x": 1})), saved=saved(before), consumed_samples=60)
    seen = [draw.window for draw in map(after.draw, range(70)) if draw.source == "a/x"]
    assert sorted(seen) == list(range(40))  # 30 of the first phase and 10 of the second are one whole epoch


def first_difference(one: Blend, two: Blend) -> int:
    return next(i for i in range(1000) if one.draw(i) != two.draw(i))


@pytest.mark.parametrize(
    "change",
    [
        {"first": {"a/x": 0.51, "b/y": 0.49}},
        {"first": SECOND},
        {"end": 41},
        {"end": 40},
        {"end": 90},
        {"second": {"a/x": 0.3, "b/y": 0.7}},
        {"second": FIRST},
        {"first": {"c/new": 0.01, "a/x": 0.5, "b/y": 0.49}, "c/new": 1.0},
    ],
    ids=str,
)
def test_rewriting_history_is_refused_with_the_first_sample_that_differs(
    open_: Callable, two_phases: Callable, change: dict
) -> None:
    before, after = open_(two_phases()), open_(two_phases(**change))
    sample = first_difference(before, after)
    consumed = max(70, sample + 1)
    with pytest.raises(ValueError, match=rf"sample {sample} came from .* {consumed} samples are consumed"):
        resume_blend(after, saved=saved(before), consumed_samples=consumed)
    resume_blend(after, saved=saved(before), consumed_samples=sample)  # nothing that was read differs
    resume_blend(after, saved=saved(before), consumed_samples=consumed, allow=["data.phases"])


def test_a_difference_too_far_to_find_is_refused_all_the_same(open_: Callable, two_phases: Callable) -> None:
    tiny = {"a/x": 0.500000000001, "b/y": 0.5}
    before, after = open_(two_phases(end=10**9)), open_(two_phases(end=10**9, first=tiny))
    with pytest.raises(ValueError, match=r"shares change from sample 0 on"):
        resume_blend(after, saved=saved(before), consumed_samples=10**8)


def test_changed_sources_are_refused(open_: Callable, two_phases: Callable, blended: Callable) -> None:
    before = open_(two_phases())
    changed = open_(two_phases(), fingerprint="g")
    with pytest.raises(ValueError, match=r"a/x has changed .* 1000 tokens in 40 windows then.* data\.groups"):
        resume_blend(changed, saved=saved(before), consumed_samples=1)
    resume_blend(changed, saved=saved(before), consumed_samples=0)
    resume_blend(changed, saved=saved(before), consumed_samples=1, allow=["data.groups"])
    with pytest.raises(ValueError, match="lacks b/y, which the run has read"):
        resume_blend(open_(blended({"a/x": 1})), saved=saved(before), consumed_samples=5)


def test_a_source_that_was_not_read_yet_may_change(open_: Callable, two_phases: Callable) -> None:
    config = two_phases(first={"a/x": 1})
    before, after = open_(config), open_(config)
    after.sources["b/y"].fingerprint = "g"
    resume_blend(after, saved=saved(before), consumed_samples=60)
    with pytest.raises(ValueError, match="b/y has changed"):
        resume_blend(after, saved=saved(before), consumed_samples=70)


@pytest.mark.parametrize(
    ("key", "value", "old"),
    [
        ("data.seq_len", 128, 256),
        ("data.reset_attention", True, False),
        ("data.mask_eod_loss", True, False),
        ("seed", 7, 0),
    ],
)
def test_changed_options_are_refused(
    open_: Callable, two_phases: Callable, key: str, value: object, old: object
) -> None:
    before = open_(two_phases())
    after = open_(two_phases(), seed=value if key == "seed" else 0)
    if key != "seed":
        setattr(after.config, key.removeprefix("data."), value)
    with pytest.raises(ValueError, match=rf"{key}={value}, but .* with {old}.*resume_allow"):
        resume_blend(after, saved=saved(before), consumed_samples=1)
    resume_blend(after, saved=saved(before), consumed_samples=1, allow=[key])
