"""One source of the blend: a `.bin/.idx` pair, cut into windows.

Documents are in the file in shuffled order, each with the end-of-document token at its end. Window k is
the tokens [k * T, k * T + T + 1) of that stream: neighbors share one token, which the first predicts and
the second reads, so each token but the very first is predicted exactly once per epoch. The number of windows
is floor((tokens - 1) / T). With `min_document_tokens` the stream is that of the long documents alone (`long_documents`).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lite.data.config import DataConfig
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.long_documents import LongDocuments
from megatron_lite.data.packing import Example, PackingOptions, pack
from megatron_lite.data.sidecar import Sidecar, TokenizerIdentity, read_sidecar, sidecar_path

_SAMPLED_BYTES = 1 << 16  # of each end of a file; a fingerprint must not take longer on a larger file


class Source:
    """A named, opened and checked source.

    Args:
        min_document_tokens: shorter documents are left out; 0 = none are.

    Attributes: name, documents (what is read), num_tokens and num_documents (of those), num_windows (`data.seq_len` tokens
    each), fingerprint (a hash that changes with what is read), sidecar (None for a file without one).

    Raises:
        ValueError: the files are damaged, too short for one window, written with another tokenizer, or lack
            end-of-document tokens.
    """

    def __init__(
        self,
        name: str,
        prefix: str | Path,
        *,
        config: DataConfig,
        tokenizer: TokenizerIdentity,
        min_document_tokens: int = 0,
    ) -> None:
        self.name = name
        self.dataset = IndexedDataset(prefix)
        self.sidecar = read_sidecar(prefix)
        self._seq_len = config.seq_len
        self._vocab_size = tokenizer.vocab_size
        eod = tokenizer.eod if config.eod_id is None else config.eod_id
        self._options = PackingOptions(eod, config.reset_attention, config.mask_eod_loss)
        if self.sidecar is not None:
            self._check_sidecar(self.sidecar, tokenizer)
        self._check_eod(eod)
        self.fingerprint = self._fingerprint()
        self.documents: IndexedDataset | LongDocuments = self.dataset
        if min_document_tokens:
            self.documents = LongDocuments(self.dataset, min_document_tokens, identity=self.fingerprint)
            self.fingerprint += f"-{min_document_tokens}"
        self.num_tokens, self.num_documents = self.documents.num_tokens, self.documents.num_documents
        self.num_windows = (self.num_tokens - 1) // config.seq_len
        if self.num_windows < 1:
            raise ValueError(
                f"{name} ({prefix}) has {self.num_tokens} tokens, less than one window of data.seq_len + 1 = "
                f"{config.seq_len + 1}; lower data.seq_len to {self.num_tokens - 1} or less, or give it "
                "more documents"
            )
        for k in (0, self.num_windows - 1):  # an id that the vocabulary lacks is best found before step 1
            self.window(k)

    def window(self, k: int) -> npt.NDArray[np.int64]:
        """The T + 1 tokens of window k, a copy.

        Raises:
            ValueError: a token id that the vocabulary does not have.
        """
        start = k * self._seq_len
        window = self.documents.tokens(start, start + self._seq_len + 1).astype(np.int64)
        if window.max() >= self._vocab_size or window.min() < 0:
            raise ValueError(
                f"{self.name} ({self.dataset.prefix}): token ids {window.min()} to {window.max()} near "
                f"token {start}, but the tokenizer has ids up to {self._vocab_size - 1}; the file was written with "
                "another tokenizer: set data.tokenizer to that one, or tokenize again"
            )
        return window

    def example(self, k: int) -> Example:
        """Window k as a training example (see `packing.pack`); 0 <= k < num_windows."""
        start = k * self._seq_len
        starts: list[int] = []
        if self._options.reset_attention:
            starts = [at - start for at in self.documents.documents_in(start, start + self._seq_len + 1)]
        return pack(self.window(k), starts, self._options)

    def state(self) -> dict[str, str | int]:
        """What a checkpoint keeps of the source, to recognize it by."""
        return {"fingerprint": self.fingerprint, "tokens": self.num_tokens, "windows": self.num_windows}

    def _check_sidecar(self, sidecar: Sidecar, tokenizer: TokenizerIdentity) -> None:
        path = sidecar_path(self.dataset.prefix)
        if tokenizer.fingerprint and sidecar.tokenizer and sidecar.tokenizer != tokenizer.fingerprint:
            raise ValueError(
                f"{self.name}: {path} says that the file was written with tokenizer "
                f"{sidecar.tokenizer_name} ({sidecar.tokenizer}), but the run has {tokenizer.name} "
                f"({tokenizer.fingerprint}); set data.tokenizer to the first, or tokenize the source with "
                "the second"
            )
        found = (self.dataset.num_documents, self.dataset.num_tokens)
        if found != (sidecar.documents, sidecar.tokens):
            raise ValueError(
                f"{self.name}: {path} names {sidecar.documents} documents and {sidecar.tokens} tokens, "
                f"the files hold {found[0]} and {found[1]}; the sidecar belongs to another file: tokenize "
                "the source again"
            )

    def _check_eod(self, eod: int) -> None:
        """The first and the last document with tokens end with `eod`; the others are not looked at, to open in O(1)."""
        documents = range(self.dataset.num_documents + 1)
        first_end = bisect_right(documents, 0, key=self.dataset.document_start)  # behind the first document with tokens
        last_end = bisect_left(documents, self.dataset.num_tokens, key=self.dataset.document_start)
        for following in (first_end, last_end):
            document, end = following - 1, self.dataset.document_start(following)
            last = int(self.dataset.tokens(end - 1, end)[0])
            if last != eod:
                raise ValueError(
                    f"{self.name} ({self.dataset.prefix}): document {document} ends with token {last} "
                    f"instead of the end-of-document token {eod}; tokenize with end-of-document tokens "
                    "(Megatron's --append-eod), or set data.eod_id to the id that the file uses"
                )

    def _fingerprint(self) -> str:
        """Hash of the counts, the tokenizer and both ends of both files: O(1)."""
        tokenizer = self.sidecar.tokenizer if self.sidecar else ""
        counts = [self.dataset.num_tokens, self.dataset.num_documents, str(self.dataset.dtype), tokenizer]
        digest = hashlib.blake2b(json.dumps(counts).encode(), digest_size=16)
        for end in self.dataset.ends(_SAMPLED_BYTES):
            digest.update(end)
        return digest.hexdigest()


def open_sources(config: DataConfig, tokenizer: TokenizerIdentity) -> dict[str, Source]:
    """All training sources of `config` by full name."""
    return {name: _open(name, source.path, config, tokenizer) for name, source in config.sources().items()}


def open_validation(config: DataConfig, tokenizer: TokenizerIdentity) -> dict[str, Source]:
    """The held-out files of `config` by the full name of their source; sources without one are left out."""
    return {
        name: _open(name, source.validation, config, tokenizer)
        for name, source in config.sources().items()
        if source.validation is not None
    }


def _open(name: str, prefix: str, config: DataConfig, tokenizer: TokenizerIdentity) -> Source:
    least = config.sources()[name].min_document_tokens
    return Source(name, prefix, config=config, tokenizer=tokenizer, min_document_tokens=least)
