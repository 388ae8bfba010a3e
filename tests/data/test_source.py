"""Windows and masks against a slow reference over plain lists; every kind of wrong file is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.blend import open_blend
from megatron_lite.data.config import DataConfig, GroupConfig, SourceConfig
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.sidecar import TokenizerIdentity, read_sidecar
from megatron_lite.data.source import Source, open_sources, open_validation

EOD = 1


def reference(documents: list[list[int]], k: int, config: DataConfig) -> dict[str, list]:
    """Example k token by token, each token carrying the number of its document."""
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    begin = k * config.seq_len
    example: dict[str, list] = {"tokens": [], "targets": [], "loss_mask": [], "documents": []}
    for at in range(begin, begin + config.seq_len):
        (token, document), (target, next_document) = stream[at], stream[at + 1]
        counts = not (config.mask_eod_loss and target == EOD)
        if config.reset_attention and next_document != document:
            counts = False
        example["tokens"].append(token)
        example["targets"].append(target)
        example["loss_mask"].append(counts)
        example["documents"].append(document - stream[begin][1])
    if not config.reset_attention:
        del example["documents"]
    return example


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("mask_eod", [False, True])
@pytest.mark.parametrize(("seq_len", "longest"), [(16, 40), (16, 2), (1, 3), (50, 9)])
def test_examples_equal_the_slow_reference(
    write_source: Callable, tokenizer: TokenizerIdentity, reset: bool, mask_eod: bool, seq_len: int, longest: int
) -> None:
    config = DataConfig(seq_len=seq_len, reset_attention=reset, mask_eod_loss=mask_eod)
    prefix, documents = write_source("x", documents=60, longest=longest)
    source = Source("a/x", prefix, config=config, tokenizer=tokenizer)
    tokens = sum(map(len, documents))
    assert source.num_windows == (tokens - 1) // seq_len
    for k in range(source.num_windows):
        example = source.example(k)
        expected = reference(documents, k, config)
        assert {key: value.tolist() for key, value in example.items()} == expected
        assert example["tokens"].dtype == example["targets"].dtype == np.int64
        assert example["loss_mask"].dtype == bool


def test_every_target_is_counted_once_an_epoch(write_source: Callable, tokenizer: TokenizerIdentity) -> None:
    prefix, documents = write_source("x")
    source = Source("a/x", prefix, config=DataConfig(seq_len=7), tokenizer=tokenizer)
    targets = np.concatenate([source.example(k)["targets"] for k in range(source.num_windows)])
    stream = [token for document in documents for token in document]
    assert targets.tolist() == stream[1 : 1 + 7 * source.num_windows]
    assert len(stream) - 1 - len(targets) < 7


def test_a_foreign_file_needs_no_side_car(write_source: Callable, tokenizer: TokenizerIdentity) -> None:
    prefix, _ = write_source("x", manifest=False)
    source = Source("a/x", prefix, config=DataConfig(seq_len=8), tokenizer=tokenizer)
    assert source.sidecar is None
    other = replace(tokenizer, eod=5)
    with pytest.raises(ValueError, match=r"document 0 ends with token 1 instead of .* 5; .*data\.eod_id"):
        Source("a/x", prefix, config=DataConfig(seq_len=8), tokenizer=other)
    Source("a/x", prefix, config=DataConfig(seq_len=8, eod_id=1), tokenizer=other)


def test_the_last_document_is_checked_too(tmp_path: Path, tokenizer: TokenizerIdentity) -> None:
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document([5, 6, EOD])
        writer.add_document([5, 6, 7])
    with pytest.raises(ValueError, match="document 1 ends with token 7 instead"):
        Source("a/x", tmp_path / "x", config=DataConfig(seq_len=2), tokenizer=tokenizer)


def test_another_tokenizer_is_refused_with_both_names(write_source: Callable, tokenizer: TokenizerIdentity) -> None:
    prefix, _ = write_source("x")
    other = replace(tokenizer, fingerprint="xyz", name="llama")
    message = r"tokenizer sample \(abc\), but the run has llama \(xyz\)"
    with pytest.raises(ValueError, match=message):
        Source("a/x", prefix, config=DataConfig(seq_len=8), tokenizer=other)


def test_token_ids_beyond_the_vocabulary_are_refused(write_source: Callable, tokenizer: TokenizerIdentity) -> None:
    prefix, _ = write_source("x", manifest=False)
    small = replace(tokenizer, vocab_size=100)
    # when the source is opened, before step 1
    with pytest.raises(ValueError, match=r"a/x .*token ids .* ids up to 99"):
        Source("a/x", prefix, config=DataConfig(seq_len=50), tokenizer=small)


@pytest.mark.parametrize("at", ["first", "middle", "last", "everywhere"])
@pytest.mark.parametrize("as_sequence", [False, True])
def test_documents_without_tokens_change_nothing(
    write_source: Callable, tokenizer: TokenizerIdentity, tmp_path: Path, at: str, as_sequence: bool
) -> None:
    """Megatron-LM's tools write an empty line as a document without a sequence, or with a sequence of length 0."""
    prefix, documents = write_source("x", documents=20, manifest=False)
    places = {"first": [0], "middle": [10], "last": [20], "everywhere": [0, 0, 10, 10, 20, 20]}[at]
    lengths = [len(document) for document in documents]
    if as_sequence:
        for place in reversed(places):
            lengths.insert(place, 0)
        starts = list(range(len(lengths) + 1))
    else:
        starts = sorted([*range(len(lengths) + 1), *places])
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 2
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(starts))
    index += (
        np.array(lengths, "<i4").tobytes() + np.array([pointers], "<i8").tobytes() + np.array(starts, "<i8").tobytes()
    )
    (tmp_path / "holes.idx").write_bytes(index)
    shutil.copy(f"{prefix}.bin", tmp_path / "holes.bin")
    config = DataConfig(seq_len=16, reset_attention=True)
    plain, holes = (Source("a/x", path, config=config, tokenizer=tokenizer) for path in (prefix, tmp_path / "holes"))
    assert holes.num_documents == plain.num_documents + len(places)
    for k in range(plain.num_windows):
        for key, value in plain.example(k).items():
            assert holes.example(k)[key].tolist() == value.tolist()
    with pytest.raises(ValueError, match=r"ends with token 1 instead of .* 5"):
        Source("a/x", tmp_path / "holes", config=config, tokenizer=replace(tokenizer, eod=5))


