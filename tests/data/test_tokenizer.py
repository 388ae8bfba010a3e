"""The tokenizer: exact round trips, Nemotron-4's properties, equality with transformers, helpful errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from megatron_lite.data.tokenizer import (
    END_OF_TEXT,
    encode_documents,
    fingerprint,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog 1234567890 times.\n" * 20,
    "def forward(self, x):\n    return self.norm(x) * 0.5\n\n\n" * 20,
    "नमस्ते दुनिया, यह एक परीक्षण है।\n" * 20,
    "Привет, мир! Это проверка.\n" * 20,
]
VOCAB_SIZE = 340


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer"), vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


# Every Unicode string can be encoded but lone surrogates, which are not characters (category Cs).
characters = st.characters(exclude_categories=["Cs"])
astral = st.integers(0x10000, 0x10FFFF).map(chr)
spaces = st.sampled_from([" ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200d", END_OF_TEXT, "7", "a"])


def encoded(tokenizer, text):
    """The ids of a text without the end token."""
    (ids,) = encode_documents(tokenizer, [text])
    return ids[:-1]


@given(st.lists(characters | astral | spaces).map("".join))
def test_any_unicode_string_comes_back_unchanged(tokenizer, text):
    ids = encoded(tokenizer, text)
    assert tokenizer.decode(ids.tolist()) == text


@given(st.lists(characters | spaces, max_size=20).map("".join))
def test_same_ids_as_transformers(folder, tokenizer, text):
    ids = encoded(tokenizer, text)
    assert ids.tolist() == tokenizer(text, split_special_tokens=True)["input_ids"]


def test_every_plane_and_every_byte(tokenizer):
    text = "".join(chr(c) for c in range(0, 0x110000, 251) if not 0xD800 <= c < 0xE000)
    ids = encoded(tokenizer, text)
    assert tokenizer.decode(ids.tolist()) == text


def test_each_digit_is_a_token(tokenizer):
    ids = encoded(tokenizer, "20245 1234567890")
    tokens = [tokenizer.decode([i]) for i in ids]
    assert tokens == [*"20245", " ", *"1234567890"]


def test_no_token_joins_a_digit_with_anything(tokenizer):
    decoded = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    assert all(len(text) == 1 for text in decoded if any(c.isdigit() for c in text))


def test_vocabulary_is_bytes_merges_and_one_special_token(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT
    assert tokenizer.eos_token_id == 0
    assert set(tokenizer.all_special_tokens) == {END_OF_TEXT}
    assert tokenizer.unk_token is None
    assert tokenizer.pad_token is None


def test_end_token_is_appended_and_cannot_be_forged(tokenizer):
    plain, forged = encode_documents(tokenizer, ["fox", f"fox{END_OF_TEXT}"])
    assert plain[-1] == tokenizer.eos_token_id
    assert plain.tolist().count(tokenizer.eos_token_id) == 1
    assert forged.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(forged[:-1].tolist()) == f"fox{END_OF_TEXT}"


def test_encoding_leaves_the_tokenizer_as_it_was(tokenizer):
    backend = tokenizer.backend_tokenizer
    texts = ["a", "the quick brown fox", "over"]
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=5)
    try:
        decoded = [tokenizer.decode(ids.tolist()) for ids in encode_documents(tokenizer, texts, chunk=2)]
        assert decoded == [text + END_OF_TEXT for text in texts]
        assert backend.truncation["max_length"] == 2
        assert backend.padding["length"] == 5
        assert tokenizer(END_OF_TEXT)["input_ids"][:1] == [0]
    finally:
        backend.no_truncation()
        backend.no_padding()


def test_dtype_follows_the_vocabulary(tokenizer, tmp_path):
    assert next(encode_documents(tokenizer, ["a"])).dtype == np.uint16
    tokenizer_json = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = tokenizer_json["model"]["vocab"]
    vocabulary.update({f"filler{i}": i for i in range(len(vocabulary), 70_000)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    large = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=END_OF_TEXT)
    assert next(encode_documents(large, ["a"])).dtype == np.int32


def test_training_gives_the_same_files_in_another_process(folder, tmp_path):
    code = (
        "import sys, json; from megatron_lite.data.tokenizer import train_tokenizer;"
        "train_tokenizer(json.loads(sys.argv[1]), sys.argv[2], vocab_size=int(sys.argv[3]))"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(TEXTS), tmp_path, str(VOCAB_SIZE)], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("model_type", ["nemotron", "llama"])
def test_loads_the_same_beside_a_model(folder, tokenizer, tmp_path, model_type):
    """An exported model has a config.json in the folder, from which AutoTokenizer could take another class."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "  leading, trailing  \n\n"]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_fingerprint_survives_saving_again(folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(folder) == fingerprint(str(folder)) == fingerprint(tokenizer) == fingerprint(tmp_path)


def test_fingerprint_tells_tokenizers_apart(folder, tmp_path):
    other = train_tokenizer(TEXTS[:3], tmp_path / "texts", vocab_size=VOCAB_SIZE)
    smaller = train_tokenizer(TEXTS, tmp_path / "size", vocab_size=VOCAB_SIZE - 1)
    split = Path(shutil.copytree(folder, tmp_path / "split"))  # the same vocabulary, spaces cut off from words
    path = split / "tokenizer.json"
    path.write_text(path.read_text().replace('" ?[\\\\p{L}', '"[\\\\p{L}'))
    end = Path(shutil.copytree(folder, tmp_path / "end"))
    path = end / "tokenizer_config.json"
    path.write_text(path.read_text().replace(f'"eos_token": "{END_OF_TEXT}"', '"eos_token": "the"'))
    merges = Path(shutil.copytree(folder, tmp_path / "merges"))
    path = merges / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].reverse()
    path.write_text(json.dumps(content))
    folders = [folder, other, smaller, split, end, merges]
    assert len({fingerprint(f) for f in folders}) == len(folders)


def test_slow_tokenizers_work_too(tmp_path):
    """ByT5's tokenizer is pure Python: no backend, no tokenizer.json."""
    slow = ByT5Tokenizer()
    slow.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert fingerprint(loaded) == fingerprint(slow)
    (ids,) = encode_documents(loaded, ["añ </s>"])
    assert ids.tolist() == [byte + 3 for byte in "añ </s>".encode()] + [loaded.eos_token_id]


def test_errors_name_the_path_and_the_way_out(folder, tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=r"nowhere.*does not exist.*local folder"):
        load_tokenizer(missing)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty.*holds no tokenizer.*save_pretrained"):
        load_tokenizer(empty)
    endless = Path(shutil.copytree(folder, tmp_path / "endless"))
    (endless / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=r"endless.*no eos_token.*tokenizer_config.json"):
        load_tokenizer(endless)
    torn = Path(shutil.copytree(folder, tmp_path / "torn"))
    (torn / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000])
    with pytest.raises(ValueError, match=r"torn.*does not load.*whole"):
        load_tokenizer(torn)


def test_code_in_a_folder_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not load"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_vocabulary_sizes_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=256 .*257"):
        train_tokenizer(TEXTS, tmp_path / "a", vocab_size=256)
    with pytest.raises(ValueError, match=r"vocab_size=5000 .*lower it"):
        train_tokenizer(["too short"], tmp_path / "b", vocab_size=5000)
    assert not (tmp_path / "b" / "tokenizer.json").exists()
