"""The one place where a config becomes objects.

    RunConfig -> tokenizer, blend, mesh -> assemble: the objective over this process's part of the model -> engine
              -> Trainer at the position of the newest checkpoint

Whatever can be refused is refused before the run directory is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from megatron_lite.checkpoint.store import CheckpointStore
from megatron_lite.config.compose import to_dict
from megatron_lite.data.blend import Blend, open_blend
from megatron_lite.data.config import DataConfig
from megatron_lite.data.loader import DataLoader, HeldOut, rank_samples
from megatron_lite.data.resume import resume_blend
from megatron_lite.data.sample.corpus import prepare
from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.data.source import Source, open_validation
from megatron_lite.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from megatron_lite.engine.base import Engine, EngineConfig
from megatron_lite.hardware import device_peak_flops
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.flops import flops_per_token, parameter_count
from megatron_lite.optim.schedule import BatchSize, LearningRate, Schedule
from megatron_lite.parallel.assemble import assemble, from_tensors, seeded
from megatron_lite.parallel.mesh import Mesh, ParallelConfig, build_mesh
from megatron_lite.runtime import Runtime, has_wandb_key
from megatron_lite.tracking import RunInfo, build_tracker
from megatron_lite.tracking.profile import Profiler
from megatron_lite.training.config import RunConfig
from megatron_lite.training.metrics import Metrics, Work
from megatron_lite.training.resume import check_same_run, load_optimizer, open_source
from megatron_lite.training.status import Status
from megatron_lite.training.trainer import Trainer
from megatron_lite.training.watchdog import Watchdog
from megatron_lite.weights import Weights


def open_tokenizer(config: DataConfig) -> TokenizerIdentity:
    """What data and model must agree on with the tokenizer of `data.tokenizer`.

    Raises ValueError if `data.tokenizer` is not given or is not the folder of a tokenizer.
    """
    if not config.tokenizer:
        raise ValueError(
            "data.tokenizer is empty: name the folder of the tokenizer that the token files were written with"
        )
    tokenizer = load_tokenizer(config.tokenizer)
    return TokenizerIdentity(
        fingerprint(tokenizer), config.tokenizer, tokenizer.eos_token_id, vocabulary_size(tokenizer)
    )


def prepare_data(config: DataConfig, *, vocab_size: int, report: Callable[[str], None] | None) -> None:
    """Build the sample corpus if the config reads it and it is not there yet."""
    if config.sample_corpus:
        prepare(config.sample_corpus, vocab_size=vocab_size, report=report)


def check_vocabulary(model: ModelConfig, tokenizer: TokenizerIdentity) -> None:
    """Raises ValueError if the tokenizer has an id for which the model has no row."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is too small for the tokenizer {tokenizer.name}, whose ids go up to "
            f"{tokenizer.vocab_size - 1}; set model.vocab_size={tokenizer.vocab_size}"
        )


