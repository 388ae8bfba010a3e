"""The selective recurrence of Mamba-1 (Gu and Dao, arXiv 2312.00752), in chunks.

For each channel c and state n, with h_0 given:

    h_t[c, n] = exp(dt_t[c] A[c, n]) h_{t-1}[c, n] + dt_t[c] x_t[c] B_t[n],    y_t[c] = sum_n C_t[n] h_t[c, n]

Every pair (c, n) decays at its own rate, so a chunk is not a matrix product as in Mamba-2 (`ssd.py`). Within a chunk the states of all
tokens are computed by a scan of logarithmic depth over the pairs (decay, input): two neighboring steps make one step of twice the
length, recursively (`scan_`). From chunk to chunk one state is passed on.

Notable features:
- Only decays are exponentials, each of one step's dt A <= 0, and they are multiplied: nothing overflows, however strong the decay.
- Kept for backward are the inputs and the state that enters each chunk. The states of all tokens exist for one chunk at a time:
  backward computes them again and runs the same scan from the end (the adjoint is the same recurrence).
- A state belongs to the document of the token that produced it: at a document boundary it is reset to zero, or to what a prefix of
  all documents has left.
- On a GPU the work on one chunk is compiled (`torch.compile`).

Shapes: B batch, T sequence, Q tokens of a chunk, C channels, N state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_lite.models.scan import NOTHING, Operands, Past

CHUNK = 64
# On a CPU: memory for the states of a chunk's tokens, which some forty operators read and write. They are to stay in a core's cache.
_CHUNK_BYTES_CPU = 2**20
_CHUNK_TOKENS_LEAST = 4  # a state is kept for each chunk: N / 4 times the inputs at most


def selective_scan(operands: Operands, past: Past = NOTHING, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """(y (B, T, C), the state after the last token (B, C, N)), both in the dtype of dt. chunk: tokens; None: `chunk_tokens`."""
    if chunk is None:
        state_bytes = len(operands.x) * operands.A.numel() * operands.dt.element_size()
        chunk = chunk_tokens(state_bytes, device=operands.x.device)
    state_BCN, documents_BT, prefix = past.state, past.documents_BT, past.prefix
    if state_BCN is None:
        state_BCN = operands.dt.new_zeros(len(operands.x), *operands.A.shape)
    if documents_BT is None:
        return _scan(operands, chunk, None, state_BCN, None)
    begins_BT = torch.zeros_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    if not prefix:
        return _scan(operands, chunk, begins_BT, state_BCN, past.restart)
    of_prefix, of_text = operands.split([prefix, operands.x.shape[1] - prefix])
    y_BPC, state_BCN = _scan(of_prefix, chunk, None, state_BCN, None)
    restart_BCN = state_BCN.clone()  # torch.compile does not trace a function that is given one tensor twice
    y_BTC, last_BCN = _scan(of_text, chunk, begins_BT[:, prefix:], state_BCN, restart_BCN)
    return torch.cat([y_BPC, y_BTC], dim=1), last_BCN


def chunk_tokens(state_bytes: int, *, device: torch.device) -> int:
    """Tokens in a chunk, where the state of one takes `state_bytes`: on a CPU the states of a chunk take about 1 MiB."""
    if device.type != "cpu":
        return CHUNK
    return min(CHUNK, max(_CHUNK_TOKENS_LEAST, _CHUNK_BYTES_CPU // max(1, state_bytes)))


def _scan(
    operands: Operands, chunk: int, begins_BT: Tensor | None, state_BCN: Tensor, restart_BCN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of tokens that may begin a document (`begins_BT`), then with the state `restart_BCN` or zero."""
    tensors = (operands.x, operands.dt, operands.A, operands.B, operands.C, state_BCN, restart_BCN)
    return _Scan.apply(chunk, begins_BT, *tensors)


