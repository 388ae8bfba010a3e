"""Tensor-parallel modules: subclasses of the model's modules that hold a plain local shard.

They are made in place (`reclass`): the module keeps its name, its settings and its parameters' names, its class becomes
(tensor-parallel class, original class) and its parameters become local shards. `tp_dims` says for each of them which
dimension of the global tensor was cut; a parameter that is not in it is replicated.

Notable features:
- Plain parameters, no DTensor: FSDP2, DeepSpeed and Transformer Engine all take them.
- Nothing is read or allocated on the meta device, so a model too large for one process can be cut before it exists.
- Gradients of replicated parameters that saw only part of the input are summed in the graph, by the module's forward:
  tensor hooks on sharded parameters do not fire under FSDP2.

Under sequence parallelism the residual stream is (B, T/tp, D). What a layer reads is gathered rank by rank, as (tp B, T/tp, D):
slice after slice, as an all-gather leaves it in memory. A layer that looks at one token at a time (an MLP) can use it like that,
and a sum of its results is scattered from it, without a copy that brings the slices of a sequence together. Layers that look along
a sequence put only their own, narrower tensors in order (`in_order`, `by_rank`).

Shapes: B batch, T sequence (T/tp on the residual stream under sequence parallelism), D hidden, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.models.initialization import parameter_kinds
from megatron_lite.models.norm import at_least_float32
from megatron_lite.parallel import collectives
from megatron_lite.parallel.reclass import reclass


@dataclass(frozen=True)
class TensorParallel:
    """The rank, the group and the layout of the residual stream that a tensor-parallel module needs.

    Without sequence parallelism the residual stream (B, T, D) is replicated; with it each rank holds (B, T/tp, D).
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    sequence_parallel: bool = False

    def enter(self, x_BTD: Tensor) -> Tensor:
        """From the residual stream to what every rank's shard of a layer reads: all of x, rank by rank, its gradient summed."""
        if self.sequence_parallel:
            return collectives.sequence_gather(x_BTD, self.group, dim=0)
        return collectives.copy_in(x_BTD, self.group)

    def leave(self, y: Tensor) -> Tensor:
        """From the ranks' partial results, (B, T, D) or rank by rank (tp B, T/tp, D), to the residual stream: their sum."""
        if self.sequence_parallel:
            return collectives.sequence_reduce_scatter(y, self.group, dim=0)
        return collectives.reduce_out(y, self.group)

    def in_order(self, x: Tensor) -> Tensor:
        """(tp B, T/tp, ...) rank by rank -> (B, T, ...), whole sequences; the identity without sequence parallelism."""
        if not self.sequence_parallel:
            return x
        return x.unflatten(0, (self.size, -1)).movedim(0, 1).flatten(1, 2)

    def by_rank(self, x: Tensor) -> Tensor:
        """The inverse of `in_order`. Raises ValueError if T is not a multiple of tp."""
        if not self.sequence_parallel:
            return x
        length = collectives.slice_length(x, self.size, 1)
        return x.unflatten(1, (self.size, length)).movedim(1, 0).flatten(0, 1)

    def on_stream(self, parameter: Tensor) -> Tensor:
        """A replicated parameter used on the residual stream; under sequence parallelism each rank's gradient knows only
        its own tokens, and is summed (in fp32 at least)."""
        if not self.sequence_parallel:
            return parameter
        return collectives.copy_in(at_least_float32(parameter), self.group)

    def on_heads(self, parameter: Tensor) -> Tensor:
        """A replicated parameter used on this rank's heads: its gradient is summed (in fp32 at least)."""
        return collectives.copy_in(at_least_float32(parameter), self.group)


@dataclass(frozen=True)
class ShardInfo:
    """A local parameter's place in its global tensor: from `start` on along `tp_dim`; None: every rank holds it all.

    kind: what it is for the optimizer (`models.initialization.parameter_kinds`).
    """

    global_shape: tuple[int, ...]
    tp_dim: int | None = None
    start: int = 0
    kind: str = "matrix"


class TensorParallelModule(nn.Module):
    """The base of all tensor-parallel modules.

    tp_dims: parameter -> the dimension along which it was cut. plain_forward: the model's own forward, of (module, x).
    """

    tp: TensorParallel
    tp_dims: dict[str, int]
    plain_forward: Callable[..., Tensor]


class ColumnParallelLinear(TensorParallelModule):
    """A linear layer with a share of the output features: weight (out/tp, in), bias (out/tp,).

    It does not communicate. Its input comes from a module with `copy_in`, once for all the column layers that
    read the same x (up and gate).
    """


class InOrderColumnParallelLinear(ColumnParallelLinear):
    """One whose results are whole sequences: attention's."""

    def forward(self, x: Tensor) -> Tensor:
        """What the layer reads -> (B, T, out/tp)."""
        return self.tp.in_order(super().forward(x))


class RowParallelLinear(TensorParallelModule):
    """A linear layer with a share of the input features: weight (out, in/tp), bias replicated and added after the sum."""

    product: Callable[..., Tensor]
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """What column layers computed (..., in/tp) -> the residual stream (B, T, out)."""
        y = self.tp.leave(self.product(x))
        return y if self.bias is None else y + self.tp.on_stream(self.bias).to(y.dtype)


class InOrderRowParallelLinear(RowParallelLinear):
    """One that reads whole sequences: attention's."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in/tp) -> the residual stream (B, T, out)."""
        return super().forward(self.tp.by_rank(x))


