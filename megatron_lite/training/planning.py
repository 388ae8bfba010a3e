"""What the planner says about a run."""

from __future__ import annotations

from dataclasses import replace

from megatron_lite.models import selective_scan_kernel, ssd_kernel
from megatron_lite.models.config import ModelConfig
from megatron_lite.parallel.distillation_loss import DistillationWeights
from megatron_lite.planner.job import Job, Teacher
from megatron_lite.ranks import Ranks
from megatron_lite.training.config import InitFromSection, RunConfig, validate, validate_model
from megatron_lite.training.teacher import check_teacher
from megatron_lite.weights import model_config

_SCAN_KERNELS = {"M": ssd_kernel.installed_kernel, "H": selective_scan_kernel.installed_kernel}


def job_of(run: RunConfig, world_size: int, *, teacher: ModelConfig | None = None, scan_kernels: bool = False) -> Job:
    """`run` on `world_size` processes, as the planner sees it. teacher: see `teacher_of`. scan_kernels: see `Job`."""
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
        teacher=None if teacher is None else _teacher(run, teacher),
        scan_kernels=scan_kernels,
    )


def teacher_of(run: RunConfig) -> ModelConfig | None:
    """The model of the run's teacher, of which no weight is read; None where it has none. Raises ValueError where it is not there."""
    path = run.objective.teacher_path
    return None if path is None else model_config(path, Ranks())


def has_scan_kernels(model: ModelConfig) -> bool:
    """Whether the libraries that compute the scans of `model` on a GPU are installed here."""
    return all(_SCAN_KERNELS[symbol]() is not None for symbol in set(model.symbols) & set(_SCAN_KERNELS))


def _teacher(run: RunConfig, model: ModelConfig) -> Teacher:
    weights = DistillationWeights(run.objective.temperature, run.objective.cross_entropy)
    return Teacher(model, run.objective.teacher_dtype or run.precision.dtype, weights)


def check_layout(run: RunConfig, job: Job) -> None:
    """Raise ValueError where training would refuse `run` with the layout of `job`."""
    train = replace(run.train, micro_batch_size=job.micro_batch)
    if train.max_steps is None and train.max_tokens is None:
        train = replace(train, max_steps=1)  # a step can be planned without a length
    start = InitFromSection() if run.init_from.path is None else run.init_from  # and without weights to begin with
    run = replace(run, parallel=job.parallel, engine=job.engine, train=train, init_from=start)
    validate(run, job.gpus)
    if run.takes_model_of_source:
        validate_model(run, job.gpus)
    if job.teacher is not None:
        check_teacher(run, job.teacher.model, named="the teacher")
