"""The tour's fixture."""

from __future__ import annotations

import pytest

from tests.bad_input.tour import Tour


@pytest.fixture
def tour(tiny_data, tmp_path, monkeypatch, capsys):
    """A `Tour` whose home is the current directory, so that whatever is written by a relative name is noticed too."""
    monkeypatch.chdir(tmp_path)
    return Tour(tmp_path, tiny_data, monkeypatch, capsys)
