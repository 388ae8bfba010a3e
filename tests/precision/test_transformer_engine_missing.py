"""Without a GPU's toolkit, as in this environment: the package may be there, its compiled parts are not."""

from __future__ import annotations

import pytest

from megatron_lite.precision.transformer_engine import load


def test_it_is_refused_with_the_way_out():
    """`import transformer_engine` raises RuntimeError where the package is bare, ImportError where there is none."""
    with pytest.raises(
        ValueError, match=r"transformer_engine.*(RuntimeError|ModuleNotFoundError).*pip install.*emulated"
    ):
        load()
