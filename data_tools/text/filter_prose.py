"""Heuristics for prose: Gopher's, C4's and FineWeb's, with counts taken from word hashes and per-language settings.

    Gopher    https://arxiv.org/abs/2112.11446 (appendix A.1.1)     length, word length, symbols, bullets, stop words, repetition
    C4        https://arxiv.org/abs/1910.10683                      curly brackets, lorem ipsum
    FineWeb   https://arxiv.org/abs/2406.17557                      lines that end a sentence

Notable features:
- in scripts without spaces every character is a word, so length thresholds differ (`UNSPACED`), runs for repetition are twice as
  long, and the mean word length is not tested
- the language is tested before stop words, so that an English page with another label is dropped for its language
- a text has sentences if enough of its lines end one (FineWeb), or enough of its paragraphs contain an end: lines of a wrapped book
  or a poem often end no sentence, and a speech may be a single line that is cut in the middle
- repetition is measured in words, not characters: the results agree within a percent, and no Python loop is needed
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash

from data_tools.text.hashing import LETTER, SINGLE, SPACE, character_classes, code_points, ngram_hashes, word_hashes
from data_tools.text.language import STOP_WORDS, contradicts

TERMINAL = tuple(".!?…\"'”’»)]:;。！？」』）։।॥؟۔።၊។៕")
# A letter and a full stop: the end of a sentence, not of a section number. Full stops of other scripts have no other use.
_SENTENCE_END = re.compile(r"[^\W\d_][)\"'”’»]*[.!?…][)\"'”’»]*(?=\s|$)|[։॥।。！？؟۔።၊။៕]")
_REFERENCE = re.compile(
    r"\{[\w\s'’.,/-]{1,60}\}"
)  # {word}: a reference in a dictionary or manual; code has more text in braces
_LICENSE_NAME = re.compile(
    r"(?:general public|free documentation|apache|creative commons|mozilla public|artistic)[\s\w,.-]{0,20}licen[cs]e",
    re.IGNORECASE,
)
_LICENSE_WORD = re.compile(
    r"li[cz]en[cszçt]|copyright|warrant", re.IGNORECASE
)  # English, and what translations of it contain
_BULLET = re.compile(r"^\s*(?:[-*•·‣▪o]|\d+[.)])\s")


@dataclass
class ProseFilterConfig:
    """Thresholds. A document that violates one is dropped, and the reason is named after it."""

    min_words: int = 40
    max_words: int = 1_000_000
    min_mean_word_chars: float = 2.5
    max_mean_word_chars: float = 12.0
    min_letter_share: float = 0.6
    max_symbol_share: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_stop_words: int = 2
    max_curly_share: float = 0.08
    max_lorem_share: float = 0.005
    max_license_share: float = 0.01
    min_sentence_share: float = 0.12
    max_duplicate_lines: float = 0.3
    max_duplicate_paragraphs: float = 0.3
    max_top_2gram: float = 0.20
    max_top_4gram: float = 0.16
    max_repeated_5gram: float = 0.40
    max_repeated_10gram: float = 0.25
    check_language: bool = True


# A hundred Han characters carry about as much as sixty English words; a stop-word list would be a list of characters.
UNSPACED: dict[str, Any] = {"min_words": 60, "min_letter_share": 0.5, "min_stop_words": 0}
UNSPACED_RUN = 2  # characters per word when looking for repetition: a run of n words is a run of 2 n characters


class ProseFilter:
    """`reason(text, language)` is why a text is dropped, or None.

    Args:
        config: thresholds for every language.
        languages: changes of single thresholds by language tag.
    """

    def __init__(self, config: ProseFilterConfig, *, languages: dict[str, dict[str, Any]] | None = None) -> None:
        self._base = config
        self._languages = languages or {}
        self._for = lru_cache(maxsize=1024)(self._settings)

    def _settings(self, language: str, unspaced: bool) -> ProseFilterConfig:
        changes = dict(UNSPACED) if unspaced else {}
        return replace(self._base, **(changes | self._languages.get(language, {})))

    def reason(self, text: str, language: str) -> str | None:
        """Why `text` is dropped: the name of the first threshold that it violates; None if it is kept."""
        words = word_hashes(text)
        if not len(words):
            return "no_words"
        classes = character_classes()[code_points(text)]
        singles = int((classes == SINGLE).sum())
        unspaced = singles > 0.5 * len(words)
        settings = self._for(language, unspaced)
        if len(words) < settings.min_words:
            return "too_short"
        if len(words) > settings.max_words:
            return "too_long"
        letters = int((classes == LETTER).sum()) + singles
        visible = len(classes) - int((classes == SPACE).sum())
        if letters < settings.min_letter_share * visible:
            return "few_letters"
        return (
            _characters(text, len(words), None if unspaced else letters / len(words), settings)
            or _lines(text, settings)
            or _repetition(words, UNSPACED_RUN if unspaced else 1, settings)
            or _language(text, language, settings)
            or _stop_words(text, language, settings)
        )


def _characters(text: str, words: int, mean_word: float | None, settings: ProseFilterConfig) -> str | None:
    if mean_word is not None and mean_word < settings.min_mean_word_chars:
        return "short_words"
    if mean_word is not None and mean_word > settings.max_mean_word_chars:
        return "long_words"
    limit = settings.max_symbol_share * words
    if text.count("#") > limit or text.count("...") + text.count("…") > limit:
        return "symbols"
    limit = settings.max_curly_share * words
    if text.count("{") > limit and text.count("{") - len(_REFERENCE.findall(text)) > limit:
        return "curly_brackets"
    # The text of a license, recognized by its title: every collection holds the same few, in many translations.
    if _LICENSE_NAME.search(text, 0, 150) and len(_LICENSE_WORD.findall(text)) > settings.max_license_share * words:
        return "license_text"
    # A page of filler text, not a manual that mentions it.
    return "lorem_ipsum" if text.lower().count("lorem ipsum") > settings.max_lorem_share * words else None


def _lines(text: str, settings: ProseFilterConfig) -> str | None:
    lines = [line.strip() for line in text.split("\n")]
    filled = [line for line in lines if line]
    if sum(bool(_BULLET.match(line)) for line in filled) > settings.max_bullet_lines * len(filled):
        return "bullet_list"
    if sum(line.endswith(("...", "…")) for line in filled) > settings.max_ellipsis_lines * len(filled):
        return "ellipsis_lines"
    paragraphs = _paragraphs(text)
    ended = sum(line.endswith(TERMINAL) for line in filled) / len(filled)
    if ended < settings.min_sentence_share:
        ended = sum(bool(_SENTENCE_END.search(paragraph)) for paragraph in paragraphs) / len(paragraphs)
    if ended < settings.min_sentence_share:
        return "no_sentences"
    if _duplicate_share(filled) > settings.max_duplicate_lines:
        return "duplicate_lines"
    if _duplicate_share(paragraphs) > settings.max_duplicate_paragraphs:
        return "duplicate_paragraphs"
    return None


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def _duplicate_share(units: list[str]) -> float:
    """Share of the characters in units that occurred before."""
    seen: set[int] = set()
    total = repeated = 0
    for unit in units:
        key = xxhash.xxh3_64_intdigest(unit.encode())
        total += len(unit)
        repeated += len(unit) if key in seen else 0
        seen.add(key)
    return repeated / total if total else 0.0


def _stop_words(text: str, language: str, settings: ProseFilterConfig) -> str | None:
    expected = STOP_WORDS.get(language.split("_")[0].split("-")[0])
    if not settings.min_stop_words or expected is None:
        return None
    found = expected.intersection(text[:20_000].lower().split())
    return "no_stop_words" if len(found) < settings.min_stop_words else None


def _repetition(words: np.ndarray, run: int, settings: ProseFilterConfig) -> str | None:
    """Gopher's repetition tests; a "gram" of n is a run of n times `run` words."""
    top = len(words)
    for n, limit in ((2, settings.max_top_2gram), (4, settings.max_top_4gram)):
        # A run of four words is never more frequent than the runs of two in it, so most texts need one pass.
        if top > 3 and top * n * run > limit * len(words):
            _, counts = np.unique(ngram_hashes(words, n * run), return_counts=True)
            top = int(counts.max())
            if top > 3 and top * n * run > limit * len(words):
                return f"top_{n}gram"
    repeated = 1.0
    for n, limit in ((5, settings.max_repeated_5gram), (10, settings.max_repeated_10gram)):
        if repeated > limit:
            repeated = repeated_share(words, n * run)
            if repeated > limit:
                return f"repeated_{n}gram"
    return None


def repeated_share(words: np.ndarray, n: int) -> float:
    """Share of the words inside an n-gram that occurred earlier in the text."""
    grams = ngram_hashes(words, n)
    _, first = np.unique(grams, return_index=True)
    later = np.ones(len(grams), bool)
    later[first] = False
    edges = np.zeros(len(words) + 1, np.int32)
    starts = np.flatnonzero(later)
    edges[starts] += 1
    edges[np.minimum(starts + n, len(words))] -= 1
    return float((np.cumsum(edges[:-1]) > 0).mean())


def _language(text: str, language: str, settings: ProseFilterConfig) -> str | None:
    if not settings.check_language or language in ("und", ""):
        return None
    found = contradicts(language, text)
    return None if found is None else "other_language"
