"""Where a job starts: at the newest checkpoint of its run, at a named checkpoint, from other weights, or from scratch; and
whether it is allowed to.

Notable features:
- `resume=auto|never|<path>` is about the checkpoints of this run, and a command goes back to a path only once (see
  `lineage`); `init_from=<path>` loads weights from elsewhere and is ignored once the run has a checkpoint.
- Changes that would make it a different run (model, batch sizes, tokenizer; `data.resume` checks the data) are refused by
  name.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.store import CheckpointStore
from megatron_lite.config.compose import flatten, from_dict, to_dict
from megatron_lite.data.phases import Phases
from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.engine.base import Engine
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.huggingface import expected_shapes
from megatron_lite.optim.schedule import Progress, Schedule
from megatron_lite.parallel.global_view import State
from megatron_lite.precision.recipes import Precision
from megatron_lite.ranks import Ranks
from megatron_lite.training.config import RunConfig
from megatron_lite.training.lineage import ONCE, Origin, descendants
from megatron_lite.weights import OPTIMIZER, Weights, model_config, open_weights


@dataclass(frozen=True)
class ResumePoint:
    """checkpoint: what to load. led_by: the entry to append to the lineage if `resume=<path>` goes to that checkpoint
    now."""

    checkpoint: Path
    led_by: dict[str, Any] | None = None


def choose_checkpoint(run: RunConfig, store: CheckpointStore) -> ResumePoint | None:
    """The checkpoint that `resume` selects; None starts from scratch. The same on every rank.

    Raises ValueError when `resume=never` would write over a run.
    """
    if store.directory.exists() and not store.directory.is_dir():
        raise ValueError(
            f"{store.directory} is a file, where the checkpoints belong; move it away, or give another run.dir"
        )
    if run.resume == "never":
        left = [name for name in ("metrics.jsonl", "checkpoints") if (Path(run.run.dir) / name).exists()]
        if left:
            raise ValueError(
                f"resume=never, but run.dir={run.run.dir} already holds a run ({', '.join(left)}); give another run.dir, "
                "resume=auto to continue it, or delete it"
            )
        return None
    own = (store.directory.resolve(), store.directory.parent.resolve())
    if run.resume == "auto" or (Path(run.resume).resolve() in own and store.recovered_steps()):
        newest = store.newest_valid()
        if newest is None and store.steps():  # a fresh start would overwrite what may be repaired
            raise ValueError(
                f"run.dir={run.run.dir} holds checkpoints, but none of them is whole (steps {store.steps()}, see the warnings "
                "above); put a whole copy of one back, or give another run.dir"
            )
        return ResumePoint(newest) if newest else None
    return _led_by_path(run, store)


def _led_by_path(run: RunConfig, store: CheckpointStore) -> ResumePoint:
    """The newest checkpoint of `run.dir` that descends from `resume=<path>`, or the path's own where none does yet."""
    steps = store.recovered_steps()
    origin, going_on, of_any_word = store.ranks.first("lineage", lambda: _descent(run, store.directory, steps))
    newest = store.newest_of(going_on)
    if newest is not None:
        if store.ranks.rank == 0:
            print(
                f"resume={run.resume} was gone back to by an earlier job, whose newest checkpoint is {newest.name}; to go back "
                "once more give resume_again=true, or a word that was not given before"
            )
        return ResumePoint(newest)
    if not Path(run.resume).exists():
        raise ValueError(
            f"resume={run.resume} does not exist; give a checkpoint or a run directory, auto for the newest one of run.dir, "
            "or never"
        )
    found = store.find(run.resume)
    step = store.read_manifest(found)["step"]
    branched = bool(of_any_word) and step < min(steps)  # off from here, all that there is
    if steps and not branched and found.resolve().parent != store.directory.resolve():
        raise ValueError(
            f"resume={run.resume} is a checkpoint of another run, and run.dir={run.run.dir} holds checkpoints of its own, which "
            "would be dropped; set run.dir to the run that it belongs to, or to an empty folder"
        )
    return ResumePoint(found, origin.entry(step))


