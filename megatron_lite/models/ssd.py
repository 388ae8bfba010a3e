"""The state-space recurrence of Mamba-2, computed in chunks (SSD: Dao and Gu, arXiv 2405.21060, section 6 and listing 1).

For each head, with a state h of P x N numbers and h_0 given:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,    y_t = h_t C_t

Unrolled, token s reaches token t with the decay exp(a_{s+1} + .. + a_t), a = dt A. So a chunk of Q tokens is a matrix product, as in
attention with the decay in the softmax's place, and one state is passed from chunk to chunk:

    within a chunk    Y = (C B^T * decay) (dt X)
    its own state     S = sum_s decay(s, end) dt_s x_s B_s^T
    passing on        h <- exp(a_first + .. + a_last) h + S
    from before       Y_t += exp(a_first + .. + a_t) h C_t, with h what entered the chunk

Notable features:
- A decay is the exponential of a sum of its own steps (`decays`), never of the difference of two running sums: after a strong decay
  such a difference has no digits left in fp32. It is masked before the exponential, so the exponential never overflows.
- A state belongs to the document of the token that produced it, and is reset at a document boundary: to zero, or to what a prefix
  of all documents has left.
- Any length: the last chunk is filled up with steps of dt = 0, which change no state.
- Backward recomputes the chunks from the inputs (`checkpoint`): the Q x Q decays of each head are never kept, and those of
  one
  segment of chunks only are in memory at a time.

Shapes: B batch, T sequence, C chunks, Q tokens of a chunk, H heads in G groups of R, P head dim, N state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 64
CHUNK_CPU = 32  # as fast as 64 with states of 64 x 128 numbers, up to a third faster with smaller ones
SEGMENT = 512  # tokens that are computed at a time


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    *,
    state_BHPN: Tensor | None = None,
    documents_BT: Tensor | None = None,
    prefix: int = 0,
    restart_BHPN: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (B, T, H, P), the state after the last token (B, H, P, N)), computed in float32 at least, in the dtype of dt.

    dt: time steps, 0 or more. A: below 0. B, C: shared by the H / G heads of a group.
    state: the state before the first token, of the same document; None: zero. documents: rise along a row.
    prefix: the first tokens, which have the number of the first document; the others begin with the state that they leave.
    restart: without a prefix, the state with which every document but the first begins; None: zero.
    chunk: tokens; None: CHUNK, or CHUNK_CPU.
    """
    if chunk is None:
        chunk = CHUNK_CPU if x_BTHP.device.type == "cpu" else CHUNK
    sizes = segment_sizes(x_BTHP.shape[1], SEGMENT, first=0 if documents_BT is None else prefix)
    # split, not slices: its backward is one concatenation, that of every slice a whole tensor of zeros
    inputs = [tensor.split(sizes, dim=1) for tensor in (x_BTHP, dt_BTH, B_BTGN, C_BTGN)]
    documents: Sequence[Tensor | None] = [None] * len(sizes)
    if documents_BT is not None:
        documents = documents_BT.split(sizes, dim=1)
    outputs: list[Tensor] = []
    last_B: Tensor | None = None
    for x, dt, B, C, of_segment_BT in zip(*inputs, documents):
        if of_segment_BT is not None:
            if last_B is not None and state_BHPN is not None:
                goes_on_B111 = (of_segment_BT[:, 0] == last_B)[:, None, None, None]
                restart = torch.zeros_like(state_BHPN) if restart_BHPN is None else restart_BHPN
                state_BHPN = torch.where(goes_on_B111, state_BHPN, restart)
            last_B = of_segment_BT[:, -1]
        arguments = (x, dt, A_H, B, C, state_BHPN, of_segment_BT, restart_BHPN, chunk)
        y_BTHP, state_BHPN = checkpoint(_ssd, *arguments, use_reentrant=False, preserve_rng_state=False)
        outputs.append(y_BTHP)
        if prefix and documents_BT is not None and len(outputs) == 1:
            restart_BHPN = state_BHPN
    assert state_BHPN is not None, "a sequence has a token"
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state_BHPN