class _Scan(torch.autograd.Function):
    """See `_scan`. Tensors that have gradients are arguments of their own."""

    @staticmethod
    def forward(ctx: Any, chunk: int, begins_BT: Tensor | None, *tensors: Any) -> tuple[Tensor, Tensor]:
        x_BTC, dt_BTC, A_CN, B_BTN, C_BTN, state_BCN, restart_BCN = tensors
        A_NC, restart_BNC = A_CN.T.contiguous(), None if restart_BCN is None else restart_BCN.mT.contiguous()
        state_BNC = state_BCN.mT.to(dt_BTC.dtype)
        step = _compiled(_states) if x_BTC.is_cuda else _states
        outputs, entering = [], []
        for part in _chunks(chunk, x_BTC, dt_BTC, B_BTN, C_BTN, begins_BT):
            entering.append(state_BNC)
            h_BQNC = step(part, A_NC, state_BNC, restart_BNC)
            outputs.append((part.C_BQN[:, :, None] @ h_BQNC)[:, :, 0])
            state_BNC = h_BQNC[:, -1].clone()  # a view would keep the states of the whole chunk
        ctx.chunk = chunk
        ctx.save_for_backward(x_BTC, dt_BTC, A_NC, B_BTN, C_BTN, begins_BT, restart_BNC, torch.stack(entering, dim=1))
        return torch.cat(outputs, dim=1), state_BNC.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, dy_BTC: Tensor, d_last_BCN: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, dt_BTC, A_NC, B_BTN, C_BTN, begins_BT, restart_BNC, entering_BKNC = ctx.saved_tensors
        later_BNC = d_last_BCN.mT.contiguous()  # the gradient of a chunk's last state, from the tokens after it
        dA_NC = torch.zeros_like(A_NC)
        d_restart_BNC = None if restart_BNC is None else torch.zeros_like(restart_BNC)
        step: Callable[..., Any] = _compiled(_gradients) if x_BTC.is_cuda else _gradients
        found: list[tuple[Tensor, ...]] = []
        chunks = list(zip(_chunks(ctx.chunk, x_BTC, dt_BTC, B_BTN, C_BTN, begins_BT), dy_BTC.split(ctx.chunk, dim=1)))
        for number in reversed(range(len(chunks))):
            part, dy = chunks[number]
            *of_tokens, dA, later_BNC, d_restart = step(
                part, dy.to(dt_BTC.dtype), A_NC, entering_BKNC[:, number], later_BNC, restart_BNC
            )
            found.append(tuple(of_tokens))
            dA_NC += dA
            if d_restart_BNC is not None and d_restart is not None:
                d_restart_BNC += d_restart
        dx, ddt, dB, dC = (torch.cat(parts[::-1], dim=1) for parts in zip(*found))
        d_restart_BCN = None if d_restart_BNC is None else d_restart_BNC.mT
        narrow = dx.to(x_BTC.dtype), ddt, dA_NC.T, dB.to(B_BTN.dtype), dC.to(C_BTN.dtype)
        return None, None, *narrow, later_BNC.mT, d_restart_BCN


class Chunk(NamedTuple):
    """What comes into the recurrence at Q tokens, in one dtype. begins: which of them begin a document."""

    x_BQC: Tensor
    dt_BQC: Tensor
    B_BQN: Tensor
    C_BQN: Tensor
    begins_BQ: Tensor | None


def _chunks(
    chunk: int, x_BTC: Tensor, dt_BTC: Tensor, B_BTN: Tensor, C_BTN: Tensor, begins_BT: Tensor | None
) -> Iterator[Chunk]:
    for start in range(0, x_BTC.shape[1], chunk):
        x, dt, B, C = (tensor[:, start : start + chunk] for tensor in (x_BTC, dt_BTC, B_BTN, C_BTN))
        begins = None if begins_BT is None else begins_BT[:, start : start + chunk]
        if begins is not None and _is_all_false(begins):
            begins = None
        yield Chunk(x.to(dt.dtype), dt, B.to(dt.dtype), C.to(dt.dtype), begins)


