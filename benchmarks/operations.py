"""The operations of a training step, in the form that training uses and in the form that its formula suggests, for `benchmarks.kernels`.

An operation says how many FLOPs and bytes it needs. The FLOPs are those of the matrix products without what is computed twice, causal
attention half of the square; the bytes are those of the operation's inputs, outputs and their gradients, each read or written once
where forward or backward needs it.

Shapes: B batch, T sequence, H heads, K head dim, C channels, P head dim of a scan, N state, W words, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.models.attention_kernel import attend
from megatron_lite.models.attention_mask import Visibility
from megatron_lite.models.cache import KeyValue
from megatron_lite.models.context import LayerContext
from megatron_lite.models.norm import LayerNorm1p
from megatron_lite.models.scan import Operands
from megatron_lite.models.selective_scan import selective_scan
from megatron_lite.models.ssd import CHUNK_CPU, ssd
from megatron_lite.optim.optimizer import AdamW, OptimConfig
from megatron_lite.parallel.chunked_loss import VocabularyShard
from megatron_lite.parallel.cross_entropy import cross_entropy_sum

Form = Callable[[], list[Tensor]]
"""Runs an operation once; what it computed, to be compared with another form."""

FP32 = 4  # bytes of a number


@dataclass(frozen=True)
class Size:
    """tokens: of the batch, in sequences of `length`. square: side of the matrices that measure the matmul rate. large: MB that no cache
    holds, for the byte rate and for operations that only move bytes."""

    tokens: int
    length: int
    hidden: int
    words: int
    square: int
    large: int

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.tokens // self.length


SIZES = {
    "tiny": Size(tokens=128, length=64, hidden=64, words=256, square=128, large=1),
    "small": Size(tokens=2048, length=256, hidden=256, words=8192, square=1024, large=128),
    "long": Size(tokens=2048, length=2048, hidden=512, words=16384, square=1024, large=128),
}


@dataclass(frozen=True)
class Operation:
    """An operation in both forms. flops, bytes: of forward and backward, see above."""

    name: str
    shape: str
    ours: Form
    plain: Form
    flops: float
    bytes: float


def attention(size: Size) -> Operation:
    """Causal self-attention of heads of 64 numbers."""
    K, T, B = 64, size.length, size.batch
    H = size.hidden // K
    query, key, value = (torch.randn(B, H, T, K) for _ in range(3))
    context, visibility = LayerContext(torch.arange(T)[None]), Visibility()
    hidden_TS = torch.ones(T, T, dtype=torch.bool).triu(1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, KeyValue(k, v), context, visibility)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT / K**0.5).masked_fill(hidden_TS, -torch.inf)
        return scores.softmax(-1) @ v

    return Operation(
        "attention",
        f"B {B}, T {T}, H {H}, K {K}",
        *_both(ours, plain, query, key, value),
        flops=3 * 2 * B * H * T * T * K,
        bytes=12 * query.numel() * FP32,  # 3 in, 1 out; backward reads these and the gradient of 1, writes those of 3
    )


def mamba2(size: Size) -> Operation:
    """The scan of a Mamba-2 layer of twice the hidden width, one group."""
    B, T, P, N = size.batch, size.length, 64, 64
    H = 2 * size.hidden // P
    x, dt = torch.randn(B, T, H, P), F.softplus(torch.randn(B, T, H) - 2)
    B_BTGN, C_BTGN = torch.randn(B, T, 1, N), torch.randn(B, T, 1, N)
    A_H = -torch.rand(H) - 0.5

    def ours(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return ssd(Operands(x, dt, A_H, b, c))[0]

    def plain(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        state, outputs = x.new_zeros(B, H, P, N), []
        for t in range(T):
            added = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
            state = torch.exp(dt[:, t] * A_H)[..., None, None] * state + added
            outputs.append((state @ c[:, t, 0, None, :, None])[..., 0])
        return torch.stack(outputs, dim=1)

    # causal scores and products of a chunk; its state, and from the state before
    a_token = CHUNK_CPU * (N + H * P) + 4 * H * P * N
    return Operation(
        "Mamba-2 scan",
        f"B {B}, T {T}, H {H}, P {P}, N {N}",
        *_both(ours, plain, x, dt, B_BTGN, C_BTGN),
        flops=3 * B * T * a_token,
        bytes=5 * FP32 * (x.numel() + 2 * B_BTGN.numel()),
    )


def mamba1(size: Size) -> Operation:
    """The scan of a Mamba-1 layer of twice the hidden width."""
    B, T, C, N = size.batch, size.length, 2 * size.hidden, 16
    x, dt = torch.randn(B, T, C), F.softplus(torch.randn(B, T, C) - 2)
    B_BTN, C_BTN = torch.randn(B, T, N), torch.randn(B, T, N)
    A_CN = -torch.rand(C, N) - 0.5

    def ours(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return selective_scan(Operands(x, dt, A_CN, b, c))[0]

    def plain(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        state, outputs = x.new_zeros(B, C, N), []
        for t in range(T):
            added = (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
            state = torch.exp(dt[:, t, :, None] * A_CN) * state + added
            outputs.append((state @ c[:, t, :, None])[..., 0])
        return torch.stack(outputs, dim=1)

    return Operation(
        "Mamba-1 scan",
        f"B {B}, T {T}, C {C}, N {N}",
        *_both(ours, plain, x, dt, B_BTN, C_BTN),
        flops=3 * 6 * B * T * C * N,  # exp, decay, input and their sum, and the product with C
        bytes=5 * FP32 * 2 * (x.numel() + B_BTN.numel()),
    )


def cross_entropy(size: Size) -> Operation:
    """The output matrix and the loss."""
    N, D, W = size.tokens, size.hidden, size.words
    x, weight, targets = torch.randn(N, D), 0.02 * torch.randn(W, D), torch.randint(0, W, (N,))
    counted = torch.ones(N, dtype=torch.bool)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy_sum(x, weight, targets, counted, shard=VocabularyShard(W))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.T, targets, reduction="sum")

    return Operation(
        "linear cross-entropy",
        f"{N:,} tokens, D {D}, W {W:,}",
        *_both(ours, plain, x, weight),
        flops=3 * 2 * N * D * W,
        bytes=3 * FP32 * (x.numel() + weight.numel()),
    )


def norm(size: Size) -> Operation:
    """LayerNorm1p."""
    module = LayerNorm1p(size.hidden, eps=1e-5)
    torch.nn.init.normal_(module.weight, std=0.1)
    torch.nn.init.normal_(module.bias, std=0.1)
    tokens = size.large * 2**20 // FP32 // size.hidden
    gain, bias, x = module.weight.detach(), module.bias.detach(), torch.randn(tokens, size.hidden)

    def plain(x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return (1 + gain) * centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + 1e-5) + bias

    return Operation(
        "LayerNorm1p",
        f"{tokens:,} tokens, D {size.hidden}",
        *_both(module, plain, x),
        flops=0.0,
        bytes=5 * FP32 * x.numel(),  # x and y; backward: x and the gradient of y, that of x
    )


def optimizer(size: Size) -> Operation:
    """AdamW over the matrices of as many blocks as the moments need to be large; the plain form is torch's loop over the parameters."""
    D = size.hidden
    block = {"qkv": (3 * D, D), "out": (D, D), "up": (4 * D, D), "down": (D, 4 * D)}
    blocks = max(1, size.large * 2**20 // (2 * FP32 * 12 * D * D))
    shapes = {f"{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}
    gradients = {name: torch.randn(shape) for name, shape in shapes.items()}
    mine, theirs = ({name: torch.ones(shape) for name, shape in shapes.items()} for _ in range(2))
    config = OptimConfig(lr=1e-3)
    fused = AdamW(mine, config, dict.fromkeys(shapes, "matrix"))
    skip = torch.zeros(())

    def ours() -> list[Tensor]:
        fused.step(gradients, lr=config.lr, skip=skip)
        return list(mine.values())

    for name, tensor in theirs.items():
        tensor.grad = gradients[name]
    loop = torch.optim.AdamW(
        list(theirs.values()),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=False,
    )

    def plain() -> list[Tensor]:
        loop.step()
        return list(theirs.values())

    numbers = sum(tensor.numel() for tensor in mine.values())
    reads, writes = 4, 3  # weight, gradient and two moments; all but the gradient
    return Operation(
        "AdamW", f"{numbers / 1e6:.1f} M parameters", ours, plain, flops=0.0, bytes=(reads + writes) * FP32 * numbers
    )


OPERATIONS = {
    "attention": attention,
    "Mamba-2": mamba2,
    "Mamba-1": mamba1,
    "cross-entropy": cross_entropy,
    "norm": norm,
    "optimizer": optimizer,
}


def _both(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> tuple[Form, Form]:
    """Forward and backward of two functions of the same inputs, from the same gradient of the output."""
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.no_grad():
        gradient = torch.randn_like(ours(*leaves))

    def form(function: Callable[..., Tensor]) -> Form:
        def run() -> list[Tensor]:
            y = function(*leaves)
            return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]

        return run

    return form(ours), form(plain)
