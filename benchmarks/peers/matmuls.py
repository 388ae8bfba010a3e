"""The ceiling: only the matrix products of the linear layers and the head, three for each (forward, gradients of input and weight).

No implementation of the work is faster, so the ratio to it is the share of the ceiling that ours reaches.
"""

from __future__ import annotations

import itertools

import torch

from benchmarks.peers.serving import Pace, Work


def products(work: Work) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(input, weight, gradient of the output) of each kind of layer, as often as it occurs; layers share the tensors of their kind."""
    D, tokens = work.hidden, work.batch * work.length
    layer = [
        (torch.randn(tokens, fan_in), torch.randn(fan_out, fan_in), torch.randn(tokens, fan_out))
        for fan_in, fan_out in ((D, 3 * D), (D, D), (D, work.ffn), (work.ffn, D))
    ]
    head = torch.randn(tokens, D), torch.randn(work.vocabulary, D), torch.randn(tokens, work.vocabulary)
    return layer * work.layers + [head]


if __name__ == "__main__":
    work = Work.from_command_line()
    for step in Pace().over(itertools.repeat(products(work))):
        for x, weight, gradient in step:
            torch.mm(x, weight.T)
            torch.mm(gradient, weight)
            torch.mm(gradient.T, x)
