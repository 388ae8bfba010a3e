"""Bytes that a rank holds, by what they are for, and the peak within a step: measured on real ranks, beside the theory.

    python benchmarks/memory.py [--ranks 1 2] [--precision fp32] [--hidden 256] [--layers 4] [--micro-batch 1] [--recompute none]

Every number is counted in unique storages of the live tensors of rank 0, so views and buffers that share memory count once:

    weights     what the forward pass reads, between two steps
    optimizer   master weights that are not the weights themselves, and Adam's two moments
    gradients   what lives when the update begins and did not live between two steps
    other       everything else that stays between two steps (ZeRO-3's gradient partition and its bucket)
    peak        the most that was allocated at once within a step, above what stays

Theory, for P parameters a tensor-parallel rank and d data-parallel ranks, in bytes (Rajbhandari et al. 2020, section 3):

    mode                     weights   optimizer        gradients
    fsdp none                4P        8P               4P
    fsdp optimizer, full     4P/d      8P/d             4P/d        (optimizer keeps the gathered weights within the step)
    zero 1                   wP        4P/d + 8P/d      4P          (w: 4 in fp32, 2 in bf16)
    zero 2                   wP        4P/d + 8P/d      4P/d
    zero 3                   wP/d      4P/d + 8P/d      4P/d
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from megatron_lite.data.config import DataConfig
from megatron_lite.engine.deepspeed import DeepSpeedConfig
from megatron_lite.engine.fsdp import FsdpConfig
from megatron_lite.models.config import AttentionConfig, MlpConfig, ModelConfig
from megatron_lite.models.huggingface import expected_shapes
from megatron_lite.objectives.next_token import NextTokenConfig
from megatron_lite.parallel.mesh import Mesh, ParallelConfig
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.training.build import build_engine, build_grid
from megatron_lite.training.config import RunConfig
from megatron_lite.training.teacher import Teacher
from megatron_lite.training.trainer import TrainConfig
from megatron_lite.weights import Weights

PARTS = ("weights", "optimizer", "gradients", "other", "peak")
VOCABULARY, LENGTH = 4096, 128
DOCUMENT = 100  # tokens


@dataclass(frozen=True)
class Mode:
    """One row: an engine's settings and the tensor-parallel degree."""

    name: str
    engine: FsdpConfig | DeepSpeedConfig
    tp: bool = False

    def theory(self, parameters: int, ranks: int, precision: str) -> dict[str, float]:
        """Bytes by part, where the theory says something."""
        local = parameters / (ranks if self.tp else 1)
        d = 1 if self.tp else ranks
        if isinstance(self.engine, FsdpConfig):
            d = 1 if self.engine.shard == "none" else d
            return {"weights": 4 * local / d, "optimizer": 8 * local / d, "gradients": 4 * local / d}
        stage, width = self.engine.zero_stage, 2 if precision == "bf16" else 4
        return {
            "weights": width * local / (d if stage == 3 else 1),
            "optimizer": 12 * local / d,
            "gradients": 4 * local / (d if stage >= 2 else 1),
        }


MODES = [
    Mode("fsdp none", FsdpConfig(shard="none")),
    Mode("fsdp optimizer", FsdpConfig(shard="optimizer")),
    Mode("fsdp full", FsdpConfig(shard="full")),
    Mode("zero 1", DeepSpeedConfig(zero_stage=1)),
    Mode("zero 2", DeepSpeedConfig(zero_stage=2)),
    Mode("zero 3", DeepSpeedConfig(zero_stage=3)),
    Mode("tp", FsdpConfig(shard="none"), tp=True),
]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: a GPU for each rank")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    options = parser.parse_args()
    rows = [(mode, ranks, *in_processes(mode, ranks, options)) for ranks in options.ranks for mode in MODES]
    show(rows, options)


def in_processes(mode: Mode, ranks: int, options: argparse.Namespace) -> tuple[dict[str, int], int]:
    """(bytes by part on rank 0, parameters of the model)."""
    return measured(run_config(mode, ranks, options), ranks, device=options.device)


