"""Every wrong data config is refused with its key, its value and a way out, before a file is opened."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from megatron_lite.data.config import DataConfig, GroupConfig, PhaseConfig, SourceConfig, ValidationConfig


def good() -> DataConfig:
    return DataConfig(
        groups={
            "english": GroupConfig(weight=0.7, sources={"wiki": SourceConfig("w"), "books": SourceConfig("b")}),
            "code": GroupConfig(weight=0.3, sources={"python": SourceConfig("p", validation="pv")}),
        },
        phases=[PhaseConfig(until_fraction=0.5), PhaseConfig(weights={"code": 1, "english/wiki": 1})],
    )


def test_a_good_config_passes() -> None:
    good().validate()
    assert list(good().sources()) == ["code/python", "english/books", "english/wiki"]


def wiki(config: DataConfig) -> SourceConfig:
    return config.groups["english"].sources["wiki"]


BAD: list[tuple[Callable[[DataConfig], object], str]] = [
    (lambda c: setattr(c, "seq_len", 0), r"data\.seq_len=0 must be at least 1"),
    (lambda c: setattr(c, "validation", ValidationConfig(windows=0)), r"data\.validation\.windows=0"),
    (lambda c: c.groups.clear(), r"data\.groups is empty"),
    (lambda c: c.groups["code"].sources.clear(), r"data\.groups\.code\.sources is empty"),
    (lambda c: setattr(c.groups["code"], "weight", -1.0), r"data\.groups\.code\.weight=-1\.0 must be .* >= 0"),
    (lambda c: setattr(c.groups["code"], "weight", math.nan), r"data\.groups\.code\.weight=nan"),
    (lambda c: setattr(c.groups["code"], "alpha", -0.5), r"data\.groups\.code\.alpha=-0\.5"),
    (lambda c: setattr(wiki(c), "weight", math.inf), r"data\.groups\.english\.sources\.wiki\.weight=inf"),
    (lambda c: setattr(wiki(c), "weight", 2.0), r"english\.sources\.books has no weight, but others"),
    (
        lambda c: [setattr(s, "weight", 0.0) for s in c.groups["english"].sources.values()],
        r"data\.groups\.english: its sources' weights are all 0",
    ),
    (
        lambda c: (setattr(wiki(c), "weight", 2.0), setattr(c.groups["english"], "alpha", 0.5)),
        r"english has alpha=0\.5 and weights",
    ),
    (lambda c: c.groups.update({"a/b": c.groups["code"]}), r"must not contain '/'"),
    (lambda c: setattr(wiki(c), "path", "b"), r"wiki and english/books both read 'b'"),
    (lambda c: setattr(wiki(c), "validation", "w"), r"english/wiki and english/wiki both read 'w'"),
    (lambda c: setattr(c.phases[1], "until_samples", 9), r"phases\[1\] is the last phase"),
    (lambda c: setattr(c.phases[0], "until_fraction", None), r"phases\[0\] has no end"),
    (lambda c: setattr(c.phases[0], "until_samples", 9), r"until_samples=9 and until_fraction=0\.5; keep one"),
    (lambda c: setattr(c.phases[0], "until_fraction", 1.5), r"phases\[0\]\.until_fraction=1\.5"),
    (lambda c: c.phases.insert(0, PhaseConfig(until_samples=0)), r"phases\[0\]\.until_samples=0"),
    (lambda c: c.phases[1].weights.update(cod=1.0), r"phases\[1\]\.weights names 'cod', which is not among"),
    (lambda c: c.phases[1].weights.update(code=-2.0), r"phases\[1\]\.weights\.code=-2\.0"),
    (lambda c: setattr(c.phases[1], "weights", {"code": 0.0}), r"phases\[1\]\.weights are all 0"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_configs(spoil: Callable[[DataConfig], object], message: str) -> None:
    config = good()
    spoil(config)
    with pytest.raises(ValueError, match=message):
        config.validate()