def _is_all_false(x: Tensor) -> bool:
    """Whether this is known without waiting for a GPU, outside of a graph that torch.compile makes for any data, and of a tensor that has
    data (a planner's may have only a shape)."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling() and not x.any()


def _steps(part: Chunk, A_NC: Tensor, state_BNC: Tensor, restart_BNC: Tensor | None) -> tuple[Tensor, Tensor]:
    """(how much of the state before it each token keeps, what it adds), both (B, Q, N, C): the state that enters the chunk is a part of
    what the first token adds, the restart state of what the first token of a document adds."""
    decay_BQNC = (part.dt_BQC[:, :, None] * A_NC).exp_()
    added_BQNC = (part.dt_BQC * part.x_BQC)[:, :, None] * part.B_BQN[..., None]
    if part.begins_BQ is not None:
        begins_BQ11 = part.begins_BQ[:, :, None, None]
        if restart_BNC is not None:
            restarted_BQNC = torch.addcmul(added_BQNC, decay_BQNC, restart_BNC[:, None])
            added_BQNC = torch.where(begins_BQ11, restarted_BQNC, added_BQNC)
        decay_BQNC.masked_fill_(begins_BQ11, 0.0)
    added_BQNC[:, 0].addcmul_(decay_BQNC[:, 0], state_BNC)
    return decay_BQNC, added_BQNC


def _states(part: Chunk, A_NC: Tensor, state_BNC: Tensor, restart_BNC: Tensor | None) -> Tensor:
    """The states after each token of a chunk, (B, Q, N, C)."""
    decay_BQNC, h_BQNC = _steps(part, A_NC, state_BNC, restart_BNC)
    scan_(decay_BQNC, h_BQNC)
    return h_BQNC


def _gradients(
    part: Chunk, dy_BQC: Tensor, A_NC: Tensor, state_BNC: Tensor, later_BNC: Tensor, restart_BNC: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of one chunk's x, dt, B and C; of A (summed over the chunk), of the state that enters it, of the restart state.

    later: the gradient of its last state from the tokens after it.
    """
    x_BQC, dt_BQC, B_BQN, C_BQN, begins_BQ = part
    decay_BQNC, h_BQNC = _steps(part, A_NC, state_BNC, restart_BNC)
    scan_(decay_BQNC.clone(), h_BQNC)
    dC_BQN = (dy_BQC[:, :, None] @ h_BQNC.mT)[:, :, 0]
    # the gradient of h_t: g_t = C_t dy_t + decay_{t+1} g_{t+1}
    g_BQNC = C_BQN[..., None] * dy_BQC[:, :, None]
    g_BQNC[:, -1] += later_BNC
    scan_from_end_(torch.cat([decay_BQNC[:, 1:], torch.zeros_like(decay_BQNC[:, :1])], dim=1), g_BQNC)
    # what a token adds to the state
    du_BQC = (B_BQN[:, :, None] @ g_BQNC)[:, :, 0]
    dB_BQN = ((dt_BQC * x_BQC)[:, :, None] @ g_BQNC.mT)[:, :, 0]
    # its decay, which multiplies the state before it
    d_exponent_BQNC = decay_BQNC * g_BQNC
    d_state_BNC = d_exponent_BQNC[:, 0].clone()
    d_exponent_BQNC[:, 0].mul_(state_BNC)
    d_exponent_BQNC[:, 1:].mul_(h_BQNC[:, :-1])
    d_restart_BNC = None
    if begins_BQ is not None and restart_BNC is not None:
        kept_BQNC = (dt_BQC[:, :, None] * A_NC).exp_().mul_(g_BQNC)
        into_restart_BQNC = kept_BQNC.masked_fill_(~begins_BQ[:, :, None, None], 0.0)
        d_restart_BNC = into_restart_BQNC.sum(1)
        d_exponent_BQNC.addcmul_(into_restart_BQNC, restart_BNC[:, None])
    d_dt_BQC = (d_exponent_BQNC * A_NC).sum(2) + du_BQC * x_BQC
    dA_NC = (d_exponent_BQNC * dt_BQC[:, :, None]).sum((0, 1))  # einsum would copy into another order first
    return du_BQC * dt_BQC, d_dt_BQC, dB_BQN, dC_BQN, dA_NC, d_state_BNC, d_restart_BNC


def scan_(decay: Tensor, h: Tensor) -> None:
    """In place along dimension 1: h_t <- decay_t h_{t-1} + h_t, from the first to the last; `decay` is overwritten.

    Two steps are one of twice the length: the odd ones take in the step before them and are then scanned alone, the even ones follow
    from the odd ones before them. (Blelloch 1990; about three passes over the data at a depth of 2 log2 Q.)
    """
    if h.shape[1] < 2:
        return
    odd_decay, odd_h = decay[:, 1::2], h[:, 1::2]
    pairs = odd_h.shape[1]
    odd_h.addcmul_(odd_decay, h[:, 0 : 2 * pairs : 2])
    odd_decay.mul_(decay[:, 0 : 2 * pairs : 2])
    scan_(odd_decay, odd_h)
    even_h = h[:, 2::2]
    even_h.addcmul_(decay[:, 2::2], odd_h[:, : even_h.shape[1]])


def scan_from_end_(decay: Tensor, h: Tensor) -> None:
    """`scan_` from the last to the first, h_t <- decay_t h_{t+1} + h_t: the same steps, counted from the end."""
    length = h.shape[1]
    if length < 2:
        return
    first = length % 2  # of the odd ones, counted from the end
    odd_decay, odd_h = decay[:, first:-1:2], h[:, first:-1:2]
    odd_h.addcmul_(odd_decay, h[:, first + 1 :: 2])
    odd_decay.mul_(decay[:, first + 1 :: 2])
    scan_from_end_(odd_decay, odd_h)
    even_h = h[:, 1 - first : -2 : 2]
    even_h.addcmul_(decay[:, 1 - first : -2 : 2], odd_h[:, odd_h.shape[1] - even_h.shape[1] :])


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
