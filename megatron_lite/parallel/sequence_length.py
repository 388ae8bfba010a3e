"""Whether a layout can divide a model and its sequences.

a rank's sequence   the meta tokens P, and T / cp tokens, of which each half is a slice (see `sequence_slices`)
context parallel    T is a multiple of 2 cp, and a slice is at least as long as what a convolution looks back
sequence parallel   P + T / cp is a multiple of tp
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from megatron_lite.models.config import ModelConfig
from megatron_lite.parallel.mesh import ParallelConfig
from megatron_lite.parallel.plans import check_divisible, check_sequences_divide, taps


def check_layout(model: ModelConfig, parallel: ParallelConfig, *, seq_len: int) -> None:
    """Raise ValueError, naming keys and values that would do, if `parallel` cannot divide the model or sequences of `seq_len` tokens."""
    _check_degree(model, parallel)
    if parallel.cp > 1:
        check_sequences_divide(model)
    problem = _problem(model, parallel, seq_len)
    if problem is None:
        return
    raise ValueError(f"{problem}; choose {', or '.join(_ways_out(model, parallel, seq_len))}")


def _ways_out(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> list[str]:
    """Settings of which each one is enough."""
    period, shortest = 2 * parallel.cp * parallel.tp, 2 * parallel.cp * max([1, *taps(model).values()])
    below = range(seq_len - 1, max(0, seq_len - period - 1), -1)
    above = range(seq_len + 1, min(max(seq_len, shortest) + period, model.max_seq_len) + 1)
    lengths = [str(length) for tried in (below, above) for length in _first(model, parallel, tried)]
    ways = [f"data.seq_len={' or '.join(lengths)}"] if lengths else []
    smaller: list[dict[str, Any]] = [{"cp": cp} for cp in range(parallel.cp - 1, 0, -1) if parallel.cp % cp == 0]
    whole = [{"sequence_parallel": False}] if parallel.sequence_parallel else []
    for tried in (smaller, whole, [one | {"sequence_parallel": False} for one in smaller]):
        works = [changes for changes in tried if _fits(model, replace(parallel, **changes), seq_len)]
        if works and not (len(works[0]) > 1 and ways):
            ways.append(" with ".join(f"parallel.{key}={str(value).lower()}" for key, value in works[0].items()))
    return ways


def _check_degree(model: ModelConfig, parallel: ParallelConfig) -> None:
    check_divisible(model, tp=parallel.tp, sequence_parallel=parallel.sequence_parallel and parallel.cp == 1)


def _fits(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> bool:
    try:
        _check_degree(model, parallel)
    except ValueError:
        return False
    return _problem(model, parallel, seq_len) is None


def _first(model: ModelConfig, parallel: ParallelConfig, lengths: Iterable[int]) -> list[int]:
    return [length for length in lengths if _problem(model, parallel, length) is None][:1]


def _problem(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> str | None:
    cp, tp = parallel.cp, parallel.tp if parallel.sequence_parallel else 1
    named = f"data.seq_len={seq_len}" + (f" with parallel.cp={cp}" if cp > 1 else "")
    if cp > 1 and seq_len % (2 * cp):
        return f"{named} does not divide into {2 * cp} slices, two for each rank"
    of_slice = seq_len // (2 * cp)
    for key, number in taps(model).items() if cp > 1 else ():
        if of_slice < number - 1:
            tokens = f"{of_slice} token{'s' if of_slice > 1 else ''}"
            return f"{named} makes slices of {tokens}, fewer than the {number - 1} that {key}={number} looks back"
    length = model.meta_tokens + seq_len // cp
    if length % tp == 0:
        return None
    meta = f" and model.meta_tokens={model.meta_tokens}" if model.meta_tokens else ""
    made = f" make {length} tokens on a rank, which do" if meta or cp > 1 else " does"
    return f"{named}{meta}{made} not divide by parallel.tp={tp}, as parallel.sequence_parallel needs"
