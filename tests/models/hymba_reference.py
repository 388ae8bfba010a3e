"""Hymba (arXiv 2411.13676) in float64, written from its published config and equations: the reference that the model is held to.

Slow and in another form than the model on purpose: one sequence at a time, dense masks from two nested loops, one Python step for
each token of the scan, every weight under its published name. It imports nothing of megatron_lite.

    h      = in_proj(RMSNorm(u))                                    rows  Q | K | V | x | z   (a layer with borrowed keys: Q | x | z)
    attn   = softmax(mask(RoPE(Q) RoPE(K)^T / sqrt(K))) V           heads side by side, V's head dim is twice Q's and K's
    x      = silu(conv(x)); r, B, C = RMSNorm of the three parts of x_proj x;  dt = softplus(dt_proj r)
    S_t    = exp(dt_t A) S_(t-1) + dt_t B_t x_t,  A = -exp(A_log);  ssm_t = (C_t S_t + D x_t) silu(z_t)
    u      = u + out_proj((RMSNorm_1(attn) + RMSNorm_2(ssm)) / 2)
    u      = u + down(silu(gate(RMSNorm(u))) up(RMSNorm(u)))

The meta tokens stand in front of every sequence, at positions 0 .. M-1, and leave before the head. A windowed query sees the meta
tokens and the `sliding_window` + 1 newest tokens, itself included. In a packed sample every document runs alone, after meta tokens
of its own.

Shapes: S meta tokens and text, T text, D hidden, H heads, G KV groups, K and W head dim of keys and of values, C channels (of the
state-space branch), N states of a channel, R rank of dt, V vocabulary, M meta tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PUBLISHED_1P5B: dict[str, Any] = {
    "hidden_size": 1600,
    "num_hidden_layers": 32,
    "num_attention_heads": 25,
    "num_key_value_heads": 5,
    "v_head_dim": 128,
    "intermediate_size": 5504,
    "vocab_size": 32001,
    "tie_word_embeddings": True,
    "num_memory_tokens": 128,
    "sliding_window": 1024,
    "global_attn_idx": [0, 15, 31],
    "kv_reuse_group": [
        [1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [16, 17, 18], [19, 20], [21, 22], [23, 24], [25, 26],
        [27, 28], [29, 30],
    ],
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_dt_rank": 100,
    "mamba_expand": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_type": "ntk",
    "orig_max_position_embeddings": 2048,
    "max_position_embeddings": 8192,
}  # fmt: skip
NTK_FACTOR = 2  # a constant of the published code


@dataclass
class LayerState:
    """What a layer has after the last token; the tests of caches compare with it.

    output_SD: the residual stream behind the layer. keys_GSK (rotated) and values_GSW: its own, or those it borrowed.
    taps_LC: the last d_conv - 1 inputs of the convolution. state_CN: the scan's.
    """

    output_SD: Tensor
    keys_GSK: Tensor
    values_GSW: Tensor
    taps_LC: Tensor
    state_CN: Tensor


@dataclass
class Result:
    """logits_TV: of the text tokens only. layers: in order."""

    logits_TV: Tensor
    layers: list[LayerState] = field(default_factory=list)


def run(tensors: Mapping[str, Tensor], config: Mapping[str, Any], tokens: Sequence[int]) -> Result:
    """One document. tensors: under the published names, any dtype; gradients flow to those that ask for them."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    embedding = weights["model.embed_tokens.weight"]
    words = [embedding[int(token)] for token in tokens]
    u_SD = torch.cat([weights["model.memory_tokens"], torch.stack(words)])
    result = Result(torch.empty(0))
    lender = {index: group[0] for group in config.get("kv_reuse_group") or [] for index in group[1:]}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        borrowed = result.layers[lender[index]] if index in lender else None
        state = _layer(own, config, u_SD, borrowed=borrowed, is_global=index in config["global_attn_idx"])
        result.layers.append(state)
        u_SD = state.output_SD
    text_TD = _rms_norm(u_SD[config["num_memory_tokens"] :], weights["model.final_layernorm.weight"], config)
    head_VD = embedding if config["tie_word_embeddings"] else weights["lm_head.weight"]
    result.logits_TV = text_TD @ head_VD.T
    return result


