"""Checkpoints with global names and shapes: safetensors and JSON, written atomically, for any layout."""

from megatron_lite.checkpoint.opening import Verifier, describe, find_checkpoint, load_tensors
from megatron_lite.checkpoint.store import CheckpointConfig, CheckpointStore
from megatron_lite.errors import CheckpointError
from megatron_lite.parallel.global_view import Layout, Piece

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "Layout",
    "Piece",
    "Verifier",
    "describe",
    "find_checkpoint",
    "load_tensors",
]
