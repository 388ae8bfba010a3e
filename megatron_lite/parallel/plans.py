"""Plans: what each module becomes, as data. Here is tensor parallelism's; `quantization.py` has that of FP8.

A plan maps a name below the module to an entry, or to several that are applied in order:

    column           linear layer, share of the output features; reads what a `copy_in` module returns
    row              linear layer, share of the input features; sums the ranks' results
    column_in_order, row_in_order    the same for layers that look along the sequence, as attention does
    inner_row        row in the middle of a mixer: every rank gets the sum
    copy_inside      the module's output is used by every rank with its shard: its gradient is summed in backward
    vocab            embedding or output head, share of the words; an embedding may hold meta tokens
    shard(dim)       the plain parameter of that name, cut along dim
    replicated_norm  norm of the residual stream: weights on every rank, gradients summed under sequence parallelism
    sharded_norm     norm over a sharded width: statistics summed over the ranks
    head_norm        norm over the dimensions of each head: weights on every rank, gradients summed over the ranks' heads
    copy_in          the module's output enters the sharded region: its gradient is summed in backward
    copy_in_order    the same with whole sequences, for what looks along them
    tied_logits      decoder whose head is its embedding: gathers the logits in `logits`
    Replace(make)    another module takes its place, before any entry that follows

What column, row and copy_in do is Megatron-LM's (arXiv 1909.08053, section 3): one all-reduce a layer forward and one
backward. Under sequence parallelism (arXiv 2205.05198) the same plan holds: `copy_in` gathers, `row` and `vocab` scatter. What is
gathered is ordered rank by rank, not sequence by sequence: see `layers`.
What becomes of the mixers' submodules that look along the sequence, where context-parallel ranks divide it, is data too
(`MixerPlan.along_sequence`). A new layer type is a row of its mixer in MIXERS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from operator import attrgetter

import torch
from torch import nn

from megatron_lite.models.attention import Attention
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.hymba import Hymba
from megatron_lite.models.layers import LAYER_TYPES
from megatron_lite.models.linear import Embedding
from megatron_lite.models.mamba import Mamba2
from megatron_lite.models.meta_tokens import PrefixedEmbedding
from megatron_lite.models.mlp import MLP, GatedMLP
from megatron_lite.models.pattern import LayerSpec
from megatron_lite.parallel.context_attention import ContextParallelAttention
from megatron_lite.parallel.layers import (
    ColumnParallelLinear,
    CopyIn,
    CopyInOrder,
    CopyInside,
    InnerRowParallelLinear,
    InOrderColumnParallelLinear,
    InOrderRowParallelLinear,
    PrefixedVocabParallelEmbedding,
    RowParallelLinear,
    TensorParallel,
    TensorParallelModule,
    TiedLogits,
    VocabParallelEmbedding,
    VocabParallelHead,
    parallelize_module,
    shard_parameter,
)
from megatron_lite.parallel.norms import HeadNorm, ReplicatedNorm, ShardedNorm
from megatron_lite.parallel.reclass import reclass
from megatron_lite.parallel.sequence_slices import ContextParallel


@dataclass(frozen=True)
class Entry:
    """The class a module gets (None: keeps its own) and the dimension along which each of its parameters is cut."""

    mixin: type[TensorParallelModule] | None
    tp_dims: Mapping[str, int]


@dataclass(frozen=True)
class Replace:
    """make: (name, module) -> the module that takes its place. It has the same parameters under the same names: the same module with
    another class, or one of a library with our parameters moved into it."""

    make: Callable[[str, nn.Module], nn.Module]


def shard(dim: int) -> Entry:
    """The entry for a plain parameter, named in the plan as `submodule.parameter`."""
    return Entry(None, {"": dim})


column = Entry(ColumnParallelLinear, {"weight": 0, "bias": 0})
column_in_order = Entry(InOrderColumnParallelLinear, {"weight": 0, "bias": 0})
row = Entry(RowParallelLinear, {"weight": 1})
row_in_order = Entry(InOrderRowParallelLinear, {"weight": 1})
inner_row = Entry(InnerRowParallelLinear, {"weight": 1})
copy_inside = Entry(CopyInside, {})
vocab_embedding = Entry(VocabParallelEmbedding, {"weight": 0})
vocab_embedding_with_prefix = Entry(PrefixedVocabParallelEmbedding, {"weight": 0})
vocab_head = Entry(VocabParallelHead, {"weight": 0, "bias": 0})
replicated_norm = Entry(ReplicatedNorm, {})
sharded_norm = Entry(ShardedNorm, {"weight": 0, "bias": 0})
head_norm = Entry(HeadNorm, {})
copy_in = Entry(CopyIn, {})
copy_in_order = Entry(CopyInOrder, {})
tied_logits = Entry(TiedLogits, {})

Plan = Mapping[str, tuple[Entry | Replace, ...]]

# The norm before a mixer hands its output to column layers, the final norm hands its output to the head.
ENTRANCE = (replicated_norm, copy_in)
FINAL = (replicated_norm, copy_in_order)


@dataclass(frozen=True)
class MixerPlan:
    """How a mixer is sharded. plan: an entry of a submodule that is None in this mixer is passed over.

    must_divide: config key -> value, for the values that the degree has to divide.
    along_sequence: its submodules that look along the sequence -> what they become where ranks divide sequences; None: parallel.cp > 1
      is refused.
    taps: config key -> value, for the tokens that a convolution sees.
    """

    plan: Plan
    must_divide: Callable[[ModelConfig], dict[str, int]]
    along_sequence: Mapping[str, type[nn.Module]] | None = None
    taps: Callable[[ModelConfig], dict[str, int]] = lambda config: {}


def _kv_heads(config: ModelConfig) -> dict[str, int]:
    return {"model.attention.kv_heads": config.attention.kv_heads}  # one is never split; heads is a multiple of it


def _ffn_size(config: ModelConfig) -> dict[str, int]:
    return {"model.mlp.ffn_size": config.mlp.ffn_size}


def _ssm_groups(config: ModelConfig) -> dict[str, int]:
    return {"model.mamba.groups": config.mamba.groups}  # heads is a multiple of it


def _conv_taps(config: ModelConfig) -> dict[str, int]:
    return {"model.mamba.conv": config.mamba.conv}


MIXERS: dict[type[nn.Module], MixerPlan] = {
    Attention: MixerPlan(
        {"qkv": (column_in_order,), "core.q_norm": (head_norm,), "core.k_norm": (head_norm,), "out": (row_in_order,)},
        _kv_heads,
        {"core": ContextParallelAttention},
    ),
    MLP: MixerPlan({"up": (column,), "down": (row,)}, _ffn_size, {}),
    GatedMLP: MixerPlan({"up": (column,), "gate": (column,), "down": (row,)}, _ffn_size, {}),
    Mamba2: MixerPlan(
        {"in_proj": (column_in_order,), "out_proj": (row_in_order,)}
        | dict.fromkeys(("conv.weight", "conv.bias", "ssm.A_log", "ssm.dt_bias", "ssm.D", "norm.weight"), (shard(0),)),
        _ssm_groups,
        taps=_conv_taps,
    ),
    Hymba: MixerPlan(
        {
            "in_proj": (column_in_order,),
            "attention.q_norm": (head_norm,),
            "attention.k_norm": (head_norm,),
            "select": (copy_inside,),
            "select.x_proj": (inner_row,),
            "dt_proj": (column,),
            "attention_norm": (sharded_norm,),
            "ssm_norm": (sharded_norm,),
            "out_proj": (row_in_order,),
        }
        | dict.fromkeys(("conv.weight", "conv.bias", "ssm.A_log", "ssm.dt_bias", "ssm.D"), (shard(0),)),
        _kv_heads,  # a group of channels goes with each
        taps=_conv_taps,
    ),
}
EMBEDDINGS: dict[type[nn.Module], Entry] = {
    Embedding: vocab_embedding,
    PrefixedEmbedding: vocab_embedding_with_prefix,
}


def mixer_plan(mixer: nn.Module, index: int) -> MixerPlan:
    """The row of layer `index`'s mixer. Raises ValueError when there is none."""
    if type(mixer) not in MIXERS:
        raise ValueError(
            f"layer {index} is a {type(mixer).__name__}, which has no tensor-parallel plan; set parallel.tp=1"
        )
    return MIXERS[type(mixer)]


