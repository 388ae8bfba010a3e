"""A decoder on the meta device as a rank of any layout would hold it: training's own code, without processes and without memory.

Collectives run on meta with a group that has a size and a name and nothing else, so `parallelize` makes of a decoder here what it
makes of it in training. Only attention is different: it is the kernel that a GPU would run, where the meta device would take apart
softmax and products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.models.attention import AttentionCore
from megatron_lite.models.attention_kernel import attention_kernel
from megatron_lite.models.attention_mask import Visibility
from megatron_lite.models.cache import KeyValue
from megatron_lite.models.context import LayerContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context_attention import ContextParallelAttention
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parallelize import Recipe, parallelize
from megatron_lite.parallel.reclass import reclass
from megatron_lite.parallel.sequence_slices import ContextParallel
from megatron_lite.planner.job import Job
from megatron_lite.planner.scans import plan_scans
from megatron_lite.precision.dtypes import PrecisionConfig, fp32_modules

META = torch.device("meta")


@dataclass(frozen=True)
class MetaGroup:
    """What a collective asks of its group. group_name: the axis of the mesh."""

    group_name: str
    members: int

    def size(self) -> int:
        """Number of processes."""
        return self.members

    def rank(self) -> int:
        """This one's."""
        return 0


@dataclass(frozen=True)
class MetaMesh(Mesh):
    """The mesh of `degrees` as its first rank sees it, on the meta device."""

    device: torch.device = META

    @property
    def context_parallel(self) -> ContextParallel | None:
        """See `Mesh`."""
        cp = self.degrees.cp
        return None if cp == 1 else ContextParallel(0, cp, self.group("cp"))

    def group(self, axis: str) -> dist.ProcessGroup:
        """See `Mesh`; its collectives compute shapes only."""
        return MetaGroup(axis, getattr(self.degrees, axis))  # type: ignore[return-value]


class GpuAttention(nn.Module):
    """An attention core on the kernel that a GPU would run. What a window hides is not seen here: see `work.seen_fraction`."""

    masked: bool
    visibility: Visibility

    def attend(self, query_BHTK: Tensor, kv: KeyValue, context: LayerContext) -> Tensor:
        """(B, H, T, V)."""
        key_BGSK, value_BGSV = kv.key_BGSK, kv.value_BGSV
        same, tokens = query_BHTK.shape[-1] == value_BGSV.shape[-1], query_BHTK.shape[2]
        if self.masked and not self.visibility.hides_some_of(tokens):  # all layers without a window share one
            batch, dtype = len(query_BHTK), query_BHTK.dtype
            context.shared(("dense", self.visibility, dtype), lambda: query_BHTK.new_empty(batch, 1, tokens, tokens))
        kernel = attention_kernel("cuda", query_BHTK.dtype, masked=self.masked, same_head_dims=same)
        if not kernel.repeats:
            return torch.ops.aten._scaled_dot_product_flash_attention(query_BHTK, key_BGSK, value_BGSV, 0.0, True)[0]
        queries = query_BHTK.shape[1] // key_BGSK.shape[1]
        key, value = (x.repeat_interleave(queries, dim=1) for x in (key_BGSK, value_BGSV))
        return torch.ops.aten._scaled_dot_product_efficient_attention(query_BHTK, key, value, None, True, 0.0, True)[0]


def meta_decoder(job: Job) -> Decoder:
    """The decoder as one rank of `job` computes with it, in the dtype of its forward pass. FP8 layers are still bf16.

    Raises ValueError when the model does not divide by the layout's degrees.
    """
    with torch.device("meta"):
        decoder = Decoder(job.model)
    # the emulation's operators are not those of a GPU: see `fp8`
    precision = PrecisionConfig("fp32" if job.precision.dtype is torch.float32 else "bf16")
    parallel = replace(job.parallel, compile=False)  # what it fuses is counted, not compiled
    plan_scans(decoder, kernels=job.scan_kernels and not job.masked)
    parallelize(decoder, MetaMesh(job.degrees), Recipe(parallel, precision))
    use_gpu_attention(decoder, masked=job.masked)
    cast_parameters(decoder, job.precision.dtype)
    return decoder


def use_gpu_attention(decoder: Decoder, *, masked: bool) -> None:
    """Give every attention core the kernel that a GPU would run; one that divides a sequence is an operator by itself."""
    for module in decoder.modules():
        if isinstance(module, AttentionCore) and not isinstance(module, ContextParallelAttention):
            reclass(module, GpuAttention, masked=masked)


def cast_parameters(decoder: Decoder, dtype: torch.dtype) -> None:
    """Every parameter to `dtype`, those of modules that compute in fp32 excepted."""
    kept = {id(parameter) for module in fp32_modules(decoder) for parameter in module.parameters()}
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in kept:
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))


def meta_tensor(*shape: int, dtype: torch.dtype, grad: bool = False) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device=META, requires_grad=grad)
