"""From a plain decoder to this process's part of it: apply the tensor-parallel plan, then recompute and compilation, layer
by layer.

Works on the meta device, where it costs neither memory nor communication.
"""

from __future__ import annotations

import torch.distributed as dist

from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.layers import TensorParallel
from megatron_lite.parallel.mesh import Mesh, ParallelConfig
from megatron_lite.parallel.plans import apply_plan, check_divisible, decoder_plan
from megatron_lite.parallel.recompute import recompute_layer


def parallelize(decoder: Decoder, mesh: Mesh, config: ParallelConfig) -> None:
    """Cut the decoder over the tensor-parallel ranks, in place, and set its layers' recompute and compilation.

    Raises ValueError when the model does not divide by `config.tp`.
    """
    if mesh.tp_size > 1:
        check_divisible(decoder.config, tp=mesh.tp_size, sequence_parallel=config.sequence_parallel)
        tp = TensorParallel(mesh.tp_rank, mesh.tp_size, mesh.group("tp"), config.sequence_parallel)
        apply_plan(decoder, decoder_plan(decoder), tp)
    for layer in decoder.layers:
        recompute_layer(layer, config.recompute)
        if config.compile:
            layer.compile()


def vocabulary_shard(decoder: Decoder) -> tuple[int, dist.ProcessGroup | None]:
    """(vocab_start, group) for `cross_entropy_sum`: the first word of this rank's rows of the head, and who has the rest."""
    holder = decoder.embedding if decoder.head is None else decoder.head
    tp: TensorParallel | None = getattr(holder, "tp", None)
    if tp is None:
        return 0, None
    return tp.rank * decoder.head_weight.shape[0], tp.group
