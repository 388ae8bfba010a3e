"""Format 1, as version 0.1 wrote it on four ranks (tp 2 x dp 2): every number of it is read, whole or in slices, on one rank or four."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint import CheckpointConfig, CheckpointError, CheckpointStore, Layout, load_tensors
from megatron_lite.checkpoint.manifest import encode
from megatron_lite.checkpoint.opening import Verifier
from tests.checkpoint.processes import STATE, bitwise_equal, first_ranks, flip_byte
from tests.distributed import run_ranks

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format_1_tp2_dp2"
SHAPES = {
    "embedding.weight": ((10, 6), 0), "layers.0.norm.weight": ((6,), None), "layers.0.mixer.qkv.weight": ((12, 6), 0),
    "layers.0.mixer.out.weight": ((6, 12), 1), "odd.weight": ((5,), 0), "scalar": ((), None),
}  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    """What was saved."""
    draw = torch.Generator().manual_seed(1)
    return {
        f"{kind}.{name}": torch.randint(-999, 999, shape, generator=draw).float() / 8
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for name, (shape, _) in SHAPES.items()
    }


def load_on_four_ranks(rank: int, size: int, folder: str) -> bool:
    at = Layout(rank % 2, 2, rank // 2, 2)  # not the ranks that wrote it
    store = CheckpointStore(folder, CheckpointConfig(), group=first_ranks(4, size))
    expected, target = {}, {}
    for name, whole in tensors().items():
        tp_dim = SHAPES[name.split(".", 1)[1]][1]
        offsets, sizes = at.box(whole.shape, tp_dim=tp_dim)
        expected[name] = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes))]
        target[name] = at.piece(torch.full(sizes, torch.nan), whole.shape, tp_dim=tp_dim)
    manifest = store.load(store.newest_valid(), target)
    assert manifest["counters"] == {"adam_step": 10}
    assert manifest["consumed_samples"] == STATE["consumed_samples"]
    return bitwise_equal(expected, {name: piece.tensor() for name, piece in target.items()})


def test_it_loads_on_four_ranks_and_on_one():
    assert all(run_ranks(4, load_on_four_ranks, str(FIXTURE)))
    path = FIXTURE / "step_00000003"
    assert bitwise_equal(dict(load_tensors(path)), tensors())
    found = Verifier().open(path)
    assert found.read("model.layers.0.mixer.out.weight", (1, 2), (4, 9)).equal(
        tensors()["model.layers.0.mixer.out.weight"][1:5, 2:11]
    )


def test_a_shard_that_no_file_of_it_holds_is_noticed(tmp_path):
    path = Path(shutil.copytree(FIXTURE, tmp_path / "checkpoints")) / "step_00000003"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    gone = next(
        file for file in path.glob("rank-00001-*") if b"exp_avg_sq.layers.0.mixer.out.weight" in file.read_bytes()
    )
    gone.unlink()
    del manifest["files"][gone.name]
    (path / "manifest.json").write_bytes(encode(manifest))
    with pytest.raises(CheckpointError, match=r"no file .* holds a part of 'exp_avg_sq"):
        list(load_tensors(path))


@pytest.mark.parametrize("place", [-1, 20], ids=["a value", "the header"])
def test_its_damage_is_refused(tmp_path, place):
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "checkpoints"))
    path = folder / "step_00000003"
    flip_byte(next(path.glob("rank-00002-*")), place)
    with pytest.raises(CheckpointError, match=r"rank-00002.*(SHA-256|damaged)"):
        list(load_tensors(path))
    assert CheckpointStore(folder, CheckpointConfig()).newest_valid() is None
