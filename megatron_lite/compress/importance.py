"""Importance of channels, heads, neurons and layers from forward passes over training data (Minitron, arXiv 2407.14679, section 2.2).

Hooks on an assembled decoder read the input of `down` (neurons) and `out` (heads), the output of `in_proj` (Mamba) and of the norms
(channels of the residual stream), and input and output of the layers (depth). Of each: the mean of |x| over the counted tokens of a sample,
squared, summed over the samples. These are the readings of ModelOpt 0.47 (the paper's formula for neurons is the input of the
activation, ModelOpt reads its output).

Notable features
- The sums do not depend on layout or batch size: a sample's mean is complete before it is squared, also under sequence and context
  parallelism, and all that is added up over samples, data-parallel ranks and the jobs of an interrupted calibration are the squares, in
  float64.
- Tokens that the loss does not count do not count here.
- The model is the one that training and evaluation assemble; no module knows that it is read.

Shapes: B batch, T sequence, C channels of a place (a tensor-parallel rank's share of them), D hidden, N counted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.compress.axes import mixer_axes
from megatron_lite.compress.scores import DEPTH, FINAL_NORM, TOKENS, ImportanceConfig, Scores
from megatron_lite.compress.sizes import unit_layers
from megatron_lite.data.blend import Blend
from megatron_lite.data.packing import Batch, collate
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.collectives import gather
from megatron_lite.parallel.mesh import Mesh, sum_over


class Meter:
    """Sums over the samples of this data-parallel rank, of all places of a decoder. Open it around the forward passes.

    decoder: assembled on `mesh`; on tensor-parallel ranks it holds their shards.
    """

    def __init__(self, decoder: Decoder, mesh: Mesh, options: ImportanceConfig) -> None:
        self.decoder, self.mesh, self.options = decoder, mesh, options
        self._sums: dict[str, Tensor] = {}
        self._mask_BT = torch.ones(0, 0)  # of this rank's slices
        self._counted_B1 = torch.ones(0, 1)  # counted tokens of the whole sample
        self._entering: dict[int, Tensor] = {}  # unit -> what entered its first layer
        self._cut = False  # whether the residual stream is cut along the sequence

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, forward passes are read; `begin` each of them."""
        handles = [handle for place in self._places() for handle in place]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, batch: Batch) -> None:
        """The next forward pass is over this batch, as `Mesh.place` returned it: `loss_mask` (B, T) says which of its tokens count.
        Collective, as the pass is, where ranks divide sequences."""
        self._mask_BT = batch["loss_mask"]
        self._counted_B1 = self._over_slices(self._mask_BT.sum(dim=1)).clamp(min=1)[
            :, None
        ]  # a sample without any adds 0

    def take(self) -> dict[str, Tensor]:
        """What all ranks read since the last call, of the whole model: place -> (C,) float64 on the CPU. Collective."""
        taken = {}
        for place, total in sorted(self._sums.items()):
            if self.mesh.tp_size > 1:
                group = self.mesh.group("tp")
                if place.endswith(".mixer"):
                    total = gather(total, group)
                elif place in (DEPTH, TOKENS) and self._cut:
                    total = sum_over([group], total)
            total = sum_over(self.mesh.loss_groups, total).cpu()
            # the context-parallel ranks among them have the same sums of whole samples, but different tokens
            taken[place] = total if place in (DEPTH, TOKENS) else total / self.mesh.cp_size
        self._sums = {}
        return taken

    def _places(self) -> Iterator[tuple[Any, ...]]:
        """The handles of the hooks of each place."""
        config = self.decoder.config
        for index, layer in enumerate(self.decoder.layers):
            mixer = layer.get_submodule("mixer")
            row = mixer_axes(mixer, index)
            name, side = row.reads
            place, module = f"layers.{index}.mixer", mixer.get_submodule(name)

            def read(x: Tensor, place: str = place, row: Any = row) -> None:
                self._add(place, row.channels(config, self._whole(x)))

            yield (_on_input(module, read) if side == "input" else _on_output(module, read),)
            yield (self._norm(layer.get_submodule("norm"), f"layers.{index}.norm"),)
        yield (self._norm(self.decoder.final_norm, FINAL_NORM),)
        for unit, layers in enumerate(unit_layers(config)):
            first, last = (self.decoder.layers[layer] for layer in (layers[0], layers[-1]))
            yield _on_input(first, self._enters(unit)), _on_output(last, self._leaves(unit, len(unit_layers(config))))

    def _norm(self, module: nn.Module, place: str) -> Any:
        return _on_output(module, lambda y: self._add(place, self._whole(y)))

    def _whole(self, x: Tensor) -> Tensor:
        """(B, T, C) of what a module of the sharded region reads or writes: maybe rank by rank, (tp B, T/tp, C), see `parallel.layers`."""
        if x.shape[:2] == self._mask_BT.shape:
            return x
        whole = x.unflatten(0, (self.mesh.tp_size, -1)).movedim(0, 1).flatten(1, 2)
        assert whole.shape[:2] == self._mask_BT.shape, (x.shape, self._mask_BT.shape)
        return whole

    def _add(self, place: str, x_BTC: Tensor) -> None:
        values = x_BTC.detach().float().masked_fill(~self._mask_BT[..., None], 0.0)
        is_mean = self.options.sequence == "mean"
        summed_BC = self._over_slices((values.abs() if is_mean else values.square()).sum(dim=1))
        of_sample_BC = (summed_BC / self._counted_B1 if is_mean else summed_BC.sqrt()).double()
        total = (of_sample_BC.square() if self.options.batch == "l2" else of_sample_BC).sum(dim=0)
        self._sums[place] = self._sums[place] + total if place in self._sums else total

    def _over_slices(self, of_slices: Tensor) -> Tensor:
        """The sum over the ranks that divide a sequence, in place."""
        return of_slices if self.mesh.cp_size == 1 else sum_over([self.mesh.group("cp")], of_slices)

    def _enters(self, unit: int) -> Callable[[Tensor], None]:
        def enter(x_BTD: Tensor) -> None:
            self._entering[unit] = x_BTD.detach()

        return enter

    def _leaves(self, unit: int, units: int) -> Callable[[Tensor], None]:
        def leave(y_BTD: Tensor) -> None:
            x_BTD, mask_BT = self._entering.pop(unit), self._mask_BT
            self._cut = x_BTD.shape[1] != mask_BT.shape[1]
            if self._cut:
                mask_BT = mask_BT.chunk(self.mesh.tp_size, dim=1)[self.mesh.tp_rank]
            cosine_BT = F.cosine_similarity(x_BTD.float(), y_BTD.detach().float(), dim=-1)
            distance = (1 - cosine_BT.double()).masked_fill(~mask_BT, 0.0).sum()
            totals = self._sums.setdefault(DEPTH, torch.zeros(units, dtype=torch.float64, device=y_BTD.device))
            totals[unit] += distance
            if unit == 0:
                tokens = self._sums.setdefault(TOKENS, torch.zeros(1, dtype=torch.float64, device=y_BTD.device))
                tokens += mask_BT.sum()

        return leave


