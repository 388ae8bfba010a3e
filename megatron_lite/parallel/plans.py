"""Which module becomes what under tensor parallelism, as data.

A plan maps a name below the module to an entry, or to several that are applied in order:

    column           linear layer, share of the output features; reads what a `copy_in` module returns
    row              linear layer, share of the input features; sums the ranks' results
    column_in_order, row_in_order    the same for layers that look along the sequence, as attention does
    vocab            embedding or output head, share of the words
    shard(dim)       the plain parameter of that name, cut along dim
    replicated_norm  norm of the residual stream: weights on every rank, gradients summed under sequence parallelism
    sharded_norm     norm over a sharded width: statistics summed over the ranks
    copy_in          the module's output enters the sharded region: its gradient is summed in backward
    copy_in_order    the same with whole sequences, for what looks along them
    tied_logits      decoder whose head is its embedding: gathers the logits in `logits`

What column, row and copy_in do is Megatron-LM's (arXiv 1909.08053, section 3): one all-reduce a layer forward and one
backward. Under sequence parallelism (arXiv 2205.05198) the same plan holds: `copy_in` gathers, `row` and `vocab` scatter. What is
gathered lies rank by rank, not sequence by sequence: see `layers`.
A new layer kind needs a plan of its own in MIXERS and a line in `MUST_DIVIDE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from megatron_lite.models.attention import Attention
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.mlp import MLP, GatedMLP
from megatron_lite.parallel.layers import (
    ColumnParallelLinear,
    CopyIn,
    CopyInOrder,
    InOrderColumnParallelLinear,
    InOrderRowParallelLinear,
    RowParallelLinear,
    TensorParallel,
    TensorParallelModule,
    TiedLogits,
    VocabParallelEmbedding,
    VocabParallelHead,
    parallelize_module,
    shard_parameter,
)
from megatron_lite.parallel.norms import ReplicatedNorm, ShardedNorm


@dataclass(frozen=True)
class Entry:
    """The class a module gets (None: keeps its own) and the dimension along which each of its parameters is cut."""

    mixin: type[TensorParallelModule] | None
    tp_dims: Mapping[str, int]


def shard(dim: int) -> Entry:
    """The entry for a plain parameter, named in the plan as `submodule.parameter`."""
    return Entry(None, {"": dim})


column = Entry(ColumnParallelLinear, {"weight": 0, "bias": 0})
column_in_order = Entry(InOrderColumnParallelLinear, {"weight": 0, "bias": 0})
row = Entry(RowParallelLinear, {"weight": 1})
row_in_order = Entry(InOrderRowParallelLinear, {"weight": 1})
vocab_embedding = Entry(VocabParallelEmbedding, {"weight": 0})
vocab_head = Entry(VocabParallelHead, {"weight": 0, "bias": 0})
replicated_norm = Entry(ReplicatedNorm, {})
sharded_norm = Entry(ShardedNorm, {"weight": 0, "bias": 0})
copy_in = Entry(CopyIn, {})
copy_in_order = Entry(CopyInOrder, {})
tied_logits = Entry(TiedLogits, {})

Plan = Mapping[str, tuple[Entry, ...]]

# The norm before a mixer hands its output to column layers, the final norm hands its output to the head.
ENTRANCE = (replicated_norm, copy_in)
FINAL = (replicated_norm, copy_in_order)

MIXERS: dict[type[nn.Module], Plan] = {
    Attention: {"qkv": (column_in_order,), "out": (row_in_order,)},
    MLP: {"up": (column,), "down": (row,)},
    GatedMLP: {"up": (column,), "gate": (column,), "down": (row,)},
}


def decoder_plan(decoder: Decoder) -> dict[str, tuple[Entry, ...]]:
    """The plan of a whole decoder. Raises ValueError for a layer kind without a plan."""
    plan: dict[str, tuple[Entry, ...]] = {"embedding": (vocab_embedding,), "final_norm": FINAL}
    plan |= {"": (tied_logits,)} if decoder.head is None else {"head": (vocab_head,)}
    for index, layer in enumerate(decoder.layers):
        kind = type(layer.mixer)
        if kind not in MIXERS:
            raise ValueError(
                f"layer {index} is a {kind.__name__}, which has no tensor-parallel plan; set parallel.tp=1"
            )
        plan[f"layers.{index}.norm"] = ENTRANCE
        plan |= {f"layers.{index}.mixer.{name}": entries for name, entries in MIXERS[kind].items()}
    return plan


def apply_plan(model: nn.Module, plan: Plan, tp: TensorParallel) -> None:
    """Turn the modules and parameters that the plan names into tensor-parallel ones, in place."""
    for name, entries in plan.items():
        for entry in entries:
            if entry.mixin is None:
                parent, _, parameter = name.rpartition(".")
                shard_parameter(model.get_submodule(parent), parameter, entry.tp_dims[""], tp)
                continue
            module = model.get_submodule(name)
            parallelize_module(module, entry.mixin, tp)
            for parameter, dim in entry.tp_dims.items():
                if getattr(module, parameter, None) is not None:
                    shard_parameter(module, parameter, dim, tp)


# What tensor parallelism divides, for each symbol of the layer pattern: the config's key and its number.
Counts = Callable[[ModelConfig], Iterator[tuple[str, int]]]


def _attention_counts(config: ModelConfig) -> Iterator[tuple[str, int]]:
    yield "model.attention.kv_heads", config.attention.kv_heads  # heads is a multiple of it


def _mlp_counts(config: ModelConfig) -> Iterator[tuple[str, int]]:
    yield "model.mlp.ffn_size", config.mlp.ffn_size


MUST_DIVIDE: dict[str, Counts] = {"*": _attention_counts, "-": _mlp_counts}


def check_divisible(config: ModelConfig, *, tp: int, sequence_parallel: bool = False) -> None:
    """Raise ValueError when `tp` ranks cannot share this model, naming the key and degrees that would work."""
    counts = {"the padded vocabulary (model.vocab_size up to model.vocab_multiple)": config.padded_vocab}
    for symbol in sorted(set(config.symbols) & set(MUST_DIVIDE)):
        counts |= dict(MUST_DIVIDE[symbol](config))
    if sequence_parallel:
        counts["model.max_seq_len"] = config.max_seq_len
    for key, number in counts.items():
        if number % tp:
            # of the divisors of tp: those divide the number of processes too
            works = [d for d in range(1, tp) if tp % d == 0 and all(count % d == 0 for count in counts.values())]
            reason = "; a key-value head is not split" if key == "model.attention.kv_heads" else ""
            raise ValueError(
                f"{key}={number} does not divide by parallel.tp={tp}{reason}; with this model parallel.tp="
                f"{' or '.join(map(str, works))} would work"
            )
