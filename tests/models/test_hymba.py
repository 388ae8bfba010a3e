"""Hymba against the float64 reference of the published form; and windows, shared keys, meta tokens and wide values in other patterns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lite.config.compose import from_dict
from megatron_lite.models.attention import AttentionCore
from megatron_lite.models.attention_mask import Visibility
from megatron_lite.models.cache_size import cache_bytes
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.conv import CausalConv
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.flops import parameter_count
from megatron_lite.models.huggingface import family_named
from megatron_lite.models.hymba import SelectiveStateSpace
from megatron_lite.models.selective_scan import selective_scan
from tests.models import hymba_reference as reference
from tests.models.conftest import hybrid_config, loud_decoder
from tests.models.test_config import CONFIGS
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
    made = {
        name: tensor
        for rule in family_named("hymba").rules(config)
        for name, tensor in zip(rule.hf, rule.to_hf(values[rule.native].detach()), strict=True)
    }
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
        config.attention.global_layers = pick([], [0], [attending - 1])  # two or more attend
    config.attention.kv_groups = pick([], [[0, 1]], [[0, attending - 1]])
    config.attention.qk_norm = pick(False, True)
    config.attention.qkv_bias = "H" not in pattern and pick(False, True)
    return config, [pick(1, 3, 50), pick(2, 70), pick(1, 60)]


def loud_config(pattern: str, kind: str) -> ModelConfig:
    config = hybrid_config(pattern=pattern)
    config.attention.value_head_dim = 6
    config.rope.fraction = 1.0
    if kind == "H":
        config.mamba.version, config.mamba.groups, config.mamba.dt_rank = 1, 1, 3
        config.mamba.heads, config.mamba.head_dim = 4, 6
    return config


@settings(max_examples=8)
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
        for sizes in ([1] * lengths[-1], [1, 2, 50, 7] if lengths[-1] == 60 else [1]):
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


# ------------------------------------------------------------------ the cache


def bytes_by_hand(config: ModelConfig, tokens: int, *, width: int, state_width: int) -> int:
    """Each producer's slots x KV heads x (K + V); the last inputs of the convolution; the states."""
    attention, layers = config.attention, config.symbols.count("H")
    borrowers = {member for group in attention.kv_groups for member in group[1:]}
    text = tokens + config.meta_tokens
    ring = min(text, attention.always_visible + attention.window + 1)
    slots = sum(text if n in attention.global_layers else ring for n in range(layers) if n not in borrowers)
    inner = config.mamba.heads * config.mamba.head_dim
    keys = slots * attention.kv_heads * (config.head_dim + config.value_head_dim) * width
    return keys + layers * inner * ((config.mamba.conv - 1) * width + config.mamba.state * state_width)


@pytest.mark.parametrize("tokens", [10, 40])
def test_a_cache_takes_what_the_arithmetic_says(tokens):
    """Also while it is used: nothing grows beyond it, and a layer that borrows keys keeps none."""
    config = hymba_config(num_memory_tokens=5, sliding_window=12)
    model = loud_decoder(config)
    cache = model.new_cache(tokens)
    with torch.no_grad():
        for token in words(tokens).split(1, dim=1):
            model(token, cache=cache)
    assert cache.nbytes() == bytes_by_hand(config, tokens, width=4, state_width=4)
    assert cache.nbytes() == cache_bytes(config, tokens, dtype=torch.float32)
    assert [layer.keys is None for layer in cache.layers[::2]] == [False, False, True, True]


