"""How native tensors and Hugging Face tensors become each other, as data: one `Rule` for each native
parameter.

All families so far share the transformer block's names on the Hugging Face side; what differs (gate, norm
biases, tied head) follows from the config. A family with other names brings its own list of rules. Linear
biases are not among them: no family here has any, and a config.json that asks for them is refused.

The one permutation: our `qkv` rows go KV group by KV group [q.. k v], Hugging Face has q, k and v as three
matrices, each with its heads in the same order.

Shapes: G KV groups, N = heads a group + 2, K head dim, D hidden, V vocabulary (Vp: padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.models.config import ModelConfig


@dataclass(frozen=True)
class Rule:
    """One native parameter and the Hugging Face tensors that hold it; works on the meta device too."""

    native: str
    hf: tuple[str, ...]
    to_hf: Callable[[Tensor], tuple[Tensor, ...]]
    to_native: Callable[[Sequence[Tensor]], Tensor]


def renamed(native: str, hf: str) -> Rule:
    """The same tensor under another name."""
    return Rule(native, (hf,), to_hf=lambda tensor: (tensor,), to_native=lambda tensors: tensors[0])


def vocabulary(native: str, hf: str, *, config: ModelConfig) -> Rule:
    """Rows of a vocabulary: cut to vocab_size on the way out, padded with zero rows on the way in."""

    def pad(tensors: Sequence[Tensor]) -> Tensor:
        rows = tensors[0]
        missing = config.padded_vocab - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows

    return Rule(native, (hf,), to_hf=lambda tensor: (tensor[: config.vocab_size],), to_native=pad)


def fused_qkv(native: str, hf: Sequence[str], *, config: ModelConfig) -> Rule:
    """Group-major rows <-> three matrices (rows, D)."""
    groups, head_dim = config.attention.kv_heads, config.head_dim
    queries = config.attention.heads // groups

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        rest = tensor.shape[1:]
        rows_GNK = tensor.reshape(groups, queries + 2, head_dim, *rest)
        parts = rows_GNK[:, :-2], rows_GNK[:, -2:-1], rows_GNK[:, -1:]
        return tuple(part.reshape(-1, *rest) for part in parts)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        rest = tensors[0].shape[1:]
        parts = [tensor.reshape(groups, -1, head_dim, *rest) for tensor in tensors]
        return torch.cat(parts, dim=1).reshape(-1, *rest)

    return Rule(native, tuple(hf), to_hf=split, to_native=join)


def transformer_rules(config: ModelConfig) -> list[Rule]:
    """Rules for blocks `*-` with the names that Llama, Mistral and Nemotron share."""
    norm_parts = ("weight",) if config.norm == "rmsnorm" else ("weight", "bias")
    projections = ("gate", "up", "down") if config.mlp.activation == "swiglu" else ("up", "down")
    rules = [vocabulary("embedding.weight", "model.embed_tokens.weight", config=config)]
    for block in range(len(config.symbols) // 2):
        attention, mlp, hf = f"layers.{2 * block}", f"layers.{2 * block + 1}", f"model.layers.{block}"
        for part in norm_parts:
            rules.append(renamed(f"{attention}.norm.{part}", f"{hf}.input_layernorm.{part}"))
            rules.append(renamed(f"{mlp}.norm.{part}", f"{hf}.post_attention_layernorm.{part}"))
        names = [f"{hf}.self_attn.{part}_proj.weight" for part in "qkv"]
        rules.append(fused_qkv(f"{attention}.mixer.qkv.weight", names, config=config))
        rules.append(renamed(f"{attention}.mixer.out.weight", f"{hf}.self_attn.o_proj.weight"))
        for name in projections:
            rules.append(renamed(f"{mlp}.mixer.{name}.weight", f"{hf}.mlp.{name}_proj.weight"))
    rules += [renamed(f"final_norm.{part}", f"model.norm.{part}") for part in norm_parts]
    if not config.tie_embeddings:
        rules.append(vocabulary("head.weight", "lm_head.weight", config=config))
    return rules
