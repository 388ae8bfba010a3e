"""Activation recompute: keep fewer activations in forward and compute them again in backward.

    none       keep everything
    selective  keep what matrix products and fused attention computed; recompute the cheap rest (norms, activations,
               rotations, casts) and the sequence-parallel gathers (after Korthikanti et al., arXiv 2205.05198, who
               recompute what is large and cheap; there it was softmax attention, which a fused kernel no longer stores)
    full       keep each layer's input only; recompute the layer

Both modes keep what context-parallel ranks (`parallel.cp`) have sent to each other: to recompute it would be to send it again.

The same operations run again on the same inputs, so gradients are the same bits. A layer becomes a subclass
in place (`reclass`), so that no parameter changes its name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron_lite.parallel.context_attention import CONTEXT_ATTENTION
from megatron_lite.parallel.context_window import CONTEXT_WINDOW
from megatron_lite.parallel.reclass import reclass
from megatron_lite.parallel.slice_collectives import SLICE_OPERATORS

# What context-parallel ranks send to each other.
_COMMUNICATION = frozenset({CONTEXT_ATTENTION, CONTEXT_WINDOW, *SLICE_OPERATORS})


# Not bmm: where attention has no fused kernel its T x T scores are bmm outputs, the largest thing there is to keep.
_KEPT = _COMMUNICATION | {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}

# Since torch 2.13 a layer that runs again may not run more operations than it did in forward. FSDP2's hooks around a module inside
# the layer (one that computes in fp32) do, but only these marks for the profiler.
SAC_IGNORED_OPS.update(
    {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}
)


def recompute_layer(layer: nn.Module, mode: str, *, divided: bool = False) -> None:
    """Make `layer` recompute in backward, in place. divided: its sequences are, over ranks. Raises ValueError for an unknown mode."""
    if mode == "none":
        return
    if mode not in ("selective", "full"):
        raise ValueError(f"parallel.recompute={mode} is unknown; choose one of none, selective, full")
    if mode == "full":
        reclass(layer, FullRecomputeOfDivided if divided else FullRecompute)
    else:
        reclass(layer, SelectiveRecompute)


class FullRecompute(nn.Module):
    """Keeps the input and runs the forward again in backward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # No layer draws random numbers, so there is no generator state to keep.
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class FullRecomputeOfDivided(nn.Module):
    """Keeps the input and what ranks sent to each other, and runs the rest again in backward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            super().forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_contexts_of_divided,
            **kwargs,
        )


class SelectiveRecompute(nn.Module):
    """Keeps what `_KEPT` computed and runs the rest again in backward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            super().forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=_selective_contexts,
            **kwargs,
        )


# Functions of the module, not methods: torch.compile traces no others here.
def _contexts_of_divided() -> Any:
    return create_selective_checkpoint_contexts(_keep_communication)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_products)


def _keep_communication(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _COMMUNICATION else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
