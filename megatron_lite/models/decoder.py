"""The decoder: embedding, residual layers as defined by the pattern, final norm, head.

Every residual layer is pre-norm:  x <- x + mixer(norm(x)).  A symbol of the pattern says which mixer; a
transformer block is two of them (`*-`). Positions, documents and cache are handed to the layers as arguments.

Shapes: B batch, T sequence, D hidden, V vocabulary (Vp: padded).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.models.cache import Cache
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.context import LayerContext
from megatron_lite.models.layers import LAYER_TYPES
from megatron_lite.models.linear import Embedding, Linear
from megatron_lite.models.norm import NORMS
from megatron_lite.models.rope import restarting_positions

T = TypeVar("T")

__all__ = ["Decoder", "ModelConfig", "ResidualLayer"]


class ResidualLayer(nn.Module):
    """x + mixer(norm(x)): the unit of sharding, recompute and compilation."""

    def __init__(self, norm: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def forward(self, x_BTD: Tensor, context: LayerContext) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return x_BTD + self.mixer(self.norm(x_BTD), context)


class Decoder(nn.Module):
    """A causal language model. Builds on any device, initializes nothing (see `initialization`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        rows, width = config.padded_vocab, config.hidden_size
        make_norm = NORMS[config.norm]
        self.embedding = Embedding(rows, width, init_std=config.init_std, valid_rows=config.vocab_size)
        self.layers = nn.ModuleList(
            ResidualLayer(make_norm(width, config.norm_eps), LAYER_TYPES[symbol].build(config))
            for symbol in config.symbols
        )
        self.final_norm = make_norm(width, config.norm_eps)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(width, rows, init_std=config.init_std, valid_rows=config.vocab_size)
        )

    @property
    def head_weight(self) -> nn.Parameter:
        """(Vp, D): the head's weight, which is the embedding's when they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) for the token after each one; the padding's columns are cut off."""
        return self.logits(self.hidden(tokens_BT, documents_BT, cache))

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) states after the final norm -> (..., V)."""
        padded = F.linear(x, self.embedding.weight) if self.head is None else self.head(x)
        return padded[..., : self.config.vocab_size]

    def with_head_weight(self, function: Callable[[Tensor, Tensor], T], x: Tensor) -> T:
        """`function(x, head_weight)`."""
        return function(x, self.embedding.weight) if self.head is None else self.head.with_weight(function, x)

    def hidden(self, tokens_BT: Tensor, documents_BT: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """States (B, T, D) after the final norm.

        documents_BT: number of the document that each token belongs to, rising along a row; attention and positions restart
        where it changes.
        cache: what the layers remember of the tokens before these (`new_cache`); these are added to it in place.
        """
        context = self.context(tokens_BT, documents_BT, cache)
        x_BTD = self.embedding(tokens_BT)
        for index, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, context if cache is None else replace(context, cache=cache.layers[index]))
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return self.final_norm(x_BTD)

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for `capacity` tokens."""
        types = (LAYER_TYPES[symbol] for symbol in self.config.symbols)
        return Cache(capacity, [None if layer.cache is None else layer.cache(capacity) for layer in types])

    def context(
        self, tokens_BT: Tensor, documents_BT: Tensor | None = None, cache: Cache | None = None
    ) -> LayerContext:
        """What the layers of one forward share.

        Raises ValueError when documents and cache are both given, or the cache has no room for the tokens.
        """
        if documents_BT is None:
            past = 0 if cache is None else cache.length
            if cache is not None:
                cache.check_room(tokens_BT.shape[1])
            positions_BT = torch.arange(past, past + tokens_BT.shape[1], device=tokens_BT.device)[None]
            if cache is not None and cache.starts_B is not None:
                return LayerContext(positions_BT - cache.starts_B[:, None], starts_B=cache.starts_B)
            return LayerContext(positions_BT)
        if cache is not None:
            raise ValueError("a cache holds one document; call without documents, or without a cache")
        return LayerContext(restarting_positions(documents_BT), documents_BT)
