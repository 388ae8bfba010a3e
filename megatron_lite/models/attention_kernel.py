"""Which kernel computes softmax(Q K^T / sqrt(K)) V.

    device  dtype        mask     kernel                keys and values
    cuda    bf16, fp16   none     flash                 one head a group
    cuda    bf16, fp16   given    memory-efficient      repeated for every query head
    cuda    fp32         any      memory-efficient      repeated for every query head
    cuda    fp64         any      math                  one head a group
    others  any          any      torch's choice        one head a group

`F.scaled_dot_product_attention` would choose by itself, and where nothing else fits fall to the math kernel without a word, which
keeps T x T scores of every head: flash takes neither masks nor fp32, memory-efficient takes no grouped heads. So the kernel is named,
and one that cannot run raises RuntimeError. Flash and memory-efficient have a deterministic backward pass, which
`torch.use_deterministic_algorithms` switches on, so the choice does not depend on it.

Shapes: B batch, T queries, S keys, H heads, G KV groups, K head dim.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class AttentionKernel:
    """backend: None leaves the choice to torch. repeats: keys and values are given to it once for every query head."""

    name: str
    backend: SDPBackend | None = None
    repeats: bool = False

    def __call__(
        self, query_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, *, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """(B, H, T, K). mask: (B or 1, 1, T, S) bool, True = attend. Raises RuntimeError if the kernel cannot run."""
        queries = query_BHTK.shape[1] // key_BGSK.shape[1]
        if self.repeats and queries > 1:
            key_BGSK, value_BGSK = (x.repeat_interleave(queries, dim=1) for x in (key_BGSK, value_BGSK))
        with sdpa_kernel(self.backend) if self.backend is not None else nullcontext():
            return F.scaled_dot_product_attention(
                query_BHTK,
                key_BGSK,
                value_BGSK,
                attn_mask=mask,
                is_causal=is_causal,
                # On CPU as fast as any way of repeating the keys and values by hand (tried, both passes).
                enable_gqa=queries > 1 and not self.repeats,
            )


ANY = AttentionKernel("torch's choice")
FLASH = AttentionKernel("flash", SDPBackend.FLASH_ATTENTION)
EFFICIENT = AttentionKernel("memory-efficient", SDPBackend.EFFICIENT_ATTENTION, repeats=True)
MATH = AttentionKernel("math", SDPBackend.MATH)


def attention_kernel(device_type: str, dtype: torch.dtype, *, masked: bool) -> AttentionKernel:
    """The kernel for tensors of `dtype` on such a device, with or without a mask: the table above."""
    if device_type != "cuda":
        return ANY
    if dtype is torch.float64:
        return MATH
    return EFFICIENT if masked or dtype is torch.float32 else FLASH
