"""Documents in which keys have to be found again, made of a corpus and of lines of three words.

A line is four tokens: the end of a line, two words (the key), one word (the value). In a training document the same lines stand
again and again, with corpus text between them, so that from the second time on their values can be known. How often is what makes
it learnable: with many lines of few keys a model first guesses among the few values, and then finds the right one. In every second
document all keys stand twice, the second time in another order.

A question asks for several keys, one after the other at its end. Each stands once before, at the start of its section: the text is
cut into as many equal sections as there are keys, and the rest of a section is corpus text and lines with other keys and values.

The keys of questions are pairs of words that no training document has, in its lines or in its text; each of the two words alone is in
other keys.
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
class Question:
    """tokens: (T,). asked_at: for each key, the place of its last word at the end, where the model has to know the token that comes
    next. stands_at: where its line begins."""

    tokens: Tokens
    asked_at: Tokens
    stands_at: Tokens

    @property
    def values(self) -> Tokens:
        """The right answer for each key."""
        return self.tokens[self.asked_at + 1]


@dataclass(frozen=True)
class Material:
    """What documents are made of. text: corpus tokens without ends of documents. words: (3, W) first and second word of a key, values.

    newline, eod: token ids. held_out: share of the W x W keys that only questions have, if so many
    are not in the text.
    """

    text: Tokens
    words: Tokens
    newline: int
    eod: int
    held_out: float = 0.2

    @cached_property
    def keys(self) -> tuple[Tokens, Tokens]:
        """(keys of training documents, keys of questions), each (n, 2) token ids. The text has none of the latter."""
        firsts, seconds = np.meshgrid(self.words[0], self.words[1], indexing="ij")
        keys = np.stack([firsts.ravel(), seconds.ravel()], axis=1)
        np.random.default_rng(0).shuffle(keys)
        many = 1 + max(self.text.max(), self.words.max())  # makes one number of a pair
        unseen = ~np.isin(keys @ [many, 1], np.stack([self.text[:-1], self.text[1:]], axis=1) @ [many, 1])
        held_out = unseen & (np.cumsum(unseen) <= round(len(keys) * self.held_out))
        return keys[~held_out], keys[held_out]

    def line(self, key: Tokens, value: int) -> list[int]:
        """The tokens of a line."""
        return [self.newline, *map(int, key), int(value)]

    def document(self, draw: np.random.Generator, length: int, *, lines: tuple[int, int]) -> Tokens:
        """(length,) tokens: least to most lines with up to half as many keys, each with one value, and the end-of-document token."""
        trained, count = self.keys[0], _log_uniform(draw, *lines)
        some = _log_uniform(draw, 1, min(count // 2, len(trained)))
        if draw.integers(2):
            order = draw.integers(0, some, count)
        else:  # all keys, and all of them again
            some = min(count // 2, len(trained))
            order = np.concatenate([draw.permutation(some), draw.permutation(some)])
        keys, values = _some(draw, trained, some), draw.choice(self.words[2], some)
        written = [self.line(keys[i], values[i]) for i in order]
        return np.array([*self._spread(draw, written, length - 1), self.eod])

    def question(self, draw: np.random.Generator, length: int, *, asked: int, others: int) -> Question:
        """A question of `length` tokens for `asked` keys, with `others` other lines in each section. All values differ."""
        keys = np.concatenate([_some(draw, self.keys[1], asked), _some(draw, self.keys[0], asked * others)])
        lines = [self.line(*pair) for pair in zip(keys, _some(draw, self.words[2], len(keys)))]
        # where sections begin, and the end of the last
        at = np.linspace(0, length - asked * LINE, asked + 1).astype(int)
        tokens: list[int] = []
        for i in range(asked):
            within = lines[asked + i * others : asked + (i + 1) * others]
            tokens += [*lines[i], *self._spread(draw, within, int(at[i + 1] - at[i]) - LINE)]
        order = draw.permutation(asked)
        tokens += [token for i in order for token in lines[i]]
        return Question(np.array(tokens), at[-1] + LINE * np.argsort(order) + LINE - 2, at[:asked])

    def _spread(self, draw: np.random.Generator, lines: Sequence[list[int]], length: int) -> list[int]:
        """The lines in order, with pieces of text of random lengths before, between and after them, `length` tokens in all."""
        gaps = length - LINE * len(lines)
        cuts = np.sort(draw.integers(0, gaps, len(lines), endpoint=True))
        sizes = np.diff([0, *cuts, gaps])
        starts = draw.integers(0, len(self.text) - gaps, len(sizes))
        pieces = [self.text[start : start + size].tolist() for start, size in zip(starts, sizes)]
        return [token for piece, line in zip(pieces, [*lines, []]) for token in (*piece, *line)]


def material(prefixes: Sequence[str], tokenizer: Any, *, words: int) -> Material:
    """The corpus of the token files `prefixes`, and up to `words` words of each kind: tokens of two or more letters."""
    known = sorted(tokenizer.get_vocab().values())
    eod = tokenizer.eos_token_id
    plain = [token for token in known if re.fullmatch(" ?[a-z]{2,}", tokenizer.decode([token]))]
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


def _some(draw: np.random.Generator, things: Tokens, count: int) -> Tokens:
    return things[draw.choice(len(things), count, replace=False)]


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