def test_published_cache():
    """The paper's 79 MB, 918 MB and ratio of 11.67 count 1,024,000 bytes as a megabyte; these are MiB."""
    config = family_named("hymba").from_hf_config(reference.PUBLISHED_1P5B)
    half, single = (bytes_by_hand(config, 8192, width=2, state_width=width) for width in (2, 4))
    assert cache_bytes(config, 8192, dtype=torch.float16) == single
    assert half == 82_807_040
    assert round(half / 2**20, 1) == 79.0
    assert round((single - half) / 2**20, 1) == 3.1
    llama = from_dict(ModelConfig, yaml.safe_load((CONFIGS / "llama3p2_3b.yaml").read_text()))
    assert cache_bytes(llama, 8192, dtype=torch.float16) == 896 * 2**20
    assert round(896 * 2**20 / half, 1) == 11.3


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.window", 0, r"model\.attention\.window=0"),
        ("attention.always_visible", -1, r"model\.attention\.always_visible=-1"),
        ("attention.global_layers", [3], r"model\.attention\.global_layers=\[3\] .*has 3"),
        ("attention.global_layers", [2, 0, 1], r"window=\d+ has no effect.*global_layers=\[2, 0, 1\]"),
        ("attention.global_layers", [0, 0], r"global_layers=\[0, 0\] names a layer twice"),
        ("attention.kv_groups", [[1]], r"kv_groups=\[\[1\]\]"),
        ("attention.kv_groups", [[2, 1]], r"kv_groups=\[\[2, 1\]\].*rising"),
        ("attention.kv_groups", [[0, 1], [1, 2]], r"kv_groups=.* names a layer twice"),
        ("attention.kv_groups", [[0, 7]], r"kv_groups=\[\[0, 7\]\] .*has 3"),
        ("attention.value_head_dim", 4, r"mamba\.heads=4 .*head_dim=8 .*value_head_dim=4"),
        ("attention.qkv_bias", True, r"attention\.qkv_bias=True"),
        ("meta_tokens", -1, r"model\.meta_tokens=-1"),
        ("mamba.version", 2, r"model\.mamba\.version=2.*set it to 1"),
        ("mamba.dt_rank", None, r"model\.mamba\.dt_rank=None"),
        ("mamba.groups", 2, r"model\.mamba\.groups=2.*set it to 1"),
        ("mamba.dt_limits", [0.1, 0.2], r"model\.mamba\.dt_limits=.*set it to null"),
    ],
)
def test_impossible_layers_are_refused_by_name(hymba, key, value, message):
    config = hymba(pattern="H-HH")
    config.validate()
    with pytest.raises(ValueError, match=message):
        hymba(**{"pattern": "H-HH", key: value}).validate()


@pytest.mark.parametrize(("key", "value"), [("always_visible", 2), ("global_layers", [0])])
def test_settings_of_a_window_need_one(nemotron, key, value):
    with pytest.raises(ValueError, match=rf"model\.attention\.{key}=.* has no effect without model\.attention\.window"):
        nemotron(**{f"attention.{key}": value}).validate()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("window", 8),
        ("always_visible", 2),
        ("global_layers", [0]),
        ("kv_groups", [[0, 1]]),
        ("qkv_bias", True),
        ("qk_norm", True),
    ],
)
def test_choices_about_attention_need_attention(hybrid, key, value):
    hybrid(pattern="M-M-").validate()  # sizes of attention may stay: they choose nothing
    with pytest.raises(ValueError, match=rf"model\.attention\.{key}=.* no layer of model\.pattern='M-M-' attends"):
        hybrid(**{"pattern": "M-M-", f"attention.{key}": value}).validate()


# ------------------------------------------------------------------ planted bugs


def plant(bug: str, patch: pytest.MonkeyPatch) -> None:
    if bug == "a borrower takes the newest keys":
        right = AttentionCore.forward
        newest: list[Any] = []

        def wrong(self, qk, value, context):  # type: ignore[no-untyped-def]
            y, kv = right(self, qk, value, replace(context, kv=newest[-1] if self.uses_others else None))
            newest.extend([kv] if kv is not None else [])
            return y, kv

        patch.setattr(AttentionCore, "forward", wrong)
    elif bug == "a borrower has keys of its own":
        right = AttentionCore.forward

        def own(self, qk, value, context):  # type: ignore[no-untyped-def]
            if self.uses_others:
                first = qk.unflatten(-1, (-1, self.head_dim))[:, :, :, 0].transpose(1, 2)
                context = replace(context, kv=context.kv._replace(key_BGSK=first))
            return right(self, qk, value, context)

        patch.setattr(AttentionCore, "forward", own)
    elif bug == "a window of one key less":
        right_rule = Visibility.shows
        patch.setattr(
            Visibility,
            "shows",
            lambda self, query, key: right_rule(replace(self, window=self.window and self.window - 1), query, key),
        )
    elif bug == "documents restart from zero":
        patch.setattr(SelectiveStateSpace, "scan", lambda self, o, past: selective_scan(o, replace(past, prefix=0)))
    else:
        assert bug == "the convolution restarts from zero", bug
        patch.setattr(CausalConv, "_of_prefix", lambda self, last, documents: torch.zeros(()))


@pytest.mark.parametrize(
    "bug",
    [
        "a borrower takes the newest keys",
        "a borrower has keys of its own",
        "a window of one key less",
        "documents restart from zero",
        "the convolution restarts from zero",
    ],
)
def test_planted_bugs_are_found(bug, monkeypatch):
    changes = {"kv_reuse_group": [[0, 2], [1, 3]], "sliding_window": 4, "num_memory_tokens": 3}
    check_against_the_reference(changes, [7, 9], 0)
    plant(bug, monkeypatch)
    with pytest.raises(AssertionError):
        check_against_the_reference(changes, [7, 9], 0)


def test_a_borrower_that_projects_its_own_keys_has_another_size():
    config = family_named("hymba").from_hf_config(reference.PUBLISHED_1P5B)
    config.attention.kv_groups = []
    assert parameter_count(config) == 1_522_797_824 + 15 * 1600 * 5 * (64 + 128)
