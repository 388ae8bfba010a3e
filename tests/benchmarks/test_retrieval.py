"""`make retrieval TINY=1`: every row, column and file is there; and questions are what the page says they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import retrieval
from benchmarks.retrieval_data import LINE, Material


@pytest.fixture
def material() -> Material:
    """Text of the tokens 100 to 199; words 10 to 33."""
    draw = np.random.default_rng(1)
    return Material(draw.integers(100, 200, 5000), np.arange(10, 34).reshape(3, 8), newline=1, eod=0)


def lines_in(tokens: np.ndarray) -> list[tuple[int, tuple[int, int], int]]:
    """(position, key, value) of every line of a document."""
    starts = np.flatnonzero(tokens == 1)
    return [
        (int(at), (int(tokens[at + 1]), int(tokens[at + 2])), int(tokens[at + 3]))
        for at in starts
        if at + 3 < len(tokens)
    ]


def test_a_key_has_one_value_in_a_document_and_those_of_questions_are_not_trained(material: Material) -> None:
    trained, asked = ({tuple(key) for key in keys.tolist()} for keys in material.keys)
    assert not trained & asked
    assert len(trained | asked) == 64
    draw, counts = np.random.default_rng(0), set()
    for _ in range(100):
        tokens = material.document(draw, 256, lines=40)
        assert (len(tokens), tokens[-1]) == (256, 0)
        lines = lines_in(tokens)
        values = {key: value for _, key, value in lines}
        assert all(values[key] == value for _, key, value in lines)
        assert set(values) <= trained
        counts.add(len(lines))
    assert (min(counts), max(counts)) == (2, 40)


@pytest.mark.parametrize("depth", retrieval.DEPTHS)
def test_a_question_is_asked_once_at_its_depth(material: Material, depth: float) -> None:
    draw = np.random.default_rng(0)
    for key in material.keys[1]:
        tokens, value = material.question(draw, 256, key=key, depth=depth, others=6)
        assert len(tokens) == 256
        assert tokens[-LINE + 1 :].tolist() == [1, *key]
        lines = lines_in(tokens)
        assert len(lines) == 7
        ((at, _, found),) = [line for line in lines if line[1] == tuple(key)]
        assert found == value
        assert at == round(depth * (256 - 2 * LINE + 1))


class Reader(torch.nn.Module):
    """Knows the answer: it looks for the key with which a question ends, and reads on; a `blind` one sees the last `sees` tokens."""

    def __init__(self, sees: int) -> None:
        super().__init__()
        self.sees = sees

    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        answers = torch.zeros(*tokens_BT.shape, 64)
        for row, tokens in enumerate(tokens_BT.numpy()):
            for at in range(max(0, len(tokens) - self.sees), len(tokens) - LINE):
                if (tokens[at : at + 3] == tokens[-3:]).all():
                    answers[row, -1, tokens[at + 3]] = 1
        return answers

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_what_is_counted_are_right_answers(material: Material) -> None:
    draw = np.random.default_rng(0)
    asked = [
        material.question(draw, 128, key=key, depth=depth, others=3)
        for depth in retrieval.DEPTHS
        for key in material.keys[1]
    ]
    questions, values = np.stack([tokens for tokens, _ in asked]), [value for _, value in asked]
    assert retrieval.share_right(Reader(sees=128), questions, values, batch=7) == 1.0
    assert retrieval.share_right(Reader(sees=64), questions, values, batch=7) == 0.5


@pytest.mark.slow
def test_the_demo_has_every_row_column_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--size", "tiny", "--folder", str(tmp_path)]
    retrieval.main(words)
    found = json.loads((tmp_path / "retrieval.json").read_text())
    assert list(found["accuracy"]) == ["short at 32", "short at 64", "extended at 32", "extended at 64"]
    assert all(np.shape(shares) == (1, 4) for shares in found["accuracy"].values())
    assert set(found["claims"]) == {"at least 90% at 64", "under 20% without the extension"}
    table = [line for line in (tmp_path / "retrieval.md").read_text().split("\n") if line.startswith("|")]
    assert len(table) == 2 + 4
    assert {line.count("|") for line in table} == {9}
    assert (tmp_path / "retrieval.png").stat().st_size > 10_000
    config = (tmp_path / "extended" / "seed_0" / "config.yaml").read_text()
    assert "cp: 2" in config
    assert "processor" in capsys.readouterr().out
    monkeypatch.setattr("subprocess.run", lambda *words, **keys: pytest.fail("trained again"))
    retrieval.main(words)
    assert json.loads((tmp_path / "retrieval.json").read_text())["accuracy"] == found["accuracy"]