class InnerRowParallelLinear(TensorParallelModule):
    """A row-parallel layer in the middle of a mixer: every rank gets the sum, of whole sequences, and uses it with its own shard
    (after a module with `CopyInside`)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in/tp) -> (..., out)."""
        return collectives.reduce_out(super().forward(x), self.tp.group)


class CopyInside(TensorParallelModule):
    """A module in the middle of a mixer whose output, the same on all ranks, each uses with its shard: the gradient is summed."""

    def forward(self, *args: object) -> Tensor:
        """What the module returns."""
        return collectives.copy_in(super().forward(*args), self.tp.group)


class VocabParallelEmbedding(TensorParallelModule):
    """An embedding with a share of the rows: looks up the words it holds, the others are zero, and sums."""

    weight: nn.Parameter

    def forward(self, tokens_BT: Tensor, *, begins: bool = True) -> Tensor:
        """(B, T) global word indices -> the residual stream (B, T, D), with meta tokens (B, P + T, D)."""
        return self.tp.leave(self.tp.by_rank(super().forward(tokens_BT, begins=begins)))

    def look_up(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), zero for the words of other ranks."""
        rows = self.weight.shape[0]
        local_BT = tokens_BT - self.tp.rank * rows
        is_here_BT = (local_BT >= 0) & (local_BT < rows)
        x_BTD = super().look_up(local_BT.masked_fill(~is_here_BT, 0))  # type: ignore[misc]
        return x_BTD.masked_fill(~is_here_BT[..., None], 0.0)


class PrefixedVocabParallelEmbedding(VocabParallelEmbedding):
    """One with meta tokens, which every rank holds: the first rank puts them into the sum, and their gradient, which arrives there
    only, is summed."""

    def prefix(self) -> Tensor:
        """(P, D), zero on all ranks but the first."""
        meta_PD = collectives.copy_in(super().prefix(), self.tp.group)  # type: ignore[misc]
        return meta_PD if self.tp.rank == 0 else meta_PD * 0.0


class VocabParallelHead(TensorParallelModule):
    """An output projection with a share of the rows. Its forward gathers the logits, for evaluation and generation;
    training goes through `cross_entropy_sum`, which reads the weight and never gathers."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V), all words on every rank."""
        return collectives.gather(super().forward(x_BTD), self.tp.group)


class TiedLogits(TensorParallelModule):
    """A decoder whose head is the vocabulary-parallel embedding: gathers what `VocabParallelHead` gathers."""

    head_weight: Tensor

    def logits(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) states after the final norm -> (B, T, vocabulary without padding)."""
        padded = collectives.gather(F.linear(x_BTD, self.head_weight), self.tp.group)
        return padded[..., : self.config.vocab_size]  # type: ignore[union-attr]


class CopyIn(TensorParallelModule):
    """A module whose output enters the tensor-parallel region: identity (or gather along the sequence), and in backward
    the sum of the ranks' partial gradients (or its slice)."""

    def forward(self, *args: object) -> Tensor:
        """What the module returns, ready for column layers."""
        return self.tp.enter(super().forward(*args))


class CopyInOrder(CopyIn):
    """One that hands on whole sequences: the final norm, for the head and the loss."""

    def forward(self, *args: object) -> Tensor:
        """What the module returns, (B, T, D) on every rank."""
        return self.tp.in_order(super().forward(*args))


def parallelize_module(module: nn.Module, mixin: type[TensorParallelModule], tp: TensorParallel) -> None:
    """Make `module` tensor-parallel in place, as yet with whole parameters."""
    plain_forward = getattr(module, "plain_forward", type(module).forward)
    reclass(module, mixin, tp=tp, tp_dims=getattr(module, "tp_dims", {}), plain_forward=plain_forward)


def shard_parameter(module: nn.Module, name: str, dim: int, tp: TensorParallel) -> None:
    """Cut the module's own parameter `name` along `dim` and keep this rank's part. Allocates nothing on meta.

    Raises ValueError when the dimension does not divide.
    """
    whole = module.get_parameter(name)
    if whole.shape[dim] % tp.size:
        raise ValueError(
            f"{type(module).__name__}.{name} of shape {tuple(whole.shape)} does not divide over parallel.tp={tp.size} "
            f"along dimension {dim}; choose a tp that divides {whole.shape[dim]}"
        )
    length = whole.shape[dim] // tp.size
    local = whole.detach().narrow(dim, tp.rank * length, length).clone()
    setattr(module, name, nn.Parameter(local, requires_grad=whole.requires_grad))
    module.tp = tp  # type: ignore[assignment]
    module.tp_dims = {**getattr(module, "tp_dims", {}), name: dim}  # type: ignore[assignment]


def shard_info(model: nn.Module) -> dict[str, ShardInfo]:
    """For every parameter, by its global name, the place of this rank's part in the global tensor.

    Call it before the engine shards parameters over the data-parallel ranks.
    """
    infos = {}
    for prefix, module in model.named_modules():
        for name, kind in parameter_kinds(module).items():
            full_name = f"{prefix}.{name}" if prefix else name
            shape = list(module.get_parameter(name).shape)
            dim = getattr(module, "tp_dims", {}).get(name)
            if dim is None:
                infos[full_name] = ShardInfo(tuple(shape), kind=kind)
                continue
            tp: TensorParallel = module.tp
            start = tp.rank * shape[dim]
            shape[dim] *= tp.size
            infos[full_name] = ShardInfo(tuple(shape), tp_dim=dim, start=start, kind=kind)
    return infos
