"""`mlite plan`: the size of a model and its shapes on a rank; with `gpus` and `gpu` what a training costs there, before it runs.

python -m megatron_lite plan model=nemotron_nano2_12b
python -m megatron_lite plan model=nemotron4_15b parallel.tp=8
python -m megatron_lite plan experiment=nemotron4_15b gpus=768 gpu=h100 price=2.5
python -m megatron_lite plan experiment=nemotron4_15b gpus=64 gpu=h100 search=true train.global_batch_size=256

Everything is built on the meta device, without memory and without a GPU: see docs/plan.md.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_lite.commands import plan_report
from megatron_lite.commands.command import run_command
from megatron_lite.errors import CheckpointError
from megatron_lite.hardware import Gpu, gpu_named
from megatron_lite.models.cache_size import cache_bytes
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.flops import flops_per_token, parameter_count
from megatron_lite.models.layers import LAYER_TYPES
from megatron_lite.parallel.layers import ShardInfo
from megatron_lite.parallel.plans import check_divisible
from megatron_lite.planner import plan as planner
from megatron_lite.planner.job import Job
from megatron_lite.planner.memory import OUTSIDE
from megatron_lite.planner.search import search
from megatron_lite.planner.shapes import local_shapes
from megatron_lite.tracking.memory import write_memory_plot
from megatron_lite.training.config import RunConfig, compose_run
from megatron_lite.training.planning import check_layout, job_of, teacher_of


@dataclass
class PlanConfig(RunConfig):
    """`mlite plan`: a run as `mlite train` takes it.

    seq_len: for the FLOPs per token and the cache of a model; null = model.max_seq_len. gpus, gpu: how many and which (a name of
    `hardware.GPUS`); without them only sizes are printed. price: of a GPU for an hour. search: look for the fastest layouts, of which
    `show` are listed; after `search_seconds` no further cut of the layers is looked at. teacher: the model of a distillation's teacher (a
    name of configs/model) where `objective.teacher` is not here.
    scan_kernels: flash-linear-attention and mamba-ssm are installed on the GPUs. json: print one JSON line, too. plot: a PNG to draw the
    memory by part in.
    """

    seq_len: int | None = None
    gpus: int | None = None
    gpu: str | None = None
    price: float | None = None
    search: bool = False
    show: int = 8
    search_seconds: float = 120.0
    teacher: str | None = None
    scan_kernels: bool = False
    json: bool = False
    plot: str | None = None


def main() -> None:
    """Parse, count, exit."""
    run_command("plan", PlanConfig, "How large a model is, and what training it on some GPUs costs.", plan)


def plan(config: PlanConfig) -> int:
    """Print sizes and shapes, or what a training costs. Raises ValueError when the model cannot be built, or not on these GPUs."""
    one_layout = config.gpus is not None and not config.search
    if config.plot and not one_layout:
        raise ValueError(
            f"plot={config.plot} draws one layout on some GPUs: add gpus=<how many> gpu=<which>, and no search=true"
        )
    if config.gpus is None and config.gpu is None:
        if config.search:
            raise ValueError(
                "search=true looks for a layout on some GPUs: add gpus=<how many> gpu=<which>, as in gpus=64 gpu=h100"
            )
        return sizes(config)
    gpu = _checked(config)
    job = job_of(config, config.gpus or 0, teacher=_teacher(config), scan_kernels=config.scan_kernels)
    return _search(config, job, gpu) if config.search else _cost(config, job, gpu)


def _checked(config: PlanConfig) -> Gpu:
    """The GPU. Raises ValueError for what is missing beside it."""
    for key, value, example in (("gpus", config.gpus, "64"), ("gpu", config.gpu, "h100")):
        if value is None:
            raise ValueError(f"{key} is not given; add {key}=..., as in {key}={example}")
    for key, number, least in (
        ("gpus", config.gpus, 1),
        ("show", config.show, 1),
        ("price", config.price, 0),
        ("search_seconds", config.search_seconds, 0),
    ):
        if number is not None and number < least:
            raise ValueError(f"{key}={number} must be at least {least}")
    if config.seq_len is not None:
        raise ValueError(
            f"seq_len={config.seq_len} is for sizes; with gpus the tokens of a sample are data.seq_len={config.seq_len}"
        )
    return gpu_named(config.gpu or "")


def _teacher(config: PlanConfig) -> ModelConfig | None:
    if config.teacher is None:
        try:
            return teacher_of(config)
        except (ValueError, CheckpointError) as error:
            raise ValueError(
                f"objective.teacher: {error}; or name its model, as in teacher=mistral_nemo_12b"
            ) from error
    if config.objective.teacher_path is None:
        raise ValueError(f"teacher={config.teacher} is for objective=distillation; drop it, or set that")
    return compose_run([f"model={config.teacher}"]).model


def _cost(config: PlanConfig, job: Job, gpu: Gpu) -> int:
    check_layout(config, job)
    result = planner.plan(job, gpu)
    tokens = config.train.max_tokens
    if tokens is None and config.train.max_steps is not None:
        tokens = config.train.max_steps * job.tokens
    bill = None if tokens is None else result.bill(tokens, config.price)
    plan_report.print_plan(result, bill)
    if config.plot:
        title = f"memory of a rank of {job.gpus:,} x {gpu.name}, in {result.memory.moment}"
        parts = result.memory.parts | {"outside": OUTSIDE}
        print(f"drawn: {write_memory_plot(Path(config.plot), parts, title=title, available=gpu.memory)}")
    if config.json:
        print(json.dumps(result.to_dict() | ({} if bill is None else {"run": asdict(bill)})))
    return 0


def _search(config: PlanConfig, job: Job, gpu: Gpu) -> int:
    check = partial(check_layout, config)
    found = search(job, gpu, check=check, show=config.show, patience=config.search_seconds)
    plan_report.print_found(found, job, gpu)
    if config.json:
        rows = {key: [one.to_dict() for one in getattr(found, key)] for key in ("best", "others")}
        print(json.dumps({"gpus": job.gpus, "gpu": gpu.name, **rows}))
    return 0


def sizes(config: PlanConfig) -> int:
    """Print sizes and shapes. Raises ValueError when the model cannot be built or does not divide by `parallel.tp`."""
    model, tp = config.model, config.parallel.tp
    config.parallel.validate(world_size=tp * config.parallel.cp * config.parallel.dp_replicate)
    model.validate()
    check_divisible(model, tp=tp, sequence_parallel=config.parallel.sequence_parallel and config.parallel.cp == 1)
    seq_len = model.max_seq_len if config.seq_len is None else config.seq_len
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1")
    infos, local = local_shapes(model, tp=tp)
    total = parameter_count(model)
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(f"{total:,} parameters, {total - vocabulary:,} without embedding and head", highlight=False)
    counts = Counter(model.symbols)
    layers = ", ".join(f"{count} {LAYER_TYPES[symbol].name}" for symbol, count in counts.items())
    console.print(f"{len(model.symbols)} layers: {layers}", highlight=False)
    flops = flops_per_token(model, seq_len)
    console.print(f"{flops:.4g} FLOPs to train on a token of a sequence of {seq_len:,}", highlight=False)
    held = cache_bytes(model, seq_len) / 2**20
    console.print(f"{held:,.1f} MiB of cache to generate a text of {seq_len:,} tokens in bf16", highlight=False)
    parameters = sum(map(prod, local.values()))
    console.print(
        f"{parameters:,} parameters on a rank with parallel.tp={tp}, vocabulary padding included", highlight=False
    )
    console.print(_table(model, infos, local))
    return 0


def _table(model: ModelConfig, infos: dict[str, ShardInfo], local: dict[str, tuple[int, ...]]) -> Table:
    """One row a parameter; of each type of layer the first one."""
    first = {model.symbols.index(symbol): count for symbol, count in Counter(model.symbols).items()}
    table = Table()
    for column in ("parameter", "layers", "shape", "on a rank"):
        table.add_column(column)
    for name, info in infos.items():
        of_layer = name.startswith("layers.")
        index = int(name.split(".")[1]) if of_layer else None
        if index is None or index in first:
            times = "" if index is None else f"{first[index]} x"
            table.add_row(name, times, " x ".join(map(str, info.global_shape)), " x ".join(map(str, local[name])))
    return table
