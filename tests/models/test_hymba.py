"""Hymba against the float64 reference of the published form; and windows, shared keys, meta tokens and wide values in other patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.flops import parameter_count
from megatron_lite.models.huggingface import family_named, native_to_hf
from tests.models import hymba_reference as reference
from tests.models.conftest import loud_decoder
from tests.models.test_hymba_reference import TINY

EXACT = {"rtol": 0, "atol": 1e-10}  # float64 sums in another order, on logits of size 1 to 10


def hymba_config(**changes: Any) -> ModelConfig:
    """The reference's tiny model, with `changes` of its config.json."""
    return family_named("hymba").from_hf_config(TINY | {"initializer_range": 0.02} | changes)


def words(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(0, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def documents_of(*lengths: int) -> Tensor:
    return torch.tensor([[number for number, length in enumerate(lengths) for _ in range(length)]])


def published(config: ModelConfig, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the published names; the reference also wants meta tokens where there are none."""
    made = dict(native_to_hf(config, values))
    made.setdefault("model.memory_tokens", torch.zeros(0, config.hidden_size, dtype=torch.float64))
    return made


def check_against_the_reference(changes: dict[str, Any], lengths: list[int], seed: int) -> None:
    config = hymba_config(**changes)
    hf = TINY | changes
    model = loud_decoder(config, seed=seed).double()
    tokens, documents = words(sum(lengths), seed=seed), documents_of(*lengths)
    tensors = {
        name: tensor.clone().requires_grad_()
        for name, tensor in published(config, dict(model.named_parameters())).items()
    }
    expected = reference.run_packed(tensors, hf, tokens[0].tolist(), documents[0].tolist())
    actual = model(tokens, documents if len(lengths) > 1 else None)[0]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    scale = expected.detach().abs().max()
    assert (actual - expected).abs().max() <= 1e-11 * scale
    gradients = published(config, {name: p.grad for name, p in model.named_parameters()})
    for name, tensor in tensors.items():
        wanted = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        if wanted.numel():
            error = (gradients[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
            assert error <= 1e-9, f"the gradient of {name} is off by {error:.1e}"


GROUPS = [None, [[1, 2, 3]], [[0, 2], [1, 3]], [[0, 1]]]


@settings(max_examples=10)
@given(
    st.integers(0, 4),
    st.sampled_from([1, 2, 4, 30, None]),
    st.sampled_from(GROUPS),
    st.sets(st.integers(0, 3)),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_values_and_gradients_are_the_references(meta, window, groups, global_layers, lengths, seed):
    changes = {
        "num_memory_tokens": meta,
        "sliding_window": window,
        "kv_reuse_group": groups,
        "global_attn_idx": sorted(global_layers) if window else [],
        "tie_word_embeddings": seed % 2 == 0,
    }
    check_against_the_reference(changes, lengths, seed)


def test_long_documents_in_bands_and_chunks():
    """Longer than a band of queries, a segment of the window and a chunk of the scan."""
    check_against_the_reference({"num_memory_tokens": 5, "sliding_window": 40}, [150], 0)
    check_against_the_reference({"num_memory_tokens": 5, "sliding_window": 40}, [90, 3, 70], 1)


def test_published_size():
    config = family_named("hymba").from_hf_config(reference.PUBLISHED_1P5B)
    assert parameter_count(config) == 1_522_797_824


# ------------------------------------------------------------------ the same in other patterns


def any_pattern(seed: int) -> tuple[ModelConfig, list[int]]:
    """A random model with windows, shared keys, meta tokens and values of another width; and lengths of documents."""
    draw = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=draw))]

    kind = pick("M", "H")
    pattern = "*" + "".join(pick("*", "-", kind) for _ in range(4)) + "*"
    attending = sum(symbol in "*H" for symbol in pattern)
    config = loud_config(pattern, kind)
    config.meta_tokens = pick(0, 1, 6)
    config.attention.window = pick(None, 1, 5, 40)
    if config.attention.window is not None:
        config.attention.always_visible = pick(0, config.meta_tokens, config.meta_tokens + 2)
        config.attention.global_layers = pick([], [0], [attending - 1])
    config.attention.kv_groups = pick([], [[0, 1]], [[0, attending - 1]])
    config.attention.qk_norm = pick(False, True)
    return config, [pick(1, 3, 50), pick(2, 70), pick(1, 90)]


def loud_config(pattern: str, kind: str) -> ModelConfig:
    from tests.models.conftest import hybrid_config

    config = hybrid_config(pattern=pattern)
    config.attention.value_head_dim = 6
    config.rope.fraction = 1.0
    if kind == "H":
        config.mamba.version, config.mamba.groups, config.mamba.dt_rank = 1, 1, 3
        config.mamba.heads, config.mamba.head_dim = 4, 6
    return config


@settings(max_examples=15)
@given(st.integers(0, 10_000))
def test_any_pattern_packed_cached_and_alone(seed):
    config, lengths = any_pattern(seed)
    model = loud_decoder(config, seed=seed).double()
    tokens = torch.randint(0, 101, (2, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        alone = [model(part) for part in tokens.split(lengths, dim=1)]
        packed = model(tokens, documents_of(*lengths).expand(2, -1))
        torch.testing.assert_close(packed, torch.cat(alone, dim=1), **EXACT)
        last = tokens[:, -lengths[-1] :]
        for sizes in ([1] * lengths[-1], [1, 2, 50, 37] if lengths[-1] == 90 else [1]):
            cache = model.new_cache(lengths[-1])
            parts = [model(part, cache=cache) for part in last.split(sizes, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), alone[-1], **EXACT)


def dense(model: Decoder, tokens: Tensor) -> Tensor:
    """A decoder of `*` and `-` in another form: one row, a loop over heads, masks from loops over positions."""
    config = model.config
    attention, meta = config.attention, config.meta_tokens
    x_SD = torch.cat([model.embedding.meta_tokens, model.embedding.weight[tokens]])
    size, positions = len(x_SD), range(len(x_SD))
    number, lent = -1, {}
    borrowed = {member: group[0] for group in attention.kv_groups for member in group[1:]}
    for layer in model.layers:
        normed = layer.norm(x_SD)
        if not hasattr(layer.mixer, "qkv"):
            x_SD = x_SD + layer.mixer(normed)[0]
            continue
        number += 1
        window = None if number in attention.global_layers else attention.window
        sees = torch.tensor(
            [
                [k <= q and (window is None or q - k <= window or k < attention.always_visible) for k in positions]
                for q in positions
            ]
        )
        rows = normed @ layer.mixer.qkv.weight.T
        of_group, queries = rows.shape[1] // attention.kv_heads, attention.heads // attention.kv_heads
        keys, outputs = [], []
        for group in range(attention.kv_heads):
            own = rows[:, group * of_group : (group + 1) * of_group].split(config.head_dim, dim=1)
            if number not in borrowed:
                key = own[queries]
                value = rows[:, group * of_group + (queries + 1) * config.head_dim : (group + 1) * of_group]
                keys.append((turned(key, config.rope.base), value))
            key, value = keys[group] if number not in borrowed else lent[borrowed[number]][group]
            for query in own[:queries]:
                scores = turned(query, config.rope.base) @ key.T / config.head_dim**0.5
                outputs.append(scores.masked_fill(~sees, -torch.inf).softmax(dim=1) @ value)
        lent[number] = keys
        x_SD = x_SD + torch.cat(outputs, dim=1) @ layer.mixer.out.weight.T
    assert size == meta + len(tokens)
    return model.final_norm(x_SD)[meta:] @ model.head_weight[: config.vocab_size].T


def turned(x_SK: Tensor, base: float) -> Tensor:
    half = x_SK.shape[1] // 2
    angle = torch.arange(len(x_SK)).double()[:, None] * base ** (-torch.arange(half).double() / half)
    whole = torch.complex(x_SK[:, :half], x_SK[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([whole.real, whole.imag], dim=1)


@pytest.mark.parametrize(
    ("window", "visible", "global_layers", "groups"),
    [
        (None, 0, [], [[0, 2]]),
        (3, 0, [1], [[0, 1], [2, 3]]),
        (3, 4, [0, 3], [[1, 2]]),
        (70, 2, [3], [[0, 1, 2, 3]]),
        (20, 9, [], []),
    ],
)
def test_attention_layers_are_dense_attention_with_loops(window, visible, global_layers, groups):
    config = loud_config("**-**", "M")
    config.meta_tokens, config.attention.window, config.attention.always_visible = 4, window, visible
    config.attention.global_layers, config.attention.kv_groups = global_layers, groups
    model = loud_decoder(config).double()
    tokens = torch.randint(0, 101, (150,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens[None])[0], dense(model, tokens), **EXACT)