def run_packed(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], tokens: Sequence[int], documents: Sequence[int]
) -> Tensor:
    """Logits (T, V) of a packed sample: its documents (equal neighbors in `documents`) one by one."""
    parts, start = [], 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or documents[end] != documents[start]:
            parts.append(run(tensors, config, tokens[start:end]).logits_TV)
            start = end
    return torch.cat(parts)


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published name -> shape."""
    width, inner = config["hidden_size"], config["mamba_expand"] * config["hidden_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    rank, states, ffn = config["mamba_dt_rank"], config["mamba_d_state"], config["intermediate_size"]
    query, key, value = width, groups * (width // heads), groups * config["v_head_dim"]
    borrowers = {index for group in config.get("kv_reuse_group") or [] for index in group[1:]}
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.memory_tokens": (config["num_memory_tokens"], width),
    }
    for index in range(config["num_hidden_layers"]):
        rows = query + 2 * inner + (0 if index in borrowers else key + value)
        of_layer = {
            "input_layernorm.weight": (width,),
            "mamba.in_proj.weight": (rows, width),
            "mamba.out_proj.weight": (width, inner),
            "mamba.conv1d.weight": (inner, 1, config["mamba_d_conv"]),
            "mamba.conv1d.bias": (inner,),
            "mamba.x_proj.0.weight": (rank + 2 * states, inner),
            "mamba.dt_proj.0.weight": (inner, rank),
            "mamba.dt_proj.0.bias": (inner,),
            "mamba.A_log.0": (inner, states),
            "mamba.D.0": (inner,),
            "mamba.dt_layernorm.weight": (rank,),
            "mamba.B_layernorm.weight": (states,),
            "mamba.C_layernorm.weight": (states,),
            "mamba.pre_avg_layernorm1.weight": (inner,),
            "mamba.pre_avg_layernorm2.weight": (inner,),
            "pre_moe_layernorm.weight": (width,),
            "moe.experts.0.gate_proj.weight": (ffn, width),
            "moe.experts.0.up_proj.weight": (ffn, width),
            "moe.experts.0.down_proj.weight": (width, ffn),
        }
        found |= {f"model.layers.{index}.{name}": shape for name, shape in of_layer.items()}
    found["model.final_layernorm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], width)
    return found


def random_tensors(config: Mapping[str, Any], seed: int = 0, std: float = 0.3) -> dict[str, Tensor]:
    """Large float64 weights, so that every path shows; gains lie around one, A_log around its usual values."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes(config).items():
        made[name] = std * torch.randn(shape, generator=generator, dtype=torch.float64)
        if "layernorm" in name or name.endswith("D.0"):
            made[name] += 1.0
        if name.endswith("A_log.0"):
            made[name] += torch.log(torch.arange(1.0, shape[1] + 1.0, dtype=torch.float64))
    return made


def rope_base(config: Mapping[str, Any]) -> float:
    """theta, or what the NTK rule for `max_position_embeddings` makes of it."""
    if config.get("rope_type") in (None, "default"):
        return float(config["rope_theta"])
    assert config["rope_type"] == "ntk"
    key_dim = config["hidden_size"] // config["num_attention_heads"]
    longer = config["max_position_embeddings"] / config["orig_max_position_embeddings"]
    return config["rope_theta"] * (NTK_FACTOR * longer - (NTK_FACTOR - 1)) ** (key_dim / (key_dim - 2))


def allowed(config: Mapping[str, Any], *, length: int, is_global: bool) -> Tensor:
    """(S, S) bool: whether query q sees key k."""
    meta, window = config["num_memory_tokens"], config["sliding_window"]
    rows = []
    for q in range(length):
        rows.append([k <= q and (is_global or window is None or q - k <= window or k < meta) for k in range(length)])
    return torch.tensor(rows)


def _layer(
    own: Mapping[str, Tensor],
    config: Mapping[str, Any],
    u_SD: Tensor,
    *,
    borrowed: LayerState | None,
    is_global: bool,
) -> LayerState:
    width, inner = config["hidden_size"], config["mamba_expand"] * config["hidden_size"]
    heads, groups, value_dim = config["num_attention_heads"], config["num_key_value_heads"], config["v_head_dim"]
    key_dim = width // heads
    rows = _rms_norm(u_SD, own["input_layernorm.weight"], config) @ own["mamba.in_proj.weight"].T
    query_SD, rest = rows[:, :width], rows[:, width:]
    query_HSK = _rotated(_by_head(query_SD, key_dim), rope_base(config))
    if borrowed is None:
        key_end, value_end = groups * key_dim, groups * (key_dim + value_dim)
        keys_GSK = _rotated(_by_head(rest[:, :key_end], key_dim), rope_base(config))
        values_GSW = _by_head(rest[:, key_end:value_end], value_dim)
        rest = rest[:, value_end:]
    else:
        keys_GSK, values_GSW = borrowed.keys_GSK, borrowed.values_GSW
    x_SC, z_SC = rest[:, :inner], rest[:, inner:]
    assert z_SC.shape[1] == inner
    sees_SS = allowed(config, length=len(u_SD), is_global=is_global)
    attention_SC = attention(query_HSK, keys_GSK, values_GSW, sees_SS)
    ssm_SC, taps_LC, state_CN = state_space(own, config, x_SC, z_SC)
    mean_SC = (
        _rms_norm(attention_SC, own["mamba.pre_avg_layernorm1.weight"], config)
        + _rms_norm(ssm_SC, own["mamba.pre_avg_layernorm2.weight"], config)
    ) / 2
    u_SD = u_SD + mean_SC @ own["mamba.out_proj.weight"].T
    normed_SD = _rms_norm(u_SD, own["pre_moe_layernorm.weight"], config)
    gate, up, down = (own[f"moe.experts.0.{name}_proj.weight"] for name in ("gate", "up", "down"))
    u_SD = u_SD + (_silu(normed_SD @ gate.T) * (normed_SD @ up.T)) @ down.T
    return LayerState(u_SD, keys_GSK, values_GSW, taps_LC, state_CN)


