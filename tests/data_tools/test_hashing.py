from __future__ import annotations

import re
import unicodedata

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_tools.text import hashing
from data_tools.text.hashing import ngram_hashes, word_hashes


def words_by_hand(text: str) -> list[str]:
    """The definition in a loop: runs of letters, marks, digits; CJK characters alone."""
    found, current = [], ""
    for character in text.lower():
        inside = unicodedata.category(character)[0] in "LMN" and ord(character) < 0x323B0
        single = inside and any(a <= ord(character) <= b for a, b in hashing._UNSPACED)
        if inside and not single:
            current += character
            continue
        if current:
            found.append(current)
        current = ""
        if single:
            found.append(character)
    return [*found, current] if current else found


def same_partition(hashes: list[int], items: list) -> bool:
    """Equal items have equal hashes and different items different ones."""
    return len(set(hashes)) == len(set(items)) == len(set(zip(hashes, items)))


@given(st.text(max_size=60))
def test_words_are_those_of_the_definition(text: str) -> None:
    words = words_by_hand(text)
    hashes = word_hashes(text)
    assert len(hashes) == len(words)
    assert same_partition(hashes.tolist(), words)


def test_real_words_do_not_collide() -> None:
    text = " ".join(f"word{i} {i} w{i % 97}" for i in range(20_000)) + " aa ab ba bb aab abb"
    words = re.findall(r"\w+", text)
    assert same_partition(word_hashes(text).tolist(), words)


def test_a_word_has_the_same_hash_wherever_it_stands() -> None:
    alone = word_hashes("garden")[0]
    assert word_hashes("x " * 1000 + "Garden, y")[1000] == alone
    assert word_hashes("x" * (hashing.BLOCK - 1) + " garden")[-1] == alone  # across a block's edge


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 6))
def test_ngrams(letters: list[str], n: int) -> None:
    grams = ngram_hashes(word_hashes(" ".join(letters)), n)
    n = min(n, len(letters))
    expected = [tuple(letters[i : i + n]) for i in range(len(letters) - n + 1)]
    assert same_partition(grams.tolist(), expected)


def test_no_words_give_no_ngrams() -> None:
    assert len(ngram_hashes(word_hashes(" ... "), 5)) == 0
    assert ngram_hashes(np.empty(0, np.uint64), 5).dtype == np.uint64
