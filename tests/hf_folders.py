"""Real Hugging Face folders for tests: tiny random models of transformers' own classes, saved by transformers, with tokenizers."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    NemotronHConfig,
    PreTrainedTokenizerFast,
)

from megatron_lite.config.compose import compose_config

SIZES = {
    "vocab_size": 384, "hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": [0, 5], "pad_token_id": 3,
}  # fmt: skip
NEMOTRON_H = {
    "hybrid_override_pattern": "M-M*", "head_dim": 14, "mamba_num_heads": 6, "mamba_head_dim": 9, "n_groups": 2,
    "ssm_state_size": 7, "time_step_min": 1e-6,
}  # fmt: skip
CONFIGS = {
    "nemotron": lambda **changes: NemotronConfig(**(SIZES | {"head_dim": 16} | changes)),
    "llama": lambda **changes: LlamaConfig(**(SIZES | {"tie_word_embeddings": True} | changes)),
    "mistral": lambda **changes: MistralConfig(**(SIZES | {"head_dim": 14, "sliding_window": None} | changes)),
    "nemotron_h": lambda **changes: NemotronHConfig(
        **({key: value for key, value in SIZES.items() if key != "num_hidden_layers"} | NEMOTRON_H | changes)
    ),
}
TEXTS = [
    "the model reads every word and learns what comes next",
    "модель читает текст",
    "def f(x): return x + 1",
    "日本語の文章を読む 🙂",
]


def make_folder(
    path: Path, kind: str, *, dtype=torch.float32, shard: str = "1GB", tokenizer: Path | None = None, **changes
) -> Path:
    """A random model saved by transformers; std 0.3, so that a lost bias or a swapped head shows in the loss."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            shutil.copy2(file, path / file.name)
    return path


def metaspace_tokenizer(path: Path) -> Path:
    """A tokenizer as Llama 2's and Mistral's: spaces are parts of tokens, bytes are the fallback, decoding drops a leading space."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:1] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(path)
    return path


def command(name: str, *overrides: str) -> int:
    """Run `mlite <name>` in this process, errors included."""
    import importlib

    module = importlib.import_module(f"megatron_lite.commands.{name}")
    if name in ("evaluate", "prune"):
        return getattr(module, name)(getattr(module, f"compose_{name}")(list(overrides)))
    schema = module.RunConfig if name == "train" else getattr(module, f"{name.capitalize()}Config")
    return getattr(module, name)(compose_config(name, schema, list(overrides)))
