"""What a run reads: its tokenizer, the corpora that are made at first use, and the held-out files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_lite.data.config import DataConfig
from megatron_lite.data.loader import HeldOut
from megatron_lite.data.random_corpus import prepare_random
from megatron_lite.data.sample.corpus import prepare
from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.data.source import open_validation
from megatron_lite.data.token_bytes import token_bytes
from megatron_lite.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from megatron_lite.models.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_tokenizer(config: DataConfig) -> TokenizerIdentity:
    """What data and model must agree on with the tokenizer of `data.tokenizer`.

    Raises ValueError if `data.tokenizer` is not given or is not the folder of a tokenizer.
    """
    if not config.tokenizer:
        raise ValueError(
            "data.tokenizer is empty: name the folder of the tokenizer that the token files were written with"
        )
    tokenizer = load_tokenizer(config.tokenizer)
    return TokenizerIdentity(
        fingerprint(tokenizer),
        config.tokenizer,
        tokenizer.eos_token_id,
        vocabulary_size(tokenizer),
        _token_bytes(tokenizer),
    )


def _token_bytes(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.int64] | None:
    """None, and a warning, for a tokenizer that does not tell: bits per byte are worth no refusal."""
    try:
        return token_bytes(tokenizer)
    except Exception as error:  # tokenizers of all kinds raise anything
        warnings.warn(f"no bits per byte: {type(tokenizer).__name__}: {error}", stacklevel=2)
        return None


def prepare_data(config: DataConfig, *, vocab_size: int, report: Callable[[str], None] | None) -> None:
    """Build the sample or the random corpus if the config reads it and it is not there yet."""
    if config.sample_corpus:
        prepare(config.sample_corpus, vocab_size=vocab_size, report=report)
    if config.random_corpus:
        prepare_random(config.random_corpus, vocab_size=vocab_size, seq_len=config.seq_len, report=report)


def check_vocabulary(model: ModelConfig, tokenizer: TokenizerIdentity) -> None:
    """Raises ValueError if the tokenizer has an id for which the model has no row."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is too small for the tokenizer {tokenizer.name}, whose ids go up to "
            f"{tokenizer.vocab_size - 1}; set model.vocab_size={tokenizer.vocab_size}"
        )


def held_out(config: DataConfig, tokenizer: TokenizerIdentity) -> HeldOut:
    """What `config` holds out for validation; without sources where no source has a `validation` file."""
    return HeldOut(open_validation(config, tokenizer), config.validation.windows, tokenizer.token_bytes)
