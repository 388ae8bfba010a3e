"""A run of an earlier version goes on: fixtures/format_1 holds its data, its checkpoint of step 10 of 20 in format 1 with flat model
keys, and the rows of the same run without the stop.

Made with the command in MODEL and tests/runs.py at version 0.1; never made again, since only the version that wrote it can.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.weights import load
from tests import runs

FIXTURE = Path(__file__).parent / "fixtures" / "format_1"
MODEL = [
    "model.hidden_size=16", "model.attention.head_dim=4", "model.mlp.ffn_size=32", "checkpoint.every=10",
]  # fmt: skip


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy to work in; the paths in its manifest are relative to it."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Path("run")


def test_a_run_of_format_1_resumes_on_its_curve(old):
    before = runs.curve(old)
    assert runs.run(Path("data"), old, *MODEL) == 0
    whole = [json.loads(line) for line in Path("uninterrupted.jsonl").read_text().splitlines()]
    whole = [row for row in whole if "loss" in row]
    resumed = runs.rows(old)
    assert runs.curve(old)[:10] == before
    for key in ("step", "consumed_samples", "lr"):
        assert [row[key] for row in resumed] == [row[key] for row in whole]
    for key in ("loss", "grad_norm"):
        # Another CPU sums in another order: over 20 steps that moved such curves by up to 1.1e-4. Adam's moments, the position
        # or a tensor lost on the way move the next losses by more than 1e-3.
        assert [row[key] for row in resumed] == pytest.approx([row[key] for row in whole], rel=5e-4)


def test_its_config_is_read_under_the_keys_of_today(old):
    stored = json.loads((old / "checkpoints" / "step_00000010" / "manifest.json").read_text())
    assert stored["format_version"] == 1
    assert stored["config"]["model"]["num_heads"] == 4
    manifest = read_manifest(old / "checkpoints" / "step_00000010")
    assert "num_heads" not in manifest["config"]["model"]
    assert manifest["config"]["model"]["attention"] == {"heads": 4, "kv_heads": 2, "head_dim": 4}
    model, tokenizer = load(old)
    assert (model.config.attention.heads, model.config.rope.fraction, len(tokenizer)) == (4, 0.5, 384)


@pytest.mark.parametrize("change", ["model.mlp.ffn_size=64", "model.rope.base=500"])
def test_another_model_is_still_refused(old, change):
    key, _, value = change.partition("=")
    with pytest.raises(ValueError, match=rf"{key}={value}.* \(checkpoint: "):
        runs.run(Path("data"), old, *MODEL, change)
