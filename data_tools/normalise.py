"""Unicode repair and removal of what is no text. Prose is cleaned; code keeps its characters and its white space.

Notable features:
- mojibake is repaired by ftfy, and only in texts that its badness test flags: ftfy alone would be slower than all the rest together
- terminal escape codes, control characters, zero-width marks and byte-order marks go; line ends become "\\n"
- blank-line-separated blocks whose every line recurs in many documents of the source (menus, licence notices) go as a whole: a
  frequent line inside a paragraph stays, so no sentence is torn
- a licence header at the top of a code file goes; the first line (`#!`) stays
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

import xxhash

from data_tools.recipe import NormaliseConfig

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])|.\x08")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u200b\u2060\ufeff\ufffe\uffff]")
_BLANK_LINES = re.compile(r"\n{4,}")
_TRAILING = re.compile(r"[ \t\f\xa0]+$", re.MULTILINE)
_POLICY = (
    "enable javascript", "javascript is disabled", "javascript is required", "terms of use", "terms of service", "privacy policy",
    "cookie policy", "uses cookies", "use of cookies", "all rights reserved",
)  # fmt: skip
_LONGEST_POLICY_LINE = 300  # longer lines are paragraphs that only mention it
_SUSPICIOUS = re.compile("[\x80-\x9fÃÂâÐÑÎÏØÙã]")  # first characters of UTF-8 read as something else
_LICENCE = re.compile(r"copyright|licen[cs]e|spdx|all rights reserved|warrant(?:y|ies)|redistribut", re.IGNORECASE)
_HEADER = re.compile(
    r"\A(?P<keep>(?:#![^\n]*\n)?(?:[^\n]*-\*-[^\n]*\n)?(?:<\?php[ \t]*\n)?)\s*"
    r"(?P<comment>/\*.*?\*/[ \t]*\n?|<!--.*?-->\s*\n?|(?:[ \t]*(?://|#(?!include|define|if|pragma|import)|--|;|%)[^\n]*\n)+)",
    re.DOTALL,
)
_EMAIL = re.compile(r"\b[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_IPV4 = re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.])")
_PHONE = re.compile(r"(?<![\w.])\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}(?!\w)")


class Normaliser:
    """`normalise(text, kind, frequent)` gives the cleaned text and the names of the repairs that changed it."""

    def __init__(self, config: NormaliseConfig) -> None:
        self.config = config

    def normalise(self, text: str, *, kind: str, frequent: set[int] | None = None) -> tuple[str, list[str]]:
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
        yield "line_ends", _line_ends
        yield "control_characters", _controls
        if kind == "code":
            if config.strip_licence_headers:
                yield "licence_header", strip_licence_header
        else:
            if config.fix_encoding:
                yield "mojibake", fix_encoding
            if config.unicode_form != "none":
                yield "unicode_form", lambda text: unicodedata.normalize(config.unicode_form, text)  # type: ignore[arg-type]
            if frequent:
                yield "boilerplate", lambda text: remove_blocks(text, frequent)
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
    """Mojibake undone, where ftfy sees any."""
    if text.isascii() or not _SUSPICIOUS.search(text):
        return text
    import ftfy
    import ftfy.badness

    # Paragraph by paragraph: one that was pasted in twice-encoded must not decide for the rest.
    return "\n\n".join(ftfy.fix_encoding(part) if ftfy.badness.is_bad(part) else part for part in text.split("\n\n"))


def line_key(line: str) -> int:
    """Hash of a line without the white space around it."""
    return xxhash.xxh3_64_intdigest(line.strip().encode())


def remove_blocks(text: str, frequent: set[int]) -> str:
    """`text` without the blocks (between blank lines) that consist of frequent lines only."""
    kept = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines or not all(line_key(line) in frequent for line in lines):
            kept.append(block)
    return "\n\n".join(kept)


def strip_licence_header(text: str) -> str:
    """A code file without the comment at its top, when that comment is a licence."""
    match = _HEADER.match(text)
    if match is None or not _LICENCE.search(match["comment"]):
        return text
    return match["keep"] + text[match.end() :].lstrip("\n")


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
