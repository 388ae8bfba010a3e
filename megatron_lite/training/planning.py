"""What the planner says about a run."""

from __future__ import annotations

from dataclasses import replace

from megatron_lite.planner.job import Job
from megatron_lite.training.config import RunConfig, validate, validate_model


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


def check_layout(run: RunConfig, job: Job) -> None:
    """Raise ValueError where training would refuse `run` with the layout of `job`."""
    train = replace(run.train, micro_batch_size=job.micro_batch)
    if train.max_steps is None and train.max_tokens is None:
        train = replace(train, max_steps=1)  # a step can be planned without a length
    run = replace(run, parallel=job.parallel, engine=job.engine, train=train)
    validate(run, job.gpus)
    if run.takes_model_of_source:
        validate_model(run, job.gpus)
