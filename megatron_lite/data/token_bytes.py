"""How much text a token represents, in bytes of UTF-8, to convert a loss into bits per byte.

    bits per byte = loss / ln 2 / (bytes / tokens)

with loss the mean in nats over the counted tokens, and bytes / tokens that of the same targets. Unlike perplexity it compares models
with different tokenizers (Gao et al., The Pile, https://arxiv.org/abs/2101.00027, section 3.1).

Notable features:
- Bytes are counted id by id from one table, so a window may begin or end inside a character.
- Special tokens represent no text: an end-of-document token that is counted costs bits but adds no bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data.packing import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's tokens for the bytes of characters that it lacks


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.int64]:
    """(largest id + 1,): the bytes that each id adds to a decoded text; 0 for special tokens and ids that do not exist."""
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    sizes = np.zeros(max(vocabulary) + 1, dtype=np.int64)
    for index, added in tokenizer.added_tokens_decoder.items():
        vocabulary.pop(index, None)
        sizes[index] = 0 if added.special else len(added.content.encode())
    for index in tokenizer.all_special_ids:
        vocabulary.pop(index, None)
        sizes[index] = 0
    if _is_byte_level(tokenizer):
        from tokenizers import pre_tokenizers

        alphabet = set(pre_tokenizers.ByteLevel.alphabet())  # 256 characters, one a byte
        for index, token in vocabulary.items():
            sizes[index] = len(token) if alphabet.issuperset(token) else len(token.encode())
        return sizes
    bytes_as_characters = _spells_bytes(tokenizer)
    single = [
        index
        for token, index in tokenizer.get_vocab().items()
        if _BYTE.fullmatch(token) or (bytes_as_characters and len(token) == 1)
    ]
    rest = list(vocabulary.keys() - set(single))
    sizes[rest] = _added_bytes(tokenizer, rest)
    sizes[single] = 1
    return sizes


def bytes_per_token(examples: Iterable[Example], sizes: npt.NDArray[np.int64]) -> float:
    """Mean bytes of the counted targets of `examples`, by the table `sizes` of `token_bytes`; 0 where nothing counts."""
    total, tokens = 0, 0
    for example in examples:
        counted = example["targets"][example["loss_mask"]]
        total += int(sizes[counted].sum())
        tokens += len(counted)
    return total / max(tokens, 1)


def bits_per_byte(losses: dict[str, float], ratios: dict[str, float]) -> dict[str, float]:
    """source -> bits per byte from its loss (nats a token) and its bytes a token; sources without text are left out."""
    return {name: loss / math.log(2) / ratios[name] for name, loss in losses.items() if ratios.get(name)}


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
    parts = (decoder or {}).get("decoders", [decoder])
    return any(part and part["type"] == "ByteLevel" for part in parts)


def _spells_bytes(tokenizer: Any) -> bool:
    """Whether the token of every byte is the character of the same number, as in ByT5: those above 127 decode to nothing alone."""
    letter = "é"
    ids = tokenizer(letter, add_special_tokens=False)["input_ids"]
    return tokenizer.convert_ids_to_tokens(ids) == [chr(byte) for byte in letter.encode()]


def _added_bytes(tokenizer: Any, ids: list[int]) -> list[int]:
    """What each id adds behind another token: at the beginning of a text, decoders drop a space."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rows = [before, *([*before, index] for index in ids)]
    if backend is not None:
        texts = backend.decode_batch(rows, skip_special_tokens=False)
    else:
        texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]
    alone = len(texts[0].encode())
    return [max(0, len(text.encode()) - alone) for text in texts[1:]]
