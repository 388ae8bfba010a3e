"""Letters of layers."""

from __future__ import annotations

import pytest

from megatron_lite.models.pattern import expand


def test_unit_is_repeated():
    assert expand(unit="*-", num_layers=3, pattern=None) == "*-*-*-"


def test_pattern_is_taken_as_it_is():
    assert expand(unit="*-", num_layers=None, pattern="-*--") == "-*--"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "*-", "num_layers": 2, "pattern": "*-"}, "exclude each other"),
        ({"unit": "*-", "num_layers": None, "pattern": None}, "model.num_layers=None"),
        ({"unit": "*-", "num_layers": 0, "pattern": None}, "model.num_layers=0"),
        ({"unit": "", "num_layers": 2, "pattern": None}, "model.unit is empty"),
        ({"unit": "*-", "num_layers": None, "pattern": ""}, "model.pattern is empty"),
        ({"unit": "M-", "num_layers": 2, "pattern": None}, r"'M' at place 0; the known letters are '\*' attention"),
        ({"unit": "*-", "num_layers": None, "pattern": "*-H-"}, "'H' at place 2; the known letters are"),
    ],
)
def test_wrong_patterns_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        expand(**arguments)
