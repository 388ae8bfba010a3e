"""Choosing the next token, and generating with a cache.

Order of the filters, as in transformers: temperature, then top-k, then top-p on what top-k left. Temperature
0 is greedy. The logits have no columns for vocabulary padding, so padding is never chosen.

Shapes: B batch, T sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.models.cache import batch
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder


@dataclass
class SamplingConfig:
    """temperature 0 = greedy; top_k 0 = all tokens; top_p 1 = all tokens; seed fixes the draws."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError naming the key."""
        if not (self.temperature == 0 or self.temperature >= 1e-4):  # below, fp32 logits overflow
            raise ValueError(f"sampling.temperature={self.temperature} must be 0 (greedy), or at least 1e-4")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k={self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p} must be in (0, 1]; 1 keeps all tokens")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"sampling.seed={self.seed} must be 0 or more and below 2**63")


def filtered_probabilities(logits_BV: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities (B, V), float32, after temperature (> 0), top-k and top-p.

    top_k keeps exactly k tokens; top_p keeps the smallest set of the most probable tokens whose sum reaches
    p, at least one. Among equal logits the lower token number wins.
    """
    sorted_BV, order_BV = (logits_BV.float() / temperature).sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < sorted_BV.shape[-1]:
        sorted_BV[:, top_k:] = float("-inf")
    probabilities_BV = sorted_BV.softmax(dim=-1)
    if top_p < 1.0:
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= top_p, 0.0)
        probabilities_BV = probabilities_BV / probabilities_BV.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities_BV).scatter_(-1, order_BV, probabilities_BV)


def sample_next(
    logits_BV: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token (B,) int64 for each row of logits; `generator` is on the logits' device."""
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    kept_BV = filtered_probabilities(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p)
    return torch.multinomial(kept_BV, 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate_tokens(
    decoder: Decoder,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
    sampling: SamplingConfig | None = None,
) -> Iterator[int]:
    """Yields new tokens one by one as they are made; stops before any of `end_tokens` (which it does not
    yield) or at the limit.

    Raises ValueError for an empty prompt, for a token that the vocabulary does not have, and for a prompt
    that with its new tokens is longer than the model's max_seq_len.
    """
    sampling = sampling or SamplingConfig()
    sampling.validate()
    check_prompt(decoder.config, tokens, max_new_tokens)
    device = decoder.head_weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = decoder.new_cache(len(tokens) + max_new_tokens)
    new_BT = torch.tensor([list(tokens)], device=device)
    for _ in range(max_new_tokens):
        # Only the last state goes through the head: a long prompt's logits would be T x V numbers for
        # nothing.
        last_BV = decoder.logits(decoder.hidden(new_BT, cache=cache)[:, -1])
        next_B = _next(last_BV, sampling, generator)
        token = int(next_B)
        if token in end_tokens:
            return
        yield token
        new_BT = next_B[:, None]


@torch.inference_mode()
def generate_batch(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
    sampling: SamplingConfig | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, as `generate_tokens` makes them one by one, computed together.

    Prompts may have different lengths. Each is read alone, so that no padding enters a state. Raises ValueError as `generate_tokens`.
    """
    sampling = sampling or SamplingConfig()
    sampling.validate()
    for prompt in prompts:
        check_prompt(decoder.config, prompt, max_new_tokens)
    device = decoder.head_weight.device
    caches, last = [], []
    for prompt in prompts:
        caches.append(decoder.new_cache(len(prompt)))
        last.append(decoder.hidden(torch.tensor([list(prompt)], device=device), cache=caches[-1])[:, -1])
    cache = batch(caches, capacity=max(map(len, prompts)) + max_new_tokens, device=device)
    state_BD = torch.cat(last)
    generators = [torch.Generator(device).manual_seed(sampling.seed) for _ in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for number in range(max_new_tokens):
        rows = zip(decoder.logits(state_BD).split(1), generators)
        next_B = torch.cat([_next(logits_1V, sampling, generator) for logits_1V, generator in rows])
        for row, token in enumerate(next_B.tolist()):
            if row in running and token in end_tokens:
                running.remove(row)
            if row in running:
                made[row].append(token)
        if not running or number + 1 == max_new_tokens:
            break
        state_BD = decoder.hidden(next_B[:, None], cache=cache)[:, -1]
    return made


def _next(logits_BV: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    return sample_next(
        logits_BV,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        generator=generator,
    )


def check_prompt(config: ModelConfig, tokens: Sequence[int], max_new_tokens: int) -> None:
    """Raise ValueError for what `generate_tokens` cannot continue."""
    if not tokens:
        raise ValueError("the prompt has no tokens; give at least one (the end-of-document token will do)")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    foreign = [token for token in tokens if not 0 <= token < config.vocab_size]
    if foreign:
        raise ValueError(
            f"the prompt holds token {foreign[0]}, but model.vocab_size={config.vocab_size}; is this the "
            "tokenizer that the model was trained with?"
        )
    left = config.max_seq_len - len(tokens)
    if max_new_tokens > left:
        way_out = f"lower max_new_tokens to {left} or shorten the prompt" if left > 0 else "shorten the prompt"
        raise ValueError(
            f"a prompt of {len(tokens)} tokens and max_new_tokens={max_new_tokens} exceed model.max_seq_len="
            f"{config.max_seq_len}; {way_out}"
        )
