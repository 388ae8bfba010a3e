"""The registered families. A new family is one file next to this one and one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lite.models.huggingface.family import Family
from megatron_lite.models.huggingface.hymba import HYMBA
from megatron_lite.models.huggingface.llama import LLAMA, MISTRAL
from megatron_lite.models.huggingface.nemotron import NEMOTRON4
from megatron_lite.models.huggingface.nemotron_h import NEMOTRON_H
from megatron_lite.models.huggingface.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.name: family for family in (NEMOTRON4, LLAMA, MISTRAL, QWEN2, QWEN3, NEMOTRON_H, HYMBA)
}


def family_named(name: str) -> Family:
    """The mapping that `model.family` names, or ValueError."""
    if name not in FAMILIES:
        raise ValueError(f"model.family={name!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The mapping for a config.json's `model_type`, or ValueError."""
    model_type = hf_config.get("model_type")
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES.values())
    raise ValueError(f"config.json: model_type={model_type!r} is not one that can be held ({known})")
