"""Fields of config.json with their types checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def integer(hf: Mapping[str, Any], key: str) -> int:
    """A whole number of config.json, or ValueError."""
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"config.json: {key}={value!r} must be a whole number")
    return value


def number(hf: Mapping[str, Any], key: str) -> float:
    """A number of config.json, or ValueError."""
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config.json: {key}={value!r} must be a number")
    return float(value)


def switch(hf: Mapping[str, Any], key: str) -> bool:
    """A true or false of config.json, or ValueError."""
    value = hf.get(key)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key}={value!r} must be true or false")
    return value
