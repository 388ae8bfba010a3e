"""How many bytes generation takes beside the weights."""

from __future__ import annotations

import torch

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder


def cache_bytes(config: ModelConfig, tokens: int, *, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the cache of one text of `tokens` tokens, for a model that computes in `dtype`; states of scans are float32 at least.

    The model reads one token on the meta device, where nothing is computed: caches allocate all that they will ever hold.
    """
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
        cache = decoder.new_cache(tokens)
        decoder.hidden(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    return cache.nbytes()
