"""Micro-batches for one data-parallel rank, read ahead in the background and brought to where it computes.

A step takes the samples [consumed, consumed + global batch size). Its micro-batch m takes the next
micro_batch_size * data_parallel_size of them, of which rank r gets the r-th run of micro_batch_size. So what
a step sees does not depend on the number of ranks, and the state of the data is the one number
`consumed_samples`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_lite.data.blend import Blend
from megatron_lite.data.packing import Batch, Example, collate
from megatron_lite.data.source import Source
from megatron_lite.data.token_bytes import bytes_per_token

Step = tuple[int, list[Batch]]  # global batch size, this rank's micro-batches
_POLL_SECONDS = 0.1  # how often a waiting thread looks whether the other side is still there
_PREFETCH = 2  # steps that are read ahead


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


@dataclass(frozen=True)
class HeldOut:
    """What a run validates on: the first `windows` windows of each source.

    token_bytes: bytes of text by token id, where bits per byte are asked for.
    """

    sources: dict[str, Source]
    windows: int
    token_bytes: npt.NDArray[np.int64] | None = None

    @cached_property
    def bytes_per_token(self) -> dict[str, float]:
        """source -> mean bytes of its counted targets; reads them all once. Empty without `token_bytes`."""
        if self.token_bytes is None:
            return {}
        return {
            name: bytes_per_token(map(source.example, range(min(self.windows, source.num_windows))), self.token_bytes)
            for name, source in self.sources.items()
        }


class Destination(Protocol):
    """Where batches go (a `Mesh`). device: the one that they are computed on."""

    @property
    def device(self) -> torch.device: ...

    def place(self, batch: Batch) -> Batch:
        """The batch on the device, or what this process computes of it."""


class OnCpu:
    """A process that computes whole batches on the CPU."""

    device = torch.device("cpu")

    def place(self, batch: Batch) -> Batch:
        """See `Destination`."""
        return batch


ON_CPU = OnCpu()


class DataLoader:
    """The batches of one data-parallel rank, where it computes.

    Args:
        micro_batch_size: samples of a micro-batch on one rank.
        rank, ranks: this data-parallel rank, and how many there are.
        to: what places them.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        blend: Blend,
        held_out: HeldOut | None = None,
        *,
        micro_batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        to: Destination = ON_CPU,
    ) -> None:
        if micro_batch_size < 1:
            raise ValueError(f"train.micro_batch_size={micro_batch_size} must be at least 1")
        if not 0 <= rank < ranks:
            raise ValueError(f"data-parallel rank {rank} must be in [0, {ranks})")
        self.blend, self.held_out = blend, held_out or HeldOut({}, 0)
        self.micro_batch_size, self.rank, self.ranks, self.to = micro_batch_size, rank, ranks, to

    def step(self, consumed: int, batch: int) -> list[Batch]:
        """This rank's micro-batches, still on the CPU, of the step that takes samples [consumed, consumed + batch)."""
        split = rank_samples(consumed, batch=batch, micro_batch=self.micro_batch_size, rank=self.rank, ranks=self.ranks)
        batches = [collate([self.blend[i] for i in numbers]) for numbers in split]
        # page-locked memory is what a GPU copies from while it computes
        return [_pinned(batch) for batch in batches] if self.to.device.type == "cuda" else batches

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

        with closing(_ahead(produce(), depth=_PREFETCH)) as ahead:
            for batch, micro_batches in ahead:
                yield batch, [self.to.place(one) for one in micro_batches]

    def again(self, consumed: int, batch: int) -> list[Batch]:
        """The placed micro-batches of `step`, beside those that are read ahead."""
        return [self.to.place(one) for one in self.step(consumed, batch)]

    def validation(self) -> Iterable[tuple[str, Iterable[Batch]]]:
        """(source, this rank's held-out batches), always the same ones."""
        for name, source in self.held_out.sources.items():
            batches = validation_batches(
                source,
                windows=self.held_out.windows,
                micro_batch_size=self.micro_batch_size,
                rank=self.rank,
                ranks=self.ranks,
            )
            yield name, map(self.to.place, batches)

    def seen(self, consumed: int) -> dict[str, dict[str, float]]:
        """source -> samples, share, target share and epochs of the first `consumed` samples."""
        counts, targets = self.blend.counts(0, consumed), self.blend.expected(consumed)
        return {
            name: {
                "samples": count,
                "share": count / max(consumed, 1),
                "target": targets[name],
                "epochs": count / self.blend.sources[name].num_windows,
            }
            for name, count in counts.items()
        }


def validation_batches(
    source: Source,
    *,
    windows: int,
    micro_batch_size: int,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """The first `windows` windows of a held-out file (or all, if it has fewer), in order: always the same.

    Every rank gets equally many batches of the same shape, because a sharded model has to run on all of them
    together; where windows run out, a rank gets one again with an all-False `loss_mask`. The sum of losses
    and of counted tokens over the ranks is therefore that of each window once.
    """
    count = min(windows, source.num_windows)
    stride = micro_batch_size * ranks
    for start in range(rank * micro_batch_size, -(-count // stride) * stride, stride):
        yield collate([_or_blank(source, k, count) for k in range(start, start + micro_batch_size)])


def _or_blank(source: Source, k: int, count: int) -> Example:
    if k < count:
        return source.example(k)
    example = source.example(0)
    return example | {"loss_mask": np.zeros_like(example["loss_mask"])}


def _pinned(batch: Batch) -> Batch:
    return {key: tensor.pin_memory() for key, tensor in batch.items()}


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
