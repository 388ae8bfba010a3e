"""The documents of the sample corpus: exact duplicates dropped, a part held out, an order that looks random.

Notable features:
- everything is decided by sha256 of the text, so by the text alone: no random numbers, no order of folders
- so a document is on the same side of the split in every corpus that holds it (in a source too small for its
  share to be measurable, the next documents by hash are held out as well)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_lite.data.sample.readers import read_source
from megatron_lite.data.sample.sources import SOURCES, Document, Source

# Share of the documents that is held out, and the bytes that every source holds out at least (2,000 tokens).
_HELD_OUT = {"english": 0.04, "multilingual": 0.08, "code": 0.04}
_HELD_OUT_BYTES = 10_000


@dataclass
class Part:
    """The documents of one source on their way; hashes are sha256 of the text, parallel to `documents`."""

    source: Source
    documents: list[Document] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    held_out: frozenset[str] = frozenset()

    def split(self, name: str) -> list[Document]:
        """Documents of "train" or "validation" in their shuffled order: by a hash that no content decides."""
        wanted = name == "validation"
        chosen = [(h, d) for h, d in zip(self.hashes, self.documents) if (h in self.held_out) == wanted]
        return [d for h, d in sorted(chosen, key=lambda item: _sha256(f"order {item[0]}"))]


def collect(scale: float, say: Callable[[str], None]) -> list[Part]:
    """All sources with exact duplicates dropped (the first stays) and the held-out documents chosen."""
    parts = []
    seen: set[str] = set()
    for source in SOURCES:
        part = Part(source)
        for document in read_source(source, int(source.megabytes * 1e6 * scale)):
            digest = _sha256(document.text)
            if digest not in seen:
                seen.add(digest)
                part.documents.append(document)
                part.hashes.append(digest)
        part.held_out = _held_out(part, int(_HELD_OUT_BYTES * scale))
        parts.append(part)
    for group in _HELD_OUT:
        documents = [d for part in parts if part.source.group == group for d in part.documents]
        size = sum(len(d.text.encode()) for d in documents)
        say(f"sample corpus: {group}: {len(documents):,} documents, {size / 1e6:.1f} MB")
    return parts


def _held_out(part: Part, at_least: int) -> frozenset[str]:
    """Hashes of the documents below the group's share, and of the next ones until `at_least`
    bytes.
    """
    bound = _HELD_OUT[part.source.group] * 2.0**32
    chosen: set[str] = set()
    size = 0
    for digest, document in sorted(zip(part.hashes, part.documents), key=lambda item: item[0]):
        if int(digest[:8], 16) >= bound and size >= at_least and chosen:
            break
        chosen.add(digest)
        size += len(document.text.encode())
    if len(chosen) >= len(part.documents):
        raise ValueError(
            f"sample corpus: source {part.source.name!r} found only {len(part.documents)} documents in the "
            f"package {part.source.package or 'python'!r}, too few to hold "
            "some out; reinstall the package whole"
        )
    return frozenset(chosen)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
