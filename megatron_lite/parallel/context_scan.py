"""State-space layers over a sequence that is divided over ranks: mixins for the convolution and the scans.

A slice hands two things to the next one: its last K - 1 inputs, for the convolution, and the state. Of the state h that enters it, it
makes

    kept * h + own      kept = exp(sum of dt A),    own = sum_s exp(sum of dt A after s) dt_s x_s B_s^T

so every slice first computes its `effect` (kept, own), all ranks learn these in one gather, and each follows the recurrence from slice
to slice up to its own two. Then comes the scan, which begins with a state that is now known. However long the sequence is, what a rank
sends for a layer are two states and 2 (K - 1) inputs.

The alternative is to scan from a zero state and to add C_t exp(sum of dt A up to t) h to every output. It costs as much: 2 P N FLOPs
for each token and head, as `own` does. With `own` first the scan is the one of a whole sequence, whichever kernel computes it, and
nothing as long as the sequence is made a second time. (Mamba-2's scan computes such sums for each of its chunks. To use them here would
save these FLOPs, but all of their states would wait in memory for what the ranks say, 2 P numbers a token and head at N = 128: twice
the inputs.)

Documents are numbered by the index of their first token in the sequence (`sequence_slices.shard_sequence`), so that a slice knows
whether its first document began before it. Where one begins on a border, the state that enters is replaced; one that begins inside
makes `kept` zero: neither is the exponential of an infinite sum. Meta tokens are computed on every rank, and the state and inputs
that they leave are those with which every document begins.

Shapes: B batch, T sequence (this rank's: prefix and two slices), W channels of the convolution, K taps, H heads in G groups of R,
P head dim, N state; C channels of Mamba-1, Q tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_lite.models.scan import Operands, Past
from megatron_lite.models.selective_scan import CHUNK
from megatron_lite.parallel.sequence_slices import ContextParallel, check_numbering
from megatron_lite.parallel.slice_collectives import entering_states, preceding

NO_STATE = "sequences are divided in training only, where nothing comes before them"


@dataclass(frozen=True)
class Slice:
    """A slice of a sequence. documents_BT: of its tokens; None: one document a row.

    before_B: how many tokens of its first document the slices before it have. passes_B: whether this document lasts to its end, and
    began before it.
    """

    documents_BT: Tensor | None
    before_B: Tensor
    passes_B: Tensor

    @property
    def in_last_BT(self) -> Tensor | None:
        """Which tokens belong to its last document; None: all."""
        return None if self.documents_BT is None else self.documents_BT == self.documents_BT[:, -1:]


@dataclass(frozen=True)
class Division:
    """What this rank has of a sequence: `prefix` meta tokens and two slices. documents_BT: of all these."""

    cp: ContextParallel
    documents_BT: Tensor | None
    prefix: int

    def sizes(self, x_BT: Tensor) -> list[int]:
        """Tokens of the prefix and the two slices of a sequence like x, (B, T, ...)."""
        length = (x_BT.shape[1] - self.prefix) // 2
        return [self.prefix, length, length]

    def split(self, x_BT: Tensor) -> tuple[Tensor, ...]:
        """(B, T, ...) -> the prefix and the two slices. One split, whose backward is one concatenation."""
        return x_BT.split(self.sizes(x_BT), dim=1)

    def slices(self, x_BT: Tensor) -> list[Slice]:
        """The two slices of a sequence like x, (B, T, ...)."""
        length = self.sizes(x_BT)[-1]
        begins = [number * length for number in self.cp.slices]
        if self.documents_BT is None:
            befores = [torch.full((len(x_BT),), begin, device=x_BT.device) for begin in begins]
            return [Slice(None, before_B, before_B > 0) for before_B in befores]
        check_numbering(self.documents_BT, self.cp, prefix=self.prefix)
        _, *documents = self.split(self.documents_BT)
        return [Slice(of_BT, begin - of_BT[:, 0], begin > of_BT[:, -1]) for begin, of_BT in zip(begins, documents)]


# ------------------------------------------------------------------ the convolution


class ContextParallelConv(nn.Module):
    """A causal convolution that takes the inputs before a slice from the rank that holds them."""

    cp: ContextParallel
    weight: nn.Parameter
    _of_prefix: Callable[[Tensor, Tensor], Tensor]

    def forward(
        self, x_BTW: Tensor, state_BKW: Tensor | None = None, documents_BT: Tensor | None = None, *, prefix: int = 0
    ) -> tuple[Tensor, Tensor]:
        """See `CausalConv`; x is this rank's part of the sequence, and there is no state.

        Raises ValueError if a slice is shorter than the K - 1 inputs that the next one needs.
        """
        assert state_BKW is None, NO_STATE
        division, before = Division(self.cp, documents_BT, prefix), self.weight.shape[-1] - 1
        x_BPW, *parts = division.split(x_BTW)
        if parts[0].shape[1] < before:
            raise ValueError(
                f"parallel.cp={self.cp.size} makes slices of {parts[0].shape[1]} tokens, fewer than the {before} that "
                f"model.mamba.conv={before + 1} looks back; set parallel.cp lower or data.seq_len higher"
            )
        outputs, restart_BKW = [], x_BTW.new_zeros(len(x_BTW), before, x_BTW.shape[2])
        if prefix:
            y_BPW, restart_BKW = super().forward(x_BPW)
            outputs.append(y_BPW)
        ends = torch.stack([part[:, part.shape[1] - before :] for part in parts])
        for x, of, halo_BKW in zip(parts, division.slices(x_BTW), preceding(ends, self.cp)):
            y, state_BKW = super().forward(x, _inputs_before(of, halo_BKW, restart_BKW), of.documents_BT)
            if prefix and before and of.documents_BT is not None:
                y = y + self._of_prefix(restart_BKW, of.documents_BT)
            outputs.append(y)
        assert state_BKW is not None, "there are two slices"
        return torch.cat(outputs, dim=1), state_BKW


def _inputs_before(of: Slice, halo_BKW: Tensor, restart_BKW: Tensor) -> Tensor:
    """The K - 1 inputs before a slice as its first document has them: behind the restart's those of the halo that are its own."""
    before = halo_BKW.shape[1]
    inputs_BKW = restart_BKW
    for own in range(1, before + 1):
        with_own_BKW = torch.cat([restart_BKW[:, own:], halo_BKW[:, before - own :]], dim=1)
        inputs_BKW = torch.where((of.before_B >= own)[:, None, None], with_own_BKW, inputs_BKW)
    return inputs_BKW