def test_too_few_tokens_for_one_window(write_source: Callable, tokenizer: TokenizerIdentity) -> None:
    prefix, documents = write_source("x", documents=3)
    tokens = sum(map(len, documents))
    Source("a/x", prefix, config=DataConfig(seq_len=tokens - 1), tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match=rf"has {tokens} tokens, .* = {tokens + 1}; lower data\.seq_len to {tokens - 1}"
    ):
        Source("a/x", prefix, config=DataConfig(seq_len=tokens), tokenizer=tokenizer)


def test_side_cars_that_do_not_fit_or_cannot_be_read(write_source: Callable, tokenizer: TokenizerIdentity) -> None:
    prefix, _ = write_source("x")
    path = Path(f"{prefix}.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"tokens": 7, "unknown": 1}))
    with pytest.raises(ValueError, match="40 documents and 7 tokens, the files hold 40 and"):
        Source("a/x", prefix, config=DataConfig(seq_len=8), tokenizer=tokenizer)
    for damaged in ("{", "[]", '{"tokens": 7}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"x\.json is damaged"):
            read_sidecar(prefix)


def test_fingerprints_follow_the_content(write_source: Callable, tokenizer: TokenizerIdentity, tmp_path: Path) -> None:
    config = DataConfig(seq_len=8)

    def fingerprint(prefix: str) -> str:
        return Source("a/x", prefix, config=config, tokenizer=tokenizer).fingerprint

    one, _ = write_source("one")
    copy, _ = write_source("copy")
    other, _ = write_source("other", seed=1)
    assert fingerprint(one) == fingerprint(copy) != fingerprint(other)
    tokens = bytearray(Path(f"{copy}.bin").read_bytes())
    tokens[0] ^= 1
    Path(f"{copy}.bin").write_bytes(tokens)
    assert fingerprint(one) != fingerprint(copy)


def test_a_source_more_is_config_only(write_source: Callable, tokenizer: TokenizerIdentity) -> None:
    files = {name: write_source(name, seed=seed)[0] for seed, name in enumerate(["wiki", "held", "python"])}
    config = DataConfig(seq_len=8)
    config.groups["english"] = GroupConfig(sources={"wiki": SourceConfig(files["wiki"], validation=files["held"])})
    assert list(open_sources(config, tokenizer)) == ["english/wiki"]
    config.groups["code"] = GroupConfig(sources={"python": SourceConfig(files["python"])})
    blend = open_blend(config, tokenizer=tokenizer, seed=0, total_samples=100)
    assert blend.counts(0, 10) == {"code/python": 5, "english/wiki": 5}
    draw = blend.draw(3)
    assert (blend[3]["tokens"] == blend.sources[draw.source].example(draw.window)["tokens"]).all()
    validation = open_validation(config, tokenizer)
    assert {name: source.dataset.prefix for name, source in validation.items()} == {"english/wiki": files["held"]}
    state = json.loads(json.dumps(blend.state()))
    assert state == blend.state()


def test_a_bad_config_is_refused_before_files_are_opened(tokenizer: TokenizerIdentity) -> None:
    with pytest.raises(ValueError, match=r"data\.groups is empty"):
        open_blend(DataConfig(), tokenizer=tokenizer, seed=0, total_samples=1)
