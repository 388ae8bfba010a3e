"""The same 20 steps on any layout and engine, and how far they are from one process.

What makes wrong gradients visible: no warm-up, clipping at every step, documents of uneven lengths with masked ends, a last
sample with hardly a counted token, biases, and norms, biases and embeddings outside decay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.store import CheckpointConfig, CheckpointStore
from megatron_lite.engine.deepspeed import DeepSpeedConfig
from megatron_lite.engine.fsdp import FsdpConfig
from megatron_lite.objectives.distillation import DistillationConfig
from megatron_lite.objectives.next_token import NextTokenConfig
from megatron_lite.optim.optimizer import OptimConfig
from megatron_lite.parallel.global_view import State
from megatron_lite.parallel.mesh import ParallelConfig
from megatron_lite.precision.recipes import precision_class
from megatron_lite.training.build import build_engine, build_grid
from megatron_lite.training.config import RunConfig
from megatron_lite.training.teacher import Teacher
from megatron_lite.weights import open_weights
from tests.distributed import device
from tests.engine.bugs import BUGS
from tests.model_configs import model_config

STEPS = 20
SAMPLES = 8
LENGTH = 32
WORDS = 300  # padded to 384
END = 0
CLIP = 0.25
PEAK = 1e-3
# Adam's g / (|g| + eps) has the slope 1 / eps at 0: with the usual 1e-8 it makes a tenth of the learning rate out of a difference
# of 1e-9, which is the last digit of gradients of 1e-2. With 1e-6 weights agree as well as gradients do.
EPS = 1e-6

# Reordered fp32 sums differ by 1e-7 in losses and by at most 2e-6 in gradients, whether torch, oneDNN and MKL use AVX-512, AVX2 or SSE;
# a doubled gradient moves 20 losses of Adam by 3e-6.
TOLERANCE = 1e-5

Boxes = dict[str, tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """One layout, engine and precision. `parallel` and `engine` are fields of their configs, `model` holds dotted keys.

    numbers: fields of the precision's config. distillation: fields of its config, with the checkpoint of a teacher; empty for
    next-token prediction.
    """

    parallel: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    model: dict[str, Any] = field(default_factory=dict)
    micro_batch: int = 2
    distillation: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trace:
    """What one rank saw. The boxes are its pieces of the weights at the start, and of weights and moment after step 1."""

    losses: list[float]
    norms: list[float]
    boxes: dict[str, Boxes]
    parts: list[dict[str, float]] = field(default_factory=list)


def run_config(case: Case) -> RunConfig:
    """The typed config of a case."""
    model: dict[str, Any] = {
        "family": "nemotron4", "num_layers": 2, "hidden_size": 32, "attention.heads": 4, "attention.kv_heads": 4,
        "attention.head_dim": 8, "mlp.ffn_size": 64, "vocab_size": WORDS, "max_seq_len": LENGTH, "mlp.activation": "squared_relu",
        "norm": "layernorm1p", "linear_bias": True,
    }  # fmt: skip
    kinds, settings = {"fsdp": FsdpConfig, "deepspeed": DeepSpeedConfig}, dict(case.engine)
    return RunConfig(
        seed=7,
        model=model_config(model | case.model),
        engine=kinds[settings.pop("kind", "fsdp")](**settings),
        objective=DistillationConfig(**case.distillation) if case.distillation else NextTokenConfig(),
        parallel=ParallelConfig(**case.parallel),
        precision=precision_class(case.precision)(case.precision, **case.numbers),
        optim=OptimConfig(lr=PEAK, eps=EPS, weight_decay=0.5, clip_grad=CLIP),
    )


def sample(step: int, index: int, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Sample `index` of the global batch of `step`: the next word is mostly three times this one plus one."""
    draw = torch.Generator().manual_seed(1000 * step + index)
    words = torch.randint(1, WORDS, (length + 1,), generator=draw)
    for position in range(length):
        if torch.rand((), generator=draw) < 0.7:
            words[position + 1] = (3 * words[position] + 1) % WORDS
    words[torch.rand(length + 1, generator=draw) < 0.1] = END
    tokens, targets = words[:-1], words[1:]
    mask = targets != END
    if index == SAMPLES - 1:
        mask[3:] = False
    ends = (tokens == END).long()
    return {"tokens": tokens, "targets": targets, "loss_mask": mask, "documents": ends.cumsum(0) - ends}


