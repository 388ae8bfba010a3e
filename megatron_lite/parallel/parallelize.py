"""From a plain decoder to this process's part of it, in this order: FP8 linear layers, the tensor-parallel plan, mixers that divide
sequences, then recompute and compilation, layer by layer.

Works on the meta device, where it costs neither memory nor communication.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.chunked_loss import VocabularyShard
from megatron_lite.parallel.layers import TensorParallel
from megatron_lite.parallel.mesh import Mesh, ParallelConfig
from megatron_lite.parallel.plans import apply_plan, check_divisible, decoder_plan, divide_sequences
from megatron_lite.parallel.quantization import quantize
from megatron_lite.parallel.recompute import recompute_layer
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.precision.recipes import Fp8Config, Precision


@dataclass(frozen=True)
class Recipe:
    """What is applied to a decoder from outside. The defaults leave it as it is."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Precision = field(default_factory=PrecisionConfig)


def parallelize(decoder: Decoder, mesh: Mesh, recipe: Recipe) -> None:
    """Make the decoder's linear layers FP8, cut it over the tensor-parallel ranks, let its mixers divide sequences over the
    context-parallel ranks, in place, and set its layers' recompute and compilation.

    Raises ValueError when the model does not divide by `parallel.tp` or `parallel.cp`, or the precision cannot be had.
    """
    config = recipe.parallel
    if config.compile:
        _check_compiler(decoder)
    if isinstance(recipe.precision, Fp8Config):
        quantize(decoder, recipe.precision, mesh)
    if mesh.tp_size > 1:
        check_divisible(
            decoder.config, tp=mesh.tp_size, sequence_parallel=config.sequence_parallel and mesh.cp_size == 1
        )
        tp = TensorParallel(mesh.tp_rank, mesh.tp_size, mesh.group("tp"), config.sequence_parallel)
        apply_plan(decoder, decoder_plan(decoder), tp)
    if mesh.context_parallel is not None:
        divide_sequences(decoder, mesh.context_parallel)
    for layer in decoder.layers:
        recompute_layer(layer, config.recompute, divided=mesh.context_parallel is not None)
        if config.compile:
            layer.compile()


def _check_compiler(decoder: Decoder) -> None:
    """Raises ValueError where torch.compile would give wrong gradients without a word. Before torch 2.13 a custom autograd function
    whose output was written in place gets zeros (seen in 2.11): the convolution of state-space layers is one."""
    found = {"M", "H"} & set(decoder.config.symbols)
    if found and torch.__version__ < "2.13":  # compares numbers, not text
        raise ValueError(
            f"parallel.compile=true: torch {torch.__version__} computes wrong gradients for layers {', '.join(sorted(found))} of "
            "model.pattern; install torch 2.13, or set parallel.compile=false"
        )


def vocabulary_shard(decoder: Decoder) -> VocabularyShard:
    """This rank's rows of the head, and who has the rest."""
    holder = decoder.embedding if decoder.head is None else decoder.head
    tp: TensorParallel | None = getattr(holder, "tp", None)
    if tp is None:
        return VocabularyShard(decoder.config.vocab_size)
    return VocabularyShard(decoder.config.vocab_size, tp.rank * decoder.head_weight.shape[0], tp.group)
