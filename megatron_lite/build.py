"""The one place where a config becomes objects.

    RunConfig -> tokenizer, blend, mesh -> decoder on the meta device -> parallelize -> materialise -> objective -> engine
              -> Trainer at the position of the newest checkpoint

Whatever can be refused is refused before the run directory is touched.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.checkpoint.reader import SavedTensors, find_checkpoint
from megatron_lite.checkpoint.store import CheckpointStore
from megatron_lite.config import RunConfig, flatten, from_dict, to_dict, to_yaml
from megatron_lite.data.blend import Blend, open_blend
from megatron_lite.data.config import DataConfig
from megatron_lite.data.loader import Loader, rank_samples, validation_batches
from megatron_lite.data.manifest import TokenizerIdentity
from megatron_lite.data.resume import resume_blend
from megatron_lite.data.sample_corpus import prepare
from megatron_lite.data.source import Source, open_validation
from megatron_lite.data.tokenizer import fingerprint, load_tokenizer
from megatron_lite.engine import deepspeed, fsdp
from megatron_lite.engine.base import Batch, Engine
from megatron_lite.metrics import Metrics, Work, device_peak_flops
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.flops import flops_per_token, parameter_count
from megatron_lite.objectives.registry import build_objective
from megatron_lite.optim.schedule import BatchSize, LearningRate
from megatron_lite.parallel.layers import shard_info
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.parallel.parallelize import materialize, parallelize, vocabulary_shard
from megatron_lite.runtime import Runtime, has_wandb_key
from megatron_lite.tracking import RunInfo, build_tracker
from megatron_lite.tracking.profile import Profiler
from megatron_lite.tracking.status import Status
from megatron_lite.trainer import Schedule, Trainer
from megatron_lite.watchdog import Watchdog
from megatron_lite.weights import TOKENIZER, copy_tokenizer, open_weights


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


def open_tokenizer(config: DataConfig) -> TokenizerIdentity:
    """What data and model must agree on with the tokenizer of `data.tokenizer`.

    Raises ValueError when neither a tokenizer nor `data.eod_id` is given.
    """
    if not config.tokenizer:
        raise ValueError(
            "data.tokenizer is empty: name the folder of the tokenizer that the token files were written with"
        )
    tokenizer = load_tokenizer(config.tokenizer)
    return TokenizerIdentity(fingerprint(tokenizer), config.tokenizer, tokenizer.eos_token_id, len(tokenizer))


def prepare_data(config: DataConfig, *, vocab_size: int, report: Callable[[str], None] | None) -> None:
    """Build the sample corpus if the config reads it and it is not there yet."""
    if config.sample_corpus:
        prepare(config.sample_corpus, vocab_size=vocab_size, report=report)


def check_vocabulary(model: ModelConfig, tokenizer: TokenizerIdentity) -> None:
    """Raise ValueError when the tokenizer has words that the model has no row for."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the {tokenizer.vocab_size} entries of the tokenizer "
            f"{tokenizer.name}; set model.vocab_size={tokenizer.vocab_size}"
        )


def choose_model(run: RunConfig, store: CheckpointStore, checkpoint: Path | None) -> RunConfig:
    """The run with the model config that holds: of its checkpoint's source for a weights-only start, else its own.

    A resumed run takes it from its own checkpoint: it never looks at `init_from` again.
    """
    if not run.takes_model_of_source:
        return run
    if checkpoint:
        model = from_dict(ModelConfig, store.read_manifest(checkpoint)["config"]["model"])
    else:
        model = open_weights(run.init_from.path or "").config
    return replace(run, model=model)


def start_from(engine: Engine, run: RunConfig, tokenizer: TokenizerIdentity) -> None:
    """Fill the engine with the weights (and with `init_from.optimizer` Adam's state) of `init_from`, tensor by tensor.

    Warns when they were trained with another tokenizer. Raises ValueError naming tensors and shapes that do not fit.
    """
    weights = open_weights(run.init_from.path or "")
    if weights.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        warnings.warn(
            f"init_from={run.init_from.path} was trained with tokenizer {weights.tokenizer_fingerprint}, this run reads "
            f"{tokenizer.fingerprint} ({run.data.tokenizer}): its embeddings belong to other words",
            stacklevel=2,
        )
    kinds: dict[str, Mapping[str, Tensor]] = {"model": weights.tensors}
    adam_step = 0
    if run.init_from.optimizer:
        if weights.manifest is None or not weights.manifest["adam_step"]:
            raise ValueError(
                f"init_from.optimizer=true, but {run.init_from.path} holds no optimizer state; drop it, or name a run"
            )
        kinds |= {kind: SavedTensors(weights.path, prefix=f"{kind}.") for kind in ("exp_avg", "exp_avg_sq")}
        adam_step = weights.manifest["adam_step"]
    pieces = {key: piece for key, piece in engine.state().items() if key.split(".", 1)[0] in kinds}
    wanted = {key.split(".", 1)[1] for key in pieces}
    different = sorted(wanted ^ set(weights.tensors))
    if different:
        raise ValueError(
            f"init_from={run.init_from.path} holds another model; tensors on one side only: {', '.join(different[:5])}"
        )
    for key, piece in pieces.items():
        kind, name = key.split(".", 1)
        tensor = kinds[kind][name]
        if tuple(tensor.shape) != piece.global_shape:
            raise ValueError(
                f"init_from={run.init_from.path}: {name} has shape {tuple(tensor.shape)} there and {piece.global_shape} here; "
                "drop the model keys to take the source's model"
            )
        box = tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.local.shape))
        piece.local.copy_(tensor[box])
    engine.load_state(pieces, adam_step=adam_step)


