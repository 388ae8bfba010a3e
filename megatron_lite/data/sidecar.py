"""The sidecar `<prefix>.json` of a `.bin/.idx` pair: which tokenizer wrote it, and what is in it.

The token files alone do not say what their numbers mean; the sidecar does, so that a run with another
tokenizer is refused. Files from elsewhere may lack it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.atomic import whole_file


@dataclass(frozen=True)
class TokenizerIdentity:
    """What the data and the run's tokenizer must agree on. fingerprint: a hash; vocab_size: the largest id + 1.

    token_bytes: (vocab_size,) bytes of text that each id stands for (`token_bytes.token_bytes`), None if bits per byte are
    not needed.
    """

    fingerprint: str
    name: str
    eod: int
    vocab_size: int
    token_bytes: npt.NDArray[np.int64] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Sidecar:
    """Content of the sidecar. tokenizer: the fingerprint; languages and licenses: of the documents."""

    tokenizer: str
    tokenizer_name: str
    eod: int
    vocab_size: int
    documents: int
    tokens: int
    languages: Any = field(default_factory=list)
    licenses: Any = field(default_factory=list)


def sidecar_path(prefix: str | Path) -> Path:
    """The sidecar of a prefix."""
    return Path(f"{prefix}.json")


def write_sidecar(prefix: str | Path, sidecar: Sidecar) -> None:
    """Write the sidecar, whole or not at all."""
    path = sidecar_path(prefix)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(asdict(sidecar), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_sidecar(prefix: str | Path) -> Sidecar | None:
    """The sidecar of a prefix, or None where there is none.

    Raises:
        ValueError: it cannot be read or lacks a field; fields that we do not know are ignored.
    """
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    known = {entry.name for entry in fields(Sidecar)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        # `licences`: before version 0.2
        content = {{"licences": "licenses"}.get(key, key): value for key, value in content.items()}
        return Sidecar(**{key: value for key, value in content.items() if key in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); tokenize the source again") from None
