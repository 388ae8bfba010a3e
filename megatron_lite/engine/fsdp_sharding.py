"""What FSDP2 shards in which groups: each layer, modules that compute in fp32, embedding, head, and the rest.

Embedding and head are groups of their own: the first layer waits for the embedding's gather only, and the head's gradient, the first
that is complete, is reduced beside the rest of backward. (When they are one tensor, it is gathered first and reduced last.)
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from megatron_lite.parallel.assemble import Distribute, Materialize
from megatron_lite.parallel.mesh import CPU, Mesh
from megatron_lite.precision.dtypes import fp32_modules
from megatron_lite.precision.numerics import numerics_of


def sharding(mesh: Mesh, dtype: torch.dtype, *, reshard: bool, cpu_offload: bool) -> Distribute:
    """Shards over `mesh.sharding`, for computation in `dtype`. reshard: a layer is gathered again for backward."""
    in_fp32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    policy = in_fp32 if dtype is torch.float32 else mixed
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh.sharding, offload_policy=offload)

    def distribute(objective: nn.Module, materialize: Materialize) -> None:
        for module in fp32_modules(objective) if policy is mixed else []:  # a policy is a whole group's
            shard(module, mp_policy=in_fp32, reshard_after_forward=reshard)
        for layer in materialize.decoder.layers:
            shard(layer, mp_policy=policy, reshard_after_forward=reshard)
        decoder = materialize.decoder
        for module in (decoder.embedding, decoder.head) if decoder.head is not None else ():
            # stays gathered: backward begins where forward ends
            shard(module, mp_policy=policy, reshard_after_forward=False)
        if decoder.head is not None:
            register_fsdp_forward_method(decoder.head, "with_weight")  # what a loss calls
        shard(objective, mp_policy=policy, reshard_after_forward=False)
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # a plain sum: gloo has no scaled one
        place = replace(materialize, device=CPU) if cpu_offload else materialize
        place(objective)
        ranks = mesh.group("dp_shard").size()
        if ranks > 1:
            _gather_in_fp8(decoder, ranks)

    return distribute


def _gather_in_fp8(decoder: nn.Module, ranks: int) -> None:
    numerics = numerics_of(decoder)
    for path in numerics.gathered:
        weight = decoder.get_parameter(f"{path}.weight")
        assert isinstance(weight, DTensor), f"{path} is not sharded"
        # `to_local` would give another tensor of the same memory, and this one is what FSDP2 asks
        numerics.gather(path, weight._local_tensor, rows=weight.shape[0], ranks=ranks)
