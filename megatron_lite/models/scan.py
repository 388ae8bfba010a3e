"""What the recurrences of state-space layers compute from. `ssd.py` is that of Mamba-2, `selective_scan.py` that of Mamba-1.

Shapes: B batch, T sequence, H heads in G groups, P head dim, N state; C channels of Mamba-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Operands:
    """What enters the recurrence at each token, and the decay rates A.

              Mamba-2          Mamba-1
        x     (B, T, H, P)     (B, T, C)
        dt    (B, T, H)        (B, T, C)    time steps, 0 or more
        A     (H,)             (C, N)       below 0
        B, C  (B, T, G, N)     (B, T, N)    what is written to and read from the state

    The recurrence is computed in the dtype of dt.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def split(self, sizes: Sequence[int]) -> list[Operands]:
        """Those of so many tokens each, one after the other."""
        # split, not slices: its backward is one concatenation, that of every slice a whole tensor of zeros
        parts = zip(*(tensor.split(sizes, dim=1) for tensor in (self.x, self.dt, self.B, self.C)))
        return [Operands(x, dt, self.A, B, C) for x, dt, B, C in parts]


@dataclass(frozen=True)
class Past:
    """What came before the tokens of a scan, and where documents begin.

    state: the state before the first token, of the same document, (B, H, P, N) or (B, C, N); None: zero.
    documents_BT: rise along a row; None: one document a row.
    prefix: the first tokens, which have the number of the first document; the others begin with the state that they leave.
    restart: without a prefix, the state with which every document but the first begins; None: zero.
    """

    state: Tensor | None = None
    documents_BT: Tensor | None = None
    prefix: int = 0
    restart: Tensor | None = None


NOTHING = Past()
