"""What a Hugging Face mapping consists of, and the readers that every mapping uses.

A family is data plus two small functions: `write_config` (ModelConfig -> config.json) and `read_config`
(config.json -> ModelConfig). A field that changes the model and that we cannot hold is refused by name; a
field that transformers' own class for this architecture ignores or that does not change the model is kept
beside the config and written back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from megatron_lite.models.config import AttentionConfig, MlpConfig, ModelConfig
from megatron_lite.models.huggingface.fields import integer, number, switch
from megatron_lite.models.huggingface.rope import written_rope
from megatron_lite.models.huggingface.rules import Rule
from megatron_lite.models.pattern import BLOCK

# Where older and newer transformers keep the same thing; always regenerated, never carried along.
REWRITTEN = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "dtype", "torch_dtype")
# Of attention, what a family has to say that it can write.
PLAIN_ATTENTION: dict[str, Any] = {
    "attention.qkv_bias": False,
    "attention.qk_norm": False,
    "attention.value_head_dim": None,
    "attention.window": None,
    "attention.kv_groups": [],
    "meta_tokens": 0,
}


@dataclass(frozen=True)
class Family:
    """One mapping.

    required: keys of ModelConfig (dotted) that such a model always has, and their value.
    defaults: what transformers assumes for fields that config.json leaves out.
    only: fields of config.json that change the model, and which of their values are supported.
    spellings: fields of config.json that say one thing in different ways; they go back as they came.
    """

    name: str
    model_type: str
    architecture: str
    required: Mapping[str, Any]
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    rules: Callable[[ModelConfig], list[Rule]]
    spellings: tuple[str, ...] = ()

    def to_hf_config(self, config: ModelConfig) -> dict[str, Any]:
        """config.json for `config`, without dtype. Raises ValueError naming the key that does not fit."""
        config.validate()
        for key, value in self.required.items():
            found = attrgetter(key)(config)
            if found != value:
                raise ValueError(
                    f"model.{key}={found!r} cannot be written as {self.architecture}, which has {value!r}; another "
                    "model.family may fit"
                )
        head = {"architectures": [self.architecture], "model_type": self.model_type}
        return head | self.write_config(config)

    def from_hf_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """The ModelConfig of a config.json. Raises ValueError naming the field that ModelConfig cannot represent."""
        architectures = hf.get("architectures") or [self.architecture]
        if architectures != [self.architecture]:
            raise ValueError(
                f"config.json: architectures={architectures!r} cannot be held; expected [{self.architecture!r}]"
            )
        full = {**self.defaults, **hf}
        for key, allowed in {"quantization_config": (None,), "auto_map": (None,), **self.only}.items():
            if full.get(key) not in allowed:
                raise ValueError(
                    f"config.json: {key}={full.get(key)!r} is not supported (only "
                    f"{' or '.join(repr(value) for value in allowed)})"
                )
        config = self.read_config(full)
        try:
            config.validate()
        except ValueError as error:
            raise ValueError(f"config.json describes a model that cannot be built: {error}") from error
        return config

    def extra(self, hf: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """The fields of config.json that are not the model's shape, to be written back on export."""
        owned = {*self.to_hf_config(config), *REWRITTEN} - set(self.spellings)
        return {key: value for key, value in hf.items() if key not in owned}

    def with_extra(self, config: ModelConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
        """config.json for `config` with the fields that `extra` gave, spelled as they were if they still say the same."""
        written = self.to_hf_config(config)
        spelled = {key: extra[key] for key in self.spellings if key in extra}
        others = {key: value for key, value in extra.items() if key not in spelled}
        if spelled:
            respelled = {key: value for key, value in written.items() if key not in self.spellings} | spelled
            if self.from_hf_config(respelled) == self.from_hf_config(written):
                written = respelled
        return others | written


def attention(hf: Mapping[str, Any]) -> AttentionConfig:
    """Heads, key-value heads and head dim; the latter two may be null in config.json."""
    heads, hidden = integer(hf, "num_attention_heads"), integer(hf, "hidden_size")
    kv_heads = heads if hf.get("num_key_value_heads") is None else integer(hf, "num_key_value_heads")
    head_dim = hidden // max(1, heads) if hf.get("head_dim") is None else integer(hf, "head_dim")
    return AttentionConfig(heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def written_sizes(config: ModelConfig) -> dict[str, Any]:
    """The fields that every dense family writes, under the names they share; the counterpart of `read_sizes`.

    Raises ValueError for a pattern that does not repeat one block.
    """
    if config.symbols != BLOCK * (len(config.symbols) // 2):
        raise ValueError(
            f"model.pattern={config.symbols!r} cannot be written with model.family={config.family}, which repeats {BLOCK!r} "
            "(attention, feed-forward)"
        )
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp.ffn_size,
        "num_hidden_layers": len(config.symbols) // len(BLOCK),
        "num_attention_heads": config.attention.heads,
        "num_key_value_heads": config.attention.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    } | written_rope(config)


def read_sizes(hf: Mapping[str, Any], *, activation: str) -> dict[str, Any]:
    """The fields of ModelConfig that every dense family reads under the same names."""
    return {
        "num_layers": integer(hf, "num_hidden_layers"),
        "hidden_size": integer(hf, "hidden_size"),
        "vocab_size": integer(hf, "vocab_size"),
        "max_seq_len": integer(hf, "max_position_embeddings"),
        "init_std": number(hf, "initializer_range"),
        "tie_embeddings": switch(hf, "tie_word_embeddings"),
        "attention": attention(hf),
        "mlp": MlpConfig(ffn_size=integer(hf, "intermediate_size"), activation=activation),
    }