def segment_sizes(length: int, segment: int, *, first: int = 0) -> list[int]:
    """Lengths of the parts of a sequence of `length` tokens: `first`, if it is not 0, then `segment` tokens each and the rest."""
    sizes = [first] if first else []
    left = length - first
    return sizes + [segment] * (left // segment) + [left % segment] * (left % segment > 0)


def _ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    state_BHPN: Tensor | None,
    documents_BT: Tensor | None,
    restart_BHPN: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """`ssd` of one segment. restart: the state with which a document begins; None: zero."""
    dtype = dt_BTH.dtype
    batch, length, heads, width = x_BTHP.shape
    groups, states = B_BTGN.shape[2:]
    chunk = min(chunk, length)
    pad = -length % chunk

    def chunks(tensor: Tensor) -> Tensor:
        """(B, T, ...) -> (B, C, Q, ...); the filling is zero."""
        return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad)).unflatten(1, (-1, chunk))

    dt_BCQH = chunks(dt_BTH)
    u_BCQGRP = (chunks(x_BTHP.to(dtype)) * dt_BCQH[..., None]).unflatten(3, (groups, -1))
    a_BGRCQ = (dt_BCQH * A_H).unflatten(3, (groups, -1)).permute(0, 3, 4, 1, 2)
    B_BCQGN, C_BCQGN = chunks(B_BTGN.to(dtype)), chunks(C_BTGN.to(dtype))
    documents_BCQ = None
    if documents_BT is not None:
        filling_BT = documents_BT[:, -1:].expand(-1, pad)
        documents_BCQ = torch.cat([documents_BT, filling_BT], dim=1).unflatten(1, (-1, chunk))

    decay_BGRCQQ = decays(a_BGRCQ, documents_BCQ)
    scores_BGCQQ = torch.einsum("bcsgn,bcqgn->bgcsq", B_BCQGN, C_BCQGN)
    y_BCQGRP = torch.einsum("bgrcsq,bcsgrp->bcqgrp", decay_BGRCQQ * scores_BGCQQ[:, :, None], u_BCQGRP)

    to_end_BCQGR = decay_BGRCQQ[..., -1].permute(0, 3, 4, 1, 2)
    own_BCGRPN = torch.einsum("bcsgrp,bcsgn->bcgrpn", u_BCQGRP * to_end_BCQGR[..., None], B_BCQGN)
    reached_BCQGR = (
        a_BGRCQ.cumsum(-1).exp().permute(0, 3, 4, 1, 2)
    )  # how much of what enters a chunk reaches each token
    if documents_BCQ is not None:
        entering_BC1 = torch.cat([documents_BCQ[:, 0, :1], documents_BCQ[:, :-1, -1]], dim=1)[..., None]
        reached_BCQGR = reached_BCQGR * (documents_BCQ == entering_BC1)[..., None, None]

    if state_BHPN is None:
        state_BHPN = x_BTHP.new_zeros(batch, heads, width, states, dtype=dtype)
    state_BGRPN = state_BHPN.to(dtype).unflatten(1, (groups, -1))
    if restart_BHPN is not None and documents_BCQ is not None:
        # how much of the state with which a document begins reaches each token, if the document begins in its chunk
        begins_BCQ = torch.zeros_like(documents_BCQ, dtype=torch.bool)
        begins_BCQ.view(batch, -1)[:, 1:] = documents_BCQ.flatten(1)[:, 1:] != documents_BCQ.flatten(1)[:, :-1]
        first_BGRCQ = a_BGRCQ.exp() * begins_BCQ[:, None, None]
        since_BCQGR = (decay_BGRCQQ * first_BGRCQ[..., None]).sum(-2).permute(0, 3, 4, 1, 2)
        restart_BGRPN = restart_BHPN.to(dtype).unflatten(1, (groups, -1))
        own_BCGRPN = own_BCGRPN + since_BCQGR[:, :, -1, ..., None, None] * restart_BGRPN[:, None]
        of_restart = torch.einsum("bcqgn,bgrpn->bcqgrp", C_BCQGN, restart_BGRPN)
        y_BCQGRP = torch.addcmul(y_BCQGRP, of_restart, since_BCQGR[..., None])
    entering = []
    for own_BGRPN, kept_BGR in zip(own_BCGRPN.unbind(1), reached_BCQGR[:, :, -1].unbind(1)):
        entering.append(state_BGRPN)
        state_BGRPN = torch.addcmul(own_BGRPN, state_BGRPN, kept_BGR[..., None, None])
    before_BCQGRP = torch.einsum("bcqgn,bcgrpn->bcqgrp", C_BCQGN, torch.stack(entering, dim=1))
    y_BCQGRP = torch.addcmul(y_BCQGRP, before_BCQGRP, reached_BCQGR[..., None])
    return y_BCQGRP.flatten(3, 4).flatten(1, 2)[:, :length].contiguous(), state_BGRPN.flatten(1, 2)


def decays(a: Tensor, documents: Tensor | None) -> Tensor:
    """(..., Q) -> (..., Q, Q): entry [s, t] is exp(a_{s+1} + .. + a_t), 1 at t = s, and 0 where t is earlier or in another document.

    a: (B, G, R, C, Q). documents: (B, C, Q).
    """
    length = a.shape[-1]
    reaches = torch.ones(length, length, dtype=torch.bool, device=a.device).triu()
    steps = a[..., None, :].expand(*a.shape[:-1], length, length).masked_fill(~reaches.triu(1), 0.0)
    if documents is not None:
        reaches = reaches & (documents[..., :, None] == documents[..., None, :])[:, None, None]
    return steps.cumsum(-1).masked_fill_(~reaches, -torch.inf).exp_()
