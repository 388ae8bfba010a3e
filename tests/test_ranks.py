"""Four ranks: one fails, one sees damage, one stays away, one dies. All agree, none hangs."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_lite.checkpoint.opening as opening
from megatron_lite.checkpoint import CheckpointConfig, CheckpointStore, Layout
from megatron_lite.checkpoint.storage import open_for_writing
from megatron_lite.errors import CheckpointError
from tests.checkpoint.processes import (
    STATE,
    bitwise_equal,
    empty_like,
    first_ranks,
    flip_byte,
    fresh_ranks,
    run_alone,
    tensors_of,
)
from tests.distributed import PATIENCE_SECONDS, run_ranks


def pieces_of(rank: int, size: int, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    at = Layout(rank, size)
    pieces = {}
    for name, whole in tensors.items():
        offsets, sizes = at.box(whole.shape)
        local = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))].clone()
        pieces[name] = at.piece(local, whole.shape)
    return pieces


def make_store(size: int, folder: str, **settings: Any) -> CheckpointStore:
    open_stream = settings.pop("open_stream", open_for_writing)
    group = settings.pop("group", None) or first_ranks(size, size)
    return CheckpointStore(folder, CheckpointConfig(**settings), group=group, open_stream=open_stream)


def save(rank: int, size: int, folder: str, step: int) -> None:
    make_store(size, folder).save(step, pieces_of(rank, size, tensors_of(step)), STATE)


def load_newest(rank: int, size: int, folder: str) -> tuple[str, bool]:
    store = make_store(size, folder)
    path = store.newest_valid()
    assert path is not None
    step = store.read_manifest(path)["step"]
    expected = pieces_of(rank, size, tensors_of(step))
    target = pieces_of(rank, size, empty_like(tensors_of(step)))
    store.load(path, target)
    same = bitwise_equal({n: p.local for n, p in expected.items()}, {n: p.local for n, p in target.items()})
    return path.name, same


class Unpicklable(Exception):
    def __init__(self, first: Any, second: Any) -> None:
        super().__init__("cannot travel")
        self.lock = threading.Lock()


def save_failing(rank: int, size: int, folder: str, failing: int, kind: str, behind: bool) -> str:
    def open_stream(path: Path) -> Any:
        if rank == failing and (kind != "manifest" or path.name == "manifest.json"):
            raise Unpicklable(1, 2) if kind == "unpicklable" else OSError(28, "No space left on device")
        return open_for_writing(path)

    store = make_store(size, folder, open_stream=open_stream, async_save=behind)

    def save_whole() -> None:
        store.save(2, pieces_of(rank, 4, tensors_of(2)), STATE)
        store.wait()

    with pytest.raises(CheckpointError) as caught:
        save_whole()
    return str(caught.value)


@pytest.mark.parametrize(
    ("failing", "kind", "text"),
    [
        (0, "full", "No space left on device"),
        (2, "full", "No space left on device"),
        (3, "unpicklable", "Unpicklable: cannot travel"),
        (0, "manifest", "No space left on device"),
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_one_ranks_error_reaches_all(tmp_path, failing, kind, text, behind):
    folder = str(tmp_path)
    run_ranks(4, save, folder, 1)
    texts = run_ranks(4, save_failing, folder, failing, kind, behind)
    assert len(set(texts)) == 1
    assert f"rank {failing}: " in texts[0]
    assert "step 2 was not saved" in texts[0]
    assert text in texts[0]
    assert os.listdir(folder) == ["step_00000001"]
    assert run_ranks(4, load_newest, folder) == [("step_00000001", True)] * 4


def test_all_fall_back_to_the_same_older_one(tmp_path):
    for step in (1, 2, 3):
        run_ranks(4, save, str(tmp_path), step)
    files = sorted((tmp_path / "step_00000003").glob("*.safetensors"))
    for file in files:  # whichever rank verifies it
        flip_byte(file)
        assert run_ranks(4, load_newest, str(tmp_path)) == [("step_00000002", True)] * 4
        flip_byte(file)
    assert run_ranks(4, load_newest, str(tmp_path)) == [("step_00000003", True)] * 4


def load_when_one_rank_cannot_read(rank: int, size: int, folder: str) -> tuple[str, bool]:
    honest = opening.block_digest

    def stale(file: Path, block: int | None) -> bytes:
        if "step_00000003" in str(file):
            raise OSError(116, "Stale file handle")
        return honest(file, block)

    if rank == 2:
        opening.block_digest = stale
    try:
        return load_newest(rank, size, folder)
    finally:
        opening.block_digest = honest


def test_what_one_rank_sees_counts_for_all(tmp_path):
    for step in (2, 3):
        run_ranks(4, save, str(tmp_path), step)
    assert run_ranks(4, load_when_one_rank_cannot_read, str(tmp_path)) == [("step_00000002", True)] * 4


def load_another_model(rank: int, size: int, folder: str) -> None:
    tensors = {**empty_like(tensors_of(1)), "model.norm.weight": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"model.norm.weight is \(6,\) bfloat16 there, \(7,\) float32 here"):
        make_store(size, folder).load(1, pieces_of(rank, 4, tensors))


def test_another_model_is_refused_by_all(tmp_path):
    run_ranks(4, save, str(tmp_path), 1)
    run_ranks(4, load_another_model, str(tmp_path))


def save_plain_tensors(rank: int, size: int, folder: str) -> None:
    with pytest.raises(TypeError, match="on 4 ranks every tensor must be a Piece"):
        make_store(size, folder).save(1, tensors_of(1), STATE)


def test_plain_tensors_say_too_little_on_many_ranks(tmp_path):
    run_ranks(4, save_plain_tensors, str(tmp_path))


def save_a_norm_that_drifted(rank: int, size: int, folder: str) -> str:
    at = Layout(rank // 2, 2, rank % 2, 2)
    norm = torch.ones(3)
    if rank == 3:
        norm[-1] += 1e-7
    pieces = {"model.norm.weight": at.piece(norm, (6,))}
    with pytest.raises(CheckpointError) as caught:
        make_store(size, folder).save(1, pieces, STATE)
    return str(caught.value)


def test_replicas_must_be_bitwise_equal(tmp_path):
    texts = run_ranks(4, save_a_norm_that_drifted, str(tmp_path))
    assert all("'model.norm.weight' is replicated" in text and "ranks 2 and 3" in text for text in texts)
    assert os.listdir(tmp_path) == []


def train_while_saving(rank: int, size: int, folder: str) -> bool:
    """300 collectives of the training's own group pass while the files cannot be opened yet."""
    gate = threading.Event()

    def open_stream(path: Path) -> Any:
        assert gate.wait(PATIENCE_SECONDS)
        return open_for_writing(path)

    store = make_store(size, folder, open_stream=open_stream, async_save=True)
    pieces = pieces_of(rank, 4, tensors_of(1))
    store.save(1, pieces, STATE)
    total = torch.zeros(1)
    for _ in range(300):
        step = torch.ones(1)
        dist.all_reduce(step)
        total += step
        for piece in pieces.values():
            piece.local.zero_()
    visible = store.steps()
    gate.set()
    store.wait()
    return total.item() == 1200 and visible == []


