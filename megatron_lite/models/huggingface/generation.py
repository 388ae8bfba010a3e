"""What the files of a Hugging Face folder say of generating text: where it ends, and what greedy decoding would change.

As in transformers, generation_config.json goes before config.json, and both before the tokenizer's own end token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Settings of generation_config.json that change greedy text, and the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "num_beams": (None, 1),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
}


def end_tokens(extra: Mapping[str, Any], default: int | None) -> frozenset[int]:
    """The ids at which text ends; `extra` as `open_folder` gives it, `default` is the tokenizer's end token.

    Raises ValueError if a file holds something else than token ids.
    """
    for file in ("generation_config", "config"):
        value = extra.get(file, {}).get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
                raise ValueError(f"{file}.json: eos_token_id={value!r} must be a token id or a list of them")
            return frozenset(ids)
    return frozenset() if default is None else frozenset([default])


def not_applied(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of generation_config.json that change greedy text in transformers and that `mlite generate` does not apply."""
    found = extra.get("generation_config", {})
    return {key: found[key] for key, neutral in _NEUTRAL.items() if key in found and found[key] not in neutral}
