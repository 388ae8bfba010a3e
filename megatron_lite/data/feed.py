"""From the blend to the device: this data-parallel rank's batches, to train on and to validate on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from megatron_lite.data.blend import Blend
from megatron_lite.data.loader import Loader, validation_batches
from megatron_lite.data.source import Source
from megatron_lite.data.packing import Batch


@dataclass
class DataFeed:
    """This data-parallel rank's batches, on the device."""

    blend: Blend
    loader: Loader
    held_out: dict[str, Source]
    windows: int
    micro_batch_size: int
    rank: int
    ranks: int
    device: torch.device

    def steps(self, consumed: int, batch_size_at: Callable[[int], int], stop: int) -> Iterator[tuple[int, list[Batch]]]:
        """See `trainer.Feed`."""
        for size, micro_batches in self.loader.steps(consumed, batch_size_at, stop):
            yield size, [self._move(batch) for batch in micro_batches]

    def validation(self) -> Iterable[tuple[str, Iterable[Batch]]]:
        """See `trainer.Feed`."""
        for name, source in self.held_out.items():
            batches = validation_batches(
                source,
                windows=self.windows,
                micro_batch_size=self.micro_batch_size,
                data_parallel_rank=self.rank,
                data_parallel_size=self.ranks,
            )
            yield name, (self._move(batch) for batch in batches)

    def seen(self, consumed: int) -> dict[str, dict[str, float]]:
        """See `trainer.Feed`."""
        counts = self.blend.counts(0, consumed)
        targets = self.blend.expected(consumed)
        return {
            name: {
                "samples": count,
                "share": count / max(consumed, 1),
                "target": targets[name],
                "epochs": count / self.blend.sources[name].num_windows,
            }
            for name, count in counts.items()
        }

    def _move(self, batch: Batch) -> Batch:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
