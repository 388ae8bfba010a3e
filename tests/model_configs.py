"""ModelConfigs from dotted keys, which merge as plain dicts do: {"hidden_size": 32, "attention.heads": 4}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lite.models.config import ModelConfig


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The config with these values and defaults elsewhere. Raises AttributeError for a key that does not exist."""
    config = ModelConfig()
    for key, value in values.items():
        section: Any = config
        *path, last = key.split(".")
        for part in path:
            section = getattr(section, part)
        getattr(section, last)
        setattr(section, last, value)
    return config
