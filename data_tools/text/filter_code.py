"""Heuristics for source code: drop files that are generated or are data (as in The Stack / StarCoder, https://arxiv.org/abs/2305.06161).

A model learns little from generated or minified files and from tables of numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from data_tools.text.hashing import code_points

HEAD_CHARS = 2_000  # generated files say so at the top
_GENERATED = re.compile(
    r"(?i:auto-?\s?generated|automatically generated|(?:machine|mechanically)[ -]generated|@generated)|DO NOT (?:EDIT|MODIFY)\b|"
    r"(?i:(?:do not|don't|never) (?:edit|modify|change) (?:this (?:file|code|header)|(?:it |the file )?(?:by hand|directly|manually)))|"
    r"(?i:(?:file|header|code|source|table)s? (?:is|was|has been|were|are) (?:\w+ )?(?:generated|created) (?:by|from|using))|"
    r"(?i:^\W{1,6}generated (?:by|from|with|on)\b)|GENERATED FILE",
    re.MULTILINE,
)
_BASE64 = re.compile(r"[A-Za-z0-9+/]{120,}={0,2}")
_ESCAPED = re.compile(r"(?:(?:0x|\\x)[0-9A-Fa-f]{2},?\s*){12,}|(?:\\u[0-9A-Fa-f]{4}){8,}")
_NUMBERS = re.compile(r"\b(?:0[xX][0-9A-Fa-f]+|\d+(?:\.\d+)?)[uUlLfF]*\b")


@dataclass
class CodeFilterConfig:
    """Thresholds. A file that violates one is dropped, and the reason is named after it."""

    min_chars: int = 100
    max_chars: int = 1_000_000
    max_line_chars: int = 1_000
    max_mean_line_chars: float = 100.0
    min_alphanumeric_share: float = 0.25
    min_letter_share: float = 0.2
    max_encoded_share: float = 0.3
    max_number_share: float = 0.35
    drop_generated: bool = True


class CodeFilter:
    """`reason(text)` is why a file is dropped, or None."""

    def __init__(self, config: CodeFilterConfig) -> None:
        self.config = config

    def reason(self, text: str) -> str | None:
        """Why `text` is dropped: the first test that it fails; None if it is kept."""
        config = self.config
        if len(text.strip()) < config.min_chars:
            return "too_short"
        if len(text) > config.max_chars:
            return "too_long"
        if config.drop_generated and _GENERATED.search(text, 0, HEAD_CHARS):
            return "generated"
        codes = code_points(text)
        breaks = np.flatnonzero(codes == 10)
        lengths = np.diff(np.concatenate([[-1], breaks, [len(codes)]])) - 1
        if int(lengths.max()) > config.max_line_chars:
            return "long_line"
        if float(lengths[lengths > 0].mean()) > config.max_mean_line_chars:
            return "long_mean_line"
        return _composition(text, codes, config)


def _composition(text: str, codes: np.ndarray, config: CodeFilterConfig) -> str | None:
    digits = int(((codes >= 48) & (codes <= 57)).sum())
    letters = int((((codes | 32) >= 97) & ((codes | 32) <= 122) | (codes > 191)).sum())
    if digits + letters < config.min_alphanumeric_share * len(codes):
        return "few_alphanumerics"
    if letters < config.min_letter_share * len(codes):
        return "few_letters"
    if _encoded_chars(text) > config.max_encoded_share * len(text):
        return "encoded_data"
    if sum(map(len, _NUMBERS.findall(text))) > config.max_number_share * int((codes > 32).sum()):
        return "number_table"
    return None


def _encoded_chars(text: str) -> int:
    """Characters in base64 and in runs of escaped bytes; each search runs only where its marks occur, as both are slow."""
    found = 0
    if any(len(word) >= 120 for word in text.split()):
        found += sum(map(len, _BASE64.findall(text)))
    if "0x" in text or "\\x" in text or "\\u" in text:
        found += sum(len(match.group()) for match in _ESCAPED.finditer(text))
    return found
