"""Unicode repair and removal of what is not text. Prose is cleaned; code keeps its characters and its white space.

Notable features:
- mojibake is repaired by ftfy, only in texts that a cheap test flags: ftfy on every text would take longer than all other steps
- terminal escape codes, control characters, zero-width marks and byte-order marks are removed; line ends become "\\n"
- blocks between blank lines are removed if every line of them recurs in many documents of the source (menus, license notices). A
  frequent line inside a paragraph is kept; short lines ("Syntax") count as headings unless there are several in a row
- comments about a license at the top of a code file are removed; the first line (`#!`) and other comments are kept
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import xxhash

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])|.\x08")
# A zero-width space separates words in Thai, Lao, Burmese and Khmer, which have no other mark for it.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f\u2060\ufeff\ufffe\uffff]|(?<![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])\u200b"
)
_BLANK_LINES = re.compile(r"\n{4,}")
_TRAILING = re.compile(r"[ \t\f\xa0]+$", re.MULTILINE)
_POLICY = (
    "enable javascript", "javascript is disabled", "javascript is required", "terms of use", "terms of service", "privacy policy",
    "cookie policy", "uses cookies", "use of cookies", "all rights reserved",
)  # fmt: skip
MENU_LINES = 5
_LONGEST_POLICY_LINE = 300  # longer lines are paragraphs that only mention it
_SUSPICIOUS = re.compile("[\x80-\x9fÃÂâÐÑÎÏØÙã]")  # first characters of UTF-8 read as something else
_LICENSE = re.compile(r"copyright|licen[cs]e|spdx|all rights reserved|warrant(?:y|ies)|redistribut", re.IGNORECASE)
_FIRST_LINES = re.compile(r"(?:#![^\n]*\n)?(?:[^\n]*-\*-[^\n]*\n)?(?:<\?php[ \t]*\n)?")
_COMMENT = re.compile(
    r"\s*(?:(?:/\*.*?\*/[ \t]*\n?)+|<!--.*?-->[ \t]*\n?|(?:\(\*.*?\*\)[ \t]*\n?)+|"
    r"(?:[ \t]*(?://|#(?!include|define|if|pragma|import)|--|;|%|\"(?!\"))[^\n]*(?:\n|\Z))+)",
    re.DOTALL,
)
_HEADER_COMMENTS = 12  # comments before the first line of code that are looked at
_EMAIL = re.compile(r"\b[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_IPV4 = re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.])")
_PHONE = re.compile(r"(?<![\w.])\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}(?!\w)")


@dataclass
class NormalizeConfig:
    """Unicode repair and removal of what is not text. Code keeps its white space and its characters."""

    unicode_form: str = "NFC"
    fix_encoding: bool = True
    strip_license_headers: bool = True
    mask_pii: bool = False
    boilerplate_documents: int = 20  # a line in that many documents of a source is frequent
    boilerplate_min_chars: int = 12  # shorter frequent lines are removed only in a row of several
    enabled: bool = True  # false: texts stay as they were read; languages are identified all the same


class Normalizer:
    """`normalize(text, kind, frequent)` gives the cleaned text and the names of the repairs that changed it."""

    def __init__(self, config: NormalizeConfig) -> None:
        self.config = config

    def normalize(self, text: str, *, kind: str, frequent: set[int] | None = None) -> tuple[str, list[str]]:
        """The cleaned text, and which repairs changed it. `frequent`: hashes of the lines that are boilerplate here."""
        repairs = []
        for name, repair in self._repairs(kind, frequent):
            after = repair(text)
            if after != text:
                repairs.append(name)
                text = after
        return text, repairs

    def _repairs(self, kind: str, frequent: set[int] | None) -> Iterator[tuple[str, Callable[[str], str]]]:
        config = self.config
        if not config.enabled:
            return
        yield "line_ends", _line_ends
        yield "control_characters", _controls
        if kind == "code":
            if config.strip_license_headers:
                yield "license_header", strip_license_header
        else:
            if config.fix_encoding:
                yield "mojibake", fix_encoding
            if config.unicode_form != "none":
                yield "unicode_form", lambda text: unicodedata.normalize(config.unicode_form, text)  # type: ignore[arg-type]
            if frequent:
                yield "boilerplate", lambda text: remove_blocks(text, frequent, config.boilerplate_min_chars)
            yield "policy_lines", remove_policy_lines
            yield "white_space", _white_space
        if config.mask_pii:
            yield "pii", mask_pii


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _controls(text: str) -> str:
    if "\x1b" in text or "\x08" in text:
        text = _ESCAPES.sub("", text)
    return _CONTROLS.sub("", text)


def _white_space(text: str) -> str:
    return _BLANK_LINES.sub("\n\n\n", _TRAILING.sub("", text)).strip("\n")


def remove_policy_lines(text: str) -> str:
    """`text` without the short lines that C4 calls policy lines."""
    lower = text.lower()
    if not any(words in lower for words in _POLICY):
        return text
    return "\n".join(
        line
        for line in text.split("\n")
        if len(line) > _LONGEST_POLICY_LINE or not any(words in line.lower() for words in _POLICY)
    )


def fix_encoding(text: str) -> str:
    """`text` with mojibake repaired where ftfy finds any."""
    if text.isascii() or not _SUSPICIOUS.search(text):
        return text
    import ftfy
    import ftfy.badness

    # Paragraph by paragraph: one twice-encoded paragraph must not decide about the rest.
    return "\n\n".join(ftfy.fix_encoding(part) if ftfy.badness.is_bad(part) else part for part in text.split("\n\n"))


def line_key(line: str) -> int:
    """Hash of a line, ignoring the white space around it."""
    return xxhash.xxh3_64_intdigest(line.strip().encode())


def remove_blocks(text: str, frequent: set[int], min_chars: int) -> str:
    """`text` without the blocks between blank lines that consist of frequent lines only.

    A block of lines that are all shorter than `min_chars` is removed only in a row of blocks with `MENU_LINES` lines in total.
    """
    blocks = text.split("\n\n")
    stays = [True] * len(blocks)
    row: list[int] = []  # the frequent blocks that stand together
    row_lines = 0
    for i, block in enumerate([*blocks, None]):
        lines = [] if block is None else [line.strip() for line in block.split("\n") if line.strip()]
        if lines and all(line_key(line) in frequent for line in lines):
            row.append(i)
            row_lines += len(lines)
            stays[i] = max(map(len, lines)) < min_chars
        elif lines or block is None:  # an empty block does not end a row
            for j in row if row_lines >= MENU_LINES else ():
                stays[j] = False
            row, row_lines = [], 0
    return "\n\n".join(block for block, kept in zip(blocks, stays) if kept)


def strip_license_header(text: str) -> str:
    """`text` without the comments before its first line of code that mention a license."""
    first = _FIRST_LINES.match(text)
    start = at = first.end() if first else 0
    kept = []
    for _ in range(_HEADER_COMMENTS):
        match = _COMMENT.match(text, at)
        if match is None:
            break
        at = match.end()
        if not _LICENSE.search(match.group()):
            kept.append(match.group())
    comments = "".join(kept)
    if comments == text[start:at]:
        return text
    return text[:start] + (comments + text[at:]).lstrip("\n")


def mask_pii(text: str) -> str:
    """E-mail addresses, public IPv4 addresses and international telephone numbers replaced by placeholders."""
    text = _EMAIL.sub("<email>", text)
    text = _IPV4.sub(lambda match: match.group() if _is_private(match.group()) else "<ip>", text)
    return _PHONE.sub("<phone>", text)


def _is_private(address: str) -> bool:
    first, second, *_ = map(int, address.split("."))
    return (
        first in (0, 10, 127) or first >= 224 or (first, second) == (192, 168) or (first == 172 and 16 <= second < 32)
    )
