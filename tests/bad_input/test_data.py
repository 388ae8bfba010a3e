"""Wrong token files and tokenizers: refused before anything is written, naming the file and what to do."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import pytest

from megatron_lite.data.tokenizer import load_tokenizer, train_tokenizer
from tests import runs

PROSE = "data.groups.english.sources.prose"


def cut(file: Path, size: int) -> None:
    """Keep the first `size` bytes, or all but the last `-size`."""
    file.write_bytes(file.read_bytes()[:size])


def overwrite(file: Path, place: int, data: bytes) -> None:
    """Replace bytes, the size stays."""
    content = bytearray(file.read_bytes())
    content[place : place + len(data)] = data
    file.write_bytes(content)


def swap_last_token(prefix: Path) -> None:
    """The last document then does not end with the end-of-document token."""
    overwrite(Path(f"{prefix}.bin"), Path(f"{prefix}.bin").stat().st_size - 2, struct.pack("<H", 77))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shorten(prefix: Path) -> None:
    """One document of a few tokens."""
    runs.write_source(prefix, load_tokenizer(prefix.parent / "tokenizer"), ["the word"])


# name -> (what is done to the files of one source, what is said); the header of an index: magic 9, version 8, dtype 1, counts 8 + 8
FILES = {
    "no .bin": (lambda p: Path(f"{p}.bin").unlink(), r"prose\.bin does not exist; .*correct the path, or tokenize"),
    "no .idx": (lambda p: Path(f"{p}.idx").unlink(), r"prose\.idx does not exist"),
    "a folder for a .bin": (lambda p: (Path(f"{p}.bin").unlink(), Path(f"{p}.bin").mkdir()), r"prose\.bin does not exist"),
    "an empty .bin": (lambda p: cut(Path(f"{p}.bin"), 0), r"prose\.bin is empty"),
    "an empty .idx": (lambda p: cut(Path(f"{p}.idx"), 0), r"prose\.idx is empty"),
    "a truncated .bin": (lambda p: cut(Path(f"{p}.bin"), -2), r"prose\.bin: \d+ bytes, but the index .*copy both again"),
    "a truncated .idx": (lambda p: cut(Path(f"{p}.idx"), -8), r"prose\.idx is truncated: .*copy or tokenize it again"),
    "a header that is cut": (lambda p: cut(Path(f"{p}.idx"), 20), r"prose\.idx is truncated: 20 bytes, the header alone has 34"),
    "a foreign magic": (lambda p: overwrite(Path(f"{p}.idx"), 0, b"TNTIDX\0\0"), r"not a Megatron index: it begins with b'TNTIDX"),
    "text for an index": (lambda p: Path(f"{p}.idx").write_text("once upon a time, there was text here"), r"not a Megatron index"),
    "another version": (lambda p: overwrite(Path(f"{p}.idx"), 9, struct.pack("<Q", 3)), r"prose\.idx has format version 3"),
    "a dtype of floats": (lambda p: overwrite(Path(f"{p}.idx"), 17, b"\x06"), r"prose\.idx has dtype code 6, which is not an integer"),
    "a wider dtype": (lambda p: overwrite(Path(f"{p}.idx"), 17, b"\x04"), r"prose\.bin: \d+ bytes, but the index"),
    "the index of another": (lambda p: shutil.copy(f"{p.parent}/other.idx", f"{p}.idx"), r"belongs to another file"),
    "no end of document": (swap_last_token, r"prose.*ends with token 77 instead of .*--append-eod.*data\.eod_id"),
    "too short": (shorten, r"english/prose .* less than one window of data\.seq_len \+ 1 = 33; lower data\.seq_len to"),
    "a sidecar of another": (lambda p: edit_json(Path(f"{p}.json"), tokens=12), r"prose\.json names .*belongs to another"),
    "a damaged sidecar": (lambda p: cut(Path(f"{p}.json"), 40), r"prose\.json is damaged .*tokenize the source again"),
    "a sidecar of a list": (lambda p: Path(f"{p}.json").write_text("[]"), r"prose\.json is damaged"),
    "another tokenizer's": (lambda p: edit_json(Path(f"{p}.json"), tokenizer="feed"), r"with tokenizer tiny \(feed\).*set data\.tokenizer"),
}  # fmt: skip


@pytest.fixture
def folder(tour):
    """A copy of the token files and the tokenizer that may be damaged."""
    return Path(shutil.copytree(tour.data, tour.home / "data"))


@pytest.mark.parametrize(("damage", "says"), FILES.values(), ids=FILES)
def test_a_damaged_source_is_refused(tour, folder, damage, says):
    damage(folder / "prose")
    typed = [f"{PROSE}.path={folder / 'prose'}"]
    tour.refused("train", *runs.arguments(tour.data, tour.home / "r", *typed), says=says)


def test_a_damaged_validation_file_is_refused_too(tour, folder):
    cut(folder / "prose.validation.bin", -2)
    typed = [f"{PROSE}.validation={folder / 'prose.validation'}"]
    tour.refused(
        "train", *runs.arguments(tour.data, tour.home / "r", *typed), says=r"prose\.validation\.bin: \d+ bytes"
    )


def test_one_file_for_training_and_validation_is_refused(tour):
    typed = [f"{PROSE}.validation={tour.data / 'prose'}"]
    tour.refused(
        "train", *runs.arguments(tour.data, tour.home / "r", *typed), says=r"english/prose and english/prose both read"
    )


def other_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder)
    train_tokenizer(["a b c d e f g h " * 3, "aaaa bbbb cccc"], folder, vocab_size=260)


TOKENIZERS = {
    "no folder": (shutil.rmtree, r"tokenizer folder .* does not exist; give a local folder"),
    "nothing in it": (lambda p: [file.unlink() for file in p.iterdir()], r"holds no tokenizer .*save_pretrained"),
    "no JSON": (lambda p: (p / "tokenizer.json").write_text("{"), r"does not load: .*check that its files are whole"),
    "no end token": (lambda p: edit_json(p / "tokenizer_config.json", eos_token=None), r"has no eos_token.*tokenizer_config\.json"),
    "another one": (other_tokenizer, r"written with tokenizer tiny .*set data\.tokenizer to the first"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_wrong_tokenizer_is_refused(tour, folder, damage, says):
    damage(folder / "tokenizer")
    typed = [f"data.tokenizer={folder / 'tokenizer'}"]
    tour.refused("train", *runs.arguments(tour.data, tour.home / "r", *typed), says=says)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("data.tokenizer=", r"data\.tokenizer is empty: name the folder"),
        ("model.vocab_size=300", r"model\.vocab_size=300 .*set model\.vocab_size=384"),
        ("data.eod_id=5", r"ends with token 0 instead of the end-of-document token 5"),
        ("data.groups.english.sources.prose.path=/nowhere/x", r"/nowhere/x\.idx does not exist"),
    ],
)
def test_what_does_not_belong_together_is_refused(tour, typed, says):
    tour.refused("train", *runs.arguments(tour.data, tour.home / "r", typed), says=says)


def test_a_token_that_the_vocabulary_lacks_ends_the_training(tour, folder):
    """Only the first and the last window of a file are looked at before training: a later one that holds such a token ends it."""
    size = (folder / "prose.bin").stat().st_size
    for place in range(200, size - 200, 40):
        overwrite(folder / "prose.bin", place, struct.pack("<H", 9999))
    typed = [f"{PROSE}.path={folder / 'prose'}", "data.phases=[]"]
    ended = tour.call("train", *runs.arguments(tour.data, tour.home / "r", *typed))
    assert ended.code == 1
    assert re.fullmatch(r"failed: step \d+, [^\n]*\n", ended.err)
    assert "another tokenizer: set data.tokenizer" in ended.err
    assert runs.status(tour.home / "r")["state"] == "failed"
