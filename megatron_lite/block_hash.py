"""A hash of a file that several processes can compute together: the SHA-256 of the SHA-256s of its blocks of 1 MiB.

Checkpoints of format 2 hold it for each of their files (`blocks_sha256` of the manifest).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK = 2**20  # bytes of a block, a part of checkpoint format 2


class BlockHash:
    """The hash of bytes that come one part after the other."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []
        self._block, self._filled = hashlib.sha256(), 0

    def update(self, data: memoryview) -> None:
        """Go on with bytes of any number."""
        while data:
            part, data = data[: BLOCK - self._filled], data[BLOCK - self._filled :]
            self._block.update(part)
            self._filled += len(part)
            if self._filled == BLOCK:
                self._close_block()

    def hexdigest(self) -> str:
        """The hash of all that came; nothing may come after it."""
        if self._filled:
            self._close_block()
        return hash_of_blocks(b"".join(self._digests))

    def _close_block(self) -> None:
        self._digests.append(self._block.digest())
        self._block, self._filled = hashlib.sha256(), 0


def hash_of_blocks(digests: bytes) -> str:
    """What `BlockHash` makes of the digests of all blocks."""
    return hashlib.sha256(digests).hexdigest()


def block_digest(path: Path, block: int | None) -> bytes:
    """The SHA-256 of block `block` of a file, None: of the whole file. Every byte that is hashed from a disk is read here."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        if block is not None:
            stream.seek(block * BLOCK)
            digest.update(stream.read(BLOCK))
            return digest.digest()
        while data := stream.read(BLOCK):
            digest.update(data)
    return digest.digest()