def _descent(run: RunConfig, directory: Path, steps: list[int]) -> tuple[Origin, list[int], list[int]]:
    """What `resume` names, and the steps that descend from it: by its word of `resume_again`, and by any."""
    origin = Origin.named(run.resume, run.resume_again)
    by_word = descendants(origin, directory, steps)
    return origin, by_word, descendants(replace(origin, word=ONCE), directory, steps)


def choose_model(run: RunConfig, store: CheckpointStore, checkpoint: Path | None) -> RunConfig:
    """The run with the model config that holds: of its checkpoint's source for a weights-only start, else its own.

    A resumed run takes it from its own checkpoint: it never looks at `init_from` again.
    """
    if not run.takes_model_of_source:
        return run
    if checkpoint:
        model = from_dict(ModelConfig, store.read_manifest(checkpoint)["config"]["model"])
    else:
        model = model_config(run.init_from.path or "", store.ranks)
    return replace(run, model=model)


def open_source(run: RunConfig, tokenizer: TokenizerIdentity, ranks: Ranks | None = None) -> Weights:
    """What `init_from` names, verified once, shared over the ranks. Warns when it was trained with another tokenizer.

    Raises ValueError naming tensors and shapes that do not fit the run's model.
    """
    weights = open_weights(run.init_from.path or "", ranks, more=OPTIMIZER if run.init_from.optimizer else ())
    if weights.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        warnings.warn(
            f"init_from={run.init_from.path} was trained with tokenizer {weights.tokenizer_fingerprint}, this run reads "
            f"{tokenizer.fingerprint} ({run.data.tokenizer}): its embeddings belong to other words",
            stacklevel=2,
        )
    shapes = expected_shapes(run.model)
    different = sorted(shapes.keys() ^ set(weights.tensors.names()))
    if different:
        raise ValueError(
            f"init_from={run.init_from.path} holds another model; tensors on one side only: {', '.join(different[:5])}; drop the model "
            "keys to take the source's model"
        )
    for name, shape in shapes.items():
        found = weights.tensors.shape(name)
        if found != tuple(shape):
            raise ValueError(
                f"init_from={run.init_from.path}: {name} has shape {found} there and {tuple(shape)} here; "
                "drop the model keys to take the source's model"
            )
    if run.init_from.optimizer and not weights.more:
        raise ValueError(
            f"init_from.optimizer=true, but {run.init_from.path} holds no optimizer state; drop it, or name a run"
        )
    return weights


def load_optimizer(engine: Engine, source: Weights) -> None:
    """Give the engine this rank's shards of the source's optimizer state, and its counters. Nothing where it holds none."""
    if not source.more or source.manifest is None:
        return
    pieces = {}
    for key, piece in engine.state().tensors.items():
        kind, name = key.split(".", 1)
        if kind in source.more:
            piece.tensor().copy_(source.more[kind].read(name, piece.offsets, piece.sizes))
            pieces[key] = piece
    engine.load_state(State(pieces, source.manifest["counters"]))


def progress_of(manifest: dict[str, Any] | None) -> Progress:
    """Where the run stood when a checkpoint was written; at its beginning without one."""
    if manifest is None:
        return Progress()
    return Progress(manifest["step"], manifest["consumed_samples"], manifest["consumed_tokens"])


def lineage_of(manifest: dict[str, Any] | None, point: ResumePoint | None) -> list[dict[str, Any]]:
    """The lineage of the checkpoints that a job will write."""
    past = manifest["lineage"] if manifest else []
    return [*past, point.led_by] if point and point.led_by else past


