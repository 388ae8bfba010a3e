"""A source of weights on four ranks, tp 2 x dp 2: hashed once in all, and each rank reads its own slices and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.block_hash import BLOCK
from megatron_lite.checkpoint import CheckpointConfig, CheckpointStore, opening, reader
from megatron_lite.config.compose import to_dict
from megatron_lite.engine.fsdp import FsdpConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.huggingface import export_folder, folder
from megatron_lite.objectives.next_token import NextTokenConfig
from megatron_lite.parallel.mesh import ParallelConfig
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.ranks import Ranks
from megatron_lite.training.build import build_engine, build_grid
from megatron_lite.training.config import RunConfig
from megatron_lite.weights import load, open_weights
from tests.checkpoint.processes import STATE, first_ranks
from tests.distributed import run_ranks
from tests.model_configs import model_config

SIZES: dict[str, Any] = {
    "family": "llama", "num_layers": 2, "hidden_size": 256, "attention.heads": 8, "attention.kv_heads": 4, "mlp.ffn_size": 512,
    "vocab_size": 2000, "max_seq_len": 64, "mlp.activation": "swiglu", "norm": "rmsnorm", "rope.fraction": 1.0,
    "tie_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Decoder:
    """About two million parameters. The padding rows of the embedding are zero, as a Hugging Face folder has none."""
    torch.manual_seed(0)
    decoder = Decoder(model_config(SIZES))
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_()
            if name == "embedding.weight":
                parameter[SIZES["vocab_size"] :] = 0
    return decoder


@pytest.fixture(scope="module")
def sources(model, tmp_path_factory) -> dict[str, Path]:
    """The same weights as a run (with an optimizer's state, which nobody must read) and as a folder in two shards."""
    home = tmp_path_factory.mktemp("sources")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    saved = {f"{kind}.{name}": tensor for kind in ("model", "exp_avg") for name, tensor in tensors.items()}
    state = {**STATE, "config": {"model": to_dict(model.config)}}
    CheckpointStore(home / "run" / "checkpoints", CheckpointConfig()).save(1, saved, state)
    export_folder(home / "hf", config=model.config, tensors=tensors, max_shard_bytes=5 * 2**20)
    assert len(list((home / "hf").glob("*.safetensors"))) == 2
    return {"run": home / "run", "hf": home / "hf"}


def start_from(rank: int, size: int, path: str) -> tuple[Counter[str], dict[str, Any]]:
    """Assemble an engine from the source: what this rank's bytes were, and its weights: name -> (offsets, values)."""
    counted: Counter[str] = Counter()
    honest_read, honest_hash = reader.read_slice, opening.block_digest

    def read_slice(file: Any, name: str, offsets: Any, sizes: Any) -> torch.Tensor:
        part = honest_read(file, name, offsets, sizes)
        counted["read"] += part.nbytes
        return part

    def block_digest(file: Path, block: int | None) -> bytes:
        assert block is not None
        counted["hashed"] += min(BLOCK, file.stat().st_size - block * BLOCK)
        return honest_hash(file, block)

    run = RunConfig(
        model=model_config(SIZES),
        precision=PrecisionConfig(),
        parallel=ParallelConfig(tp=2),
        engine=FsdpConfig(),
        objective=NextTokenConfig(),
    )
    mesh = build_grid(run.parallel, run.engine, world_size=size, device=torch.device("cpu"))
    reader.read_slice = folder.read_slice = read_slice
    opening.block_digest = block_digest
    try:
        engine = build_engine(run, mesh, source=open_weights(path, Ranks(first_ranks(size, size))))
    finally:
        reader.read_slice = folder.read_slice = honest_read
        opening.block_digest = honest_hash
    pieces = {key.split(".", 1)[1]: p for key, p in engine.state().tensors.items() if key.startswith("model.")}
    counted["own"] = sum(piece.tensor().nbytes for piece in pieces.values())
    return counted, {name: (piece.offsets, piece.tensor().clone()) for name, piece in pieces.items()}


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_each_rank_reads_its_slices_and_shares_the_hashing(kind, model, sources):
    ranks = run_ranks(4, start_from, str(sources[kind]), timeout=180)
    parameters = dict(model.named_parameters())
    whole = sum(parameter.nbytes for parameter in parameters.values())
    for counted, slices in ranks:
        assert slices.keys() == parameters.keys()
        for name, (offsets, values) in slices.items():
            expected = parameters[name][tuple(slice(o, o + n) for o, n in zip(offsets, values.shape))]
            assert torch.equal(values, expected), name
        assert counted["hashed"] + counted["read"] <= whole / 4 + counted["own"] + BLOCK
        assert counted["read"] <= counted["own"]  # padding rows are in no folder
    hashed = sum(counted["hashed"] for counted, _ in ranks)
    files = list((sources["run"] / "checkpoints" / "step_00000001").glob("model-*"))
    assert hashed == (sum(file.stat().st_size for file in files) if kind == "run" else 0)  # a folder says no hashes


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_one_process_reads_the_same(kind, model, sources):
    loaded, _ = load(sources[kind])
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
