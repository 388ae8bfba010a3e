"""The families demo at its smallest: every arm, column and file is there, and the arms are as equal as it says."""

from __future__ import annotations

import json

import pytest

from benchmarks import families


@pytest.mark.slow
def test_every_arm_column_and_file_is_there(tiny_data, tmp_path, capsys):
    words = ["--config-dir", str(tiny_data), "data=tiny", "model.vocab_size=384"]
    families.main(["--size", "tiny", "--folder", str(tmp_path), "--", *words])
    arms = ["Nemotron-4", "Llama", "Nano 2", "Hymba"]
    text = (tmp_path / "families.md").read_text()
    assert text in capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n") if line.startswith("|")]
    assert [row[0] for row in table] == ["family", "---", *arms]
    assert table[0][1:] == [
        "non-embedding parameters", "learning rate", "held-out loss, english", "held-out loss, multilingual", "held-out loss, code",
        "training, tokens/s", "generation at 128, tokens/s", "cache at 128, MiB",
    ]  # fmt: skip
    assert {len(row) for row in table} == {9}
    numbers = json.loads((tmp_path / "families.json").read_text())
    assert set(numbers) == {"machine", *arms}
    for arm in arms:
        assert all(len(losses) == 1 for losses in numbers[arm]["held_out_by_seed"].values())
        assert len(numbers[arm]["held_out_by_learning_rate"]) == 1
    # two fp32 numbers of 64 dimensions for each token, layer and group
    assert numbers["Llama"]["cache_bytes"] == 6 * 2 * 64 * 128 * 4
    assert (tmp_path / "families.png").stat().st_size > 10_000


def test_unequal_arms_are_refused():
    options = families.options_of("", name="x", arguments=["--", "model.attention.head_dim=128"])
    with pytest.raises(ValueError, match=r"non-embedding parameters differ by more than 2%.*'Llama': "):
        families.models_of(options)
