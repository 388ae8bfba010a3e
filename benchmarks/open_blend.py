"""How long, and how much memory, does it take to open a blend over an index of 10^8 documents?

    python benchmarks/open_blend.py [documents=100000000] [folder]

Makes a sparse `.bin/.idx` pair of that many documents (the numbers that opening looks at are written, the rest
are holes, so it takes no room on the disk), opens it as a blend and draws a sample in the middle of it. Memory
beside the map is what /proc calls anonymous.
"""

from __future__ import annotations

import struct
import sys
import tempfile
import time
from pathlib import Path

from megatron_lite.data.blend import open_blend
from megatron_lite.data.config import DataConfig, GroupConfig, SourceConfig
from megatron_lite.data.indexed import HEADER, MAGIC, VERSION
from megatron_lite.data.sidecar import TokenizerIdentity

TOKENS_A_DOCUMENT = 1000
EOD = 1


def write_sparse(prefix: Path, documents: int) -> None:
    """A pair of files whose ends are right and whose middle is a hole (zeros)."""
    lengths, pointers = HEADER.size, HEADER.size + 4 * documents
    index = pointers + 8 * documents
    size = 2 * TOKENS_A_DOCUMENT  # bytes a document
    with Path(f"{prefix}.idx").open("wb") as file:
        file.truncate(index + 8 * (documents + 1))
        for at, content in [
            (0, HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1)),
            (lengths, struct.pack("<2i", TOKENS_A_DOCUMENT, TOKENS_A_DOCUMENT)),
            (pointers - 4, struct.pack("<i", TOKENS_A_DOCUMENT)),
            (pointers, struct.pack("<2q", 0, size)),
            (index - 8, struct.pack("<q", (documents - 1) * size)),
            (index, struct.pack("<2q", 0, 1)),
            (index + 8 * documents, struct.pack("<q", documents)),
        ]:
            file.seek(at)
            file.write(content)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(documents * size)
        for at in (size - 2, documents * size - 2):
            file.seek(at)
            file.write(struct.pack("<H", EOD))


def memory() -> dict[str, float]:
    """Resident memory of this process in MB, by kind (Linux)."""
    lines = Path("/proc/self/status").read_text().split("\n")
    kinds = {"RssAnon": "anonymous", "RssFile": "mapped"}
    return {kinds[key]: int(rest.split()[0]) / 1000 for key, _, rest in map(split, lines) if key in kinds}


def split(line: str) -> tuple[str, str, str]:
    """`key: value` of a line of /proc/self/status."""
    return line.partition(":")


def main(documents: int = 100_000_000, folder: str | None = None) -> None:
    """Make the index, open it, and print the two numbers."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        prefix = Path(scratch) / "huge"
        write_sparse(prefix, documents)
        index_gb = Path(f"{prefix}.idx").stat().st_size / 1e9
        config = DataConfig(seq_len=4096, groups={"web": GroupConfig(sources={"crawl": SourceConfig(str(prefix))})})
        tokenizer = TokenizerIdentity(fingerprint="", name="none", eod=EOD, vocab_size=50_000)
        before = memory()
        start = time.perf_counter()
        blend = open_blend(config, tokenizer=tokenizer, seed=0, total_samples=10**9)
        opened = time.perf_counter() - start
        blend[123_456_789 % blend.sources["web/crawl"].num_windows]
        drawn = time.perf_counter() - start
        after = memory()
    print(f"documents                     {documents:,} (index {index_gb:.1f} GB, {documents * 1000:,} tokens)")
    print(f"opening                       {1e3 * opened:.1f} ms; first sample after {1e3 * drawn:.1f} ms")
    print(f"memory beside the map         {after['anonymous'] - before['anonymous']:.1f} MB")
    print(f"resident pages of the map     {after['mapped'] - before['mapped']:.1f} MB")


if __name__ == "__main__":
    main(*(int(argument) if argument.isdigit() else argument for argument in sys.argv[1:]))  # type: ignore[arg-type]
