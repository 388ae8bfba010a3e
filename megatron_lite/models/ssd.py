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
- Backward recomputes the chunks from the inputs (`checkpoint`): the Q x Q decays of each head are never kept, and those of one
  segment of chunks only are in memory at a time.

Shapes: B batch, T sequence, C chunks, Q tokens of a chunk, H heads in G groups of R, P head dim, N state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_lite.models.scan import NOTHING, Operands, Past

CHUNK = 64
CHUNK_CPU = 32  # as fast as 64 with states of 64 x 128 numbers, up to a third faster with smaller ones
SEGMENT = 512  # tokens that are computed at a time


def ssd(operands: Operands, past: Past = NOTHING, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """(y (B, T, H, P), the state after the last token (B, H, P, N)), both in the dtype of dt.

    chunk: tokens; None: CHUNK_CPU or, elsewhere, CHUNK.
    """
    if chunk is None:
        chunk = CHUNK_CPU if operands.x.device.type == "cpu" else CHUNK
    documents_BT, state_BHPN, restart_BHPN = past.documents_BT, past.state, past.restart
    prefix = 0 if documents_BT is None else past.prefix
    sizes = segment_sizes(operands.x.shape[1], SEGMENT, first=prefix)
    documents: Sequence[Tensor | None] = [None] * len(sizes)
    if documents_BT is not None:
        documents = documents_BT.split(sizes, dim=1)
    outputs: list[Tensor] = []
    last_B: Tensor | None = None
    for segment, of_segment_BT in zip(operands.split(sizes), documents):
        if of_segment_BT is not None:
            if last_B is not None and state_BHPN is not None:
                goes_on_B111 = (of_segment_BT[:, 0] == last_B)[:, None, None, None]
                restart = torch.zeros_like(state_BHPN) if restart_BHPN is None else restart_BHPN
                state_BHPN = torch.where(goes_on_B111, state_BHPN, restart)
            last_B = of_segment_BT[:, -1]
        before = Past(state_BHPN, of_segment_BT, restart=restart_BHPN)
        # operands one by one: what an argument holds inside, hooks on saved tensors do not see
        arguments = (before, chunk, *vars(segment).values())
        y_BTHP, state_BHPN = checkpoint(_ssd, *arguments, use_reentrant=False, preserve_rng_state=False)
        outputs.append(y_BTHP)
        if prefix and len(outputs) == 1:
            restart_BHPN = state_BHPN
    assert state_BHPN is not None, "a sequence has a token"
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state_BHPN


def segment_sizes(length: int, segment: int, *, first: int = 0) -> list[int]:
    """Lengths of the parts of a sequence of `length` tokens: `first`, if it is not 0, then `segment` tokens each and the rest."""
    sizes = [first] if first else []
    left = length - first
    return sizes + [segment] * (left // segment) + [left % segment] * (left % segment > 0)


def _ssd(past: Past, chunk: int, *of_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`ssd` of one segment without a prefix. of_tokens: its operands, in their order."""
    operands = Operands(*of_tokens)
    state_BHPN, documents_BT, restart_BHPN = past.state, past.documents_BT, past.restart
    dtype = operands.dt.dtype
    batch, length, heads, width = operands.x.shape
    groups, states = operands.B.shape[2:]
    chunk = min(chunk, length)
    pad = -length % chunk

    def chunks(tensor: Tensor) -> Tensor:
        """(B, T, ...) -> (B, C, Q, ...); the filling is zero."""
        return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad)).unflatten(1, (-1, chunk))

    dt_BCQH = chunks(operands.dt)
    u_BCQGRP = (chunks(operands.x.to(dtype)) * dt_BCQH[..., None]).unflatten(3, (groups, -1))
    a_BGRCQ = (dt_BCQH * operands.A).unflatten(3, (groups, -1)).permute(0, 3, 4, 1, 2)
    B_BCQGN, C_BCQGN = chunks(operands.B.to(dtype)), chunks(operands.C.to(dtype))
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
        state_BHPN = operands.x.new_zeros(batch, heads, width, states, dtype=dtype)
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
