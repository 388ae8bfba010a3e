"""What each recompute mode runs again in backward."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.models.config import AttentionConfig, MlpConfig, ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.initialization import initialize_model_
from megatron_lite.parallel.mesh import Mesh, ParallelConfig
from megatron_lite.parallel.parallelize import Recipe, parallelize

CONFIG = ModelConfig(
    family="nemotron4",
    num_layers=2,
    hidden_size=16,
    attention=AttentionConfig(heads=4, kv_heads=2),
    mlp=MlpConfig(ffn_size=32),
    vocab_size=128,
    max_seq_len=8,
)


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def backward_calls(mode: str) -> Counter[str]:
    decoder = Decoder(CONFIG)
    initialize_model_(decoder, 0)
    parallelize(decoder, Mesh(), Recipe(ParallelConfig(recompute=mode)))
    loss = decoder(torch.arange(16).view(2, 8)).square().mean()
    with Calls() as calls:
        loss.backward()
    return calls.counts


def test_what_runs_again_in_backward() -> None:
    none, selective, full = (backward_calls(mode) for mode in ("none", "selective", "full"))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert none["native_layer_norm"] == none["relu"] == none[attention] == 0
    # Selective: every layer's norm and activation again, no matrix product and no attention.
    assert selective["native_layer_norm"] == 4
    assert selective["relu"] == 2
    assert selective["mm"] == none["mm"]
    assert selective[attention] == 0
    # Full: also the projection before attention or activation; the last one of a layer is not needed for backward.
    assert full["native_layer_norm"] == 4
    assert full[attention] == 2
    assert full["mm"] >= none["mm"] + 4


def test_names_stay() -> None:
    decoder = Decoder(CONFIG)
    names = list(decoder.state_dict())
    parallelize(decoder, Mesh(), Recipe(ParallelConfig(recompute="full")))
    assert list(decoder.state_dict()) == names


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel.recompute=half is unknown; choose one of none, selective, full"):
        parallelize(Decoder(CONFIG), Mesh(), Recipe(ParallelConfig(recompute="half")))
