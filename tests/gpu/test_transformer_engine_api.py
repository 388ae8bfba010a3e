"""The file that says what Transformer Engine's API is, is what the pinned wheel says."""

from __future__ import annotations

import json
from pathlib import Path

from tests.gpu import read_transformer_engine_api
from tests.transformer_engine_on_cpu import needs_wheel

FILE = Path(__file__).parent / "transformer_engine_api.json"
API = json.loads(FILE.read_text())


@needs_wheel
def test_the_file_is_up_to_date():
    assert FILE.read_text() == read_transformer_engine_api.text(), "run the command in the reader's first lines"
