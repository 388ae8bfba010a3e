"""What `benchmarks/context.py` counts, against the table of docs/long-context.md."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from benchmarks.context import LAYERS, Rank, layer_on
from megatron_lite.parallel.sequence_slices import ContextParallel
from tests.distributed import run_ranks


def counted(rank: int, world_size: int) -> Rank:
    return layer_on(LAYERS["Mamba-2"], ContextParallel(rank, world_size, dist.group.WORLD), 256)


@pytest.mark.slow
def test_states_go_to_every_other_rank_and_the_convolutions_inputs_once() -> None:
    heads, states, channels = 4, 32 * 32, 4 * 32 + 2 * 2 * 32
    gathered = 2 * heads * (states + 1) + 2 * heads * states  # decays in forward only
    for rank, found in enumerate(run_ranks(4, counted)):
        inputs = (1 if rank == 0 else 2) * 3 * channels
        assert (found.calls, found.bytes_sent) == (4, 4 * (3 * gathered + 2 * inputs))
