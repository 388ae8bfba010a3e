"""Attention of some queries over some of the keys, so that the parts can be put together (online softmax, arXiv 2205.14135, section 3).

    forward     out = softmax(S) V and lse = log sum exp(S) over these keys alone, with S = Q K^T / sqrt(K)
    backward    this part's share of dQ, and dK and dV, from the output and the lse over all keys:
                P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - rowsum(dO out)), dQ = dS K / sqrt(K), dK = dS^T Q / sqrt(K)

`F.scaled_dot_product_attention` returns no lse, so the kernels behind it are called by their names in torch. Which one is
decided where it is for an undivided sequence (`models/attention_kernel.py`):

    flash               heads padded with zeros to the width of the widest, and to a multiple of 8 on a GPU
    memory-efficient    keys and values repeated for every query head; their gradients are summed over these in fp32
    math                all scores at once, with plain torch: cuda fp64, and devices that have none of the others

Their conditions, by torch's sources: both CUDA kernels take strides and addresses in multiples of 16 bytes and widths in multiples
of 8, to which heads are padded (those of keys and values that travel side by side follow from the widths); flash takes up to 256
numbers a head and grouped heads, of which it sums dK and dV in 16 bits before `backward`'s caller adds parts up in fp32; neither looks
at the seeds of a dropout that is 0. `tests/gpu/test_attention_in_parts.py` runs them.

FlexAttention would skip blocks inside a tile and take grouped heads with a mask, but its backward pass cannot be called with an lse
over keys that it has not seen: every part's output and lse would have to stay in the graph, for all rounds. The tiles
(`context_tiles.py`) skip what it would, down to a window.

Shapes: B batch, H heads, G KV groups, T queries, S keys, K head dim of queries and keys, V that of values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.models.attention_kernel import EFFICIENT, FLASH, attention_kernel

Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """Queries and the keys they look at. mask: (B or 1, 1, T, S) bool, True = attend; every query of `backward` has an lse that is
    finite. causal: T = S, the same tokens, and no mask."""

    query_BHTK: Tensor
    key_BGSK: Tensor
    value_BGSV: Tensor
    mask: Tensor | None = None
    causal: bool = False

    @property
    def scale(self) -> float:
        """1 / sqrt(K)."""
        return 1 / math.sqrt(self.query_BHTK.shape[-1])

    def kernel(self) -> PartKernel:
        """The kernel for these tensors."""
        device, dtype = self.query_BHTK.device.type, self.query_BHTK.dtype
        same = self.query_BHTK.shape[-1] == self.value_BGSV.shape[-1]
        chosen = attention_kernel(device, dtype, masked=self.mask is not None, same_head_dims=same)
        kernels: dict[str, PartKernel] = {FLASH.name: CudaFlash(), EFFICIENT.name: Efficient()}
        return CpuFlash() if device == "cpu" else kernels.get(chosen.name, Math())


class PartKernel(Protocol):
    """One way to compute it."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        """out (B, H, T, V) and lse (B, H, T), fp32 or fp64; for a query that sees no key they are anything."""

    def backward(self, part: Part, grad_BHTV: Tensor, out_BHTV: Tensor, lse_BHT: Tensor) -> Grads:
        """dQ, dK and dV as above; out and lse are over all keys."""


def attend(part: Part) -> tuple[Tensor, Tensor]:
    """out (B, H, T, V) and lse (B, H, T), which is -inf where a query sees none of the keys."""
    if part.mask is None:
        return part.kernel().forward(part)
    seen = part.mask.any(-1, keepdim=True)
    # What a kernel makes of a row without keys differs (NaN, 0, their mean): it sees all keys, and the sum does not count it.
    out, lse = part.kernel().forward(replace(part, mask=part.mask | ~seen))
    return out, lse.masked_fill(~seen.squeeze(-1), -torch.inf)


class Math:
    """All T x S scores at once."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        """See `PartKernel`."""
        scores, _, value = self._scores(part)
        lse = scores.logsumexp(-1)
        return ((scores - lse[..., None]).exp() @ value).to(part.query_BHTK.dtype), lse

    def backward(self, part: Part, grad_BHTV: Tensor, out_BHTV: Tensor, lse_BHT: Tensor) -> Grads:
        """See `PartKernel`."""
        scores, key, value = self._scores(part)
        query, grad, out = (x.to(scores.dtype) for x in (part.query_BHTK, grad_BHTV, out_BHTV))
        weight = (scores - lse_BHT[..., None]).exp()
        d_scores = weight * (grad @ value.mT - (grad * out).sum(-1, keepdim=True)) * part.scale
        return d_scores @ key, _grouped(d_scores.mT @ query, part), _grouped(weight.mT @ grad, part)

    def _scores(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(part.query_BHTK.dtype, torch.float32)
        key, value = (x.to(wide) for x in _repeated(part))
        scores = part.query_BHTK.to(wide) @ key.mT * part.scale
        mask = part.mask
        if part.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf), key, value


class CpuFlash:
    """The only fused kernel of a CPU; one head dim, grouped heads."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        """See `PartKernel`."""
        query, key, value = _of_one_width(part)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, part.causal, attn_mask=_bias(part), scale=part.scale
        )
        return out[..., : part.value_BGSV.shape[-1]], lse

    def backward(self, part: Part, grad_BHTV: Tensor, out_BHTV: Tensor, lse_BHT: Tensor) -> Grads:
        """See `PartKernel`."""
        query, key, value = _of_one_width(part)
        grad, out = (_padded(x, query.shape[-1]) for x in (grad_BHTV, out_BHTV))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse_BHT, 0.0, part.causal, attn_mask=_bias(part), scale=part.scale
        )
        return _cut_to_width(grads, part)


class CudaFlash:
    """FlashAttention-2 for parts without a mask, in 16 bits."""

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        """See `PartKernel`."""
        query, key, value = _of_one_width(part)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, part.causal, scale=part.scale
        )
        return out[..., : part.value_BGSV.shape[-1]], lse

    def backward(self, part: Part, grad_BHTV: Tensor, out_BHTV: Tensor, lse_BHT: Tensor) -> Grads:
        """See `PartKernel`."""
        query, key, value = _of_one_width(part)
        grad, out = (_padded(x, query.shape[-1]) for x in (grad_BHTV, out_BHTV))
        unused = query.new_empty(0, dtype=torch.uint64)  # the state of a dropout that there is not
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad,
            query,
            key,
            value,
            out,
            lse_BHT.contiguous(),
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            part.causal,
            unused,
            unused,
            scale=part.scale,
        )
        return _cut_to_width(grads, part)


class Efficient:
    """Memory-efficient attention (arXiv 2112.05682), with or without a mask."""

    ROWS = 32  # the kernel reads lse in whole blocks of queries

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        """See `PartKernel`."""
        query, key, value = self._arguments(part)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, self._bias(part), True, 0.0, part.causal, scale=part.scale
        )
        return out[..., : part.value_BGSV.shape[-1]], lse[..., : query.shape[2]]

    def backward(self, part: Part, grad_BHTV: Tensor, out_BHTV: Tensor, lse_BHT: Tensor) -> Grads:
        """See `PartKernel`."""
        query, key, value = self._arguments(part)
        grad, out = (_padded(x, value.shape[-1]) for x in (grad_BHTV, out_BHTV))
        lse = F.pad(lse_BHT, (0, -lse_BHT.shape[-1] % self.ROWS), value=torch.inf)
        unused = torch.empty((), dtype=torch.int64, device=query.device)
        d_query, d_key, d_value, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad,
            query,
            key,
            value,
            self._bias(part),
            out,
            lse,
            unused,
            unused,
            0.0,
            [True, True, True, False],
            part.causal,
            scale=part.scale,
        )
        d_query, d_key, d_value = _cut_to_width((d_query, d_key, d_value), part)
        return d_query, _grouped(d_key, part), _grouped(d_value, part)

    def _arguments(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        key, value = _repeated(part)
        query, key, value = (_padded(x, x.shape[-1] + -x.shape[-1] % 8) for x in (part.query_BHTK, key, value))
        return query, key, value

    def _bias(self, part: Part) -> Tensor | None:
        """As the kernel wants it: a row for every head, rows that begin at multiples of 16 entries."""
        bias = _bias(part)
        if bias is None:
            return None
        heads, keys = part.query_BHTK.shape[1], bias.shape[-1]
        return F.pad(bias, (0, -keys % 16))[..., :keys].expand(len(part.query_BHTK), heads, -1, -1)


def _bias(part: Part) -> Tensor | None:
    """The mask as numbers to add to scores."""
    if part.mask is None:
        return None
    return torch.zeros(part.mask.shape, dtype=part.query_BHTK.dtype, device=part.mask.device).masked_fill_(
        ~part.mask, -torch.inf
    )


def _padded(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _of_one_width(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros change no score, and the outputs and gradients that they add are zero."""
    width = max(part.query_BHTK.shape[-1], part.value_BGSV.shape[-1])
    if part.query_BHTK.device.type == "cuda":
        width += -width % 8
    return _padded(part.query_BHTK, width), _padded(part.key_BGSK, width), _padded(part.value_BGSV, width)


def _cut_to_width(grads: Grads, part: Part) -> Grads:
    keys, values = part.query_BHTK.shape[-1], part.value_BGSV.shape[-1]
    return grads[0][..., :keys], grads[1][..., :keys], grads[2][..., :values]


def _repeated(part: Part) -> tuple[Tensor, Tensor]:
    queries = part.query_BHTK.shape[1] // part.key_BGSK.shape[1]
    key, value = (x.repeat_interleave(queries, dim=1) if queries > 1 else x for x in (part.key_BGSK, part.value_BGSV))
    return key, value


def _grouped(grad_BHSX: Tensor, part: Part) -> Tensor:
    """The sum over the query heads of a group, in fp32 at least."""
    wide = torch.promote_types(grad_BHSX.dtype, torch.float32)
    return grad_BHSX.unflatten(1, (part.key_BGSK.shape[1], -1)).sum(2, dtype=wide)