def build_schedule(run: RunConfig) -> Schedule:
    """Batch sizes, learning rates and the length of the whole run."""
    batch = BatchSize(run.train.global_batch_size, run.train.batch_ramp)
    seq_len = run.data.seq_len
    steps = run.train.max_steps or batch.steps(-(-(run.train.max_tokens or 0) // seq_len))
    samples = batch.samples(steps)
    rate = LearningRate(run.schedule, peak=run.optim.lr, horizon_steps=steps, horizon_tokens=samples * seq_len)
    return Schedule(batch, rate, horizon_steps=steps, horizon_samples=samples, seq_len=seq_len)


def build_grid(run: RunConfig, *, world_size: int, device_type: str) -> Mesh | None:
    """The grid of processes, None for one. Where the engine shards nothing, all data-parallel processes are replicas."""
    parallel = run.parallel
    if run.engine.replicates:
        dp_replicate, dp_shard, _ = parallel.degrees(world_size)
        parallel = replace(parallel, dp_replicate=dp_replicate * dp_shard, dp_shard=1)
    return build_mesh(parallel, world_size=world_size, device_type=device_type)


# kind -> (what shards a module as soon as it has memory, the engine over the whole objective)
ENGINES: dict[str, tuple[Any, Any]] = {
    "fsdp": (fsdp.sharder, fsdp.FsdpEngine),
    "deepspeed": (deepspeed.sharder, deepspeed.DeepSpeedEngine),
}


def build_engine(run: RunConfig, mesh: Mesh | None, device: torch.device) -> Engine:
    """Model, objective and engine: meta -> parallelize -> materialise and shard module by module."""
    dtype = run.precision.dtype
    with torch.device("meta"):
        decoder = Decoder(run.model)
    parallelize(decoder, mesh, run.parallel)
    shards = shard_info(decoder)
    sharder, engine = ENGINES[run.engine.kind]
    materialize(decoder, seed=run.seed, device=device, shard=sharder(run.engine, mesh, dtype))
    vocab_start, group = vocabulary_shard(decoder)
    return engine(
        build_objective(run.objective, decoder, vocab_start=vocab_start, group=group),
        config=run.engine,
        optim=run.optim,
        dtype=dtype,
        mesh=mesh,
        shards=shards,
    )


def choose_checkpoint(run: RunConfig, store: CheckpointStore) -> Path | None:
    """The checkpoint that `resume` means: None starts afresh. The same on every rank.

    Raises ValueError when `resume=never` would write over a run.
    """
    if run.resume == "never":
        left = [name for name in ("metrics.jsonl", "checkpoints") if (Path(run.run.dir) / name).exists()]
        if left:
            raise ValueError(
                f"resume=never, but run.dir={run.run.dir} already holds a run ({', '.join(left)}); give another run.dir, "
                "resume=auto to go on with it, or delete it"
            )
        return None
    if run.resume == "auto":
        newest = store.newest_valid()
        if newest is None and store.steps():  # starting afresh would write over what may be mended
            raise ValueError(
                f"run.dir={run.run.dir} holds checkpoints, but none of them is whole (steps {store.steps()}, see the warnings "
                "above); put a whole copy of one back, or give another run.dir"
            )
        return newest
    if not Path(run.resume).exists():
        raise ValueError(
            f"resume={run.resume} does not exist; give a checkpoint or a run directory, auto for the newest one of run.dir, "
            "or never"
        )
    return find_checkpoint(run.resume)


def build_trainer(run: RunConfig, runtime: Runtime, *, store: CheckpointStore, checkpoint: Path | None) -> Trainer:
    """A trainer at the position of `checkpoint`, or at the start.

    Raises ValueError for anything in the config, the data or the checkpoint that does not fit together.
    """
    tokenizer = open_tokenizer(run.data)
    check_vocabulary(run.model, tokenizer)
    schedule = build_schedule(run)
    blend = open_blend(run.data, tokenizer=tokenizer, seed=run.seed, horizon_samples=schedule.horizon_samples)
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
    mesh = build_grid(run, world_size=runtime.world_size, device_type=runtime.device.type)
    engine = build_engine(run, mesh, runtime.device)
    trainer = Trainer(
        config=run.train,
        runtime=runtime,
        engine=engine,
        schedule=schedule,
        feed=build_feed(run, blend, open_validation(run.data, tokenizer), mesh, runtime.device),
        store=store,
        tracker=build_tracker(run.tracking, main_process=runtime.is_main, has_key=has_wandb_key()),
        metrics=build_metrics(run, runtime, consumed=consumed),
        status=Status(Path(run.run.dir), main_process=runtime.is_main),
        watchdog=Watchdog(run.watchdog, runtime=runtime, run_dir=Path(run.run.dir)),
        profiler=Profiler(run.profile, Path(run.run.dir) / "profile", main_process=runtime.is_main),
        facts={
            "config": to_dict(run),
            "tokenizer": tokenizer.fingerprint,
            "schedule": to_dict(run.schedule),
            "data": blend.state(),
        },
    )
    if checkpoint:
        trainer.restore(checkpoint)
    elif run.init_from.path:
        start_from(engine, run, tokenizer)
    return trainer


def check_batch_sizes(run: RunConfig, schedule: Schedule, *, consumed: int, world_size: int) -> None:
    """Raise ValueError when a batch size between here and this job's end does not split evenly over its ranks.

    Only those: a ramp may grow together with the number of ranks, in jobs that end at its stages (`train.stop_at`).
    """
    batch, end = schedule.batch, schedule.horizon_samples
    if run.train.stop_at is not None:
        end = min(end, batch.samples(run.train.stop_at))
    first_steps = [batch.samples(batch.steps(stage.from_samples)) for stage in run.train.batch_ramp]
    dp_replicate, dp_shard, _ = run.parallel.degrees(world_size)
    for start in [consumed, *(step for step in first_steps if consumed < step < end)]:
        rank_samples(
            0, batch=batch.at(start), micro_batch=run.train.micro_batch_size, rank=0, ranks=dp_replicate * dp_shard
        )


def build_feed(
    run: RunConfig, blend: Blend, held_out: dict[str, Source], mesh: Mesh | None, device: torch.device
) -> DataFeed:
    """This data-parallel rank's batches."""
    rank, ranks = (mesh.data_parallel_rank, mesh.data_parallel_size) if mesh else (0, 1)
    size = run.train.micro_batch_size
    loader = Loader(
        blend,
        micro_batch_size=size,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        pin_memory=device.type == "cuda",
    )
    return DataFeed(blend, loader, held_out, run.data.validation.windows, size, rank, ranks, device)


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


def check_same_run(manifest: dict[str, Any], run: RunConfig, tokenizer: TokenizerIdentity) -> None:
    """Refuse to go on with another model, batch size or tokenizer than the checkpoint's (the blend checks the data).

    Raises ValueError with the differing keys; those named in `resume_allow` may differ.
    """
    if not manifest["data"]:
        raise ValueError(
            f"run.dir={run.run.dir} holds converted weights and no training state to go on with; give another run.dir and "
            f"init_from={run.run.dir}"
        )
    before, now = flatten(manifest["config"]), flatten(to_dict(run))
    fixed = ("model.", "train.global_batch_size", "train.batch_ramp")
    keys = sorted(key for key in before.keys() | now.keys() if key.startswith(fixed))
    different = [
        f"{key}={now.get(key)} (checkpoint: {before.get(key)})"
        for key in keys
        if before.get(key) != now.get(key) and not _allowed(key, run.resume_allow)
    ]
    if manifest["tokenizer"] != tokenizer.fingerprint and not _allowed("data.tokenizer", run.resume_allow):
        different.append(f"data.tokenizer: fingerprint {tokenizer.fingerprint} (checkpoint: {manifest['tokenizer']})")
    if different:
        raise ValueError(
            f"run.dir={run.run.dir} holds a run with another config: {'; '.join(different)}. Give it another run.dir, "
            "set these back, or name the keys in resume_allow=[...]"
        )


def _allowed(key: str, allow: list[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in allow)


def run_info(run: RunConfig, trainer: Trainer) -> RunInfo:
    """What trackers show of a run."""
    model = run.model
    size = f"{len(model.letters)} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}"
    return RunInfo(
        run_dir=Path(run.run.dir),
        name=run.run.name,
        total_steps=trainer.schedule.horizon_steps,
        start_step=trainer.position.step,
        config=to_dict(run),
        model=f"{model.family}, {size}",
        parameters=parameter_count(model),
        tokens_per_step=run.train.global_batch_size * run.data.seq_len,
        layout=f"{run.engine.kind}, {run.precision.name}, {trainer.runtime.world_size} process(es)",
        peak=str(trainer.metrics.work.peak),
    )


def write_config(run: RunConfig) -> None:
    """`config.yaml` of the run directory: the config that this job runs with, whole or not there."""
    target = Path(run.run.dir) / "config.yaml"
    temporary = target.with_suffix(".yaml.tmp")
    try:
        temporary.write_text(to_yaml(run), encoding="utf-8")
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def keep_tokenizer(run: RunConfig) -> None:
    """Copy the tokenizer's files into the run directory, so that the run can be evaluated and exported wherever it is moved."""
    target = Path(run.run.dir) / TOKENIZER
    if target.exists():
        return
    copy = target.with_name(f".tmp-{TOKENIZER}")  # whole or not there: a job may be killed here
    shutil.rmtree(copy, ignore_errors=True)
    copy_tokenizer(Path(run.data.tokenizer), copy)
    os.replace(copy, target)