def build_schedule(run: RunConfig) -> Schedule:
    """Batch sizes, learning rates and the length of the whole run."""
    batch = BatchSize(run.train.global_batch_size, run.train.batch_ramp)
    seq_len = run.data.seq_len
    steps = run.train.max_steps or batch.steps(-(-(run.train.max_tokens or 0) // seq_len))
    samples = batch.samples(steps)
    rate = LearningRate(run.schedule, peak=run.optim.lr, total_steps=steps, total_tokens=samples * seq_len)
    return Schedule(batch, rate, total_steps=steps, total_samples=samples, seq_len=seq_len)


def build_grid(parallel: ParallelConfig, engine: EngineConfig, *, world_size: int, device: torch.device) -> Mesh:
    """The grid of processes. Where the engine shards nothing, all data-parallel processes are replicas."""
    degrees = parallel.degrees(world_size)
    if engine.replicates:
        degrees = replace(degrees, dp_replicate=degrees.data_parallel, dp_shard=1)
    return build_mesh(degrees, device=device)


def build_engine(run: RunConfig, mesh: Mesh, *, source: Weights | None = None) -> Engine:
    """The engine over the assembled objective, with initial weights or those (and with them the optimizer's state) of `source`."""
    config: EngineConfig = run.engine
    dtype = run.precision.dtype
    objective, shards = assemble(
        run.model,
        mesh=mesh,
        parallel=run.parallel,
        fill=seeded(run.seed) if source is None else from_tensors(source.tensors),
        wrap=run.objective.build,
        distribute=config.distribute(mesh, dtype),
    )
    engine = config.build(objective, optim=run.optim, dtype=dtype, mesh=mesh, shards=shards)
    if source is not None:
        load_optimizer(engine, source)
    return engine


def build_trainer(
    run: RunConfig, runtime: Runtime, *, store: CheckpointStore, watchdog: Watchdog, checkpoint: Path | None
) -> Trainer:
    """A trainer at the position of `checkpoint`, or at the start.

    Raises ValueError for anything in the config, the data or the checkpoint that does not fit together.
    """
    tokenizer = open_tokenizer(run.data)
    check_vocabulary(run.model, tokenizer)
    schedule = build_schedule(run)
    blend = open_blend(run.data, tokenizer=tokenizer, seed=run.seed, total_samples=schedule.total_samples)
    manifest = store.read_manifest(checkpoint) if checkpoint else None
    if manifest:
        check_same_run(manifest, run, tokenizer)
        blend = resume_blend(
            blend,
            saved=manifest["data"],
            consumed_samples=manifest["consumed_samples"],
            allow=run.resume_allow,
        )
    consumed = manifest["consumed_samples"] if manifest else 0
    check_batch_sizes(run, schedule, consumed=consumed, world_size=runtime.world_size)
    mesh = build_grid(run.parallel, run.engine, world_size=runtime.world_size, device=runtime.device)
    starts_from_source = checkpoint is None and run.init_from.path is not None
    engine = build_engine(run, mesh, source=open_source(run, tokenizer, store.ranks) if starts_from_source else None)
    trainer = Trainer(
        config=run.train,
        runtime=runtime,
        engine=engine,
        schedule=schedule,
        loader=build_loader(run, blend, open_validation(run.data, tokenizer), mesh),
        store=store,
        tracker=build_tracker(run.tracking, main_process=runtime.is_main, has_key=has_wandb_key()),
        metrics=build_metrics(run, runtime, consumed=consumed),
        status=Status(Path(run.run.dir), main_process=runtime.is_main),
        watchdog=watchdog,
        profiler=Profiler(run.profile, Path(run.run.dir) / "profile", main_process=runtime.is_main),
        base_manifest={
            "config": to_dict(run),
            "tokenizer": tokenizer.fingerprint,
            "schedule": to_dict(run.schedule),
            "data": blend.state(),
            "parameters": parameter_count(run.model),
        },
    )
    if checkpoint:
        trainer.restore(checkpoint)
    return trainer


def check_batch_sizes(run: RunConfig, schedule: Schedule, *, consumed: int, world_size: int) -> None:
    """Raise ValueError when a batch size between here and this job's end does not split evenly over its ranks.

    Only those: a ramp may grow together with the number of ranks, in jobs that end at its stages (`train.stop_at`).
    """
    batch, end = schedule.batch, schedule.total_samples
    if run.train.stop_at is not None:
        end = min(end, batch.samples(run.train.stop_at))
    first_steps = [batch.samples(batch.steps(stage.from_samples)) for stage in run.train.batch_ramp]
    ranks = run.parallel.degrees(world_size).data_parallel
    for start in [consumed, *(step for step in first_steps if consumed < step < end)]:
        rank_samples(0, batch=batch.at(start), micro_batch=run.train.micro_batch_size, rank=0, ranks=ranks)


def build_loader(run: RunConfig, blend: Blend, held_out: dict[str, Source], mesh: Mesh) -> DataLoader:
    """This data-parallel rank's batches, on its device."""
    return DataLoader(
        blend,
        HeldOut(held_out, run.data.validation.windows),
        micro_batch_size=run.train.micro_batch_size,
        rank=mesh.data_parallel_rank,
        ranks=mesh.data_parallel_size,
        device=mesh.device,
    )


def build_metrics(run: RunConfig, runtime: Runtime, *, consumed: int) -> Metrics:
    """What turns steps into rows; measures the peak of the device where no data sheet has it."""
    work = Work(
        flops_per_token=flops_per_token(run.model, run.data.seq_len),
        seq_len=run.data.seq_len,
        devices=runtime.world_size,
        peak=device_peak_flops(runtime.device, run.precision.name),
        device=runtime.device,
    )
    return Metrics(work, log_every=run.train.log_every, consumed_samples=consumed)


def run_info(run: RunConfig, trainer: Trainer) -> RunInfo:
    """What trackers show of a run."""
    model = run.model
    ignored = (
        " (the cuts | of model.pattern have no effect without pipeline parallelism)"
        if "|" in (model.pattern or "")
        else ""
    )
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
        tokens_per_step=run.train.global_batch_size * run.data.seq_len,
        layout=f"{run.engine.name}, {run.precision.name}, {trainer.runtime.world_size} process(es)",
        peak=str(trainer.metrics.work.peak),
    )
