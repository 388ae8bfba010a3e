"""Train, load, identify and apply tokenizers in Hugging Face form.

Notable features:
- `train_tokenizer`: byte-level BPE with the properties of Nemotron-4's tokenizer (Parmar et al. 2024,
  arXiv 2402.16819, section 2): every digit is a token of its own, white space is kept exactly (leading,
  trailing, inner), bytes are the fallback, so every Unicode string comes back unchanged. The one special
  token is `<|endoftext|>`, id 0: no unknown token (bytes cover everything), no padding token (windows are cut
  from a stream).
- the split pattern keeps combining marks with their letters, as Indic scripts need
- `fingerprint`: an identity that survives saving again and another file format of the same tokenizer
- `encode_documents`: text to numpy arrays in batches; special tokens written out in a text stay plain text,
  so that no document can end itself with a forged end-of-document token
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_lite.data.indexed import best_dtype

if TYPE_CHECKING:  # importing transformers takes seconds; a run on tokenized data needs none of it
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"

# Letters with the space before them | one digit | punctuation with its line end | line ends with the
# indentation of empty lines | white space up to the one before a word | the rest of the white space.
_PATTERN = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_BYTES_AND_END = 257
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm", "tekken.json")

# Digits, white space, scripts, marks, emoji, code: two tokenizers that agree on vocabulary and on this are
# the same.
_PROBE = (
    "  Hello,\tworld 2024!\r\n\n  def f(x): return x**2  # naïve "
    "\u0928\u092e\u0938\u094d\u0924\u0947 你好 Привет 🙂e\u0301 "
)


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int) -> Path:
    """Train on `texts` and save `tokenizer.json` and `tokenizer_config.json` in `folder`.

    `vocab_size` counts everything: 256 bytes, the end-of-text token and the merges. Same texts in the same
    order give the same files. Raises ValueError when `vocab_size` is too small for the bytes or the texts have
    too few merges.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _BYTES_AND_END:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: the bytes and {END_OF_TEXT} alone take {_BYTES_AND_END}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is more than these texts give ({tokenizer.get_vocab_size()}); "
            "lower it or train on more text"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Not `tokenizer.save`: its errors (a full disk) are not an OSError.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The Hugging Face tokenizer in a local folder; nothing is downloaded and no code of the folder is run.

    Raises ValueError naming the folder and the way out when it is missing, holds no tokenizer or has no end
    token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"tokenizer folder {str(folder)!r} does not exist; give a local folder with tokenizer.json "
            "(names on a model hub are not looked up: download it first)"
        )
    if not any(path.is_file() for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise ValueError(
            f"{str(folder)!r} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}); "
            "save one there with `tokenizer.save_pretrained(folder)`"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises anything from KeyError to ImportError here
        raise ValueError(
            f"the tokenizer in {str(folder)!r} does not load: {error}; check that its files are whole and "
            "need no code of their own (remote code is never run)"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {str(folder)!r} has no eos_token, which marks the end of every document; "
            'add "eos_token" to its tokenizer_config.json'
        )
    return tokenizer


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files in `folder` that make up a tokenizer, sorted; empty when there is none."""
    extra = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
    found = {path for pattern in (*_TOKENIZER_FILES, *extra) for path in Path(folder).glob(pattern)}
    return sorted(path for path in found if path.is_file())


def vocabulary_size(tokenizer: Any) -> int:
    """The largest token id + 1: how many rows an embedding needs. More than the number of entries where ids have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: PreTrainedTokenizerBase | str | Path) -> str:
    """Identity of a tokenizer (or of the one in a folder): 16 hexadecimal digits of a sha256.

    Hashed are the whole vocabulary with its ids, the order of the merges where there are any, the begin and
    end tokens and the ids of a probe text. So it is the same for a folder and the object loaded from it,
    after `save_pretrained` with another version of transformers, and for slow (sentencepiece) tokenizers as
    well.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "merges": _merges(tokenizer),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "probe": tokenizer(_PROBE, add_special_tokens=False)["input_ids"],
    }
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_documents(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    chunk: int = 256,
    dtype: np.dtype | None = None,
) -> Iterator[np.ndarray]:
    """Token ids of each text and the end token (the EOD) as a 1-D array, in order. No beginning token is added.

    `dtype`: by default the smallest that holds every id. `chunk` texts are encoded at a time, by the tokenizer's own threads
    where it has them.
    """
    dtype = dtype or best_dtype(vocabulary_size(tokenizer))
    end = np.array([tokenizer.eos_token_id], dtype=dtype)
    texts = iter(texts)
    while batch := list(itertools.islice(texts, chunk)):
        for ids in _encode(tokenizer, batch):
            yield np.concatenate([np.asarray(ids, dtype=dtype), end])


def _encode(tokenizer: PreTrainedTokenizerBase, batch: list[str]) -> Iterable[list[int]]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(batch, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # The caller's tokenizer is left as it was. Encodings hold offsets and masks that nobody needs here: going
    # to the backend skips the copy into Python lists that transformers makes of them.
    before = backend.encode_special_tokens, backend.truncation, backend.padding
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(batch, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before[0]
        if before[1] is not None:
            backend.enable_truncation(**before[1])
        if before[2] is not None:
            backend.enable_padding(**before[2])


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Merges of a fast BPE tokenizer as "left right"; files hold them as pairs or as such strings."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    merges = json.loads(backend.to_str())["model"].get("merges") or []
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
