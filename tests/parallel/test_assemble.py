"""A rank reads its own part of a source and nothing else, on every engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.checkpoint import reader
from megatron_lite.engine.deepspeed import DeepSpeedConfig
from megatron_lite.engine.fsdp import FsdpConfig
from megatron_lite.models.huggingface import folder
from megatron_lite.objectives.next_token import NextToken
from megatron_lite.parallel.assemble import assemble, from_tensors
from megatron_lite.parallel.global_view import Piece
from megatron_lite.parallel.mesh import CPU, ParallelConfig, build_mesh
from megatron_lite.parallel.parallelize import Recipe
from megatron_lite.weights import load, open_weights
from tests.distributed import run_ranks
from tests.hf_folders import make_folder

ENGINES: dict[str, Any] = {"fsdp": FsdpConfig(), "zero 1": DeepSpeedConfig(), "zero 3": DeepSpeedConfig(zero_stage=3)}


def read_at_tp2_dp2(rank: int, world_size: int, path: str, engine: str) -> dict[str, int]:
    """Bytes that came through the one function that reads, the shard's own bytes, and those of one row a tensor."""
    parallel = ParallelConfig(tp=2)
    mesh = build_mesh(parallel.degrees(world_size), device=CPU)
    weights = open_weights(path)
    counts = {"read": 0, "own": 0, "rows": 0, "wrong": 0}
    original = reader.read_slice

    def counted(file: Any, name: str, offsets: Any, sizes: Any) -> Tensor:
        found = original(file, name, offsets, sizes)
        counts["read"] += found.nbytes
        return found

    def fill(name: str, shard: Piece, initial: object) -> None:
        from_tensors(weights.tensors)(name, shard, initial)  # type: ignore[arg-type]
        counts["own"] += shard.tensor().nbytes
        counts["rows"] += 4 * math.prod(shard.global_shape[1:])

    reader.read_slice = folder.read_slice = counted  # type: ignore[attr-defined]
    try:
        objective, shards = assemble(
            weights.config,
            mesh=mesh,
            recipe=Recipe(parallel),
            fill=fill,
            wrap=NextToken,
            distribute=ENGINES[engine].distribute(mesh, torch.float32),
        )
    finally:
        reader.read_slice = folder.read_slice = original  # type: ignore[attr-defined]
    if engine == "fsdp":  # the others are compared by their losses
        whole = dict(load(path)[0].named_parameters())
        for name, parameter in objective.decoder.named_parameters():
            info = shards[name]
            local = parameter.to_local()  # type: ignore[operator]
            offsets, sizes = mesh.layout.box(info.global_shape, tp_dim=info.tp_dim)
            box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes))
            counts["wrong"] += not torch.equal(local, whole[name][box])
    return counts


@pytest.fixture(params=["run", "folder"])
def source(request, straight, tmp_path):
    if request.param == "run":
        return str(straight)
    return str(make_folder(tmp_path / "hf", "nemotron", shard="60KB", vocab_size=384))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_reads_its_own_part(engine, source):
    found = run_ranks(4, read_at_tp2_dp2, source, engine, timeout=180)
    total = sum(counts["own"] for counts in found)
    for counts in found:
        assert counts["wrong"] == 0
        assert 0 < counts["read"] <= counts["own"] + counts["rows"]
        assert (
            counts["own"] < 0.35 * total
        )  # a quarter; what tensor parallelism does not cut is read by both of its ranks
