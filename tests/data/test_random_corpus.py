"""Random data: a run reads it like any other, one writer for many processes, and what does not fit is refused."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.commands.train import train
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.random_corpus import FEWEST_TOKENS, MEAN_DOCUMENT, prepare_random
from megatron_lite.training.config import compose_run
from tests.runs import rows, undrawn

TINY = ["model=nemotron4_tiny", "train.max_steps=2", "train.global_batch_size=8", "data.seq_len=32"]


def prepared(folder: Path, **changed: int) -> list[str]:
    lines: list[str] = []
    prepare_random(folder, **{"vocab_size": 300, "seq_len": 64} | changed, report=lines.append)
    return lines


def test_a_run_reads_it_and_learns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with undrawn():
        assert train(compose_run(["data=random", "run.dir=run", *TINY])) == 0
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses == pytest.approx([math.log(8192)] * len(losses), abs=0.3)  # first logits differ by 0.02 x sqrt(width)
    assert [path.name for path in (tmp_path / "data").iterdir() if path.name[0] != "."] == ["random_8192"]


def test_uniform_tokens_in_documents(tmp_path: Path) -> None:
    prepared(tmp_path / "random")
    data = IndexedDataset(tmp_path / "random/tokens")
    tokens = np.asarray(data.tokens(0, data.num_tokens))
    assert data.num_tokens == FEWEST_TOKENS
    counts = np.bincount(tokens, minlength=300)
    assert counts[0] == data.num_documents
    assert data.num_tokens / data.num_documents == pytest.approx(
        MEAN_DOCUMENT, rel=0.05
    )  # 4,096 draws: 1.6 % is one sigma
    assert np.abs(counts[1:] / counts[1:].mean() - 1).max() < 0.05  # 14,000 draws a token: 0.8 % is one sigma


def test_many_processes_write_it_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        told = [line for lines in pool.map(lambda _: prepared(tmp_path / "random"), range(4)) for line in lines]
    assert sum("writing" in line for line in told if "waiting" not in line) == 1


@pytest.mark.parametrize("changed", [{"vocab_size": 301}, {"seq_len": FEWEST_TOKENS // 2}])
def test_another_corpus_is_refused_and_kept(tmp_path: Path, changed: dict[str, int]) -> None:
    prepared(tmp_path / "random")
    before = (tmp_path / "random/tokens.bin").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"data\.random_corpus"):
        prepared(tmp_path / "random", **changed)
    assert (tmp_path / "random/tokens.bin").stat().st_mtime_ns == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a")
    with pytest.raises(ValueError, match=r"data\.random_corpus"):
        prepared(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "a"
