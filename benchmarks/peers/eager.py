"""Plain PyTorch, as one would write it by hand: a decoder with the sizes and operations of ours, without the project's code.

B batch, T positions, D hidden size, N heads, K size of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers.serving import Work, train


class Attention(nn.Module):
    """Causal attention; rotary embeddings turn the first half of each head."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.heads = work.heads
        self.qkv = nn.Linear(work.hidden, 3 * work.hidden, bias=False)
        self.out = nn.Linear(work.hidden, work.hidden, bias=False)
        turned = work.hidden // work.heads // 2
        rates = 10_000.0 ** (-torch.arange(0, turned, 2) / turned)
        angles = torch.outer(torch.arange(work.length), rates)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x_BNTK: torch.Tensor) -> torch.Tensor:
        """x_BNTK with the first half of K rotated by position."""
        quarter = self.cos.shape[-1]
        a, b, rest = x_BNTK.split([quarter, quarter, x_BNTK.shape[-1] - 2 * quarter], dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin, rest], dim=-1)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """x_BTD -> x_BTD."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BTD).chunk(3, dim=-1))
        y_BNTK = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(y_BNTK.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """Attention and a squared-ReLU feed-forward, each behind a norm and beside a residual."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(work.hidden), nn.LayerNorm(work.hidden)
        self.attention = Attention(work)
        self.up = nn.Linear(work.hidden, work.ffn, bias=False)
        self.down = nn.Linear(work.ffn, work.hidden, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """x_BTD -> x_BTD."""
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        return x_BTD + self.down(F.relu(self.up(self.norm2(x_BTD))).square())


class Decoder(nn.Module):
    """Embedding, layers, norm, head."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.embedding = nn.Embedding(work.vocabulary, work.hidden)
        self.layers = nn.Sequential(*(Layer(work) for _ in range(work.layers)))
        self.norm = nn.LayerNorm(work.hidden)
        self.head = nn.Linear(work.hidden, work.vocabulary, bias=False)

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy."""
        logits = self.head(self.norm(self.layers(self.embedding(tokens_BT))))
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())


if __name__ == "__main__":
    work = Work.from_command_line()
    decoder = Decoder(work)
    train(decoder, decoder, work, compiled=work.compiled)
