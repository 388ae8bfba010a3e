"""Small models with large weights: with std 0.3 every path shows in the logits, with 0.02 a lost bias would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_lite.models import Decoder, ModelConfig
from tests.model_configs import model_config

NEMOTRON = {
    "family": "nemotron4",
    "num_layers": 2,
    "hidden_size": 48,
    "attention.heads": 4,
    "attention.kv_heads": 2,
    "attention.head_dim": 12,
    "mlp.ffn_size": 80,
    "vocab_size": 101,
    "vocab_multiple": 16,
    "max_seq_len": 64,
    "rope.fraction": 0.5,
}
LLAMA = NEMOTRON | {
    "family": "llama",
    "norm": "rmsnorm",
    "mlp.activation": "swiglu",
    "rope.fraction": 1.0,
    "rope.base": 5000.0,
}

HYBRID = NEMOTRON | {
    "family": "nemotron_h",
    "num_layers": None,
    "pattern": "M-M*-",
    "norm": "rmsnorm",
    "rope.fraction": 0.0,
    "mamba.heads": 6,
    "mamba.head_dim": 3,
    "mamba.groups": 2,
    "mamba.state": 5,
}

HYMBA = HYBRID | {
    "family": "hymba",
    "pattern": "H-HH*",
    "rope.fraction": 1.0,
    "tie_embeddings": True,
    "meta_tokens": 5,
    "attention.value_head_dim": 8,
    "attention.window": 12,
    "attention.always_visible": 5,
    "attention.global_layers": [0],
    "attention.kv_groups": [[1, 2]],
    "mamba.version": 1,
    "mamba.heads": 4,
    "mamba.head_dim": 8,
    "mamba.groups": 1,
    "mamba.dt_rank": 3,
}


def nemotron_config(**changes: Any) -> ModelConfig:
    """A tiny Nemotron-4 with `changes` (dotted keys: `**{"attention.heads": 2}`)."""
    return model_config(NEMOTRON | changes)


def llama_config(**changes: Any) -> ModelConfig:
    """A tiny Llama with `changes`."""
    return model_config(LLAMA | changes)


def hybrid_config(**changes: Any) -> ModelConfig:
    """A tiny Mamba-2/attention hybrid with `changes`."""
    return model_config(HYBRID | changes)


def hymba_config(**changes: Any) -> ModelConfig:
    """A tiny model with Hymba's layers, and one attention layer, with `changes`."""
    return model_config(HYMBA | changes)


def loud_decoder(config: ModelConfig, seed: int = 0, std: float = 0.3) -> Decoder:
    """Every weight, gain and bias drawn with `std`; gains that are multiplied as they are lie around one."""
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, std, generator=generator)
            if name.endswith("norm.weight") and config.norm != "layernorm1p":
                parameter.add_(1.0)
        model.embedding.weight[config.vocab_size :] = 0
        model.head_weight[config.vocab_size :] = 0
    return model.eval()


@pytest.fixture
def nemotron() -> Callable[..., ModelConfig]:
    """Factory of tiny Nemotron-4 configs."""
    return nemotron_config


@pytest.fixture
def llama() -> Callable[..., ModelConfig]:
    """Factory of tiny Llama configs."""
    return llama_config


@pytest.fixture
def hybrid() -> Callable[..., ModelConfig]:
    """Factory of tiny hybrid configs."""
    return hybrid_config


@pytest.fixture
def hymba() -> Callable[..., ModelConfig]:
    """Factory of tiny configs with Hymba's layers."""
    return hymba_config


@pytest.fixture
def loud() -> Callable[..., Decoder]:
    """Factory of decoders with large weights."""
    return loud_decoder


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices: a second thread only costs, and others share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
