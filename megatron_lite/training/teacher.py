"""The teacher of a distillation: opened and checked with the config, assembled beside the model that is trained.

Notable features:
- It comes from wherever weights come from, and may have any width and family; what it must share with the run is the
  tokenizer (by its fingerprint) and the rows of the output embedding.
- It is sharded by FSDP2 over the same ranks under every engine (see `parallel/frozen.py`); DeepSpeed does not see it.
- Its identity is in every checkpoint: a run does not continue with another teacher, such as a newer checkpoint of a run that is
  still training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.engine.fsdp import FsdpConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.models.config import ModelConfig
from megatron_lite.parallel.assemble import assemble, from_tensors
from megatron_lite.parallel.frozen import FrozenDecoder
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parallelize import Recipe
from megatron_lite.parallel.sequence_length import check_layout
from megatron_lite.ranks import Ranks
from megatron_lite.training.config import RunConfig
from megatron_lite.training.resume import is_allowed
from megatron_lite.weights import Weights, identity_of, model_config, open_weights

KEY = "objective.teacher"


@dataclass(frozen=True)
class Teacher:
    """Opened, not read. identity: a hash that changes with its weights, wherever they are."""

    weights: Weights
    identity: str

    def state(self) -> dict[str, str]:
        """What a checkpoint's manifest says about it."""
        return {"path": str(self.weights.path), "identity": self.identity}


def find_teacher(run: RunConfig, ranks: Ranks) -> None:
    """Raise ValueError naming the key if the objective names a teacher that is not there. Reads no weights, so that it can be called
    before data is prepared. Collective for a run with a teacher."""
    path = run.objective.teacher_path
    if path is None:
        return

    def find() -> None:
        try:
            model_config(path, Ranks())
        except (ValueError, CheckpointError) as error:
            raise ValueError(f"{KEY}: {error}") from error

    ranks.attempt("look for the teacher", find)


def open_teacher(run: RunConfig, tokenizer: TokenizerIdentity, ranks: Ranks) -> Teacher | None:
    """What the objective names as its teacher, verified once, shared over the ranks; None where it names none.

    Raises ValueError naming the key if it does not belong to the run's tokenizer, vocabulary, sequence length or layout, and as
    `open_weights` does.
    """
    if run.objective.teacher_path is None:
        return None
    weights = open_weights(run.objective.teacher_path, ranks)
    ranks.attempt("check the teacher", partial(_check, run, weights, tokenizer))
    return Teacher(weights, identity_of(weights, ranks))


def check_same_teacher(manifest: Mapping[str, Any], run: RunConfig, teacher: Teacher | None) -> None:
    """Raise ValueError if a checkpoint's run had another teacher, or this one has none any more, unless `resume_allow` names the key."""
    before = manifest["teacher"]
    if not before or is_allowed(KEY, run.resume_allow):
        return
    if teacher is None:
        raise ValueError(
            f"this run has no teacher, but run.dir={run.run.dir} learned from {before['path']}; set objective=distillation "
            f"{KEY}={before['path']}, give another run.dir, or allow the change with resume_allow=[{KEY}]"
        )
    if before["identity"] == teacher.identity:
        return
    raise ValueError(
        f"{KEY}={run.objective.teacher_path} is {teacher.weights.path} with the hash {teacher.identity}, but run.dir={run.run.dir} "
        f"learned from {before['path']} with the hash {before['identity']}. Name that checkpoint itself, give another run.dir, or "
        f"allow the change with resume_allow=[{KEY}]"
    )


def assemble_teacher(run: RunConfig, mesh: Mesh, weights: Weights) -> FrozenDecoder:
    """This process's part of the teacher."""
    dtype = run.objective.teacher_dtype or run.precision.dtype
    frozen, _ = assemble(
        weights.config,
        mesh=mesh,
        recipe=Recipe(run.parallel),
        fill=from_tensors(weights.tensors),
        wrap=partial(FrozenDecoder, dtype=dtype),
        distribute=FsdpConfig(shard="full").distribute(mesh, dtype),
    )
    return frozen


def _check(run: RunConfig, weights: Weights, tokenizer: TokenizerIdentity) -> None:
    named = f"{KEY}={run.objective.teacher_path}"
    model = weights.config
    if weights.tokenizer_fingerprint is None:
        raise ValueError(
            f"{named} has no tokenizer beside it, so it is unknown whether its vocabulary is the run's; copy the files of its "
            "tokenizer into the folder"
        )
    if weights.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{named} was trained with tokenizer {weights.tokenizer_fingerprint}, but data.tokenizer={run.data.tokenizer} is "
            f"{tokenizer.fingerprint}: a teacher must have the tokenizer of the data"
        )
    check_teacher(run, model, named=named)


def check_teacher(run: RunConfig, model: ModelConfig, *, named: str) -> None:
    """Raise ValueError if a teacher with this model cannot read what the student reads, or cannot be divided like it. named: how the error
    names it."""
    for key in ("vocab_size", "padded_vocab"):
        theirs, ours = getattr(model, key), getattr(run.model, key)
        if theirs != ours:
            setting = "model.vocab_size" if key == "vocab_size" else "model.vocab_multiple (rows with padding)"
            raise ValueError(
                f"{named} has an output embedding for {theirs} words, but {setting} makes {ours} here; give the student the same"
            )
    # A teacher without positions reads any length: its max_seq_len says how long the sequences were that it learned from.
    if model.rotary_dim and run.data.seq_len > model.max_seq_len:
        raise ValueError(
            f"{named} takes sequences of {model.max_seq_len} at most, but data.seq_len={run.data.seq_len}; shorten that"
        )
    try:
        check_layout(model, run.parallel, seq_len=run.data.seq_len)
    except ValueError as error:
        raise ValueError(f"{named} cannot be divided like the student: {error}") from error
