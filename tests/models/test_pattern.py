"""Symbols of layers."""

from __future__ import annotations

import pytest

from megatron_lite.models.pattern import expand


def test_blocks_are_repeated():
    assert expand(num_layers=3, pattern=None) == "*-*-*-"


def test_pattern_is_taken_as_it_is():
    assert expand(num_layers=None, pattern="-*--") == "-*--"


@pytest.mark.parametrize(
    ("num_layers", "pattern", "message"),
    [
        (2, "*-", "exclude each other"),
        (None, None, "model.num_layers=None"),
        (0, None, "model.num_layers=0"),
        (None, "", "model.pattern is empty"),
        (None, "*-H-", r"'H' at place 2; the known layer types are '\*' attention"),
    ],
)
def test_wrong_patterns_are_named(num_layers, pattern, message):
    with pytest.raises(ValueError, match=message):
        expand(num_layers=num_layers, pattern=pattern)
