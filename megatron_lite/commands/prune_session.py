"""What `mlite prune` is asked for, and what reads the model for it: its importance, and losses of candidates."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from megatron_lite.atomic import check_place
from megatron_lite.commands.command import check_at_least_one
from megatron_lite.commands.evaluate import compute_as_trained, data_tokenizer, mean_loss
from megatron_lite.compress.depth import Probe, RemovalOptions, removal_order
from megatron_lite.compress.heat_map import draw_scores
from megatron_lite.compress.importance import Meter, calibrate, calibration_batches
from megatron_lite.compress.scores import FILE, ImportanceConfig, Scores, random_scores
from megatron_lite.compress.search import BudgetConfig
from megatron_lite.compress.target import TargetConfig
from megatron_lite.data.blend import Blend, open_blend
from megatron_lite.data.config import DataConfig
from megatron_lite.data.loader import HeldOut, validation_batches
from megatron_lite.data.packing import Batch
from megatron_lite.engine.fsdp import computing
from megatron_lite.models.config import ModelConfig
from megatron_lite.parallel.assemble import assemble, from_tensors
from megatron_lite.parallel.mesh import Mesh, ParallelConfig
from megatron_lite.parallel.parallelize import Recipe
from megatron_lite.parallel.plans import check_divisible
from megatron_lite.parallel.sequence_length import check_layout
from megatron_lite.ranks import Ranks
from megatron_lite.runtime import Runtime
from megatron_lite.training.build import build_grid
from megatron_lite.training.data import held_out
from megatron_lite.training.support import refuse_unsupported
from megatron_lite.weights import Weights, check_empty, identity_of


@dataclass
class PruneConfig:
    """`mlite prune`. Keys that are not given are taken from the run of `checkpoint` (see `compose_over_run`).

    output: the run directory that is made. scores: the folder that keeps the importance, null: `<output>-scores`; what is there is used,
    and a calibration that was interrupted goes on. head_residual: the residual of pruned query heads is added to the kept ones.
    """

    checkpoint: str = "???"
    output: str = "???"
    scores: str | None = None
    target: TargetConfig = field(default_factory=TargetConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    head_residual: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    precision: Any = None  # a `Precision`, chosen by its group
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: Any = None  # an `EngineConfig`, chosen by its group
    micro_batch_size: int = 8
    threads: int | None = None  # CPU threads of a process; null leaves the choice to torch
    seed: int = 1234  # of the order of the calibration data
    json: bool = False

    def validate(self, world_size: int = 1) -> None:
        """Raise ValueError naming the key if a value is invalid."""
        check_at_least_one(self, "micro_batch_size", "threads")
        if self.target.is_empty and not self.budget.is_given:
            raise ValueError("target is empty: give a size, such as target.hidden_size=4096, or a budget")
        if not self.output.strip():
            raise ValueError("output is empty; name a new folder")
        check_empty(Path(self.output), key="output")
        self._check_scores()
        self.parallel.validate(world_size)
        refuse_unsupported(
            "prune", parallel=self.parallel, engine=self.engine, precision=self.precision, world_size=world_size
        )
        for section in (self.budget, self.importance, self.precision, self.engine):
            section.validate()
        if self.head_residual and self.precision.name == "fp8_delayed":
            raise ValueError(
                "head_residual=true with precision=fp8_delayed: the changed queries outgrow the scales of the run; set precision=bf16 or "
                "fp8_current, or head_residual=false"
            )

    def _check_scores(self) -> None:
        """Raises ValueError for a folder of scores that cannot be made, or that would fill `output` before the model is written."""
        if self.scores is not None and not self.scores.strip():
            raise ValueError("scores is empty; name a folder, or give scores=null for <output>-scores")
        folder, output = self.scores_folder.resolve(), Path(self.output).resolve()
        if folder == output or output in folder.parents:
            raise ValueError(
                f"scores={self.scores} is in output={self.output}, which must be a new folder; give another scores="
            )
        if folder.exists() and not folder.is_dir():
            raise ValueError(
                f"scores={self.scores} is not a folder; name the folder that holds the scores, or a new one"
            )

    @property
    def scores_folder(self) -> Path:
        """Where the importance is kept."""
        return Path(f"{self.output.rstrip('/')}-scores" if self.scores is None else self.scores)


class Progress:
    """Prints how far something is, and how long the rest will take, every few seconds and at the end."""

    def __init__(self, what: str, done: int, of: int, *, seconds: float = 10.0) -> None:
        self.what, self.before, self.of, self.seconds = what, done, of, seconds
        self.start = self.last = time.monotonic()

    def __call__(self, done: int) -> None:
        """done: of all of them."""
        now = time.monotonic()
        if now - self.last < self.seconds and done < self.of:
            return
        self.last, rate = now, (done - self.before) / max(now - self.start, 1e-9)
        left = f"{rate:.3g} a second, {(self.of - done) / rate / 60:.1f} minutes left"
        print(f"{self.what}: {done} of {self.of}, {left}", flush=True)


@dataclass
class Session:
    """What reads the model: for its importance, and for losses. Every method is collective."""

    config: PruneConfig
    weights: Weights
    runtime: Runtime
    ranks: Ranks

    def __post_init__(self) -> None:
        self._meshes: dict[int, Mesh] = {}  # by tensor-parallel degree
        self._data: tuple[Blend | None, HeldOut] | None = None

    def scores(self) -> Scores:
        """The importance: drawn, or from `scores` where it is complete, else measured."""
        config, folder = self.config, self.config.scores_folder
        if config.importance.score == "random":
            return random_scores(self.weights.config, config.importance.seed)
        blend, _ = self._opened()
        if blend is not None:
            check = partial(check_layout, self.weights.config, config.parallel, seq_len=config.data.seq_len)
            self.ranks.attempt("check the layout", check)
        expected = self._identity(blend)
        found = self.ranks.first("look for scores", lambda: _found_scores(folder, expected))
        removals = 0 if config.importance.depth == "cosine" else self._removals()
        if found.samples < config.importance.samples or len(found.removed) < removals:
            self.ranks.first("check the place of the scores", lambda: check_place(folder / FILE))
            self._measure(found, blend, removals)
            if self.runtime.is_main:
                draw_scores(folder / "importance.png", found, self.weights.config, config.importance)
        return self.ranks.first("share the scores", lambda: found)  # each rank selects from the same bits

    def _removals(self) -> int:
        """Units that an iterative removal has to order."""
        model, budget = self.weights.config, self.config.budget
        searched = budget.units_to_remove(model) if budget.is_given else 0
        return max(searched, self.config.target.units_to_remove(model))

    def losses(self, weights: Weights, *, windows: int | None = None) -> dict[str, float]:
        """Held-out loss by source of these weights, empty without data. windows: in all; None: `data.validation.windows` of each source."""
        _, read = self._opened()
        if not read.sources:
            return {}
        of_each = read.windows if windows is None else -(-windows // len(read.sources))
        probe, mesh = self._assembled(weights)
        losses = {}
        for name, source in read.sources.items():
            batches = validation_batches(
                source,
                windows=of_each,
                micro_batch_size=self.config.micro_batch_size,
                rank=mesh.data_parallel_rank,
                ranks=mesh.data_parallel_size,
            )
            losses[name] = mean_loss(probe, map(mesh.place, batches), self.config.precision.dtype, runtime=self.runtime)
        return losses

    def _identity(self, blend: Blend | None) -> dict[str, Any]:
        """What scores must have been computed with to be these."""
        expected = self.config.importance.identity() | {
            "checkpoint": identity_of(self.weights, self.ranks),
            "precision": self.config.precision.name,
        }
        if blend is not None:  # without data, finished scores of any can be used
            expected["data"] = sha256(json.dumps(blend.state(), sort_keys=True).encode()).hexdigest()[:16]
        return expected

    def _measure(self, scores: Scores, blend: Blend | None, removals: int) -> None:
        config = self.config
        if blend is None:
            raise ValueError(
                f"checkpoint={config.checkpoint} does not say what data it was trained on; give data=<a group> to measure "
                "importance on, or scores=<a folder> with a finished calibration"
            )
        probe, mesh = self._assembled(self.weights)

        def forward(batch: Batch, *arguments: Any, **options: Any) -> Any:
            with torch.no_grad(), computing(config.precision.dtype, probe):
                return probe(batch, *arguments, **options)

        def keep() -> None:
            if self.runtime.is_main:
                scores.save(config.scores_folder)

        def keep_removal() -> None:
            keep()
            if self.runtime.is_main:
                print(f"depth: {len(scores.removed)} of {removals} layers removed", flush=True)

        progress = Progress("importance, samples", scores.samples, config.importance.samples)
        batches = partial(self._batches, blend, mesh)
        meter = Meter(probe.decoder, mesh, config.importance)
        calibrate(
            meter,
            batches,
            partial(forward, states=True),
            scores=scores,
            keep=lambda _: keep(),
            report=progress if self.runtime.is_main else lambda samples: None,
        )
        removal_order(
            probe.decoder,
            forward,
            lambda: batches(range(config.importance.depth_samples)),
            mesh=mesh,
            removed=scores.removed,
            options=RemovalOptions(removals, loss=config.importance.depth == "loss", keep=keep_removal),
        )

    def _batches(self, blend: Blend, mesh: Mesh, samples: range) -> Iterator[Batch]:
        batches = calibration_batches(
            blend,
            samples,
            micro_batch_size=self.config.micro_batch_size,
            rank=mesh.data_parallel_rank,
            ranks=mesh.data_parallel_size,
        )
        yield from map(mesh.place, batches)

    def _assembled(self, weights: Weights) -> tuple[Probe, Mesh]:
        """The model in evaluation mode, and the mesh that divides it; a rank reads only what it holds."""
        config = self.config
        parallel = dividing(weights.config, config.parallel)
        mesh = self._mesh(parallel)
        probe, _ = self.ranks.attempt(
            "read the weights",
            lambda: assemble(
                weights.config,
                mesh=mesh,
                recipe=Recipe(parallel, config.precision),
                fill=from_tensors(weights.tensors),
                wrap=Probe,
                distribute=config.engine.distribute(mesh, config.precision.dtype),
            ),
        )
        probe.eval()
        self.ranks.attempt("read the scales", lambda: compute_as_trained(probe, config.precision, weights))
        return probe, mesh

    def _mesh(self, parallel: ParallelConfig) -> Mesh:
        if parallel.tp not in self._meshes:
            world_size, device = self.runtime.world_size, self.runtime.device
            self._meshes[parallel.tp] = build_grid(parallel, self.config.engine, world_size=world_size, device=device)
        return self._meshes[parallel.tp]

    def _opened(self) -> tuple[Blend | None, HeldOut]:
        """The training data of the calibration and the held-out sources; (None, nothing) where no data is given."""
        if self._data is None:
            self._data = self.ranks.attempt("open the data", self._open)
        return self._data

    def _open(self) -> tuple[Blend | None, HeldOut]:
        config = self.config
        if not config.data.groups:
            return None, HeldOut({}, 0)
        tokenizer = data_tokenizer(config.checkpoint, config.data, self.weights, self.runtime)
        samples = config.importance.samples
        blend = open_blend(config.data, tokenizer=tokenizer, seed=config.seed, total_samples=samples)
        return blend, held_out(config.data, tokenizer)


def dividing(model: ModelConfig, parallel: ParallelConfig) -> ParallelConfig:
    """`parallel`, or where its tensor-parallel ranks cannot share this model, which may have any size, with fewer of them."""
    for tp in range(parallel.tp, 0, -1):
        if parallel.tp % tp == 0 and _divides(model, tp):
            break
    dp_shard = parallel.dp_shard if tp == parallel.tp else None
    sequence_parallel = parallel.sequence_parallel and tp > 1
    # a compiled layer calls no hooks of its parts
    return replace(parallel, tp=tp, dp_shard=dp_shard, sequence_parallel=sequence_parallel, compile=False)


def _divides(model: ModelConfig, tp: int) -> bool:
    try:
        check_divisible(model, tp=tp)
    except ValueError:
        return False
    return True


def _found_scores(folder: Path, expected: dict[str, Any]) -> Scores:
    found = Scores.load(folder) or Scores(expected)
    found.check(expected, folder)
    return found
