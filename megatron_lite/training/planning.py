"""What the planner says about a run."""

from __future__ import annotations

from megatron_lite.planner.job import Job
from megatron_lite.training.config import RunConfig


def job_of(run: RunConfig, world_size: int) -> Job:
    """`run` on `world_size` processes, as the planner sees it."""
    return Job(
        run.model,
        run.parallel,
        run.engine,
        run.precision,
        gpus=world_size,
        seq_len=run.data.seq_len,
        micro_batch=run.train.micro_batch_size,
        global_batch=run.train.global_batch_size,
        masked=run.data.reset_attention,
    )