def micro_batches(step: int, *, rank: int = 0, ranks: int = 1, size: int = 1) -> list[dict[str, torch.Tensor]]:
    """The share of data-parallel rank `rank` of the global batch of `step`."""
    share = SAMPLES // ranks
    samples = [sample(step, index) for index in range(rank * share, (rank + 1) * share)]
    return [
        {key: torch.stack([s[key] for s in samples[start : start + size]]).to(device()) for key in samples[0]}
        for start in range(0, share, size)
    ]


def placed(engine: Any, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """What this process computes of the micro-batches of its data-parallel rank."""
    return [engine.mesh.place(batch) for batch in batches]


def open_engine(case: Case, world_size: int) -> tuple[Any, int, int]:
    """(engine, this process's data-parallel rank, number of them)."""
    run = run_config(case)
    run.engine.validate()
    mesh = build_grid(run.parallel, run.engine, world_size=world_size, device=device())
    path = run.objective.teacher_path
    teacher = Teacher(open_weights(path), identity="") if path else None
    return build_engine(run, mesh, teacher=teacher), mesh.data_parallel_rank, mesh.data_parallel_size


def train(rank: int, world_size: int, case: Case, *, steps: int = STEPS, bug: str | None = None) -> Trace:
    """Train from the initial weights. `bug` names one of `BUGS`."""
    with torch.random.fork_rng():
        torch.manual_seed(rank)  # nothing may depend on it
        engine, place, places = open_engine(case, world_size)
    undo = BUGS[bug](engine) if bug else None
    try:
        trace = Trace([], [], {"start": boxes(engine, "model.")})
        move_off_zero(engine)
        for step in range(1, steps + 1):
            batches = micro_batches(step, rank=place, ranks=places, size=case.micro_batch)
            result = engine.train_step(placed(engine, batches), lr=PEAK * (1 - step / 50))
            assert result.skipped == 0
            trace.losses.append(result.loss.item())
            trace.norms.append(result.grad_norm.item())
            trace.parts.append({name: value.item() for name, value in result.parts.items()})
            if step == 1:
                trace.boxes |= {"weights": boxes(engine, "model."), "moment": boxes(engine, "exp_avg.")}
    finally:
        if undo:
            undo()
    trace.boxes |= {"end": boxes(engine, "")}
    return trace


def move_off_zero(engine: Any) -> None:
    """Give parameters that start at zero (biases, gains less one) other values, the same on every layout.

    A weight that was zero is nothing but lr g / (|g| + eps) after one step, the worst conditioned number there is (see EPS).
    """
    pieces = {key: piece for key, piece in engine.state().tensors.items() if key.startswith("model.")}
    for key, piece in pieces.items():
        if len(piece.global_shape) == 1:
            draw = torch.Generator().manual_seed(len(key))
            whole = 0.1 * torch.randn(piece.global_shape, generator=draw)
            piece.local.copy_(whole[piece.offsets[0] : piece.offsets[0] + len(piece.local)])
    engine.load_state(State(pieces, {"adam_step": 0}))


def boxes(engine: Any, prefix: str) -> Boxes:
    """The engine's pieces as plain values."""
    return {
        key: (piece.global_shape, piece.offsets, piece.local.detach().cpu().clone())
        for key, piece in engine.state().tensors.items()
        if key.startswith(prefix)
    }


def assemble(ranks: list[Boxes]) -> dict[str, torch.Tensor]:
    """Global tensors from all ranks' boxes; fails where a number is missing or ranks hold different bits of it."""
    whole = {name: torch.full(shape, torch.nan) for name, (shape, _, _) in ranks[0].items()}
    for held in ranks:
        for name, (_, offsets, local) in held.items():
            target = whole[name][tuple(slice(o, o + n) for o, n in zip(offsets, local.shape))]
            known = ~target.isnan()
            assert torch.equal(target[known], local[known]), f"ranks hold different values of {name}"
            target.copy_(local)
    missing = [name for name, tensor in whole.items() if tensor.isnan().any()]
    assert not missing, missing
    return whole


def differences(reference: list[Trace], traces: list[Trace], tolerance: float = TOLERANCE) -> list[str]:
    """What is farther from `reference` than the tolerance allows: losses, norms, gradients and weights of step 1.

    `traces` may end earlier than `reference`.
    """
    found = []
    for name, wanted, got in (
        ("loss", reference[0].losses, traces[0].losses),
        ("grad_norm", reference[0].norms, traces[0].norms),
    ):
        worst = max(abs(a - b) / abs(a) for a, b in zip(wanted, got))
        if not worst <= tolerance:
            found.append(f"{name} by {worst:.1e}")
    for kind in ("moment", "weights"):
        try:
            wanted, got = (assemble([trace.boxes[kind] for trace in side]) for side in (reference, traces))
        except AssertionError as error:
            found.append(str(error))
            continue
        assert wanted.keys() == got.keys()
        for name, tensor in wanted.items():
            # before clipping, Adam's first moment after one step is a tenth of the gradient
            scale = [max(1.0, side[0].norms[0] / CLIP) if kind == "moment" else 1.0 for side in (reference, traces)]
            worst = (tensor * scale[0] - got[name] * scale[1]).abs().max() / (tensor * scale[0]).abs().max()
            if not worst <= tolerance:
                found.append(f"{kind} of {name} by {worst:.1e}")
    return found


# ---- checkpoints


def save_after(rank: int, world_size: int, case: Case, directory: str, *, step: int, stop: int) -> Trace:
    """Train to `stop`, with a checkpoint after `step`."""
    engine, place, places = open_engine(case, world_size)
    store = CheckpointStore.with_own_group(Path(directory), CheckpointConfig(every=0))
    trace = Trace([], [], {})
    for number in range(1, stop + 1):
        batches = micro_batches(number, rank=place, ranks=places, size=case.micro_batch)
        result = engine.train_step(placed(engine, batches), lr=PEAK)
        trace.losses.append(result.loss.item())
        trace.norms.append(result.grad_norm.item())
        if number == step:
            trace.boxes["saved"] = boxes(engine, "")
            state = engine.state()
            store.save(step, state.tensors, manifest_state(state.counters))
    return trace


def resume_from(rank: int, world_size: int, case: Case, directory: str, *, step: int, stop: int) -> Trace:
    """Load the checkpoint of `step` and go on to `stop`."""
    engine, place, places = open_engine(case, world_size)
    store = CheckpointStore.with_own_group(Path(directory), CheckpointConfig(every=0))
    pieces = engine.state().tensors
    for piece in pieces.values():
        piece.local.fill_(torch.nan)
    counters = store.load(step, pieces)["counters"]
    engine.load_state(State(pieces, counters))
    assert engine.state().counters == counters == {"adam_step": step}
    trace = Trace([], [], {"loaded": boxes(engine, "")})
    for number in range(step + 1, stop + 1):
        batches = micro_batches(number, rank=place, ranks=places, size=case.micro_batch)
        result = engine.train_step(placed(engine, batches), lr=PEAK)
        trace.losses.append(result.loss.item())
        trace.norms.append(result.grad_norm.item())
    return trace


def manifest_state(counters: dict[str, int]) -> dict[str, Any]:
    """The rest of a manifest, which an engine knows nothing about."""
    return {
        "consumed_samples": 0,
        "config": {},
        "tokenizer": "",
        "schedule": {},
        "data": {},
        "rng": {},
        "counters": counters,
    }
