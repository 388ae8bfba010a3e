"""Counting parameters and floating-point operations.

Training FLOPs a token (forward and backward, a multiply-add is two):

    6 (N - N_input_embedding) + what each layer adds to it (`flops` of `LAYER_TYPES`): 12 H K s for attention

where N leaves out vocabulary padding, the head counts and the look-up of input embeddings does not (tied
embeddings count once, as the head), and attention scores are counted in full, not halved for causality. This
is the convention that reproduces the MFU column of Nemotron-4's Table 2 (arXiv 2402.16819); halved attention
does not.

MFU = flops_per_token * tokens / (seconds * devices * peak).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.layers import LAYER_TYPES


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters without vocabulary padding; counted on the meta device, so no memory is taken."""
    with torch.device("meta"):
        model = Decoder(replace(config, vocab_multiple=1))
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs for one token of a sequence of `seq_len` tokens (formula above)."""
    lookup_only = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    matrices = 6 * (parameter_count(config) - lookup_only)
    return float(matrices + sum(LAYER_TYPES[symbol].flops(config, seq_len) for symbol in config.symbols))
