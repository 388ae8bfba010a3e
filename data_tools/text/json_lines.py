"""Parses one line of JSON into its columns, and tolerates errors in every column but the text.

orjson is fast and strict. Where it refuses a line (NaN, half a surrogate pair, invalid UTF-8, a control character), the standard library
reads it, and only the text column decides whether the row can be used.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from data_tools.text.encodings import UTF8, decode_escaped, text_or_reason

_DIGITS = 4000  # of an integer: Python refuses to convert more (it would take quadratic time)


def parse_line(line: bytes, text_column: str, encodings: list[str]) -> dict[str, Any] | str:
    """The columns of a line, or why it has none."""
    line = line.removeprefix(b"\xef\xbb\xbf").strip()
    if encodings[0].lower() in UTF8:
        try:
            return _object(orjson.loads(line))
        except orjson.JSONDecodeError:
            pass
    reason = ""
    for encoding in encodings:
        found = _parse_leniently(line, text_column, encoding)
        if not isinstance(found, str):
            return found
        reason = reason or found
    return reason


def _object(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"a JSON {type(value).__name__}, not an object"


def _parse_leniently(line: bytes, text_column: str, encoding: str) -> dict[str, Any] | str:
    """The columns, or why the line has none in this encoding; bytes that are not of the encoding stay in other columns as surrogates."""
    text = decode_escaped(line, encoding)
    try:
        found = _object(json.loads(text, strict=False, parse_int=_integer))
    except (ValueError, RecursionError) as error:
        invalid = text_or_reason(text, [encoding])[0] is None
        return f"not JSON: {error}" + (f" (and not valid {encoding})" if invalid else "")
    if isinstance(found, dict) and isinstance(value := found.get(text_column), str):
        value, reason = text_or_reason(value, [encoding])
        if value is None:
            return f"column {text_column!r} {reason}"
    return found


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < _DIGITS else float(digits)