def _on_input(module: nn.Module, function: Callable[[Tensor], None]) -> Any:
    return module.register_forward_pre_hook(lambda _, args: function(args[0]))


def _on_output(module: nn.Module, function: Callable[[Tensor], None]) -> Any:
    return module.register_forward_hook(lambda _, args, output: function(_first_of(output)))


def _first_of(output: Any) -> Tensor:
    """The hidden states among what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def calibration_batches(
    blend: Blend, samples: range, *, micro_batch_size: int, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """This data-parallel rank's share of the blend's `samples`, each once over all ranks.

    Every rank gets equally many batches of the same shape: what is missing is a sample with an all-False `loss_mask`.
    """
    stride = micro_batch_size * ranks
    end = samples.start + -(-len(samples) // stride) * stride
    for start in range(samples.start + rank * micro_batch_size, end, stride):
        examples = []
        for number in range(start, start + micro_batch_size):
            example = blend[min(number, samples.stop - 1)]
            if number >= samples.stop:
                example = example | {"loss_mask": np.zeros_like(example["loss_mask"])}
            examples.append(example)
        yield collate(examples)


def calibrate(
    meter: Meter,
    batches: Callable[[range], Iterable[Batch]],
    forward: Callable[[Batch], Any],
    *,
    scores: Scores,
    keep: Callable[[Scores], None],
    report: Callable[[int], None] = lambda samples: None,
) -> None:
    """Read the samples of `meter.options` that `scores` does not have yet, and add them to it. Collective.

    batches: from numbers of samples to this rank's batches, on its device. forward: one pass of the model.
    keep: saves the scores; called every `save_every` samples and at the end. report: called after every batch with the samples read.
    """
    options, ranks = meter.options, meter.mesh.data_parallel_size
    with meter.reading():
        while scores.samples < options.samples:
            stop = min(scores.samples + options.save_every, options.samples)
            done = scores.samples
            for batch in batches(range(scores.samples, stop)):
                meter.begin(batch)
                forward(batch)
                done += len(batch["loss_mask"]) * ranks
                report(min(done, stop))
            scores.add(meter.take(), samples=stop)
            keep(scores)
