"""Documents in which keys have to be found again, made of a corpus and of lines of three words.

A line is four tokens: the end of a line, two words (the key), one word (the value). In a training document the same lines stand
again and again, with corpus text between them, so that from the second time on their values can be known. How often is what makes
it learnable: with many lines of few keys a model first guesses among the few values, and then finds the right one. In every second
document all keys stand twice, the second time in another order and far from the first. A question is a document
in which the asked line stands once at a given depth, among lines with other keys, and ends with the key.

The keys of questions are pairs of words that no training document has; each of the two words alone is in other keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, best_dtype
from megatron_lite.data.sidecar import Sidecar, TokenizerIdentity, write_sidecar

Tokens = npt.NDArray[np.int64]
LINE = 4  # tokens


@dataclass(frozen=True)
class Material:
    """What documents are made of. text: corpus tokens without ends of documents. words: (3, W) first and second word of a key, values.

    newline, eod: token ids. held_out: share of the W x W keys that only questions have.
    """

    text: Tokens
    words: Tokens
    newline: int
    eod: int
    held_out: float = 0.2

    @cached_property
    def keys(self) -> tuple[Tokens, Tokens]:
        """(keys of training documents, keys of questions), each (n, 2) token ids."""
        firsts, seconds = np.meshgrid(self.words[0], self.words[1], indexing="ij")
        keys = np.stack([firsts.ravel(), seconds.ravel()], axis=1)
        np.random.default_rng(0).shuffle(keys)
        cut = round(len(keys) * self.held_out)
        return keys[cut:], keys[:cut]

    def line(self, key: Tokens, value: int) -> list[int]:
        """The tokens of a line."""
        return [self.newline, *map(int, key), int(value)]

    def document(self, draw: np.random.Generator, length: int, *, lines: int) -> Tokens:
        """(length,) tokens: 2 to `lines` lines with up to half as many keys, each with one value, and the end-of-document token."""
        trained, count = self.keys[0], _log_uniform(draw, 2, lines)
        some = _log_uniform(draw, 1, min(count // 2, len(trained)))
        if draw.integers(2):
            order = draw.integers(0, some, count)
        else:  # all keys and all of them again: the way back is long
            some = min(count // 2, len(trained))
            order = np.concatenate([draw.permutation(some), draw.permutation(some)])
        keys, values = trained[draw.choice(len(trained), some, replace=False)], draw.choice(self.words[2], some)
        written = [self.line(keys[i], values[i]) for i in order]
        return np.array([*self._spread(draw, written, length - 1), self.eod])

    def question(
        self, draw: np.random.Generator, length: int, *, key: Tokens, depth: float, others: int
    ) -> tuple[Tokens, int]:
        """((length,) tokens up to the question's key, the value that comes next). depth: 0 the asked line is first, 1 it is last."""
        trained = self.keys[0]
        value, *values = draw.choice(self.words[2], 1 + others)
        lines = [self.line(*pair) for pair in zip(trained[draw.choice(len(trained), others, replace=False)], values)]
        asked = self.line(key, value)
        room = length - 2 * LINE + 1
        before = round(depth * room)  # tokens before the asked line, with their part of the other lines
        first = min(round(depth * others), before // LINE)
        start = [*self._spread(draw, lines[:first], before), *asked, *self._spread(draw, lines[first:], room - before)]
        return np.array([*start, *asked[:-1]]), int(value)

    def _spread(self, draw: np.random.Generator, lines: Sequence[list[int]], length: int) -> list[int]:
        """The lines in order, with pieces of text of random lengths before, between and after them, `length` tokens in all."""
        gaps = length - LINE * len(lines)
        cuts = np.sort(draw.integers(0, gaps, len(lines), endpoint=True))
        sizes = np.diff([0, *cuts, gaps])
        starts = draw.integers(0, len(self.text) - gaps, len(sizes))
        pieces = [self.text[start : start + size].tolist() for start, size in zip(starts, sizes)]
        return [token for piece, line in zip(pieces, [*lines, []]) for token in (*piece, *line)]


def material(prefixes: Sequence[str], tokenizer: Any, *, words: int) -> Material:
    """The corpus of the token files `prefixes`, and up to `words` words of each kind among the tokens of `tokenizer`."""
    known = sorted(tokenizer.get_vocab().values())
    eod = tokenizer.eos_token_id
    plain = [token for token in known if re.fullmatch(" [a-z]{2,}", tokenizer.decode([token]))]
    words = min(words, len(plain) // 3)
    draw = np.random.default_rng(0)
    text = np.concatenate([_tokens(prefix) for prefix in prefixes])
    return Material(
        text[text != eod],
        draw.permutation(plain)[: 3 * words].reshape(3, words),
        tokenizer.encode("\n", add_special_tokens=False)[0],
        eod,
    )


def _log_uniform(draw: np.random.Generator, least: int, most: int) -> int:
    return int(np.exp(draw.uniform(np.log(least), np.log(most + 1))))


def _tokens(prefix: str) -> Tokens:
    dataset = IndexedDataset(prefix)
    return dataset.tokens(0, dataset.num_tokens).astype(np.int64)


def write(prefix: Path, documents: Iterable[Tokens], identity: TokenizerIdentity) -> None:
    """Token files and their sidecar."""
    with IndexedWriter(prefix, best_dtype(identity.vocab_size)) as writer:
        for document in documents:
            writer.add_document(document)
    counts = {"documents": writer.num_documents, "tokens": writer.num_tokens}
    write_sidecar(prefix, Sidecar(identity.fingerprint, identity.name, identity.eod, identity.vocab_size, **counts))
