"""Hugging Face folders, both ways: config.json and safetensors <-> ModelConfig and native tensors.

Works on tensors and folders only; needs no engine and imports nothing of transformers.
"""

from megatron_lite.models.huggingface.export import expected_shapes, export_folder
from megatron_lite.models.huggingface.folder import (
    HuggingFaceFolder,
    NativeTensors,
    is_folder,
    open_folder,
    read_config,
)
from megatron_lite.models.huggingface.llama import exportable
from megatron_lite.models.huggingface.registry import FAMILIES, family_named, family_of

__all__ = [
    "FAMILIES",
    "HuggingFaceFolder",
    "NativeTensors",
    "expected_shapes",
    "export_folder",
    "exportable",
    "family_named",
    "family_of",
    "is_folder",
    "open_folder",
    "read_config",
]
