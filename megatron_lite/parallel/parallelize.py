"""The recipe: from a plain decoder on the meta device to this process's initialized part of it.

    decoder = Decoder(config)                                   on the meta device: shapes, no memory
    parallelize(decoder, mesh, parallel)                        cut by the plan, recompute and compile each layer
    shards = shard_info(decoder)                                what this process holds of each global parameter
    materialize(decoder, device=..., seed=..., shard=...)       layer by layer: memory, initial weights, engine's sharding

Initial weights depend on the seed, the parameter's name and the global row, so every layout starts from the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from megatron_lite.models.decoder import Decoder
from megatron_lite.models.initialization import initialize_
from megatron_lite.parallel.layers import ShardInfo, TensorParallel, shard_info
from megatron_lite.parallel.mesh import Mesh, ParallelConfig
from megatron_lite.parallel.plans import apply_plan, check_divisible, decoder_plan
from megatron_lite.parallel.recompute import recompute_layer


def parallelize(decoder: Decoder, mesh: Mesh | None, config: ParallelConfig) -> None:
    """Cut the decoder over the tensor-parallel ranks, in place, and set its layers' recompute and compilation.

    mesh None: one process, nothing is cut. Raises ValueError when the model does not divide by `config.tp`.
    """
    if mesh is not None and mesh.tp_size > 1:
        check_divisible(decoder.config, tp=mesh.tp_size, sequence_parallel=config.sequence_parallel)
        tp = TensorParallel(mesh.tp_rank, mesh.tp_size, mesh.tp_group, config.sequence_parallel)
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


def materialize(
    decoder: Decoder,
    *,
    device: torch.device | str,
    seed: int,
    shard: Callable[[nn.Module], None] | None = None,
) -> None:
    """Give the decoder memory on `device` and its initial weights, in place.

    A layer at a time: `shard(layer)` (the engine's sharding over the data-parallel ranks) runs before the next layer
    gets its memory, so that no process ever holds more than its shards, one layer, embedding and head. The engine shards
    those last two itself, with everything else outside the layers.
    """
    infos = shard_info(decoder)
    for index, layer in enumerate(decoder.layers):
        _materialize(layer, f"layers.{index}", infos, device=device, seed=seed)
        if shard is not None:
            shard(layer)
    for name, child in decoder.named_children():
        if child is not decoder.layers:
            _materialize(child, name, infos, device=device, seed=seed)
    missed = [name for name, parameter in decoder.named_parameters() if parameter.is_meta]
    assert not missed, f"not materialized: {missed}"


def _materialize(
    part: nn.Module, prefix: str, infos: dict[str, ShardInfo], *, device: torch.device | str, seed: int
) -> None:
    """Memory and initial values for everything below `part`, which is called `prefix` in the decoder."""
    part.to_empty(device=device)
    missed = {name for name, _ in part.named_parameters(prefix=prefix)}
    for path, module in part.named_modules(prefix=prefix):
        distributions = module.initial() if hasattr(module, "initial") else {}
        for local_name, distribution in distributions.items():
            name = f"{path}.{local_name}"
            info = infos[name]
            initialize_(
                module.get_parameter(local_name),
                distribution=distribution,
                name=name,
                seed=seed,
                global_shape=info.global_shape,
                dim=info.tp_dim or 0,
                start=info.start,
            )
            missed.discard(name)
    assert not missed, f"no module says how to initialize {sorted(missed)}"
