"""Context parallelism: one sequence divided over ranks, in slices that give each of them the same work.

A sequence of T tokens is cut into 2 cp slices, and rank r holds the slices r and 2 cp - 1 - r, one after the other. With causal
attention a token's work grows with its position, and the two slices of every rank have the same sum (after Llama 3, arXiv 2407.21783,
section 3.3.2).

A batch is cut once, where it goes to the device (`shard_sequence`). From there on a rank's sequence is T / cp tokens long; what looks
along the sequence (attention, convolution, state-space scan) asks the other ranks, everything else sees tokens. Which token is which is
said by its position in its document, computed before the cut. Targets are cut, not shifted: the last token of a slice has its target
in the next one.

Shapes: B batch, T sequence (T / cp after the cut).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.models.rope import restarting_positions


@dataclass(frozen=True)
class ContextParallel:
    """A process's place among those that divide one sequence. group: None on the meta device, where nothing is communicated."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    @property
    def slices(self) -> tuple[int, int]:
        """Which of the 2 size slices of the sequence this rank holds, in their order."""
        return self.rank, 2 * self.size - 1 - self.rank


def cut(x: Tensor, cp: ContextParallel, dim: int = 1) -> Tensor:
    """This rank's two slices of `x`, which has whole sequences along `dim`, one after the other.

    Raises ValueError if the sequence does not divide.
    """
    length, parts = x.shape[dim], 2 * cp.size
    if length % parts:
        raise ValueError(
            f"a sequence of {length} tokens does not divide into the {parts} slices of parallel.cp={cp.size}; it must be a multiple of "
            f"{parts}"
        )
    slices = x.unflatten(dim, (parts, length // parts))
    return torch.cat([slices.select(dim, index) for index in cp.slices], dim=dim)


def shard_sequence(batch: dict[str, Tensor], cp: ContextParallel) -> dict[str, Tensor]:
    """This rank's slices of every entry (B, T) of a batch, and of the tokens' `positions`, (B, T / cp) or (1, T / cp) int64.

    positions: each token's place in its document, from 0. documents: numbered by the index of their first token in the row, so that a
    slice can tell whether its first document began before it.
    Raises ValueError if the sequence does not divide.
    """
    tokens_BT, documents_BT = batch["tokens"], batch.get("documents")
    index_1T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
    if documents_BT is None:
        return {key: cut(value, cp) for key, value in (batch | {"positions": index_1T}).items()}
    positions_BT = restarting_positions(documents_BT)
    numbered = {"documents": index_1T - positions_BT, "positions": positions_BT}
    return {key: cut(value, cp) for key, value in (batch | numbered).items()}


def check_numbering(documents_BT: Tensor, cp: ContextParallel, *, prefix: int) -> None:
    """Raise RuntimeError if documents are not numbered as `shard_sequence` does, as far as this rank's slices show. It does not wait for
    the device; in a compiled layer nothing is checked.

    documents_BT: of `prefix` meta tokens and this rank's two slices.
    """
    if documents_BT.is_meta or torch.compiler.is_compiling():
        return
    of_B2T = documents_BT[:, prefix:].unflatten(1, (2, -1))
    starts = [number * of_B2T.shape[2] for number in cp.slices]
    index_2T = torch.stack([torch.arange(n, n + of_B2T.shape[2], device=documents_BT.device) for n in starts])
    goes_on_B2T = of_B2T[..., 1:] == of_B2T[..., :-1]
    begins_B2T = of_B2T[..., 1:] == index_2T[:, 1:]
    numbered = ((of_B2T >= 0) & (of_B2T <= index_2T)).all() & (goes_on_B2T | begins_B2T).all()
    torch._assert_async(
        numbered,
        "documents of a divided sequence are numbered by the index of their first token in the row; cut batches with "
        "Mesh.place or sequence_slices.shard_sequence",
    )
