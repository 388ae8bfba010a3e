"""The one place where a config becomes objects.

    RunConfig -> tokenizer, blend, mesh -> assemble: the objective over this process's part of the model -> engine
              -> Trainer at the position of the newest checkpoint

Whatever can be refused is refused before the run directory is touched.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_lite.background import Lost
from megatron_lite.checkpoint.store import CheckpointStore
from megatron_lite.config.compose import from_dict, to_dict
from megatron_lite.data.blend import Blend, open_blend
from megatron_lite.data.loader import DataLoader, HeldOut, rank_samples
from megatron_lite.data.resume import resume_blend
from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.engine.base import Engine, EngineConfig
from megatron_lite.hardware import device_peak_flops
from megatron_lite.models.attention_kernel import attention_kernel
from megatron_lite.models.flops import flops_per_token, parameter_count
from megatron_lite.optim.schedule import BatchSize, LearningRate, Progress, Projection, Schedule, ScheduleConfig
from megatron_lite.parallel.assemble import assemble, from_tensors, seeded
from megatron_lite.parallel.mesh import Mesh, ParallelConfig, build_mesh
from megatron_lite.parallel.parallelize import Recipe
from megatron_lite.parallel.quantization import formats_table
from megatron_lite.precision.recipes import Fp8Config
from megatron_lite.runtime import Runtime
from megatron_lite.tracking import RunInfo, build_tracker
from megatron_lite.tracking.profile import Profiler
from megatron_lite.training.config import RunConfig
from megatron_lite.training.data import check_vocabulary, held_out, open_tokenizer
from megatron_lite.training.ladder import Ladder
from megatron_lite.training.metrics import Metrics, Work
from megatron_lite.training.resume import (
    ResumePoint,
    check_same_run,
    lineage_of,
    load_optimizer,
    open_source,
    progress_of,
    report_changes,
    report_objective,
    report_precision,
)
from megatron_lite.training.spikes import SpikeGuard
from megatron_lite.training.status import Status
from megatron_lite.training.teacher import Teacher, assemble_teacher, check_same_teacher, open_teacher
from megatron_lite.training.trainer import TrainConfig, Trainer
from megatron_lite.training.watchdog import Watchdog
from megatron_lite.weights import Weights


def build_schedule(run: RunConfig, start: Progress | None = None) -> Schedule:
    """Batch sizes, learning rates and the end of a run that stands at `start` (None: at its beginning).

    Raises ValueError when warm-up and decay do not fit into its length.
    """
    batch = BatchSize(run.train.global_batch_size, run.train.batch_ramp)
    projection = Projection(start or Progress(), batch, run.data.seq_len)
    steps, tokens = run.train.max_steps, run.train.max_tokens
    end = projection.at_tokens(tokens or 0) if steps is None else projection.at_step(steps)
    rate = LearningRate(run.schedule, peak=run.optim.lr, total_steps=end.step, total_tokens=end.consumed_tokens)
    return Schedule(projection, rate, end)


def build_grid(parallel: ParallelConfig, engine: EngineConfig, *, world_size: int, device: torch.device) -> Mesh:
    """The grid of processes. Where the engine shards nothing, all data-parallel processes are replicas."""
    degrees = parallel.degrees(world_size)
    if engine.replicates:
        degrees = replace(degrees, dp_replicate=degrees.data_parallel, dp_shard=1)
    return build_mesh(degrees, device=device)


def build_engine(
    run: RunConfig, mesh: Mesh, *, source: Weights | None = None, teacher: Teacher | None = None
) -> Engine:
    """The engine over the assembled objective, with initial weights or those (and with them the optimizer's state) of `source`.

    teacher: what `open_teacher` returned for this run.
    """
    config: EngineConfig = run.engine
    dtype = run.precision.dtype
    wrap = run.objective.build
    if teacher is not None:
        wrap = partial(wrap, teacher=assemble_teacher(run, mesh, teacher.weights))
    objective, shards = assemble(
        run.model,
        mesh=mesh,
        recipe=Recipe(run.parallel, run.precision),
        fill=seeded(run.seed) if source is None else from_tensors(source.tensors),
        wrap=wrap,
        distribute=config.distribute(mesh, dtype),
    )
    engine = config.build(objective, optim=run.optim, dtype=dtype, mesh=mesh, shards=shards)
    if source is not None:
        load_optimizer(engine, source)
    return engine


def build_trainer(
    run: RunConfig,
    runtime: Runtime,
    *,
    store: CheckpointStore,
    watchdog: Watchdog,
    point: ResumePoint | None,
    lost: Lost,
) -> Trainer:
    """A trainer at the position of `point`, or at the start. `lost` collects observers that fail.

    Raises ValueError for anything in the config, the data or the checkpoint that does not fit together.
    """
    tokenizer = open_tokenizer(run.data)
    check_vocabulary(run.model, tokenizer)
    manifest = store.read_manifest(point.checkpoint) if point else None
    if manifest:
        check_same_run(manifest, run, tokenizer)
    teacher = open_teacher(run, tokenizer, store.ranks)
    if manifest:
        check_same_teacher(manifest, run, teacher)
    start = progress_of(manifest)
    schedule = build_schedule(run, start)
    blend = _blend(run, tokenizer, schedule, manifest)
    check_batch_sizes(run, schedule, world_size=runtime.world_size)
    if runtime.is_main:
        if manifest:
            report_changes(schedule, before=previous_schedule(run, manifest, start), phases=blend.phases)
            report_precision(manifest, run.precision)
            report_objective(manifest, run)
        _report_formats(run, runtime)
    mesh = build_grid(run.parallel, run.engine, world_size=runtime.world_size, device=runtime.device)
    starts_from_source = point is None and run.init_from.path is not None
    source = open_source(run, tokenizer, store.ranks) if starts_from_source else None
    engine = build_engine(run, mesh, source=source, teacher=teacher)
    trainer = Trainer(
        config=run.train,
        runtime=runtime,
        engine=engine,
        schedule=schedule,
        schedule_from=partial(build_schedule, run),
        loader=build_loader(run, blend, held_out(run.data, tokenizer), mesh),
        store=store,
        tracker=build_tracker(run.tracking, main_process=runtime.is_main, on_loss=lost),
        metrics=build_metrics(run, runtime, consumed=start.consumed_samples, teacher=teacher),
        status=Status(Path(run.run.dir), main_process=runtime.is_main, lost=lost),
        watchdog=watchdog,
        spikes=SpikeGuard(run.train.on_spike, run.spike, runtime.device),
        ladder=Ladder(engine.numerics, recipe=run.precision.name, after=run.precision.fallback_after),
        profiler=Profiler(run.profile, Path(run.run.dir) / "profile", main_process=runtime.is_main),
        base_manifest={
            "config": to_dict(run),
            "tokenizer": tokenizer.fingerprint,
            "schedule": to_dict(run.schedule),
            "data": blend.state(),
            "parameters": parameter_count(run.model),
            "lineage": lineage_of(manifest, point),
            "teacher": teacher.state() if teacher else {},
        },
    )
    if point:
        trainer.restore(point.checkpoint)
    return trainer


def _blend(run: RunConfig, tokenizer: TokenizerIdentity, schedule: Schedule, manifest: dict[str, Any] | None) -> Blend:
    """The blend of the run, or of its rest after the checkpoint of `manifest`."""
    total_samples = schedule.end.consumed_samples
    blend = open_blend(run.data, tokenizer=tokenizer, seed=run.seed, total_samples=total_samples)
    if manifest is None:
        return blend
    consumed = manifest["consumed_samples"]
    return resume_blend(blend, saved=manifest["data"], consumed_samples=consumed, allow=run.resume_allow)


def _report_formats(run: RunConfig, runtime: Runtime) -> None:
    run.precision.warn_if_slow(runtime.device)
    if isinstance(run.precision, Fp8Config):
        backend = run.precision.backend_on(runtime.device)
        print("\n".join([f"{run.precision.name}, {backend}:", *formats_table(run.model, run.precision)]))


def previous_schedule(run: RunConfig, manifest: dict[str, Any], start: Progress) -> Schedule | None:
    """The rest of the run as the job that wrote a checkpoint would have gone on; None where its config is not valid any more."""
    then = manifest["config"]
    try:
        return build_schedule(
            replace(
                run,
                train=from_dict(TrainConfig, then["train"]),
                schedule=from_dict(ScheduleConfig, then["schedule"]),
                optim=replace(run.optim, lr=then["optim"]["lr"]),
                data=replace(run.data, seq_len=then["data"]["seq_len"]),
            ),
            start,
        )
    except (ValueError, KeyError, TypeError):
        return None


def check_batch_sizes(run: RunConfig, schedule: Schedule, *, world_size: int) -> None:
    """Raise ValueError when a batch size between here and this job's end does not split evenly over its ranks.

    Only those: a ramp may grow together with the number of ranks, in jobs that end at its stages (`train.stop_at`).
    """
    batch, here = schedule.projection.batch, schedule.projection.start.consumed_samples
    end = schedule.end_of_job(run.train.stop_at).consumed_samples
    steps = [batch.steps(stage.from_samples, start=here) for stage in run.train.batch_ramp]  # until each stage begins
    first_samples = [batch.samples(count, start=here) for count in steps]
    ranks = run.parallel.degrees(world_size).data_parallel
    for sample in [here, *(sample for sample in first_samples if here < sample < end)]:
        rank_samples(0, batch=batch.at(sample), micro_batch=run.train.micro_batch_size, rank=0, ranks=ranks)


def build_loader(run: RunConfig, blend: Blend, held_out: HeldOut, mesh: Mesh) -> DataLoader:
    """This data-parallel rank's batches, on its device, as `mesh` places them."""
    return DataLoader(
        blend,
        held_out,
        micro_batch_size=run.train.micro_batch_size,
        rank=mesh.data_parallel_rank,
        ranks=mesh.data_parallel_size,
        to=mesh,
    )


def build_metrics(run: RunConfig, runtime: Runtime, *, consumed: int, teacher: Teacher | None = None) -> Metrics:
    """What turns steps into rows. A teacher's forward, a third of its training FLOPs, counts too."""
    flops = flops_per_token(run.model, run.data.seq_len)
    if teacher is not None:
        flops += flops_per_token(teacher.weights.config, run.data.seq_len) / 3
    work = Work(
        flops_per_token=flops,
        seq_len=run.data.seq_len,
        devices=runtime.world_size,
        peak=device_peak_flops(runtime.device, run.precision.peak),
        device=runtime.device,
    )
    return Metrics(work, log_every=run.train.log_every, consumed_samples=consumed)


def run_info(run: RunConfig, trainer: Trainer) -> RunInfo:
    """What trackers show of a run."""
    model = run.model
    device, dtype = trainer.runtime.device.type, run.precision.dtype
    kernel = attention_kernel(
        device, dtype, masked=run.data.reset_attention, same_head_dims=model.head_dim == model.value_head_dim
    )
    ignored = (
        " (the cuts | of model.pattern have no effect without pipeline parallelism)"
        if "|" in (model.pattern or "")
        else ""
    )
    degrees = run.parallel.degrees(trainer.runtime.world_size)
    processes = f"{degrees.world_size} processes ({degrees})" if degrees.world_size > 1 else str(degrees)
    size = f"{len(model.symbols)} layers{ignored}, hidden {model.hidden_size}, vocabulary {model.vocab_size}"
    return RunInfo(
        run_dir=Path(run.run.dir),
        name=run.run.name,
        total_steps=trainer.schedule.total_steps,
        start_step=trainer.position.step,
        validation_due=trainer.position.validation_due,
        config=to_dict(run),
        model=f"{model.family}, {size}",
        parameters=parameter_count(model),
        total_tokens=trainer.schedule.end.consumed_tokens,
        layout=f"{run.engine.name}, {run.precision.name}, {processes}, attention: {kernel.name}",
        peak=str(trainer.metrics.work.peak) if trainer.metrics.work.peak.flops else "",
    )
