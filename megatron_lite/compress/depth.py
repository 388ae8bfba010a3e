"""Depth by iterative removal: again and again the unit without which the model is best is taken out.

Costs a pass over the data for every unit that is left, for every unit that is removed. What "best" means is the loss, or the mean squared
difference between the logits and those of the whole model (Nemotron Nano 2).

Shapes: B batch, T sequence, D hidden, N counted tokens of a chunk, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.compress.sizes import unit_layers
from megatron_lite.data.packing import Batch
from megatron_lite.models.decoder import Decoder
from megatron_lite.objectives.next_token import NextToken
from megatron_lite.parallel.mesh import Mesh, sum_over

CHUNK_TOKENS = 1024  # whose logits are in memory at a time


@dataclass(frozen=True)
class RemovalOptions:
    """count: units to remove. loss: by the loss, otherwise by the logits. keep: called after each removal, so that an interrupted job
    continues there."""

    count: int
    loss: bool
    keep: Callable[[], Any]


class Probe(NextToken):
    """A decoder that is looked at: an engine shards it as it shards an objective. In evaluation mode."""

    def forward(self, batch: Batch, reference_BTD: Tensor | None = None, *, states: bool = False) -> Any:
        """As any objective the loss; with `states` the states (B, T, D) after the final norm; with `reference`, states of another pass,
        the sum over the counted tokens of the squared differences of their logits, over the vocabulary."""
        if states:
            return self.hidden(batch)
        if reference_BTD is None:
            return super().forward(batch)
        return self._logit_distance(self.hidden(batch) - reference_BTD, batch)

    def _logit_distance(self, delta_BTD: Tensor, batch: Batch) -> Tensor:
        """Logits are linear in the states: those of the difference are the difference of the logits."""

        def squares(delta_ND: Tensor, weight_VD: Tensor) -> Tensor:
            parts = [(chunk @ weight_VD.T).float().square().sum() for chunk in delta_ND.split(CHUNK_TOKENS)]
            return torch.stack(parts).sum() if parts else delta_ND.new_zeros((), dtype=torch.float32)

        counted_ND = delta_BTD.flatten(0, 1)[batch["loss_mask"].flatten()]
        total = self.decoder.with_head_weight(squares, counted_ND)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total


def removal_order(
    decoder: Decoder,
    forward: Callable[..., Any],
    batches: Callable[[], Iterable[Batch]],
    *,
    mesh: Mesh,
    removed: list[int],
    options: RemovalOptions,
) -> None:
    """Extend `removed`, the units that were removed so far, to `options.count` units. Collective.

    forward: a pass of the `Probe` around `decoder`, with its arguments. batches: this rank's, the same at every call.
    """
    units = unit_layers(decoder.config)
    while len(removed) < options.count:
        left = [unit for unit in range(len(units)) if unit not in removed]
        totals = torch.zeros(len(left), dtype=torch.float64, device=mesh.device)
        for batch in batches():
            reference = None if options.loss else forward(batch, states=True)
            for index, unit in enumerate(left):
                with without(decoder, [layer for gone in (*removed, unit) for layer in units[gone]]):
                    found = forward(batch, reference)
                    totals[index] += (found.total if options.loss else found).double()
        sum_over(mesh.world, totals)  # one sum: every rank gets the same bits, and tensor-parallel ranks count alike
        removed.append(left[int(totals.argmin())])
        options.keep()


@contextmanager
def without(decoder: Decoder, layers: Sequence[int]) -> Iterator[None]:
    """Inside, these residual layers hand on what they get."""

    def skip(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    handles = [decoder.layers[layer].register_forward_hook(skip) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
