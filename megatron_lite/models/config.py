"""The config of a model: sizes and choices, nothing about how or where it runs.

A checkpoint's manifest stores this tree, so keys are never renamed, and new keys are only added with a default that means "as
before".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_lite.models import pattern as layer_pattern

NORM_NAMES = ("layernorm1p", "rmsnorm", "layernorm")


@dataclass
class AttentionConfig:
    """Self-attention, in the symbols `*` and `H`. Layers are counted among those that attend, from 0.

    heads: query heads. kv_heads: key-value heads, each shared by heads / kv_heads query heads.
    head_dim: dimensions of a query and a key; null = hidden_size / heads. value_head_dim: those of a value; null = head_dim.
    window: tokens that a query looks back, itself not counted; null = all. always_visible: tokens at the start of a document, meta
      tokens included, that every query sees. global_layers: layers that attend without the window.
    kv_groups: groups of layers that use the keys and values of their first one.
    qkv_bias: biases in the query, key and value projections (Qwen2). qk_norm: norms over the head dim of queries and keys,
      before they rotate (Qwen3).
    """

    heads: int = 0
    kv_heads: int = 0
    head_dim: int | None = None
    value_head_dim: int | None = None
    window: int | None = None
    always_visible: int = 0
    global_layers: list[int] = field(default_factory=list)
    kv_groups: list[list[int]] = field(default_factory=list)
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass
class RopeConfig:
    """Rotary positions. base: theta. fraction: part of a head's dimensions that rotates; 0 = no position embedding.

    scaling: how the frequencies are stretched for longer sequences (`rope.SCALINGS`); null = not at all. The other keys are its
      numbers, each read by some scalings only.
    factor: how many times longer. original_seq_len: the sequence length before.
    low_freq_factor, high_freq_factor (llama3), beta_fast, beta_slow (yarn): between which numbers of turns within the original
      length the scaling sets in. attention_factor (yarn): multiplies cosines and sines; null = 0.1 ln(factor) + 1.
    """

    base: float = 10000.0
    fraction: float = 1.0
    scaling: str | None = None
    factor: float = 1.0
    original_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass
class MlpConfig:
    """The feed-forward layer, the symbol `-`. ffn_size: its inner width. activation: squared_relu | swiglu."""

    ffn_size: int = 0
    activation: str = "squared_relu"


@dataclass
class MambaConfig:
    """The state-space layers. version: 2 in `M`, 1 in `H`. heads, head_dim: inner width = heads x head_dim. groups: of B and C.

    state: states of a channel. conv: taps of the causal convolution. dt_rank: width of Mamba-1's time-step projection.
    dt_limits: [least, most] time step; null = no limits.
    """

    version: int = 2
    heads: int = 0
    head_dim: int = 0
    groups: int = 1
    state: int = 0
    conv: int = 4
    dt_rank: int | None = None
    dt_limits: list[float] | None = None


@dataclass
class ModelConfig:
    """Everything that fixes a decoder's shape and mathematics. `validate()` before use.

    Sizes have no default: 0 means "not given" and is refused.

    family: which Hugging Face mapping reads and writes it ("nemotron4", "nemotron_h", "llama", "mistral", "hymba").
    num_layers: number of transformer blocks, each an attention and a feed-forward layer; or `pattern`: one symbol for each layer
      (`layers.LAYER_TYPES`), with `|` where pipeline stages are cut.
    max_seq_len: tokens of text. meta_tokens: learned tokens that come before them and are in no loss.
    vocab_multiple: embedding and head have vocab_size rounded up to it; the extra rows are zero and never sampled.
    scaled_output_init: projections back into the residual stream start with init_std / sqrt(number of residual layers)
      (for a transformer, Megatron's std / sqrt(2 num_layers)).
    linear_bias: biases in all linear layers but the head.
    """

    family: str = ""
    hidden_size: int = 0
    vocab_size: int = 0
    max_seq_len: int = 0
    num_layers: int | None = None
    pattern: str | None = None
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    mlp: MlpConfig = field(default_factory=MlpConfig)
    mamba: MambaConfig = field(default_factory=MambaConfig)
    meta_tokens: int = 0
    vocab_multiple: int = 128
    norm: str = "layernorm1p"
    norm_eps: float = 1e-5
    init_std: float = 0.02
    scaled_output_init: bool = False
    tie_embeddings: bool = False
    linear_bias: bool = False

    @property
    def symbols(self) -> str:
        """One symbol for each residual layer."""
        return layer_pattern.expand(num_layers=self.num_layers, pattern=self.pattern)

    @property
    def head_dim(self) -> int:
        """Dimensions of one query or key head."""
        given = self.attention.head_dim
        return self.hidden_size // self.attention.heads if given is None else given

    @property
    def value_head_dim(self) -> int:
        """Dimensions of one value head."""
        given = self.attention.value_head_dim
        return self.head_dim if given is None else given

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions rotate."""
        return int(self.head_dim * self.rope.fraction)

    @property
    def padded_vocab(self) -> int:
        """Rows of embedding and head: vocab_size rounded up to vocab_multiple."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def output_init_std(self) -> float:
        """Initial standard deviation of the projections back into the residual stream."""
        return self.init_std / math.sqrt(len(self.symbols)) if self.scaled_output_init else self.init_std

    def validate(self) -> None:
        """Raises ValueError naming the first key with an invalid value."""
        from megatron_lite.models.layers import check_layers  # here: every layer imports this file

        self._check_ranges()
        check_layers(self)
        if self.norm not in NORM_NAMES:
            raise ValueError(f"model.norm={self.norm!r} is not one of {', '.join(NORM_NAMES)}")

    def _check_ranges(self) -> None:
        if not self.family:
            raise ValueError("model.family is not given; it names the Hugging Face mapping, as in model=nemotron4_tiny")
        for key, size in (
            ("hidden_size", self.hidden_size),
            ("vocab_size", self.vocab_size),
            ("max_seq_len", self.max_seq_len),
        ):
            if size < 1:
                raise ValueError(f"model.{key}={size} must be at least 1")
        if self.meta_tokens < 0:
            raise ValueError(f"model.meta_tokens={self.meta_tokens} must not be negative (0 = none)")
        if self.vocab_multiple < 1:
            raise ValueError(f"model.vocab_multiple={self.vocab_multiple} must be at least 1 (1 = no padding)")
        for key, number in (("norm_eps", self.norm_eps), ("rope.base", self.rope.base), ("init_std", self.init_std)):
            if not (number > 0 and math.isfinite(number)):
                raise ValueError(f"model.{key}={number} must be a positive number")
        if not 0 <= self.rope.fraction <= 1:
            raise ValueError(f"model.rope.fraction={self.rope.fraction} must be between 0 and 1")