def decoder_plan(decoder: Decoder) -> dict[str, tuple[Entry | Replace, ...]]:
    """The plan of a whole decoder. Raises ValueError for a layer type without a plan."""
    plan: dict[str, tuple[Entry | Replace, ...]] = {
        "embedding": (EMBEDDINGS[type(decoder.embedding)],),
        "final_norm": FINAL,
    }
    plan |= {"": (tied_logits,)} if decoder.head is None else {"head": (vocab_head,)}
    for index, layer in enumerate(decoder.layers):
        plan[f"layers.{index}.norm"] = ENTRANCE
        mixer = layer.get_submodule("mixer")
        for name, entries in mixer_plan(mixer, index).plan.items():
            if attrgetter(name)(mixer) is not None:  # an optional submodule that this mixer does not have is None
                plan[f"layers.{index}.mixer.{name}"] = entries
    return plan


def divide_sequences(decoder: Decoder, cp: ContextParallel) -> None:
    """Let the mixers of `decoder` compute this rank's slices of sequences, in place. Raises ValueError for a mixer that cannot."""
    for index, layer in enumerate(decoder.layers):
        mixer = layer.get_submodule("mixer")
        for name, mixin in _along_sequence(mixer, index).items():
            reclass(mixer.get_submodule(name), mixin, cp=cp)


