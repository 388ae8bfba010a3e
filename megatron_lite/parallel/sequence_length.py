"""Whether a layout can divide a model and its sequences.

a rank's sequence   the meta tokens P, and T / cp tokens, of which each half is a slice (see `sequence_slices`)
context parallel    T is a multiple of 2 cp, and a slice is at least as long as what a convolution looks back
sequence parallel   P + T / cp is a multiple of tp
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_lite.models.config import ModelConfig
from megatron_lite.parallel.mesh import ParallelConfig
from megatron_lite.parallel.plans import check_divisible, check_sequences_divide, taps


def check_layout(model: ModelConfig, parallel: ParallelConfig, *, seq_len: int) -> None:
    """Raise ValueError, naming keys and values that would do, if `parallel` cannot divide the model or sequences of `seq_len` tokens."""
    check_divisible(model, tp=parallel.tp, sequence_parallel=parallel.sequence_parallel and parallel.cp == 1)
    if parallel.cp > 1:
        check_sequences_divide(model)
    problem = _problem(model, parallel, seq_len)
    if problem is None:
        return
    period, shortest = 2 * parallel.cp * parallel.tp, 2 * parallel.cp * max([1, *taps(model).values()])
    below = range(seq_len - 1, max(0, seq_len - period - 1), -1)
    above = range(seq_len + 1, min(max(seq_len, shortest) + period, model.max_seq_len) + 1)
    works = [str(length) for lengths in (below, above) for length in _first(model, parallel, lengths)]
    ways = [f"data.seq_len={' or '.join(works)}"] if works else []
    ways += [f"parallel.cp={cp}" for cp in range(parallel.cp - 1, 0, -1) if parallel.cp % cp == 0][:1]
    ways += ["parallel.sequence_parallel=false"] if parallel.sequence_parallel else []
    raise ValueError(f"{problem}; choose {', or '.join(ways)}")


def _first(model: ModelConfig, parallel: ParallelConfig, lengths: Iterable[int]) -> list[int]:
    return [length for length in lengths if _problem(model, parallel, length) is None][:1]


def _problem(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> str | None:
    cp, tp = parallel.cp, parallel.tp if parallel.sequence_parallel else 1
    named = f"data.seq_len={seq_len}" + (f" with parallel.cp={cp}" if cp > 1 else "")
    if cp > 1 and seq_len % (2 * cp):
        return f"{named} does not divide into {2 * cp} slices, two for each rank"
    for key, number in taps(model).items() if cp > 1 else ():
        if seq_len // (2 * cp) < number - 1:
            return f"{named} makes slices of {seq_len // (2 * cp)} tokens, fewer than the {number - 1} that {key}={number} looks back"
    length = model.meta_tokens + seq_len // cp
    if length % tp == 0:
        return None
    meta = f" and model.meta_tokens={model.meta_tokens}" if model.meta_tokens else ""
    made = f" make {length} tokens on a rank, which do" if meta or cp > 1 else " does"
    return f"{named}{meta}{made} not divide by parallel.tp={tp}, as parallel.sequence_parallel needs"
