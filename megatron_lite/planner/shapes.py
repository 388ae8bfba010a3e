"""What a tensor-parallel rank holds of each parameter: training's own plan, applied to a decoder on the meta device."""

from __future__ import annotations

import torch

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.layers import ShardInfo, TensorParallel, shard_info
from megatron_lite.parallel.plans import apply_plan, decoder_plan


def local_shapes(model: ModelConfig, *, tp: int) -> tuple[dict[str, ShardInfo], dict[str, tuple[int, ...]]]:
    """(name -> where a rank's part is in the global parameter, name -> the part's shape), as training makes them."""
    with torch.device("meta"):
        decoder = Decoder(model)
    if tp > 1:
        # no group: nothing is computed
        apply_plan(decoder, decoder_plan(decoder), TensorParallel(0, tp, None))  # type: ignore[arg-type]
    return shard_info(decoder), {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
