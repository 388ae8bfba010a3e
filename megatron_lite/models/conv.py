"""The causal convolution in front of a state-space recurrence: depthwise, over the last K inputs of each channel.

    y_t = bias + sum_k weight_k x_{t - K + 1 + k}

It adds up in place, forward and backward: a tensor as large as the sequence is made once and not for every tap, and every tap reads
its own document only.

Shapes: B batch, T sequence, W channels, K taps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.models.initialization import Distribution, Uniform
from megatron_lite.models.rope import restarting_positions


class CausalConv(nn.Module):
    """`weight` (W, 1, K) and `bias` (W,), as in `torch.nn.Conv1d`."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(
        self,
        x_BTW: Tensor,
        state_BKW: Tensor | None = None,
        documents_BT: Tensor | None = None,
        *,
        prefix: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """((B, T, W), the last K - 1 inputs (B, K - 1, W)).

        state: the inputs before these, of the first token's document; None: zeros. documents: rise along a row.
        prefix: the first tokens, which have the number of the first document and stand before every document.
        """
        batch, length, channels = x_BTW.shape
        before = self.weight.shape[-1] - 1
        if state_BKW is None:
            state_BKW = x_BTW.new_zeros(batch, before, channels)
        inputs_BTW = torch.cat([state_BKW, x_BTW], dim=1)
        if documents_BT is not None:
            documents_BT = torch.cat([documents_BT[:, :1].expand(-1, before), documents_BT], dim=1)
        y_BTW = _Taps.apply(inputs_BTW, self.weight[:, 0], self.bias, documents_BT)
        if prefix and before and documents_BT is not None:
            y_BTW = y_BTW + self._of_prefix(inputs_BTW[:, prefix : prefix + before], documents_BT[:, before:])
        return y_BTW, inputs_BTW[:, length:].clone()  # a view would keep all inputs

    def _of_prefix(self, last_BKW: Tensor, documents_BT: Tensor) -> Tensor:
        """What the prefix's last K - 1 tokens add to the first K - 1 of every document but the row's first, (B, T, W)."""
        before = last_BKW.shape[1]
        followed_BTW = F.pad(last_BKW, (0, 0, 0, before))  # by nothing
        added_BKW = _Taps.apply(followed_BTW, self.weight[:, 0], torch.zeros_like(self.bias), None)
        place_BT = restarting_positions(documents_BT)
        place_BT = place_BT.masked_fill(documents_BT == documents_BT[:, :1], before)
        at_place_BTK = place_BT[..., None] == torch.arange(before, device=place_BT.device)
        return at_place_BTK.to(added_BKW.dtype) @ added_BKW

    def initial(self) -> dict[str, Distribution]:
        """As torch.nn.Conv1d, which is what Megatron-LM and mamba-ssm leave it at: uniform within 1 / sqrt(K)."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        return {"weight": Uniform(-bound, bound), "bias": Uniform(-bound, bound)}


class _Taps(torch.autograd.Function):
    """The sum over taps; inputs and documents begin K - 1 places before the outputs."""

    @staticmethod
    def forward(ctx: Any, inputs_BTW: Tensor, weight_WK: Tensor, bias_W: Tensor, documents_BT: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs_BTW, weight_WK, documents_BT)
        taps = weight_WK.shape[1]
        length = inputs_BTW.shape[1] - taps + 1
        y_BTW = bias_W.expand(inputs_BTW.shape[0], length, -1).clone()
        for tap in range(taps):
            read_BTW = _own_document(inputs_BTW[:, tap : tap + length], documents_BT, tap)
            y_BTW.addcmul_(read_BTW, weight_WK[:, tap])
        return y_BTW

    @staticmethod
    def backward(ctx: Any, grad_BTW: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        inputs_BTW, weight_WK, documents_BT = ctx.saved_tensors
        length = grad_BTW.shape[1]
        d_inputs_BTW, d_weight_WK = torch.zeros_like(inputs_BTW), torch.empty_like(weight_WK)
        product_BTW = torch.empty_like(grad_BTW)
        for tap in range(weight_WK.shape[1]):
            read = slice(tap, tap + length)
            own_BTW = _own_document(grad_BTW, documents_BT, tap)
            d_inputs_BTW[:, read].addcmul_(own_BTW, weight_WK[:, tap])
            torch.mul(own_BTW, inputs_BTW[:, read], out=product_BTW)
            d_weight_WK[:, tap] = product_BTW.sum((0, 1))
        return d_inputs_BTW, d_weight_WK, grad_BTW.sum((0, 1)), None


def _own_document(x_BTW: Tensor, documents_BT: Tensor | None, tap: int) -> Tensor:
    """x, zero where tap `tap` of an output would reach into another document than the output's."""
    length = x_BTW.shape[1]
    if documents_BT is None or tap == documents_BT.shape[1] - length:
        return x_BTW
    foreign_BT = documents_BT[:, tap : tap + length] != documents_BT[:, -length:]
    return x_BTW.masked_fill(foreign_BT[..., None], 0.0)
