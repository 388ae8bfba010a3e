"""Windows of the long documents of a file, against a file in which the short ones were never written."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_tools import inspect
from megatron_lite.data import long_documents
from megatron_lite.data.blend import open_blend
from megatron_lite.data.config import DataConfig, GroupConfig, SourceConfig
from megatron_lite.data.indexed import HEADER, MAGIC, VERSION, IndexedDataset, IndexedWriter
from megatron_lite.data.resume import resume_blend
from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.data.source import Source

EOD = 1


def same_examples(left: Source, right: Source) -> bool:
    assert left.num_windows == right.num_windows
    for k in range(left.num_windows):
        one, other = left.example(k), right.example(k)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one), k
    return True


def test_windows_equal_those_of_a_file_with_the_long_documents_alone(
    write_source: Callable, tokenizer: TokenizerIdentity, tmp_path: Path
) -> None:
    config = DataConfig(seq_len=16, reset_attention=True)
    prefix, documents = write_source("x", documents=200, longest=60)
    for least in (1, 20, 50):
        kept = [document for document in documents if len(document) >= least]
        with IndexedWriter(tmp_path / f"kept_{least}", "uint16") as writer:
            for document in kept:
                writer.add_document(document)
        alone = Source("a/x", tmp_path / f"kept_{least}", config=config, tokenizer=tokenizer)
        for _ in range(2):  # the index is made, and then read
            source = Source("a/x", prefix, config=config, tokenizer=tokenizer, min_document_tokens=least)
            assert (source.num_documents, source.num_tokens) == (len(kept), sum(map(len, kept)))
            assert same_examples(source, alone)
    lengths = np.concatenate([length_D for _, length_D in source.documents.document_lengths()])
    assert lengths.tolist() == [len(document) for document in documents if len(document) >= 50]


def test_documents_of_several_sequences_and_without_tokens_are_measured_as_a_whole(tmp_path: Path) -> None:
    sequences, documents = np.array([3, 4, 0, 5, 2], "<i4"), np.array([0, 2, 3, 3, 5], "<i8")  # of 7, 0, 0 and 7 tokens
    pointers = np.array([0, 6, 14, 14, 24], "<i8")
    header = HEADER.pack(MAGIC, VERSION, 8, len(sequences), len(documents))
    (tmp_path / "x.idx").write_bytes(header + sequences.tobytes() + pointers.tobytes() + documents.tobytes())
    (tmp_path / "x.bin").write_bytes(np.arange(14, dtype="<u2").tobytes())
    ((starts, lengths),) = IndexedDataset(tmp_path / "x").document_lengths()
    assert (starts.tolist(), lengths.tolist()) == ([0, 7, 7, 7], [7, 0, 0, 7])


def test_the_index_is_read_if_it_belongs_to_the_file_and_made_anew_if_not(
    write_source: Callable, tokenizer: TokenizerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(**options) -> Source:
        return Source(
            "a/x", prefix, config=DataConfig(seq_len=8), tokenizer=tokenizer, min_document_tokens=25, **options
        )

    prefix, _ = write_source("x", documents=100, longest=60)
    first = opened()
    with monkeypatch.context() as patch:
        patch.setattr(IndexedDataset, "document_lengths", lambda self: pytest.fail("the lengths were read again"))
        assert same_examples(opened(), first)
    path = long_documents.index_path(prefix, 25)
    path.write_bytes(path.read_bytes()[:200])  # cut off by a full disk
    assert same_examples(opened(), first)
    write_source("x", documents=100, longest=60, seed=1)  # tokenized again
    second = opened()
    assert second.fingerprint != first.fingerprint
    path.unlink()
    assert same_examples(opened(), second)
    with monkeypatch.context() as patch:  # a folder that cannot be written to
        patch.setattr(long_documents, "index_path", lambda prefix, least: Path("/proc/nothing/here.npy"))
        assert same_examples(opened(), second)


def test_a_file_can_be_blended_whole_and_by_its_long_documents_and_resumes(
    write_source: Callable, tokenizer: TokenizerIdentity
) -> None:
    prefix, _ = write_source("x", documents=300, longest=60)
    sources = {"all": SourceConfig(prefix, weight=4), "long": SourceConfig(prefix, weight=1, min_document_tokens=40)}
    config = DataConfig(seq_len=16, groups={"text": GroupConfig(sources=sources)})
    blend = open_blend(config, tokenizer=tokenizer, seed=3, total_samples=1000)
    assert blend.counts(0, 1000) == {"text/all": 800, "text/long": 200}
    windows = blend.sources["text/long"].num_windows
    drawn = [draw.window for draw in map(blend.draw, range(5 * windows)) if draw.source == "text/long"]
    assert sorted(drawn) == list(range(windows))  # one pass reads every window once
    again = open_blend(config, tokenizer=tokenizer, seed=3, total_samples=2000)
    resumed = resume_blend(again, saved=blend.state(), consumed_samples=500)
    assert all(np.array_equal(resumed[i]["tokens"], blend[i]["tokens"]) for i in range(500, 550))
    sources["long"] = replace(sources["long"], min_document_tokens=41)
    other = open_blend(config, tokenizer=tokenizer, seed=3, total_samples=2000)
    with pytest.raises(ValueError, match=r"text/long has changed.*min_document_tokens"):
        resume_blend(other, saved=blend.state(), consumed_samples=500)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": SourceConfig("x", min_document_tokens=-1)}, r"sources\.a\.min_document_tokens=-1"),
        (
            {name: SourceConfig("x", min_document_tokens=least) for name, least in (("a", 8), ("b", 0), ("c", 8))},
            r"long/c and long/a both read 'x'.*min_document_tokens",
        ),
        (
            {"a": SourceConfig("x"), "b": SourceConfig("y", "x", min_document_tokens=8)},
            "long/b and long/a both read 'x'",
        ),
    ],
)
def test_wrong_values_are_refused(sources: dict[str, SourceConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(groups={"long": GroupConfig(sources=sources)}).validate()


def test_a_file_without_long_documents_is_refused(write_source: Callable, tokenizer: TokenizerIdentity) -> None:
    prefix, _ = write_source("x", longest=30)
    with pytest.raises(ValueError, match=r"min_document_tokens=500.*mlite inspect"):
        Source("a/x", prefix, config=DataConfig(seq_len=8), tokenizer=tokenizer, min_document_tokens=500)


def test_lengths_of_documents_are_summed_up(
    write_source: Callable, tokenizer: TokenizerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, documents = write_source("x", documents=101, longest=60)
    monkeypatch.setattr(inspect, "LONG", (1, 30, 60, 1000))
    found = inspect.document_lengths(Source("a/x", prefix, config=DataConfig(seq_len=8), tokenizer=tokenizer))
    lengths = sorted(map(len, documents))
    assert found["quantiles"] == [lengths[i] for i in (10, 50, 90, 99, 100)]
    expected = [sum(length for length in lengths if length >= least) / sum(lengths) for least in (1, 30, 60, 1000)]
    assert found["long"] == pytest.approx(expected, abs=1e-12)


def test_inspect_decodes_the_samples_that_a_run_reads(write_source: Callable, tokenizer: TokenizerIdentity) -> None:
    class Numbers:
        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    prefix, _ = write_source("x", documents=200, longest=60)
    groups = {"text": GroupConfig(sources={"long": SourceConfig(prefix, min_document_tokens=40)})}
    blend = open_blend(DataConfig(seq_len=64, groups=groups), tokenizer=tokenizer, seed=3, total_samples=10)
    for i in range(3):
        printed = io.StringIO()
        inspect._sample(blend, i, Numbers(), 10_000, Console(file=printed, width=10_000))
        lines = [line for line in printed.getvalue().splitlines() if re.fullmatch(r"[0-9 ]+", line)]
        assert [int(number) for line in lines for number in line.split()] == blend[i]["tokens"].tolist()
