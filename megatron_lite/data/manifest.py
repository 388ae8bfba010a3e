"""The side-car `<prefix>.json` of a `.bin/.idx` pair: which tokenizer wrote it, and what is in it.

The token files alone do not say what their numbers mean; the side-car does, so that a run with another
tokenizer is refused. Files from elsewhere may lack it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TokenizerIdentity:
    """What the data must agree on with the run's tokenizer. fingerprint: a hash of the tokenizer's files."""

    fingerprint: str
    name: str
    eod: int
    vocab_size: int


@dataclass(frozen=True)
class Manifest:
    """Content of the side-car. tokenizer: the fingerprint; languages and licences: of the documents."""

    tokenizer: str
    tokenizer_name: str
    eod: int
    vocab_size: int
    documents: int
    tokens: int
    languages: Any = field(default_factory=list)
    licences: Any = field(default_factory=list)


def manifest_path(prefix: str | Path) -> Path:
    """The side-car of a prefix."""
    return Path(f"{prefix}.json")


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write the side-car, whole or not at all."""
    path = manifest_path(prefix)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The side-car of a prefix, or None where there is none.

    Raises:
        ValueError: it cannot be read or lacks a field; fields that we do not know are ignored.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    known = {entry.name for entry in fields(Manifest)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**{key: value for key, value in content.items() if key in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); tokenise the source again") from None
