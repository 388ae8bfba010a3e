"""`make retrieval TINY=1`: every row, column and file is there; and questions are what the page says they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import retrieval
from benchmarks.retrieval_data import Material
from megatron_lite.models.config import AttentionConfig, ModelConfig, RopeConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.initialization import initialize_model_


@pytest.fixture
def material() -> Material:
    """Text of the tokens 100 to 199 and of some pairs that would be keys; words 10 to 33."""
    draw = np.random.default_rng(1)
    text = draw.integers(100, 200, 5000)
    text[1000:1040] = np.stack([np.repeat(10, 8), np.arange(18, 26)] + [draw.integers(100, 200, 8)] * 3, axis=1).ravel()
    return Material(text, np.arange(10, 34).reshape(3, 8), newline=1, eod=0)


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
    assert len(asked) == 13  # 20 %
    assert not any(first == 10 for first, _ in asked)  # those are in the text
    draw, counts = np.random.default_rng(0), set()
    for _ in range(100):
        tokens = material.document(draw, 256, lines=(4, 40))
        assert (len(tokens), tokens[-1]) == (256, 0)
        lines = lines_in(tokens)
        values = {key: value for _, key, value in lines}
        assert all(values[key] == value for _, key, value in lines)
        assert set(values) <= trained
        counts.add(len(lines))
    assert min(counts) == 4
    assert 36 <= max(counts) <= 40


def test_every_asked_key_stands_once_at_its_depth(material: Material) -> None:
    draw, asked_keys = np.random.default_rng(0), {tuple(key) for key in material.keys[1].tolist()}
    for _ in range(20):
        question = material.question(draw, 256, asked=4, others=1)
        assert len(question.tokens) == 256
        assert question.stands_at.tolist() == [0, 60, 120, 180]  # 4 sections of 60 tokens, and 16 tokens that ask
        *before, _, _, _, _ = lines = lines_in(np.append(question.tokens, 0))
        assert len(lines) == 4 + 4 + 4
        assert len({value for _, _, value in before}) == 8
        by_place = {at: (key, value) for at, key, value in lines}
        assert sorted(question.asked_at - 2) == [240, 244, 248, 252]
        for stands_at, asked_at, value in zip(question.stands_at, question.asked_at, question.values):
            assert by_place[stands_at] == by_place[asked_at - 2]
            assert by_place[stands_at][1] == value
            assert by_place[stands_at][0] in asked_keys
            assert [key for _, key, _ in lines].count(by_place[stands_at][0]) == 2


class Reader(torch.nn.Module):
    """Knows the answers: after a key it looks for the same one among the last `sees` tokens, and reads on."""

    def __init__(self, sees: int) -> None:
        super().__init__()
        self.sees = sees

    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        answers = torch.zeros(*tokens_BT.shape, 64)
        for row, tokens in enumerate(tokens_BT.numpy()):
            for now in range(3, len(tokens)):
                for at in range(max(0, now + 1 - self.sees), now - 2):
                    if (tokens[at : at + 3] == tokens[now - 2 : now + 1]).all() and tokens[at] == 1:
                        answers[row, now, tokens[at + 3]] = 1
        return answers

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_what_is_counted_are_right_answers(material: Material) -> None:
    size = dataclasses.replace(retrieval.SIZES["tiny"], questions=5)
    assert retrieval.accuracies(Reader(sees=128), material, size, 128) == [1, 1, 1, 1]
    assert retrieval.accuracies(Reader(sees=80), material, size, 128) == [0, 0, 1, 1]


def test_another_rope_base_keeps_the_weights_and_turns_positions_otherwise() -> None:
    config = ModelConfig(
        family="llama", hidden_size=16, vocab_size=32, max_seq_len=32, pattern="*", norm="rmsnorm",
        attention=AttentionConfig(heads=1, kv_heads=1), rope=RopeConfig(base=100.0), init_std=0.5,
    )  # fmt: skip
    decoder = Decoder(config)
    initialize_model_(decoder, seed=0)
    tokens_BT = torch.arange(16)[None]
    same, other = (retrieval.with_rope_base(decoder, base)(tokens_BT) for base in (100.0, 1000.0))
    assert torch.equal(same, decoder(tokens_BT))
    assert not torch.allclose(other, same, atol=1e-3)


@pytest.mark.slow
def test_the_demo_has_every_row_column_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--size", "tiny", "--folder", str(tmp_path)]
    retrieval.main(words)
    found = json.loads((tmp_path / "retrieval.json").read_text())
    assert list(found["accuracy"]) == [
        f"{row} at {length}" for row in ("short", "extended", "short, larger base") for length in (32, 64)
    ]
    assert all(np.shape(shares) == (1, 4) for shares in found["accuracy"].values())
    assert set(found["claims"]) == {"at least 90% at 64", "under 20% without the extension"}
    table = [line for line in (tmp_path / "retrieval.md").read_text().split("\n") if line.startswith("|")]
    assert len(table) == 2 + 6
    assert {line.count("|") for line in table} == {9}
    assert (tmp_path / "retrieval.png").stat().st_size > 10_000
    config = (tmp_path / "extended" / "seed_0" / "config.yaml").read_text()
    assert "cp: 2" in config
    assert "processor" in capsys.readouterr().out
    monkeypatch.setattr("subprocess.run", lambda *words, **keys: pytest.fail("trained again"))
    retrieval.main(words)
    assert json.loads((tmp_path / "retrieval.json").read_text())["accuracy"] == found["accuracy"]