def attention(query_HSK: Tensor, keys_GSK: Tensor, values_GSW: Tensor, sees_SS: Tensor) -> Tensor:
    """(S, H W), heads side by side; heads h of the same h // (H / G) share a group's keys and values."""
    per_group = len(query_HSK) // len(keys_GSK)
    outputs = []
    for head, query_SK in enumerate(query_HSK):
        scores_SS = query_SK @ keys_GSK[head // per_group].T / math.sqrt(query_SK.shape[1])
        scores_SS = scores_SS.masked_fill(~sees_SS, -math.inf)
        weights_SS = torch.exp(scores_SS - scores_SS.max(dim=1, keepdim=True).values)
        weights_SS = weights_SS / weights_SS.sum(dim=1, keepdim=True)
        outputs.append(weights_SS @ values_GSW[head // per_group])
    return torch.cat(outputs, dim=1)


def state_space(
    own: Mapping[str, Tensor], config: Mapping[str, Any], x_SC: Tensor, z_SC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gated output (S, C), the last inputs of the convolution (d_conv - 1, C) and the last state (C, N)."""
    taps, rank, states = config["mamba_d_conv"], config["mamba_dt_rank"], config["mamba_d_state"]
    kernel_CL, bias_C = own["mamba.conv1d.weight"][:, 0], own["mamba.conv1d.bias"]
    A_CN = -torch.exp(own["mamba.A_log.0"])
    padded = torch.cat([x_SC.new_zeros(taps - 1, x_SC.shape[1]), x_SC])
    state_CN = torch.zeros_like(A_CN)
    outputs = []
    for t in range(len(x_SC)):
        x_C = bias_C
        for tap in range(taps):
            x_C = x_C + kernel_CL[:, tap] * padded[t + tap]
        x_C = _silu(x_C)
        projected = own["mamba.x_proj.0.weight"] @ x_C
        r_R = _rms_norm(projected[:rank], own["mamba.dt_layernorm.weight"], config)
        B_N = _rms_norm(projected[rank : rank + states], own["mamba.B_layernorm.weight"], config)
        C_N = _rms_norm(projected[rank + states :], own["mamba.C_layernorm.weight"], config)
        raw_C = own["mamba.dt_proj.0.weight"] @ r_R + own["mamba.dt_proj.0.bias"]
        dt_C = torch.logaddexp(raw_C, torch.zeros_like(raw_C))
        state_CN = torch.exp(dt_C[:, None] * A_CN) * state_CN + (dt_C * x_C)[:, None] * B_N[None, :]
        outputs.append((state_CN @ C_N + own["mamba.D.0"] * x_C) * _silu(z_SC[t]))
    return torch.stack(outputs), padded[len(padded) - (taps - 1) :], state_CN


def _rotated(x_HSK: Tensor, base: float) -> Tensor:
    """Dimension j and j + K/2 of the token at position p, as one complex number, times exp(i p base^(-2j/K))."""
    half = x_HSK.shape[2] // 2
    position_S = torch.arange(x_HSK.shape[1], dtype=torch.float64)
    turns = [base ** (-2 * j / (2 * half)) for j in range(half)]
    angle = position_S[:, None] * torch.tensor(turns, dtype=torch.float64)
    turned = torch.complex(x_HSK[..., :half], x_HSK[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=2)


def _by_head(x_SD: Tensor, head_dim: int) -> Tensor:
    return torch.stack([x_SD[:, start : start + head_dim] for start in range(0, x_SD.shape[1], head_dim)])


def _rms_norm(x: Tensor, gain: Tensor, config: Mapping[str, Any]) -> Tensor:
    return gain * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + config["rms_norm_eps"])


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))