def _along_sequence(mixer: nn.Module, index: int) -> Mapping[str, type[nn.Module]]:
    row = MIXERS.get(type(mixer))
    if row is None or row.along_sequence is None:
        raise ValueError(
            f"layer {index} is a {type(mixer).__name__}, which cannot divide a sequence over ranks; set parallel.cp=1"
        )
    return row.along_sequence


def apply_plan(model: nn.Module, plan: Plan, tp: TensorParallel | None) -> None:
    """Turn the modules and parameters that the plan names into what it says, in place. tp None: the plan only replaces."""
    for name, entries in plan.items():
        for entry in entries:
            if isinstance(entry, Replace):
                model.set_submodule(name, entry.make(name, model.get_submodule(name)))
                continue
            assert tp is not None, f"{name}: a tensor-parallel entry without tensor parallelism"
            if entry.mixin is None:
                parent, _, parameter = name.rpartition(".")
                shard_parameter(model.get_submodule(parent), parameter, entry.tp_dims[""], tp)
                continue
            module = model.get_submodule(name)
            parallelize_module(module, entry.mixin, tp)
            for parameter, dim in entry.tp_dims.items():
                if getattr(module, parameter, None) is not None:
                    shard_parameter(module, parameter, dim, tp)


def taps(config: ModelConfig) -> dict[str, int]:
    """Config key -> value, for the tokens that the model's convolutions see; those of mixers without a plan are unknown."""
    found: dict[str, int] = {}
    for _, mixer in _mixers(config):
        found |= MIXERS[type(mixer)].taps(config) if type(mixer) in MIXERS else {}
    return found


def _mixers(config: ModelConfig) -> Iterator[tuple[int, nn.Module]]:
    """(index of the first such layer, mixer) of each layer type, on the meta device."""
    for symbol in dict.fromkeys(config.symbols):
        with torch.device("meta"):
            yield config.symbols.index(symbol), LAYER_TYPES[symbol].build(config, LayerSpec(symbol))


def check_sequences_divide(config: ModelConfig) -> None:
    """Raise ValueError when this model has a mixer for which sequences cannot be divided over ranks."""
    for index, mixer in _mixers(config):
        _along_sequence(mixer, index)


def check_divisible(config: ModelConfig, *, tp: int, sequence_parallel: bool = False) -> None:
    """Raise ValueError when `tp` ranks cannot share this model, naming the key and degrees that would work."""
    counts = {"the padded vocabulary (model.vocab_size up to model.vocab_multiple)": config.padded_vocab}
    for index, mixer in _mixers(config) if tp > 1 else ():
        counts |= mixer_plan(mixer, index).must_divide(config)
    if sequence_parallel:
        key = "model.max_seq_len" if config.meta_tokens == 0 else "model.meta_tokens + model.max_seq_len"
        counts[key] = config.meta_tokens + config.max_seq_len
    wrong = {key: number for key, number in counts.items() if number % tp}
    if not wrong:
        return
    if gcd(*counts.values()) == 1:
        way_out = (
            f"{_named(counts)} have no common divisor, so no degree above 1 works for this model; set parallel.tp=1 and shard it over the "
            "data-parallel ranks (engine=fsdp engine.shard=full, with parallel.dp_replicate for replicas)"
        )
    else:
        # of the divisors of tp: those divide the number of processes too
        works = [d for d in range(1, tp) if tp % d == 0 and all(count % d == 0 for count in counts.values())]
        way_out = f"with this model parallel.tp={' or '.join(map(str, works))} would work"
    raise ValueError(f"{_named(wrong)} {'do' if len(wrong) > 1 else 'does'} not divide by parallel.tp={tp}; {way_out}")


def _named(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{key}={number}" for key, number in counts.items())
