"""How native tensors and Hugging Face tensors become each other, as data: one `Rule` for each native
parameter, which says where each run of its rows is in the Hugging Face tensors. Any slice can be read so.

The dense families share the transformer block's names on the Hugging Face side; what differs (gate, norms on
queries and keys, biases of norms and of the qkv projection, tied head) follows from the config. A family with other
names brings its own list of rules. No family here has other linear biases, and a config.json that asks for them is refused.

Two permutations: our `qkv` rows go KV group by KV group [q.. k v], Hugging Face has q, k and v as three matrices, each with its
heads in the same order. A state-space layer's rows go group by group [z x B C dt], Hugging Face has all groups' z, then x, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.models.config import ModelConfig


class Run(NamedTuple):
    """`rows` consecutive native rows: rows `start` and on of Hugging Face tensor number `part`; zeros where that is None."""

    part: int | None
    start: int
    rows: int


@dataclass(frozen=True)
class Rule:
    """One native parameter and the Hugging Face tensors that hold it; works on the meta device too.

    runs: number of native rows -> the runs that they consist of, in order.
    """

    native: str
    hf: tuple[str, ...]
    runs: Callable[[int], Sequence[Run]]

    def to_hf(self, native: Tensor) -> tuple[Tensor, ...]:
        """The Hugging Face tensors of a whole native one."""
        parts: list[dict[int, Tensor]] = [{} for _ in self.hf]  # where a run starts -> its rows
        row = 0
        for part, start, count in self.runs(len(native)):
            if part is not None:
                parts[part][start] = native[row : row + count]
            row += count
        ordered = ([rows[start] for start in sorted(rows)] for rows in parts)
        return tuple(rows[0] if len(rows) == 1 else torch.cat(rows) for rows in ordered)

    def runs_of(self, rows: int, *, start: int, count: int) -> Iterator[Run]:
        """The runs of native rows [start, start + count) of `rows`."""
        row = 0
        for part, first, length in self.runs(rows):
            low, high = max(start, row), min(start + count, row + length)
            if low < high:
                yield Run(part, first + low - row, high - low)
            row += length


def renamed(native: str, hf: str) -> Rule:
    """The same tensor under another name."""
    return Rule(native, (hf,), lambda rows: [Run(0, 0, rows)])


def vocabulary(native: str, hf: str, *, config: ModelConfig) -> Rule:
    """Rows of a vocabulary: cut to vocab_size on the way out, padded with zero rows on the way in."""
    words = config.vocab_size
    return Rule(native, (hf,), lambda rows: [Run(0, 0, words), Run(None, 0, rows - words)])


def fused_qkv(native: str, hf: Sequence[str], *, config: ModelConfig) -> Rule:
    """Group-major rows <-> three matrices (rows, D), or three biases (rows,)."""
    groups, head = config.attention.kv_heads, config.head_dim
    queries = config.attention.heads // groups * head
    sizes = (queries, head, head)  # rows of q, k and v in a group
    runs = [Run(part, group * size, size) for group in range(groups) for part, size in enumerate(sizes)]
    return Rule(native, tuple(hf), lambda rows: runs)


def grouped(native: str, hf: str, *, groups: int, sizes: Sequence[int]) -> Rule:
    """Group-major rows, `sizes` of each kind in a group <-> one tensor with all groups' rows of the first kind, then of the second, ..."""
    before = [groups * sum(sizes[:kind]) for kind in range(len(sizes))]
    runs = [
        Run(0, before[kind] + group * size, size) for group in range(groups) for kind, size in enumerate(sizes) if size
    ]
    return Rule(native, (hf,), lambda rows: runs)


def transformer_rules(config: ModelConfig) -> list[Rule]:
    """Rules for blocks `*-` with the names that Llama, Mistral, Qwen and Nemotron share."""
    norm_parts = ("weight",) if config.norm == "rmsnorm" else ("weight", "bias")
    projections = ("gate", "up", "down") if config.mlp.activation == "swiglu" else ("up", "down")
    rules = [vocabulary("embedding.weight", "model.embed_tokens.weight", config=config)]
    for block in range(len(config.symbols) // 2):
        attention, mlp, hf = f"layers.{2 * block}", f"layers.{2 * block + 1}", f"model.layers.{block}"
        for part in norm_parts:
            rules.append(renamed(f"{attention}.norm.{part}", f"{hf}.input_layernorm.{part}"))
            rules.append(renamed(f"{mlp}.norm.{part}", f"{hf}.post_attention_layernorm.{part}"))
        for parameter in ("weight", "bias") if config.attention.qkv_bias else ("weight",):
            names = [f"{hf}.self_attn.{part}_proj.{parameter}" for part in "qkv"]
            rules.append(fused_qkv(f"{attention}.mixer.qkv.{parameter}", names, config=config))
        for norm in ("q_norm", "k_norm") if config.attention.qk_norm else ():
            for part in norm_parts:
                rules.append(renamed(f"{attention}.mixer.core.{norm}.{part}", f"{hf}.self_attn.{norm}.{part}"))
        rules.append(renamed(f"{attention}.mixer.out.weight", f"{hf}.self_attn.o_proj.weight"))
        for name in projections:
            rules.append(renamed(f"{mlp}.mixer.{name}.weight", f"{hf}.mlp.{name}_proj.weight"))
    rules += [renamed(f"final_norm.{part}", f"model.norm.{part}") for part in norm_parts]
    if not config.tie_embeddings:
        rules.append(vocabulary("head.weight", "lm_head.weight", config=config))
    return rules
