"""What a save holds in memory, who writes what, and stages that hold different tensors."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from megatron_lite.checkpoint import CheckpointConfig, CheckpointError, CheckpointStore, Layout, Piece, load_tensors
from megatron_lite.checkpoint.storage import open_for_writing
from tests.checkpoint.processes import STATE, bitwise_equal, first_ranks
from tests.distributed import run_ranks


def test_tensors_made_when_needed_are_never_in_memory_together(tmp_path):
    alive: list[int] = [0]
    most = 0

    def made(number: int) -> torch.Tensor:
        nonlocal most
        tensor = torch.full((256, 256), float(number))
        alive[0] += tensor.nbytes
        most = max(most, alive[0])
        weakref.finalize(tensor, lambda size: alive.__setitem__(0, alive[0] - size), tensor.nbytes)
        return tensor

    pieces = {
        f"model.{i}": Piece(lambda i=i: made(i), (256, 256), dtype=torch.float32) for i in range(6)
    }  # 256 KiB each, all in one file
    store = CheckpointStore(tmp_path, CheckpointConfig())
    store.save(1, pieces, STATE)
    assert len(store.read_manifest(1)["files"]) == 1
    assert most <= 2 * 256 * 256 * 4  # the one that is made while the one before is let go
    assert [tensor[0, 0].item() for _, tensor in load_tensors(store.path(1))] == list(range(6))


def whole(name: str) -> torch.Tensor:
    return torch.randn(600, 300, generator=torch.Generator().manual_seed(len(name)))


def save_replicas(rank: int, size: int, folder: str) -> list[str]:
    """Nothing is cut: every rank holds everything."""
    at = Layout(replica_rank=rank, replica_size=size)
    pieces = {
        f"{kind}.{'w' * i}": at.piece(whole("w" * i), (600, 300)) for kind in ("model", "amax") for i in range(1, 9)
    }
    written = []

    def open_stream(path: Path) -> BinaryIO:
        written.append(path.name)
        return open_for_writing(path)

    store = CheckpointStore(folder, CheckpointConfig(), group=first_ranks(size, size), open_stream=open_stream)
    store.save(1, pieces, STATE)
    return [name for name in written if name != "manifest.json"]


def test_replicas_share_the_writing_and_any_kind_of_tensor_is_state(tmp_path):
    written = run_ranks(4, save_replicas, str(tmp_path))
    names = [name for names in written for name in names]
    assert len(names) == len(set(names))
    assert all(len(mine) == len(names) // 4 for mine in written)
    loaded = dict(load_tensors(tmp_path / "step_00000001"))
    assert len(loaded) == 16
    assert all(tensor.equal(whole(name.split(".")[1])) for name, tensor in loaded.items())


def save_stages(rank: int, size: int, folder: str) -> bool:
    """Two pipeline stages of two ranks each; both have a tensor of a name of its own, cut alike."""
    at, stage = Layout(rank % 2, 2), rank // 2
    mine = {f"model.layers.{stage}.{name}": whole(f"{stage}{name}") for name in ("a", "bb")}
    pieces = {}
    for name, tensor in mine.items():
        offsets, sizes = at.box(tensor.shape)
        pieces[name] = at.piece(tensor[offsets[0] : offsets[0] + sizes[0]].clone(), tensor.shape)
    store = CheckpointStore(folder, CheckpointConfig(), group=first_ranks(size, size))
    store.save(1, pieces, STATE)
    expected = {name: piece.tensor().clone() for name, piece in pieces.items()}
    for piece in pieces.values():
        piece.tensor().fill_(torch.nan)
    store.load(1, pieces)
    return bitwise_equal(expected, {name: piece.tensor() for name, piece in pieces.items()})


def test_stages_hold_different_tensors(tmp_path):
    assert all(run_ranks(4, save_stages, str(tmp_path)))
    tensors = dict(load_tensors(tmp_path / "step_00000001"))
    assert sorted(tensors) == [f"model.layers.{stage}.{name}" for stage in (0, 1) for name in ("a", "bb")]


WRONG = {"left out": (Layout(0, 3), Layout(1, 3)), "twice": (Layout(0, 2), Layout(0, 2))}


def save_with_a_wrong_layout(rank: int, size: int, folder: str, kind: str) -> str:
    at = WRONG[kind][rank]
    pieces = {"model.w": at.piece(torch.zeros(at.box((6, 2))[1]), (6, 2))}
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(folder, CheckpointConfig(), group=first_ranks(2, size)).save(1, pieces, STATE)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "says"), [("left out", "is missing"), ("twice", "another rank wrote too")])
def test_ranks_that_do_not_hold_every_shard_once_are_refused(tmp_path, kind, says):
    assert all(says in text for text in run_ranks(2, save_with_a_wrong_layout, str(tmp_path), kind))
    assert list(Path(tmp_path).iterdir()) == []
