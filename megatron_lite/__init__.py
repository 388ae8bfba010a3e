"""megatron_lite: a readable, exact and fast pretraining framework.

model, tokenizer = megatron_lite.load("runs/smoke")
logits_BTV = model(tokens_BT)
"""

from __future__ import annotations

from typing import Any

__all__ = ["load"]


def load(path: Any, **keys: Any) -> Any:
    """The model and the tokenizer of a run, a checkpoint or a Hugging Face folder: see `megatron_lite.weights.load`."""
    from megatron_lite.weights import load as load_weights  # late: importing the package must stay cheap

    return load_weights(path, **keys)