def report_changes(schedule: Schedule, *, before: Schedule | None, phases: Phases) -> None:
    """Report the effects of a length, batch size or schedule that differs from the checkpoint's: where the ends of phases
    now are (they keep their sample numbers), and a learning rate that jumps.
    """
    total = schedule.end.consumed_samples
    for fraction, sample in phases.boundaries.items():
        if round(Fraction(fraction) * total) != sample:
            reached = f"{sample / total:.3f} of the run" if sample < total else "past its end, so it is never reached"
            print(
                f"data.phases: until_fraction={float(Fraction(fraction))} stays at sample {sample}, now {reached} "
                f"({total} samples); until_samples moves a phase that has not begun"
            )
    here = schedule.projection.start
    if before is None or here.step >= schedule.total_steps:
        return
    then, now = before.rate(here), schedule.rate(here)
    if abs(now - then) > 0.01 * max(now, then):
        warnings.warn(
            f"the learning rate jumps at step {here.step}: the checkpoint's config gives {then:.3g} there, this one {now:.3g} (its "
            f"schedule ends at step {schedule.total_steps}, the checkpoint's at {before.total_steps})",
            stacklevel=2,
        )


def report_precision(manifest: dict[str, Any], precision: Precision) -> None:
    """Say that the precision is not the checkpoint's, and what that means for the scales of delayed scaling."""
    before, now = manifest["config"].get("precision") or {}, to_dict(precision)
    keys = ["name"] if before.get("name") != now["name"] else [key for key in now if before.get(key) != now[key]]
    if not before or not keys:
        return
    changes = ", ".join(f"precision.{key}={now[key]} ({before.get(key)} in the checkpoint)" for key in keys)
    has_histories = "amax_history_len" in now
    scales = (
        "; scales and histories start afresh where layer or length are not the checkpoint's" if has_histories else ""
    )
    print(f"from here on {changes}{scales}")


def report_objective(manifest: dict[str, Any], run: RunConfig) -> None:
    """Say which settings of the objective are not the checkpoint's. Its teacher is compared by `check_same_teacher`."""
    before, now = manifest["config"].get("objective") or {}, to_dict(run.objective)
    keys = [key for key in sorted(before.keys() | now.keys()) if key != "teacher" and before.get(key) != now.get(key)]
    if before and keys:
        changes = (f"objective.{key}={now.get(key)} ({before.get(key)} in the checkpoint)" for key in keys)
        print(f"from here on {', '.join(changes)}")


def check_same_run(manifest: dict[str, Any], run: RunConfig, tokenizer: TokenizerIdentity) -> None:
    """Refuse to continue with another model, batch size or tokenizer than the checkpoint's (the blend checks the data).

    Raises ValueError with the differing keys; those named in `resume_allow` may differ.
    """
    if not manifest["data"]:
        raise ValueError(
            f"run.dir={run.run.dir} holds converted weights and no training state to continue from; give another run.dir and "
            f"init_from={run.run.dir}"
        )
    # through ModelConfig: a key that came after this checkpoint has its default there
    model = to_dict(from_dict(ModelConfig, manifest["config"]["model"]))
    before, now = flatten(manifest["config"] | {"model": model}), flatten(to_dict(run))
    fixed = ("model.", "train.global_batch_size", "train.batch_ramp")
    keys = sorted(key for key in before.keys() | now.keys() if key.startswith(fixed))
    different = [
        f"{key}={now.get(key)} (checkpoint: {before.get(key)})"
        for key in keys
        if before.get(key) != now.get(key) and not is_allowed(key, run.resume_allow)
    ]
    if manifest["tokenizer"] != tokenizer.fingerprint and not is_allowed("data.tokenizer", run.resume_allow):
        different.append(f"data.tokenizer: fingerprint {tokenizer.fingerprint} (checkpoint: {manifest['tokenizer']})")
    if different:
        raise ValueError(
            f"run.dir={run.run.dir} holds a run with another config: {'; '.join(different)}. Give it another run.dir, "
            "set these back, or name the keys in resume_allow=[...]"
        )


def is_allowed(key: str, allow: list[str]) -> bool:
    """Whether `resume_allow` names the key, or a section that it is in."""
    return any(key == name or key.startswith(name + ".") for name in allow)
