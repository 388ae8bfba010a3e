"""The documents of at least L tokens of a token file, as a stream of their own: what `min_document_tokens=L` draws windows from.

Long documents follow one another as if the shorter ones were not in the file. An index says where each begins, in the file and in
that stream; a window is found in it by binary search.

The index is made once, by reading the lengths of all documents (20 bytes each, in pieces), and kept beside the token file as
`<prefix>.at_least_<L>.npy`, so that later runs open it in O(1). Where it cannot be written, it is made again at every start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lite.atomic import whole_file
from megatron_lite.data.indexed import IndexedDataset


class LongDocuments:
    """The documents of `dataset` with at least `least` tokens, as a stream.

    Attributes: num_tokens, num_documents.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, dataset: IndexedDataset, least: int, *, identity: str) -> None:
        """identity: a hash of the file's content. An index that was made of other content is not used."""
        self.dataset = dataset
        path = index_path(dataset.prefix, least)
        index = _read(path, _mark(identity))
        if index is None:
            index = _make(dataset, least, _mark(identity))
            with suppress(OSError), whole_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, index)
        # (2, n + 1) with the end of the stream in the last column: searchsorted needs each row contiguous
        self._in_file, self._in_stream = index
        self.num_documents, self.num_tokens = index.shape[1] - 1, int(self._in_stream[-1])
        if not self.num_documents:
            raise ValueError(
                f"{dataset.prefix} has no document of min_document_tokens={least} tokens; `mlite inspect` shows how long its "
                "documents are: lower min_document_tokens, or drop the source"
            )

    def document_start(self, document: int) -> int:
        """Where `document` begins in the stream; for `num_documents`, the end of the stream."""
        return int(self._in_stream[document])

    def document_lengths(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """(first token in the stream, number of tokens) of all documents."""
        yield self._in_stream[:-1], np.diff(self._in_stream)

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.integer]:
        """Tokens [start, stop) of the stream, in the file's own dtype."""
        first, last = np.searchsorted(self._in_stream, (start, stop - 1), side="right") - 1
        pieces = []
        for document in range(first, last + 1):
            begin = max(start, self.document_start(document))
            end = min(stop, self.document_start(document + 1))
            shift = int(self._in_file[document]) - self.document_start(document)
            pieces.append(self.dataset.tokens(begin + shift, end + shift))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def documents_in(self, start: int, stop: int) -> list[int]:
        """Positions in (start, stop) of the stream at which documents begin, ascending."""
        first, last = np.searchsorted(self._in_stream[:-1], (start + 1, stop))
        return self._in_stream[first:last].tolist()


def index_path(prefix: str | Path, least: int) -> Path:
    """Where the index of the documents of at least `least` tokens is kept."""
    return Path(f"{prefix}.at_least_{least}.npy")


def _mark(identity: str) -> int:
    """The hash as a number that an index can hold."""
    return int(identity[:15], 16)


def _read(path: Path, mark: int) -> npt.NDArray[np.int64] | None:
    """A kept index as a memory map; None if there is none, or none of this content."""
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = index.dtype == np.int64 and index.ndim == 2 and index.shape[0] == 2 and index.shape[1] >= 1
    return index if fits and int(index[0, -1]) == mark else None


def _make(dataset: IndexedDataset, least: int, mark: int) -> npt.NDArray[np.int64]:
    starts, lengths = [], []
    for start_D, length_D in dataset.document_lengths():
        long = length_D >= least
        starts.append(start_D[long])
        lengths.append(length_D[long])
    in_stream = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]))
    return np.stack([np.concatenate([*starts, np.array([mark])]), in_stream])