# ------------------------------------------------------------------ the scans

Scan = Callable[[Operands, Past], tuple[Tensor, Tensor]]
Effect = Callable[[Operands, Tensor | None], tuple[Tensor, Tensor]]


class ContextParallelScan(nn.Module):
    """Mamba-2's scan, of which each slice begins with the state that the slices before it leave."""

    cp: ContextParallel

    def scan(self, operands: Operands, past: Past) -> tuple[Tensor, Tensor]:
        """See `ssd`; the tokens are this rank's part of the sequence, and there is no state before them."""
        assert past.state is None, NO_STATE
        division = Division(self.cp, past.documents_BT, past.prefix)
        return scan_slices(super().scan, self.effect, operands, division)  # type: ignore[misc]

    @staticmethod
    def effect(operands: Operands, in_last_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """(kept (B, H, 1, 1), own (B, H, P, N)), see `scan_slices`, in the dtype of dt."""
        a_BTH = operands.dt * operands.A
        weight_BTH = operands.dt * _sums_after(a_BTH).exp()
        if in_last_BT is not None:
            a_BTH, weight_BTH = a_BTH * in_last_BT[..., None], weight_BTH * in_last_BT[..., None]
        arguments = (operands.x, weight_BTH, operands.B)
        own_BHPN = checkpoint(_weighted, *arguments, use_reentrant=False, preserve_rng_state=False)
        return a_BTH.sum(1).exp()[..., None, None], own_BHPN


class ContextParallelSelectiveScan(ContextParallelScan):
    """The same of Mamba-1's scan."""

    @staticmethod
    def effect(operands: Operands, in_last_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """(kept, own), both (B, C, N), see `scan_slices`, in the dtype of dt."""
        dt_BTC, A_CN = operands.dt, operands.A
        u_BTC, after_BTC = dt_BTC * operands.x, _sums_after(dt_BTC)
        if in_last_BT is not None:
            u_BTC, dt_BTC = u_BTC * in_last_BT[..., None], dt_BTC * in_last_BT[..., None]
        own_BCN = torch.zeros((), dtype=dt_BTC.dtype, device=dt_BTC.device)
        for u, after, B in zip(*(tensor.split(CHUNK, dim=1) for tensor in (u_BTC, after_BTC, operands.B))):
            arguments = (u, after, B, A_CN)
            own_BCN = own_BCN + checkpoint(_decayed, *arguments, use_reentrant=False, preserve_rng_state=False)
        return torch.exp(dt_BTC.sum(1)[..., None] * A_CN), own_BCN


def scan_slices(scan: Scan, effect: Effect, operands: Operands, division: Division) -> tuple[Tensor, Tensor]:
    """(y of the prefix and the two slices (B, T, ...), the state after the second slice).

    effect: of a slice's operands, and which of its tokens are of the last document: how much is left of the state with which the last
    document enters or begins, and what its tokens add to this.
    """
    before, *parts = operands.split(division.sizes(operands.x))
    slices = division.slices(operands.x)
    effects = [effect(part, of.in_last_BT) for part, of in zip(parts, slices)]
    outputs, restart = [], None
    if division.prefix:
        # from a state, for the gradient of the one that it leaves: see `models/selective_scan_kernel.py`
        y, restart = scan(before, Past(torch.zeros_like(effects[0][1])))
        outputs.append(y)
    decays, states = [], []
    for (kept, own), of in zip(effects, slices):
        passes = _over(kept, of.passes_B)
        decays.append(kept * passes)
        states.append(own if restart is None else own + kept * ~passes * restart)
    entering = entering_states(torch.stack(decays), torch.stack(states), division.cp)
    for part, of, state in zip(parts, slices, entering):
        start = torch.zeros_like(state) if restart is None else restart
        start = torch.where(_over(state, of.before_B > 0), state, start)
        y, state = scan(part, Past(start, of.documents_BT, restart=restart))
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _over(state: Tensor, flags_B: Tensor) -> Tensor:
    """The flags of rows, to be broadcast over a state (B, ...)."""
    return flags_B.view(-1, *[1] * (state.dim() - 1))


def _sums_after(x_BT: Tensor) -> Tensor:
    """The sum of all later tokens' x; not the difference of two sums, which has no digits left behind a strong decay."""
    return F.pad(x_BT[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)


def _weighted(x_BTHP: Tensor, weight_BTH: Tensor, B_BTGN: Tensor) -> Tensor:
    """sum_t weight_t x_t B_t^T of each head, (B, H, P, N)."""
    u_BTGRP = (x_BTHP * weight_BTH[..., None]).unflatten(2, (B_BTGN.shape[2], -1))
    return torch.einsum("btgrp,btgn->bgrpn", u_BTGRP, B_BTGN.to(u_BTGRP.dtype)).flatten(1, 2)


def _decayed(u_BQC: Tensor, after_BQC: Tensor, B_BQN: Tensor, A_CN: Tensor) -> Tensor:
    """What the tokens of a chunk of Mamba-1 add to the state after the slice, (B, C, N)."""
    return (torch.exp(after_BQC[..., None] * A_CN) * u_BQC[..., None] * B_BQN.to(u_BQC.dtype)[:, :, None]).sum(1)
