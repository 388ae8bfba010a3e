"""Counting parameters and floating-point operations.

Training FLOPs a token (forward and backward, a multiply-add is two):

    6 (N - N_input_embedding) + what each layer adds to it (`flops` of `LAYER_TYPES`): 12 H K s for attention

where N leaves out vocabulary padding, the head counts and the look-up of input embeddings does not (tied
embeddings count once, as the head), and attention scores are counted in full, not halved for causality. This
is the convention that reproduces the MFU column of Nemotron-4's Table 2 (arXiv 2402.16819); halved attention
does not. Meta tokens go through all layers and not through the head: of a sequence of s tokens with m of them a token of the text
counts 1 + m/s times in the layers, with s + m keys.

MFU = flops_per_token * tokens / (seconds * devices * peak).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.layers import LAYER_TYPES, layer_specs


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters without vocabulary padding; counted on the meta device, so no memory is taken."""
    with torch.device("meta"):
        model = Decoder(replace(config, vocab_multiple=1))
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Training FLOPs for one token of a sequence of `seq_len` tokens (formula above)."""
    vocabulary = config.vocab_size * config.hidden_size  # of the head; the look-up costs nothing
    outside = vocabulary * (1 if config.tie_embeddings else 2) + config.meta_tokens * config.hidden_size
    length = seq_len + config.meta_tokens
    layers = 6.0 * (parameter_count(config) - outside)
    layers += sum(LAYER_TYPES[spec.symbol].flops(config, spec, length) for spec in layer_specs(config))
    return layers * length / seq_len + 6.0 * vocabulary
