"""Whole tensors in one process, one by one."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from megatron_lite.checkpoint import (
    CheckpointConfig,
    CheckpointStore,
    Layout,
    Verifier,
    describe,
    find_checkpoint,
    load_tensors,
)
from megatron_lite.checkpoint.reader import Prefixed
from megatron_lite.errors import CheckpointError
from tests.checkpoint.processes import (
    STATE,
    bitwise_equal,
    first_ranks,
    flip_byte,
    run_alone,
    tensors_of,
)
from tests.distributed import run_ranks


def save_sharded(rank, size, folder):
    at = Layout(rank // 2, 2, rank % 2, 2)
    pieces = {}
    for name, whole in tensors_of(1).items():
        tp_dim = 0 if "embedding" in name else None
        offsets, sizes = at.box(whole.shape, tp_dim=tp_dim)
        local = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))].clone()
        pieces[name] = at.piece(local, whole.shape, tp_dim=tp_dim)
    CheckpointStore(folder, CheckpointConfig(), group=first_ranks(4, size)).save(1, pieces, STATE)


def test_pieces_of_four_ranks_are_assembled(tmp_path):
    run_ranks(4, save_sharded, str(tmp_path))
    path = find_checkpoint(tmp_path)
    assert bitwise_equal(dict(load_tensors(path)), tensors_of(1))
    assert describe(path) == {name: (tuple(t.shape), t.dtype) for name, t in tensors_of(1).items()}


@pytest.fixture
def path(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())
    store.save(1, tensors_of(1), STATE)
    return store.path(1)


def test_only_what_is_asked_for_in_that_order(path):
    names = ["model.scalar", "exp_avg.embedding.weight"]
    found = list(load_tensors(path, names))
    assert [name for name, _ in found] == names
    assert bitwise_equal(dict(found), {name: tensors_of(1)[name] for name in names})


def test_unknown_names(path):
    with pytest.raises(ValueError, match=r"holds no tensors model\.x, model\.y"):
        load_tensors(path, ["model.x", "model.norm.weight", "model.y"])


def test_only_the_weights(path):
    weights = Prefixed(Verifier().open(path, prefixes=("model.",)), "model.")
    assert set(weights.names()) == {"embedding.weight", "norm.weight", "scalar"}
    whole = tensors_of(1)["model.embedding.weight"]
    assert (weights.shape("embedding.weight"), weights.dtype("embedding.weight")) == ((11, 6), torch.float32)
    assert weights.read("embedding.weight", (2, 1), (7, 3)).equal(whole[2:9, 1:4])
    with pytest.raises(KeyError):
        weights.read("model.norm.weight", (0,), (6,))
    flip_byte(next(file for file in path.glob("*.safetensors") if b"model." in file.read_bytes()))
    with pytest.raises(CheckpointError, match="SHA-256"):
        Verifier().open(path, prefixes=("model.",))
    verifier = Verifier()
    verifier.open(path, prefixes=("exp_avg",))
    with pytest.raises(CheckpointError, match="SHA-256"):  # the optimizer's files were verified, the weights' were not
        verifier.open(path)


def test_damage_in_a_needed_file_is_refused_before_the_first_tensor(path):
    holder = next(file for file in path.glob("*.safetensors") if b"exp_avg_sq" in file.read_bytes())
    flip_byte(holder)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_tensors(path)
    list(load_tensors(path, ["model.norm.weight"]))  # the optimizer's files are not read for the weights


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000001"])
def test_what_a_person_may_name(path, place):
    assert find_checkpoint(path.parent.parent / place) == path


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="absent is not a checkpoint"):
        find_checkpoint(tmp_path / "absent")


def read_with_little_memory(path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(int(tensor.ne(0).all()) for _, tensor in load_tensors(path))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    # 16 tensors of 8 MiB: the whole is 128; one tensor, its box and the pages of one file are 24
    sys.exit(0 if count == 16 and grown < 72 else 1)


def test_memory_holds_one_tensor(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(file_mib=8))
    store.save(1, {f"model.{i:02}": torch.full((2**21,), i + 1.0) for i in range(16)}, STATE)
    assert run_alone(read_with_little_memory, store.path(1)) == 0
