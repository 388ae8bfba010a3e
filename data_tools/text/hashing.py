"""Word and n-gram hashes of a text as numpy arrays, without a Python loop over words.

Notable features:
- words are runs of letters, marks and digits; in scripts without spaces (Han, kana, Thai, Lao, Khmer, Burmese, Tibetan) every
  character is a word, so that n-grams are meaningful there too
- a word's hash is a polynomial in mixed code points modulo 2^64, taken from prefix sums: H(s, e) = (P_e - P_s) B^-s. B is odd,
  so B^-1 exists modulo 2^64 and every word of the text is hashed by a few vector operations (about 40 MB/s per core)
- code points are mixed (splitmix64) before, and sums after: plain polynomials modulo 2^64 have structured collisions
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import numpy as np

BLOCK = 1 << 18  # characters hashed at a time; bounds memory at about 20 MB whatever the text
BASE = 0x9E3779B97F4A7C15
BASE_INVERSE = pow(BASE, -1, 1 << 64)
_UNSPACED = (
    (0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9D), (0x20000, 0x3FFFF),
)  # fmt: skip
SEPARATOR, LETTER, SINGLE, SPACE = 0, 1, 2, 3


@lru_cache(maxsize=1)
def character_classes() -> np.ndarray:
    """uint8 (0x110000): LETTER (part of a word), SINGLE (a word by itself), SPACE or SEPARATOR (the rest)."""
    classes = np.zeros(0x110000, np.uint8)
    for code in range(0x323B0):  # above this, only tags and private use are assigned
        if unicodedata.category(chr(code))[0] in "LMN":
            classes[code] = LETTER
        elif chr(code).isspace():
            classes[code] = SPACE
    for first, last in _UNSPACED:
        span = classes[first : last + 1]
        span[span == LETTER] = SINGLE
    return classes


@lru_cache(maxsize=1)
def _powers() -> tuple[np.ndarray, np.ndarray]:
    exponents = np.full(BLOCK + 1, BASE, np.uint64)
    exponents[0] = 1
    inverses = np.full(BLOCK + 1, BASE_INVERSE, np.uint64)
    inverses[0] = 1
    return np.cumprod(exponents, dtype=np.uint64), np.cumprod(inverses, dtype=np.uint64)


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, elementwise on uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def code_points(text: str) -> np.ndarray:
    """uint32 code points; a lone surrogate counts as U+FFFD."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def word_hashes(text: str) -> np.ndarray:
    """uint64 hash of every word of `text`, in order, without regard to letter case."""
    codes = code_points(text.lower())
    if len(codes) <= BLOCK:
        return _hash_block(codes)
    parts, start = [], 0
    while start < len(codes):
        end = start + BLOCK
        if end < len(codes):  # cut after the last character outside of a word, unless one word fills the block
            outside = np.flatnonzero(character_classes()[codes[start:end]] != LETTER)
            end = start + int(outside[-1]) + 1 if len(outside) else end
        parts.append(_hash_block(codes[start:end]))
        start = end
    return np.concatenate(parts)


def _hash_block(codes: np.ndarray) -> np.ndarray:
    classes = character_classes()[codes]
    letter, single = classes == LETTER, classes == SINGLE
    previous = np.concatenate([[False], letter[:-1]])
    following = np.concatenate([letter[1:], [False]])
    starts = np.flatnonzero((letter & ~previous) | single)
    ends = np.flatnonzero((letter & ~following) | single) + 1
    powers, inverses = _powers()
    terms = mix(codes.astype(np.uint64) + np.uint64(1)) * powers[: len(codes)]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    return mix((sums[ends] - sums[starts]) * inverses[starts])


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """uint64 hash of every run of `n` words; a shorter text counts as one run of all its words (none if it is empty)."""
    n = min(n, len(words))
    if n == 0:
        return words
    count = len(words) - n + 1
    total = np.zeros(count, np.uint64)
    for i in range(n):
        total = total * np.uint64(BASE) + words[i : i + count]
    return mix(total)


def word_count(text: str) -> int:
    """Number of words in `text`."""
    return len(word_hashes(text))