def measured(
    run: RunConfig, ranks: int, *, device: str = "cpu", teacher: ModelConfig | None = None
) -> tuple[dict[str, int], int]:
    """(bytes by part on rank 0 of a step of `run`, parameters of its model), from processes that end afterwards. teacher: the model that
    its objective learns from; its weights are zeros."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(measure, args=(ranks, run, device, folder, teacher), nprocs=ranks)
        return torch.load(Path(folder, "result.pt"), weights_only=True)


def measure(
    rank: int, ranks: int, run: RunConfig, device_type: str, folder: str, teacher: ModelConfig | None = None
) -> None:
    """In a rank: two steps to settle, then one that is watched."""
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    backend = "cuda:nccl,cpu:gloo" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    mesh = build_grid(run.parallel, run.engine, world_size=ranks, device=device)
    result = measured_here(run, mesh, teacher=teacher)
    if rank == 0:
        torch.save(result, Path(folder, "result.pt"))
    dist.destroy_process_group()


class Zeros:
    """The weights of a model that has none (a `TensorSource`)."""

    def __init__(self, model: ModelConfig) -> None:
        self.shapes = expected_shapes(model)

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        return torch.zeros(*sizes)


def measured_here(run: RunConfig, mesh: Mesh, *, teacher: ModelConfig | None = None) -> tuple[dict[str, int], int]:
    """(bytes by part of this rank, parameters of the model)."""
    zeros = None if teacher is None else Teacher(Weights(Path(), teacher, Zeros(teacher)), identity="")
    engine = build_engine(run, mesh, teacher=zeros)
    batches = random_batches(run, mesh)
    for _ in range(2):
        engine.train_step(batches, lr=1e-4)
    staying = storages()
    weights, optimizer = held(engine)
    found = {
        "weights": total(weights),
        "optimizer": total({key: size for key, size in optimizer.items() if key not in weights}),
        "other": total({key: size for key, size in staying.items() if key not in weights | optimizer}),
        "peak": peak(lambda: engine.train_step(batches, lr=1e-4)),
    }
    found["gradients"] = at_update(engine, batches, staying)
    return found, sum(torch.Size(info.global_shape).numel() for info in engine.shards.values())


def random_batches(run: RunConfig, mesh: Mesh) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches of one step."""
    draw = torch.Generator().manual_seed(mesh.data_parallel_rank)
    size = run.train.micro_batch_size
    count = max(1, run.train.global_batch_size // (size * mesh.data_parallel_size))
    batches = []
    for _ in range(count):
        words = torch.randint(1, run.model.vocab_size, (size, run.data.seq_len + 1), generator=draw)
        batch = {
            "tokens": words[:, :-1],
            "targets": words[:, 1:],
            "loss_mask": torch.ones_like(words[:, 1:], dtype=torch.bool),
        }
        if run.data.reset_attention:
            batch["documents"] = torch.arange(run.data.seq_len).expand(size, -1) // DOCUMENT
        batches.append(mesh.place(batch))
    return batches


def run_config(mode: Mode, ranks: int, options: argparse.Namespace) -> RunConfig:
    """The config of one row."""
    model = ModelConfig(
        family="nemotron4", num_layers=options.layers, hidden_size=options.hidden,
        attention=AttentionConfig(heads=8, kv_heads=8), mlp=MlpConfig(ffn_size=4 * options.hidden),
        vocab_size=VOCABULARY, max_seq_len=LENGTH,
    )  # fmt: skip
    parallel = ParallelConfig(tp=ranks if mode.tp else 1, recompute=options.recompute)
    return RunConfig(
        model=model,
        engine=mode.engine,
        parallel=parallel,
        objective=NextTokenConfig(),
        precision=PrecisionConfig(options.precision),
        data=DataConfig(seq_len=LENGTH),
        train=TrainConfig(micro_batch_size=options.micro_batch, global_batch_size=1),
    )


def storages() -> dict[int, int]:
    """Address -> bytes of the storage of every live tensor."""
    gc.collect()
    found = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and type(item) is not FakeTensor]
    # a gradient that nobody has asked for has no object in Python yet
    gradients = [item.grad for item in found if item.is_leaf and item.grad is not None]
    return of([*found, *gradients])


def of(tensors: list[torch.Tensor]) -> dict[int, int]:
    found = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if local.device.type != "meta" and local.untyped_storage().nbytes():
            found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return found


def total(sizes: dict[int, int]) -> int:
    return sum(sizes.values())


def held(engine: Any) -> tuple[dict[int, int], dict[int, int]]:
    """The storages of weights, and of master weights and moments."""
    weights = of([getattr(p, "ds_tensor", p) for p in engine.parameters.values()])
    if hasattr(engine, "adamw"):
        states = engine.adamw.state
        return weights, of([*states.keys(), *(tensor for state in states.values() for tensor in state.values())])
    return weights, of([*engine.optimizer.parameters.values(), *engine.optimizer.moments().values()])


def at_update(engine: Any, batches: list[dict[str, torch.Tensor]], staying: dict[int, int]) -> int:
    """Bytes of what is new when the update begins."""
    seen = []
    owner, name = (engine, "_take_gradients") if hasattr(engine, "_take_gradients") else (engine.engine, "step")
    right = getattr(owner, name)

    def watched(*arguments: Any) -> Any:
        seen.append(total({key: size for key, size in storages().items() if key not in staying and size > 64 * 64}))
        return right(*arguments)

    setattr(owner, name, watched)
    engine.train_step(batches, lr=1e-4)
    return seen[0]


def peak(step: Any) -> int:
    """The most that was allocated at once while `step` ran, above what had been before: on a GPU if it is used, else on the CPU."""
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        step()
    events = [event for event in watch.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def show(rows: list[tuple[Mode, int, dict[str, int], int]], options: argparse.Namespace) -> None:
    """MiB measured, the theory in brackets, and what the mode lowers by at least a fifth."""
    table = Table(
        title=f"{rows[0][3]:,} parameters, {options.precision}, recompute {options.recompute}: MiB of rank 0 (theory)"
    )
    for column in ("mode", "ranks", *PARTS, "lowers"):
        table.add_column(column, justify="left" if column in ("mode", "lowers") else "right")
    for mode, ranks, found, parameters in rows:
        expected = mode.theory(parameters, ranks, options.precision)
        cells = [f"{found[p] / 2**20:.1f}" + (f" ({expected[p] / 2**20:.1f})" if p in expected else "") for p in PARTS]
        plain = next(row[2] for row in rows if row[0].name == "fsdp none" and row[1] == ranks)
        lower = [part for part in PARTS if found[part] < 0.8 * plain[part] and plain[part] > 2**18]
        table.add_row(mode.name, str(ranks), *cells, ", ".join(lower) or "nothing")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
