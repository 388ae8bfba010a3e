"""Micro-batches for one data-parallel rank, read ahead in the background.

A step takes the samples [consumed, consumed + global batch size). Its micro-batch m takes the next
micro_batch_size * data_parallel_size of them, of which rank r gets the r-th run of micro_batch_size. So what
a step sees does not depend on the number of ranks, and the state of the data is the one number
`consumed_samples`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

import numpy as np

from megatron_lite.data.packing import Batch, Example, collate
from megatron_lite.data.source import Source

Step = tuple[int, list[Batch]]  # global batch size, this rank's micro-batches
_POLL_SECONDS = 0.1  # how often a waiting thread looks whether the other side is still there


class Samples(Protocol):
    """What a loader reads from: sample number -> example (a `Blend`)."""

    def __getitem__(self, i: int) -> Example: ...


def rank_samples(consumed: int, *, batch: int, micro_batch: int, rank: int, ranks: int) -> list[range]:
    """The sample numbers of each micro-batch of one rank in the step that begins at `consumed`.

    Raises:
        ValueError: the global batch does not split evenly.
    """
    stride = micro_batch * ranks
    if batch < 1 or batch % stride:
        below, above = batch // stride * stride, (batch // stride + 1) * stride
        would_do = f"{below} or {above}" if below > 0 else f"{above}"
        raise ValueError(
            f"a global batch of {batch} samples does not divide by train.micro_batch_size={micro_batch} x "
            f"{ranks} data-parallel ranks = {stride}; {would_do} would do"
        )
    starts = range(consumed + rank * micro_batch, consumed + batch, stride)
    return [range(start, start + micro_batch) for start in starts]


class Loader:
    """Steps of one data-parallel rank.

    Args:
        samples: a `Blend`.
        micro_batch_size: samples of a micro-batch on one rank.
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.
        prefetch: steps that are read ahead.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        for key, value in (("train.micro_batch_size", micro_batch_size), ("prefetch", prefetch)):
            if value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data-parallel rank {data_parallel_rank} must lie in [0, {data_parallel_size})")
        self.samples = samples
        self._micro_batch = micro_batch_size
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._pin = pin_memory
        self._prefetch = prefetch

    def step(self, consumed: int, batch: int) -> list[Batch]:
        """This rank's micro-batches of the step that takes samples [consumed, consumed + batch)."""
        split = rank_samples(consumed, batch=batch, micro_batch=self._micro_batch, rank=self._rank, ranks=self._ranks)
        return [_pinned(collate([self.samples[i] for i in numbers]), self._pin) for numbers in split]

    def steps(
        self, consumed: int, batch_size_at: Callable[[int], int], stop: int | None = None
    ) -> Generator[Step, None, None]:
        """Steps from sample `consumed` on, read ahead by a background thread.

        Closing the iterator (or dropping it) ends the thread. What goes wrong in the thread is raised here.

        Args:
            batch_size_at: consumed samples -> global batch size of the next step (the ramp-up).
            stop: no step begins at or after this sample; None: without end.
        """

        def produce() -> Iterator[Step]:
            at = consumed
            while stop is None or at < stop:
                batch = batch_size_at(at)
                yield batch, self.step(at, batch)
                at += batch

        return _ahead(produce(), depth=self._prefetch)


def validation_batches(
    source: Source,
    *,
    windows: int,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
) -> Iterator[Batch]:
    """The first `windows` windows of a held-out file (or all, if it has fewer), in order: always the same.

    Every rank gets equally many batches of the same shape, because a sharded model has to run on all of them
    together; where windows run out, a rank gets one again with an all-False `loss_mask`. The sum of losses
    and of counted tokens over the ranks is therefore that of each window once.
    """
    count = min(windows, source.num_windows)
    stride = micro_batch_size * data_parallel_size
    for start in range(data_parallel_rank * micro_batch_size, -(-count // stride) * stride, stride):
        yield collate([_or_blank(source, k, count) for k in range(start, start + micro_batch_size)])


def _or_blank(source: Source, k: int, count: int) -> Example:
    if k < count:
        return source.example(k)
    example = source.example(0)
    return example | {"loss_mask": np.zeros_like(example["loss_mask"])}


def _pinned(batch: Batch, pin: bool) -> Batch:
    return {key: tensor.pin_memory() for key, tensor in batch.items()} if pin else batch


def _ahead(items: Iterator[Step], *, depth: int) -> Generator[Step, None, None]:
    """Yield `items`, produced by a background thread that runs up to `depth` of them ahead."""
    ready: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=depth)
    closed = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, ready, closed), name="data-loader", daemon=True)
    thread.start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry
    finally:
        closed.set()
        thread.join()


def _produce(items: Iterator[Step], ready: queue.Queue, closed: threading.Event) -> None:
    """Put every item, and last None or the exception that ended them, until the other side has closed."""

    def put(entry: Step | BaseException | None) -> None:
        while not closed.is_set():
            try:
                return ready.put(entry, timeout=_POLL_SECONDS)
            except queue.Full:
                continue

    try:
        for item in items:
            put(item)
            if closed.is_set():
                return
        put(None)
    except BaseException as error:
        put(error)
