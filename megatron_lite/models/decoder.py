"""The decoder: embedding, residual layers as defined by the pattern, final norm, head.

Every residual layer is pre-norm:  x <- x + mixer(norm(x)).  A symbol of the pattern says which mixer; a
transformer block is two of them (`*-`). Positions, documents, cache and another layer's keys and values are handed to the layers as
arguments. Meta tokens come into the sequence in the embedding and leave it after the final norm: tokens, documents, cached tokens
and states are those of the text.

Shapes: B batch, T sequence, D hidden, V vocabulary (Vp: padded).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.models.cache import Cache, KeyValue
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.context import LayerContext, Once
from megatron_lite.models.layers import LAYER_TYPES, layer_specs
from megatron_lite.models.linear import Embedding, Linear
from megatron_lite.models.meta_tokens import PrefixedEmbedding
from megatron_lite.models.norm import NORMS
from megatron_lite.models.pattern import LayerSpec
from megatron_lite.models.rope import restarting_positions

T = TypeVar("T")

__all__ = ["Decoder", "ModelConfig", "ResidualLayer"]


class ResidualLayer(nn.Module):
    """x + mixer(norm(x)): the unit of sharding, recompute and compilation."""

    def __init__(self, norm: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def forward(self, x_BTD: Tensor, context: LayerContext) -> tuple[Tensor, KeyValue | None]:
        """(B, T, D) -> ((B, T, D), the mixer's keys and values if other layers use them)."""
        y_BTD, kv = self.mixer(self.norm(x_BTD), context)
        return x_BTD + y_BTD, kv


def residual_layer(config: ModelConfig, spec: LayerSpec) -> ResidualLayer:
    """The layer that `spec` means."""
    norm = NORMS[config.norm](config.hidden_size, config.norm_eps)
    return ResidualLayer(norm, LAYER_TYPES[spec.symbol].build(config, spec))


class Decoder(nn.Module):
    """A causal language model. Builds on any device, initializes nothing (see `initialization`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        rows, width = config.padded_vocab, config.hidden_size
        self.specs = layer_specs(config)
        make_embedding = partial(PrefixedEmbedding, prefix=config.meta_tokens) if config.meta_tokens else Embedding
        self.embedding = make_embedding(rows, width, init_std=config.init_std, valid_rows=config.vocab_size)
        self.layers = nn.ModuleList(residual_layer(config, spec) for spec in self.specs)
        self.final_norm = NORMS[config.norm](width, config.norm_eps)
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

    def hidden(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
        *,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """States (B, T, D) after the final norm.

        documents_BT: number of the document that each token belongs to, rising along a row; attention and positions restart
        where it changes.
        cache: what the layers remember of the tokens before these (`new_cache`); these are added to it in place.
        positions_BT: see `context`.
        """
        context = self.context(tokens_BT, documents_BT, cache, positions_BT=positions_BT)
        x_BTD = self.embedding(tokens_BT, begins=cache is None or cache.length == 0)
        shared: dict[int, KeyValue] = {}
        for index, (spec, layer) in enumerate(zip(self.specs, self.layers)):
            of_layer = context
            if cache is not None or spec.kv_from is not None:
                of_layer = replace(
                    context,
                    cache=None if cache is None else cache.layers[index],
                    kv=None if spec.kv_from is None else shared[spec.kv_from],
                )
            x_BTD, kv = layer(x_BTD, of_layer)
            if kv is not None:
                shared[index] = kv
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        x_BTD = self.final_norm(x_BTD)
        return x_BTD[:, context.prefix :] if context.prefix else x_BTD

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for `capacity` tokens of text."""
        prefix = self.config.meta_tokens
        layers = [LAYER_TYPES[spec.symbol].cache(self.config, spec, capacity + prefix) for spec in self.specs]
        return Cache(capacity, layers, prefix=prefix)

    def context(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
        *,
        positions_BT: Tensor | None = None,
    ) -> LayerContext:
        """What the layers of one forward share.

        positions_BT: (B, T), or (1, T) for all rows, the place of each token in its document, without meta tokens. To be given where
        the tokens are parts of longer sequences; documents then are numbered from 0 over these.
        Raises ValueError when documents or positions are given together with a cache, or the cache has no room for the tokens.
        """
        prefix, length = self.config.meta_tokens, tokens_BT.shape[1]
        if positions_BT is not None:
            if cache is not None:
                raise ValueError("a cache counts positions itself; call without positions, or without a cache")
            return self._context_at(positions_BT, documents_BT)
        if documents_BT is not None:
            if cache is not None:
                raise ValueError("a cache holds one document; call without documents, or without a cache")
            if prefix:
                documents_BT = torch.cat([documents_BT[:, :1].expand(-1, prefix), documents_BT], dim=1)
            return LayerContext(restarting_positions(documents_BT, prefix=prefix), documents_BT, prefix, once=Once())
        if cache is None or cache.length == 0:
            start, end = 0, prefix + length
        else:
            start, prefix = prefix + cache.length, 0
            end = start + length
        if cache is not None:
            cache.check_room(length)
        positions_BT = torch.arange(start, end, device=tokens_BT.device)[None]
        if cache is not None and cache.starts_B is not None:
            positions_BT = positions_BT - cache.starts_B[:, None]
        return LayerContext(positions_BT, prefix=prefix, once=None if cache is not None else Once())

    def _context_at(self, positions_BT: Tensor, documents_BT: Tensor | None) -> LayerContext:
        prefix = self.config.meta_tokens
        if prefix:
            before_BP = torch.arange(prefix, device=positions_BT.device).expand(len(positions_BT), -1)
            positions_BT = torch.cat([before_BP, prefix + positions_BT], dim=1)
            if documents_BT is not None:
                documents_BT = F.pad(documents_BT, (prefix, 0))  # with the number of the first document
        return LayerContext(positions_BT, documents_BT, prefix, once=Once())
