"""Bytes of text by token id: they add up to the bytes of the text, whatever kind the tokenizer is."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from megatron_lite.data.token_bytes import bits_per_byte, bytes_per_token, token_bytes
from megatron_lite.data.tokenizer import load_tokenizer, train_tokenizer
from tests.hf_folders import TEXTS, metaspace_tokenizer


def byte_level(folder):
    return load_tokenizer(train_tokenizer(TEXTS * 3, folder, vocab_size=300))


def metaspace(folder):
    return load_tokenizer(metaspace_tokenizer(folder))


def bytes_alone(folder):
    return ByT5Tokenizer()


@pytest.mark.parametrize("kind", [byte_level, metaspace, bytes_alone])
def test_they_add_up_to_the_text(kind, tmp_path):
    tokenizer = kind(tmp_path)
    sizes = token_bytes(tokenizer)
    first = 1 if kind is metaspace else 0  # the space that SentencePiece puts in front of a text
    for text in [*TEXTS, "e\u0301 नमस्ते 你好\n\n  x = 1\t# 🙂"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sizes[ids].sum() == len(text.encode()) + first, text
    assert sizes[tokenizer.all_special_ids].sum() == 0
    assert len(sizes) == max(tokenizer.get_vocab().values()) + 1


def test_pieces_of_words_and_tokens_of_ones_own(tmp_path):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:1], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")
    wrapped.add_tokens(["<tool>", "<turn>", AddedToken("<call>", special=True)])  # <call>: special, and has no role
    wrapped.eos_token = "<turn>"  # has a role, and was not added as a special one
    sizes, vocabulary = token_bytes(wrapped), wrapped.get_vocab()
    assert sizes[vocabulary["<tool>"]] == len("<tool>")
    assert (sizes[vocabulary["w"]], sizes[vocabulary["##s"]]) == (2, 1)  # a word comes with the space before it
    assert [sizes[vocabulary[token]] for token in ("[SEP]", "<call>", "<turn>")] == [0, 0, 0]


def test_only_counted_targets_count():
    sizes = np.array([0, 3, 5])
    example = {"targets": np.array([1, 2, 0, 2]), "loss_mask": np.array([True, True, True, False])}
    assert bytes_per_token([example], sizes) == 8 / 3
    assert bits_per_byte({"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 0.0}) == {"a": pytest.approx(0.7213475204444817)}
