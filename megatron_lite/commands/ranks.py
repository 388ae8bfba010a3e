"""Commands that one process or several run: the process group around them, and errors that are printed once.

torchrun --nproc-per-node 4 -m megatron_lite evaluate checkpoint=runs/large parallel.tp=2
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_lite.errors import CheckpointError
from megatron_lite.ranks import Ranks
from megatron_lite.runtime import Runtime, start, stop


@contextmanager
def all_ranks(*, timeout_seconds: float = 1800.0) -> Iterator[tuple[Runtime, Ranks]]:
    """This process and the ranks that a launcher started beside it. timeout_seconds: how long one waits for the others.

    Inside, all ranks raise the same user error (`Ranks.attempt` ensures this); rank 0 prints it and the others just exit.
    """
    runtime = start(timeout_seconds=timeout_seconds)
    try:
        group = dist.new_group(backend="gloo") if runtime.world_size > 1 else None
        yield runtime, Ranks(group, timeout_seconds=timeout_seconds)
    except (CheckpointError, ValueError, OSError) as error:
        if runtime.is_main:
            raise
        raise SystemExit(2) from error
    finally:
        stop()
