"""Checkpoints in global names and shapes: safetensors and JSON, whole or not there, for any layout."""

from megatron_lite.checkpoint.lock import RunLock
from megatron_lite.checkpoint.ranks import CheckpointError
from megatron_lite.checkpoint.reader import SavedTensors, describe, find_checkpoint, load_tensors
from megatron_lite.checkpoint.rng import rng_state, set_rng_state
from megatron_lite.checkpoint.store import CheckpointConfig, CheckpointStore
from megatron_lite.parallel.global_view import Layout, Piece

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "Layout",
    "Piece",
    "RunLock",
    "SavedTensors",
    "describe",
    "find_checkpoint",
    "load_tensors",
    "rng_state",
    "set_rng_state",
]
