"""Random tokens as a corpus: to measure speed and memory on a cluster before there is data.

    <folder>/tokenizer/             as many tokens as the model has, each written as its number
    <folder>/tokens.{bin,idx,json}  uniform tokens in documents of 1,024 on average, each ended by the end token

A run reads it like any other data, so the loader, the masks and the embedding do the work that they do with text. There is nothing
to learn in it: the loss stays at log(vocabulary size).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_lite.atomic import whole_folder
from megatron_lite.data.indexed import IndexedWriter, best_dtype
from megatron_lite.data.sidecar import Sidecar, read_sidecar, write_sidecar
from megatron_lite.data.tokenizer import END_OF_TEXT, fingerprint, load_tokenizer
from megatron_lite.file_lock import FileLock

MEAN_DOCUMENT = 1024
FEWEST_TOKENS = 1 << 22
FEWEST_WINDOWS = 8


def prepare_random(folder: str | Path, *, vocab_size: int, seq_len: int, report: Callable[[str], None] | None) -> None:
    """The random corpus in `folder`, written there first if there is none: at least 4M tokens and 8 windows of `seq_len`.

    Safe to call from several processes at once. Raises ValueError if the folder holds something else, or a corpus of another
    vocabulary or for shorter windows.
    """
    folder = Path(folder)
    if _is_finished(folder, vocab_size=vocab_size, seq_len=seq_len):
        return
    target = folder.resolve()
    say = report or (lambda line: None)
    lock = FileLock(
        target.with_name(f".{target.name}.lock"),
        key="data.random_corpus",
        value=folder,
        waiting=lambda owner: say(f"random corpus: {owner} is writing it; waiting"),
    )
    with lock:
        if not _is_finished(folder, vocab_size=vocab_size, seq_len=seq_len):
            tokens = max(FEWEST_TOKENS, FEWEST_WINDOWS * seq_len + 1)
            say(f"random corpus: writing {tokens:,} tokens of {vocab_size:,} kinds to {folder}")
            with whole_folder(target) as building:
                _write(building, vocab_size=vocab_size, tokens=tokens)


def _is_finished(folder: Path, *, vocab_size: int, seq_len: int) -> bool:
    found = read_sidecar(folder / "tokens")
    if found is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"data.random_corpus={folder} exists but is not a random corpus; name another folder, which will be made"
            )
        return False
    if found.vocab_size != vocab_size or found.tokens <= FEWEST_WINDOWS * seq_len:
        raise ValueError(
            f"data.random_corpus={folder} has {found.tokens:,} tokens of {found.vocab_size:,} kinds, not more than "
            f"{FEWEST_WINDOWS} x data.seq_len={seq_len} of model.vocab_size={vocab_size}; name another folder, which will be made"
        )
    return True


def _write(folder: Path, *, vocab_size: int, tokens: int) -> None:
    identity = _write_tokenizer(folder / "tokenizer", vocab_size)
    generator = np.random.default_rng(0)
    with IndexedWriter(folder / "tokens", best_dtype(vocab_size)) as writer:
        while writer.num_tokens < tokens:
            length = min(tokens - writer.num_tokens, 1 + int(generator.geometric(1 / (MEAN_DOCUMENT - 1))))
            document = generator.integers(1, vocab_size, length) if vocab_size > 1 else np.zeros(length, np.int64)
            document[-1] = 0
            writer.add_document(document)
    sidecar = Sidecar(identity, "random", 0, vocab_size, documents=writer.num_documents, tokens=writer.num_tokens)
    write_sidecar(folder / "tokens", sidecar)


def _write_tokenizer(folder: Path, vocab_size: int) -> str:
    """A tokenizer of numbers, its id 0 the end of a text; the fingerprint."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {END_OF_TEXT: 0} | {str(number): number for number in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")
    return fingerprint(load_tokenizer(folder))