def test_training_goes_on_during_a_background_save(tmp_path):
    assert all(run_ranks(4, train_while_saving, str(tmp_path)))
    assert run_ranks(4, load_newest, str(tmp_path)) == [("step_00000001", True)] * 4


def save_with_a_group_of_its_own(rank: int, size: int, folder: str) -> int:
    store = CheckpointStore.with_own_group(folder, CheckpointConfig())
    store.save(1, pieces_of(rank, 4, tensors_of(1)), STATE)
    return store.ranks.size


def test_a_group_of_its_own(tmp_path):
    assert run_ranks(4, save_with_a_group_of_its_own, str(tmp_path)) == [4] * 4
    assert run_ranks(4, load_newest, str(tmp_path)) == [("step_00000001", True)] * 4


def look_for_the_directory(rank: int, size: int, folder: str, blind: int | None) -> str:
    store = make_store(size, f"{folder}/elsewhere" if rank == blind else folder)
    try:
        store.check_shared()
    except CheckpointError as error:
        return str(error)
    return ""


def test_every_rank_must_see_the_directory(tmp_path):
    assert run_ranks(4, look_for_the_directory, str(tmp_path), None) == [""] * 4
    assert os.listdir(tmp_path) == []
    texts = run_ranks(4, look_for_the_directory, str(tmp_path), 3)
    assert all("ranks [3] do not see" in text for text in texts)


def save_when_one_stays_away(rank: int, size: int, folder: str) -> str:
    group = dist.new_group(backend="gloo")
    given_up = Path(folder).with_name("given up")
    if rank == 1:  # stays connected: one that ends would be noticed at once
        while not given_up.exists():
            time.sleep(0.05)
        return ""
    store = make_store(size, folder, timeout_seconds=1, group=group)
    with pytest.raises(CheckpointError) as caught:
        store.save(2, pieces_of(rank, 2, tensors_of(2)), STATE)
    given_up.touch()
    return str(caught.value)


def test_a_rank_that_stays_away_is_named(tmp_path):
    folder = tmp_path / "checkpoints"
    run_ranks(4, save, str(folder), 1)
    text = fresh_ranks(2, save_when_one_stays_away, str(folder))[0]
    assert "phase 'prepare'" in text
    assert "timeout 1 s" in text
    assert "Ranks 1 failed" in text
    assert os.listdir(folder) == ["step_00000001"]


def save_and_die(rank: int, size: int, folder: str) -> str:
    def open_stream(path: Path) -> Any:
        if rank == 1:
            os.kill(os.getpid(), 9)
        return open_for_writing(path)

    with pytest.raises(CheckpointError) as caught:
        make_store(size, folder, open_stream=open_stream).save(2, pieces_of(rank, 2, tensors_of(2)), STATE)
    return str(caught.value)


def load_first(folder: str) -> None:
    store = CheckpointStore(folder, CheckpointConfig())
    target = empty_like(tensors_of(1))
    path = store.newest_valid()
    assert path == store.path(1)
    store.load(path, target)
    assert bitwise_equal(target, tensors_of(1))


def test_a_rank_killed_during_a_save(tmp_path):
    run_ranks(4, save, str(tmp_path), 1)
    text, died = fresh_ranks(2, save_and_die, str(tmp_path))
    assert died is None
    assert "step 2 was not saved" in text
    assert "phase 'write'" in text
    assert run_alone(load_first, str(tmp_path)) == 0
