"""Pruning and importance written once more from the papers, over transformers' models and their tensors: float64, in loops, and without
an import of what they check. Hugging Face's rows are not group-major, so the numbers of rows are computed in another way here."""

from __future__ import annotations

import numpy as np
import torch


def head_rows(heads, width: int) -> list[int]:
    return [head * width + channel for head in heads for channel in range(width)]


def sliced(tensors: dict, hf, *, layers, hidden, inner) -> dict[str, torch.Tensor]:
    """The tensors of a folder cut to layers (of the folder), hidden channels and, by layer, {axis: kept numbers}."""
    made = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "layers" not in parts:
            made[name] = tensor[hidden] if tensor.dim() == 1 else tensor[:, hidden]
            continue
        where = parts.index("layers") + 1
        layer = int(parts[where])
        if layer not in layers:
            continue
        parts[where] = str(layers.index(layer))
        rest = ".".join(parts[where + 1 :])
        for dim, numbers in enumerate(kept_numbers(rest, hf, inner[layer], hidden)):
            if numbers is not None:
                tensor = tensor.index_select(dim, torch.as_tensor(numbers))
        made[".".join(parts)] = tensor
    return made


def kept_numbers(rest: str, hf, kept: dict, hidden) -> list:
    """What stays of each dimension of a layer's tensor, None: all."""
    last = rest.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
    if last in ("up_proj", "gate_proj"):
        return [kept["ffn_size"], hidden]
    if last == "down_proj":
        return [hidden, kept["ffn_size"]]
    if last == "q_proj":
        return [head_rows(kept["heads"], hf.head_dim), hidden]
    if last in ("k_proj", "v_proj"):
        return [None, hidden]
    if last == "o_proj":
        return [hidden, head_rows(kept["heads"], hf.head_dim)]
    if "mixer" not in rest:
        return [hidden]
    if last == "norm" and rest.startswith("norm"):
        return [hidden]
    heads, channels = kept.get("mamba_heads"), kept.get("mamba_head_dim")
    width, states = hf.mamba_head_dim, hf.n_groups * hf.ssm_state_size
    inner, total = [h * width + p for h in heads for p in channels], hf.mamba_num_heads * width
    if last == "in_proj":  # [z | x | B | C | dt], each of all heads or groups
        rows = inner + [total + i for i in inner] + list(range(2 * total, 2 * total + 2 * states))
        return [rows + [2 * total + 2 * states + int(h) for h in heads], hidden]
    if last == "conv1d":
        return [inner + list(range(total, total + 2 * states)), None, None][: 3 if rest.endswith("weight") else 1]
    if last == "out_proj":
        return [hidden, inner]
    return [inner] if last == "norm" else [heads]  # A_log, D, dt_bias


def readings(model, tokens, mask) -> dict[str, np.ndarray]:
    """place -> root of the sum over samples of the squared mean |activation|, and the depth score of each layer; token by token."""
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    found: dict[str, np.ndarray] = {}
    seen: dict[str, torch.Tensor] = {}

    def see(name, take):
        def hook(module, args, *output):
            seen[name] = take(args, output)

        return hook

    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(see(f"{layer}.io", lambda args, out: (args[0], out[0])), with_kwargs=False)
        for name, module in block.named_modules():
            last = name.split(".")[-1]
            if last in ("o_proj", "down_proj"):
                module.register_forward_pre_hook(see(f"{layer}.{last}", lambda args, out: args[0]))
            elif last in ("in_proj", "norm", "input_layernorm", "post_attention_layernorm") and name != "mixer.norm":
                module.register_forward_hook(see(f"{layer}.{last}", lambda args, out: out[0]))
    squares: dict[str, np.ndarray] = {}
    distance, counted = {}, 0
    for sample in range(len(tokens)):
        with torch.no_grad():
            model(input_ids=torch.as_tensor(tokens[sample : sample + 1]))
        kept = [t for t in range(tokens.shape[1]) if mask[sample, t]]
        counted += len(kept)
        for name, value in seen.items():
            if name.endswith(".io"):
                before, after = (v[0].double().numpy() if v.dim() == 3 else v.double().numpy() for v in value)
                for t in kept:
                    cosine = before[t] @ after[t] / np.linalg.norm(before[t]) / np.linalg.norm(after[t])
                    distance[name] = distance.get(name, 0.0) + 1 - cosine
                continue
            total = np.zeros(value.shape[-1])
            for t in kept:
                total += np.abs(value[0, t].double().numpy())
            squares[name] = squares.get(name, 0.0) + (total / max(len(kept), 1)) ** 2
    found = {name: np.sqrt(total) for name, total in squares.items()}
    return found | {name: np.array(total / counted) for name, total in distance.items()}
