"""The description of a model: sizes and choices, nothing about how or where it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lite.models import pattern as layer_pattern

NORM_NAMES = ("layernorm1p", "rmsnorm", "layernorm")
ACTIVATION_NAMES = ("squared_relu", "swiglu")


@dataclass
class ModelConfig:
    """Everything that fixes a decoder's shape and mathematics. `validate()` before use.

    The sizes have no defaults that could be meant: 0 stands for "not given" and is refused.

    family: which Hugging Face mapping reads and writes it ("nemotron4", "llama", "mistral").
    num_layers: number of blocks, each one `unit` of letters; or `pattern`, the letters of all layers, for
    hybrids.
    head_dim: None means hidden_size / num_heads.
    vocab_multiple: embedding and head have vocab_size rounded up to it; the extra rows are zero and never
    sampled.
    rotary_fraction: part of a head's dimensions that rotates; 0 means no position embedding.
    scaled_output_init: projections back into the residual stream start with init_std / sqrt(number of
      residual layers) (for a transformer block, Megatron's std / sqrt(2 num_layers)).
    """

    family: str = ""
    hidden_size: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    ffn_size: int = 0
    vocab_size: int = 0
    max_seq_len: int = 0
    num_layers: int | None = None
    unit: str = "*-"
    pattern: str | None = None
    head_dim: int | None = None
    vocab_multiple: int = 128
    activation: str = "squared_relu"
    norm: str = "layernorm1p"
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rotary_fraction: float = 1.0
    init_std: float = 0.02
    scaled_output_init: bool = False
    tie_embeddings: bool = False
    linear_bias: bool = False

    @property
    def letters(self) -> str:
        """One letter for each residual layer."""
        return layer_pattern.expand(unit=self.unit, num_layers=self.num_layers, pattern=self.pattern)

    @property
    def head_size(self) -> int:
        """Dimensions of one head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions rotate."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def padded_vocab(self) -> int:
        """Rows of embedding and head: vocab_size rounded up to vocab_multiple."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def output_init_std(self) -> float:
        """Initial standard deviation of the projections back into the residual stream."""
        return self.init_std / math.sqrt(len(self.letters)) if self.scaled_output_init else self.init_std

    def validate(self) -> None:
        """Raises ValueError naming the first key whose value makes no model."""
        self._check_ranges()
        _ = self.letters
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} does not divide by model.num_heads={self.num_heads}; "
                "change one of them or set model.head_dim"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide by "
                f"model.num_kv_heads={self.num_kv_heads}; every group of query heads shares one key-value "
                "head"
            )
        if self.rotary_dim % 2:
            raise ValueError(
                f"model.rotary_fraction={self.rotary_fraction} of head dim {self.head_size} rotates "
                f"{self.rotary_dim} dimensions, which must be an even number"
            )
        if self.norm not in NORM_NAMES:
            raise ValueError(f"model.norm={self.norm!r} is not one of {', '.join(NORM_NAMES)}")
        if self.activation not in ACTIVATION_NAMES:
            raise ValueError(f"model.activation={self.activation!r} is not one of {', '.join(ACTIVATION_NAMES)}")

    def _check_ranges(self) -> None:
        if not self.family:
            raise ValueError("model.family is not given; it names the Hugging Face mapping, as in model=nemotron4_tiny")
        for key in ("hidden_size", "num_heads", "num_kv_heads", "ffn_size", "vocab_size", "max_seq_len"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1")
        if self.vocab_multiple < 1:
            raise ValueError(f"model.vocab_multiple={self.vocab_multiple} must be at least 1 (1 = no padding)")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"model.head_dim={self.head_dim} must be at least 1, or null for hidden_size/num_heads")
        for key in ("norm_eps", "rope_base", "init_std"):
            value = getattr(self, key)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"model.{key}={value} must be a positive number")
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(f"model.rotary_fraction={self.rotary_fraction} must lie between 0 and 1")
