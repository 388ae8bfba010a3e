"""Layer patterns: one letter, one residual layer (Megatron's hybrid pattern).

`*` attention, `-` feed-forward. Block families repeat a unit (`*-` is the usual transformer block), hybrids
spell the whole pattern.
"""

from __future__ import annotations

LETTERS = {"*": "attention", "-": "feed-forward"}


def check_letters(letters: str, *, key: str) -> None:
    """Raises ValueError, naming `key`, when `letters` is empty or holds a letter that we cannot build."""
    known = ", ".join(f"{letter!r} {meaning}" for letter, meaning in LETTERS.items())
    if not letters:
        raise ValueError(f"{key} is empty; spell one letter for each layer: {known}")
    for index, letter in enumerate(letters):
        if letter not in LETTERS:
            raise ValueError(f"{key}={letters!r} has {letter!r} at place {index}; the known letters are {known}")


def expand(*, unit: str, num_layers: int | None, pattern: str | None) -> str:
    """The letters of all residual layers: `pattern` as it is, or `unit` repeated `num_layers` times.

    Raises ValueError when both or neither of `num_layers` and `pattern` are given, or a letter is unknown.
    """
    if pattern is not None:
        if num_layers is not None:
            raise ValueError(
                f"model.pattern={pattern!r} and model.num_layers={num_layers} exclude each other: the "
                "pattern spells every layer; set model.num_layers=null or model.pattern=null"
            )
        check_letters(pattern, key="model.pattern")
        return pattern
    if num_layers is None or num_layers < 1:
        raise ValueError(f"model.num_layers={num_layers} must be at least 1 when there is no model.pattern")
    check_letters(unit, key="model.unit")
    return unit * num_layers
