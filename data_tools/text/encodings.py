"""From bytes to text, and strings that contain bytes which are not valid characters."""

from __future__ import annotations

import re

UTF8 = ("utf-8", "utf8", "utf_8")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HEAD = 200


def decode(data: bytes, encodings: list[str]) -> str | None:
    """`data` in the first encoding that fits; None when none does."""
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            encodings = [encoding, *encodings]
    for encoding in encodings:
        text = decode_escaped(data, encoding)
        if not _SURROGATE.search(text):
            return text
    return None


def decode_escaped(data: bytes, encoding: str) -> str:
    """`data` as text; bytes that are not of the encoding become surrogates (U+DC80 to U+DCFF), as in Python's file names.

    Raises ValueError if Python does not know the encoding.
    """
    try:
        return data.decode(encoding, "surrogateescape")
    except LookupError:
        raise ValueError(
            f"data_recipe.sources.*.encodings: {encoding!r} is not an encoding that Python knows"
        ) from None
    except UnicodeDecodeError:  # UTF-16 and UTF-32 cannot escape single bytes
        return "\udc80"


def text_or_reason(value: str | bytes, encodings: list[str]) -> tuple[str | None, str]:
    """A value as text, or None and why it is not text."""
    if isinstance(value, bytes):
        text = decode(value, encodings)
        return text, "" if text is not None else f"is not valid {' or '.join(encodings)}"
    found = _SURROGATE.search(value)
    if found is None:
        return value, ""
    if "\udc80" <= found[0] <= "\udcff":
        return None, f"is not valid {' or '.join(encodings)} at character {found.start()}"
    return None, f"holds half a character (surrogate U+{ord(found[0]):04X}) at character {found.start()}"


def printable(text: str) -> str:
    """`text` without surrogates, which cannot be written: they become backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def head(data: str | bytes) -> str:
    """The first characters of a row for a message."""
    text = data[:_HEAD].decode("utf-8", "backslashreplace") if isinstance(data, bytes) else printable(data[:_HEAD])
    return text.rstrip("\n")
