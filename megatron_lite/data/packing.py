"""From a window of the token stream to a training example.

A window has T + 1 tokens; position t reads token t and predicts token t + 1. Two options change what counts:

- `mask_eod_loss`: positions whose *target* is the end-of-document token are not counted: the model is not
  asked to guess where a document ends. (Megatron-LM's flag of that name instead drops positions whose
  *input* is that token, i.e. guessing how the next document begins; here `reset_attention` does that.)
- `reset_attention`: `documents` numbers the documents of the window from 0, so that attention and positions
  restart where it changes; a position whose target is in the next document (its input is the
  end-of-document token) is not counted, since a document must not be predicted from the one before. The
  end-of-document token belongs to the document that it ends.

Legend: B batch, T sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Example = dict[str, npt.NDArray]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PackingOptions:
    """What turns a window into an example besides its tokens. eod: the end-of-document id."""

    eod: int
    reset_attention: bool = False
    mask_eod_loss: bool = False


def pack(window: npt.NDArray[np.int64], starts: Sequence[int], options: PackingOptions) -> Example:
    """One example from the T + 1 tokens of a window.

    Args:
        window: (T + 1,) token ids.
        starts: positions in (0, T + 1) at which a document begins; only read with `reset_attention`.

    Returns:
        `tokens` and `targets` (T,) int64, `loss_mask` (T,) bool, and with `reset_attention` `documents` (T,)
        int64.
    """
    tokens_T, targets_T = window[:-1], window[1:]
    mask_T = np.ones(len(tokens_T), dtype=bool)
    if options.mask_eod_loss:
        mask_T &= targets_T != options.eod
    example = {"tokens": tokens_T, "targets": targets_T, "loss_mask": mask_T}
    if options.reset_attention:
        begins = np.zeros(len(window), dtype=np.int64)
        begins[list(starts)] = 1
        documents = np.cumsum(begins)
        mask_T &= documents[1:] == documents[:-1]
        example["documents"] = documents[:-1]
    return example


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples (T,) into contiguous tensors (B, T)."""
    return {key: torch.from_numpy(np.stack([example[key] for example in examples])) for key in examples[0]}
