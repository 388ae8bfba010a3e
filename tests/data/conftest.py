"""Small sources: real files for what reads tokens, stubs with nothing but sizes for what only counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.config import DataConfig, GroupConfig, PhaseConfig, SourceConfig
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.sidecar import Sidecar, TokenizerIdentity, write_sidecar

EOD = 1


@dataclass
class StubSource:
    """What a `Blend` asks of a source as long as nobody reads tokens."""

    num_windows: int
    num_tokens: int = 1000
    fingerprint: str = "f"

    def state(self) -> dict[str, str | int]:
        return {"fingerprint": self.fingerprint, "tokens": self.num_tokens, "windows": self.num_windows}


@pytest.fixture
def stub() -> type[StubSource]:
    return StubSource


@pytest.fixture
def tokenizer() -> TokenizerIdentity:
    return TokenizerIdentity(fingerprint="abc", name="sample", eod=EOD, vocab_size=1000)


@pytest.fixture
def blended() -> Callable[..., DataConfig]:
    """weights {"group/source": weight} and phases [(end or None, weights)] -> a config; int ends are samples."""

    def build(weights: dict[str, float], phases: list | None = None) -> DataConfig:
        groups: dict[str, GroupConfig] = {}
        for name, weight in weights.items():
            group, source = name.split("/")
            members = groups.setdefault(group, GroupConfig(weight=0.0))
            members.sources[source] = SourceConfig(path=name, weight=weight)
            members.weight = float(np.round(members.weight + weight, 9))
        made = []
        for end, shares in phases or []:
            samples, fraction = (end, None) if isinstance(end, int) else (None, end)
            made.append(PhaseConfig(until_samples=samples, until_fraction=fraction, weights=shares))
        return DataConfig(groups=groups, phases=made)

    return build


@pytest.fixture
def write_source(tmp_path: Path) -> Callable[..., tuple[str, list[list[int]]]]:
    """Writes documents of random lengths, each with EOD at its end; returns (prefix, documents)."""

    def write(
        name: str, *, documents: int = 40, longest: int = 30, seed: int = 0, manifest: bool = True
    ) -> tuple[str, list[list[int]]]:
        rng = np.random.default_rng(seed)
        content = [[*rng.integers(2, 900, rng.integers(0, longest)).tolist(), EOD] for _ in range(documents)]
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, "uint16") as writer:
            for document in content:
                writer.add_document(document)
        if manifest:
            counts = {"documents": documents, "tokens": sum(map(len, content))}
            write_sidecar(prefix, Sidecar("abc", "sample", EOD, 1000, **counts, languages=["en"]))
        return prefix, content

    return write
