"""One process: round trips, retention, replacing, going back, background saves."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.checkpoint import CheckpointConfig, CheckpointStore
from megatron_lite.checkpoint.directory import expendable
from megatron_lite.checkpoint.storage import open_for_writing
from megatron_lite.errors import CheckpointError
from tests.checkpoint.processes import STATE, bitwise_equal, empty_like, flip_byte, tensors_of
from tests.distributed import PATIENCE_SECONDS


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(keep=2))


def loads(store, step):
    target = empty_like(tensors_of(step))
    store.load(step, target)
    return bitwise_equal(target, tensors_of(step))


def test_a_round_trip(store):
    store.save(3, tensors_of(3), STATE)
    assert loads(store, 3)
    manifest = store.read_manifest(3)
    assert {key: manifest[key] for key in STATE} == STATE
    assert manifest["step"] == 3
    assert manifest["threads"] == torch.get_num_threads()
    assert torch.__version__.startswith(manifest["versions"]["torch"])  # the wheel may lack the local part, "+cu130"
    assert manifest["tensors"]["model.norm.weight"]["dtype"] == "bfloat16"


def full(path):
    """Opens no file."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_empty_directory_has_nothing(store):
    assert store.newest_valid() is None
    assert store.steps() == []
    with pytest.raises(CheckpointError, match="step_00000003"):
        store.load(3, {})


def test_parameters_that_want_gradients_load_in_place(store):
    saved = torch.nn.Parameter(torch.randn(4, 3))
    store.save(1, {"model.w": saved}, STATE)
    target = torch.nn.Parameter(torch.zeros(4, 3))
    store.load(1, {"model.w": target})
    assert target.equal(saved)


def test_views_and_strides_survive(store):
    base = torch.randn(8, 6)
    tensors = {"model.t": base.t(), "model.v": base[2:4, 1:3], "model.e": base.t().expand(2, 6, 8)}
    store.save(1, tensors, STATE)
    target = empty_like(tensors)
    target["model.t"] = torch.zeros(8, 6).t()
    target["model.e"] = torch.zeros(2, 6, 8)
    store.load(1, target)
    assert bitwise_equal(target, tensors)


def test_many_files(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(file_mib=1))
    tensors = {f"model.{i}": torch.randn(300, 300) for i in range(7)}  # 2.5 MiB
    store.save(1, tensors, STATE)
    assert len(store.read_manifest(1)["files"]) == 4
    target = empty_like(tensors)
    store.load(1, target)
    assert bitwise_equal(target, tensors)


def test_tensors_that_nobody_asks_for_are_named(store):
    store.save(1, tensors_of(1), STATE)
    weights = {name: value for name, value in tensors_of(1).items() if name.startswith("model.")}
    with pytest.raises(ValueError, match=r"2 tensors are in the checkpoint only: exp_avg.embedding"):
        store.load(1, empty_like(weights))


def test_another_model_is_named(store):
    store.save(1, tensors_of(1), STATE)
    target = empty_like(tensors_of(1))
    target["model.norm.weight"] = torch.zeros(8)
    target["model.new"] = torch.zeros(2)
    with pytest.raises(ValueError) as caught:
        store.load(1, target)
    assert "model.norm.weight is (6,) bfloat16 there, (8,) float32 here" in str(caught.value)
    assert "1 tensors are not in the checkpoint: model.new (2,) float32" in str(caught.value)


def test_at_most_five_names(store):
    store.save(1, {"model.a": torch.zeros(1)}, STATE)
    with pytest.raises(ValueError) as caught:
        store.load(1, {f"model.{i}": torch.zeros(1) for i in range(9)})
    assert "9 tensors are not in the checkpoint" in str(caught.value)
    assert "model.4" in str(caught.value)
    assert "model.5" not in str(caught.value)


@pytest.mark.parametrize("missing", list(STATE))
def test_an_incomplete_state_is_refused(store, missing):
    state = {key: value for key, value in STATE.items() if key != missing}
    with pytest.raises(CheckpointError, match=f"step 1 was not saved.*no key '{missing}'"):
        store.save(1, tensors_of(1), state)
    assert names_in(store.directory) == [] if store.directory.exists() else True


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": {"t": torch.zeros(1)}}, "must be JSON"),
        ({"counters": {"adam_step": -1}}, "'adam_step' is -1"),
        ({"files": {}}, r"the keys \['files'\]"),
    ],
)
def test_a_state_that_could_not_be_read_again_is_refused(store, change, says):
    with pytest.raises(CheckpointError, match=says):
        store.save(1, tensors_of(1), {**STATE, **change})


def test_integer_keys_survive_the_checksum(store):
    store.save(1, tensors_of(1), {**STATE, "data": {10: "b", 9: "a"}})
    assert store.newest_valid() == store.path(1)


def test_retention(store):
    for step in range(1, 8):
        store.save(step, tensors_of(step), STATE)
    assert names_in(store.directory) == ["step_00000006", "step_00000007"]


def test_every_nth_stays(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep=1, keep_every=3))
    for step in range(1, 8):
        store.save(step, tensors_of(step), STATE)
    assert store.steps() == [3, 6, 7]


@given(
    steps=st.sets(st.integers(0, 60)),
    last=st.integers(0, 60),
    keep=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 9),
)
def test_what_retention_lets_go(steps, last, keep, keep_every):
    gone = expendable(steps, last=last, keep=keep, keep_every=keep_every)
    for step in steps:
        newer = sum(step < other <= last for other in steps)
        stays = step > last or newer < keep or (keep_every is not None and step % keep_every == 0)
        assert (step in gone) == (not stays)


def test_the_newest_sound_one_is_never_deleted(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep=9))
    for step in range(1, 5):
        store.save(step, tensors_of(step), STATE)
    for step in (3, 4):
        (store.path(step) / "manifest.json").unlink()
    CheckpointStore(tmp_path, CheckpointConfig(keep=2)).prune()
    assert store.steps() == [2, 3, 4]
    assert store.newest_valid() == store.path(2)


def test_one_that_was_found_damaged_is_not_the_newest_sound_one(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep=2))
    for step in (1, 2):
        store.save(step, tensors_of(step), STATE)
    damaged = next(store.path(2).glob("*.safetensors"))
    flip_byte(damaged)  # names and sizes do not tell
    store = CheckpointStore(tmp_path, CheckpointConfig(keep=1))
    assert store.newest_valid() == store.path(1)
    store.prune()
    assert store.steps() == [1, 2]
    flip_byte(damaged)  # repaired
    assert store.newest_valid() == store.path(2)
    store.prune()
    assert store.steps() == [2]


def test_a_save_to_a_directory_of_its_own_is_noticed(store, tmp_path):
    """A rank of a node that does not see the directory of rank 0 as the others do."""

    def elsewhere(path):
        return open_for_writing(path if path.suffix == ".json" else tmp_path / path.name)

    store = CheckpointStore(store.directory, CheckpointConfig(), open_stream=elsewhere)
    with pytest.raises(CheckpointError, match=r"cannot be read: No such file.*see the same directory"):
        store.save(1, tensors_of(1), STATE)
    assert store.steps() == []


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_save_returns(store, monkeypatch):
    """A crash of the machine may lose whatever no fsync was for; a test cannot crash one, so it looks at the order of calls."""
    calls, fsync, rename = [], os.fsync, os.rename

    def recorded_fsync(descriptor):
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def recorded_rename(old, new):
        calls.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    store.save(1, tensors_of(1), STATE)
    files = {path.name for path in store.path(1).iterdir()}
    before, after = calls[: calls.index("rename")], calls[calls.index("rename") + 1 :]
    assert set(before) == {*files, ".tmp-step_00000001"}
    assert before[-2:] == ["manifest.json", ".tmp-step_00000001"]
    assert after == ["checkpoints"]


def test_a_crash_between_the_renames_of_a_replacing_save_loses_nothing(store):
    store.save(5, tensors_of(5), STATE)
    store.path(5).rename(store.directory / ".tmp-replaced-step_00000005")
    assert store.newest_valid() == store.path(5)
    assert loads(store, 5)


def test_the_same_step_again_replaces(store):
    store.save(5, tensors_of(1), STATE)
    store.save(5, tensors_of(5), STATE)
    assert loads(store, 5)
    assert names_in(store.directory) == ["step_00000005"]


def test_going_back_hides_what_came_after(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep=5))
    for step in (10, 20, 30):
        store.save(step, tensors_of(step), STATE)
    assert store.abandon_after(10) == [20, 30]
    assert store.newest_valid() == store.path(10)
    with pytest.raises(CheckpointError, match="No space left"):
        CheckpointStore(tmp_path, store.config, open_stream=full).save(15, tensors_of(15), STATE)
    assert len(names_in(tmp_path)) == 3  # only a save that succeeds deletes them
    store.save(15, tensors_of(15), STATE)
    assert names_in(tmp_path) == ["step_00000010", "step_00000015"]


def test_steps_of_another_history_do_not_push_out_the_new(store):
    for step in (10, 20, 30):
        store.save(step, tensors_of(step), STATE)
    store.save(15, tensors_of(15), STATE)
    assert 15 in store.steps()


@pytest.mark.parametrize("leftover", [".tmp-step_00000009", ".tmp-delete-step_00000001", ".tmp-whatever"])
def test_leftovers_are_cleaned_and_never_loaded(store, leftover):
    (store.directory / leftover).mkdir(parents=True)
    (store.directory / leftover / "half").write_text("x")
    assert store.newest_valid() is None
    store.save(1, tensors_of(1), STATE)
    assert names_in(store.directory) == ["step_00000001"]


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"every": -1}, {"keep_every": 0}, {"file_mib": 0}])
def test_impossible_settings(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"checkpoint.{next(iter(wrong))}="):
        CheckpointStore(tmp_path, CheckpointConfig(**wrong))


class Gate:
    """Files that open only when told to."""

    def __init__(self):
        self.open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, path):
        self.reached.set()
        assert self.open.wait(PATIENCE_SECONDS)
        return open_for_writing(path)


def test_a_background_save_keeps_the_values_of_its_moment(tmp_path):
    gate = Gate()
    store = CheckpointStore(tmp_path, CheckpointConfig(async_save=True), open_stream=gate)
    tensors = tensors_of(1)
    state = {**STATE, "config": {"list": [1]}}
    store.save(1, tensors, state)
    assert gate.reached.wait(PATIENCE_SECONDS)
    assert store.steps() == []  # not visible before it is whole; and `save` has returned meanwhile
    for tensor in tensors.values():
        tensor.fill_(0)
    state["config"]["list"].append(2)
    gate.open.set()
    store.wait()
    assert loads(store, 1)
    assert store.read_manifest(1)["config"] == {"list": [1]}


def test_background_saves_of_other_shapes_and_dtypes(tmp_path):
    """The buffers that the tensors are copied to are kept from one save to the next."""
    store = CheckpointStore(tmp_path, CheckpointConfig(async_save=True))
    for step, tensor in enumerate((torch.ones(3), torch.full((3,), 1 / 3, dtype=torch.float64), torch.ones(4)), 1):
        store.save(step, {"model.a": tensor}, STATE)
        store.wait()
        target = torch.zeros_like(tensor)
        store.load(step, {"model.a": target})
        assert torch.equal(target, tensor)


def test_a_second_background_save_waits_for_the_first(tmp_path):
    gate = Gate()
    store = CheckpointStore(tmp_path, CheckpointConfig(async_save=True), open_stream=gate)
    store.save(1, tensors_of(1), STATE)
    second = threading.Thread(target=lambda: store.save(2, tensors_of(2), STATE))
    second.start()
    assert gate.reached.wait(PATIENCE_SECONDS)
    second.join(0.2)
    assert second.is_alive()
    gate.open.set()
    second.join(PATIENCE_SECONDS)
    store.wait()
    assert loads(store, 1)
    assert loads(store, 2)


def test_foreground_and_background_look_the_same(tmp_path):
    looks = []
    for behind in (False, True):
        store = CheckpointStore(tmp_path / str(behind), CheckpointConfig(async_save=behind))
        store.save(1, tensors_of(1), STATE)
        store.wait()
        assert loads(store, 1)
        manifest = store.read_manifest(1)
        looks.append({key: value for key, value in manifest.items() if key != "files"})
        looks[-1]["files"] = {name: entry["size"] for name, entry in manifest["files"].items()}
    assert looks[0] == looks[1]


def test_a_background_error_surfaces_once_with_its_step(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(async_save=True), open_stream=full)
    store.save(4, tensors_of(4), STATE)
    with pytest.raises(CheckpointError, match=r"step 4 was not saved.*No space left"):
        store.save(5, tensors_of(5), STATE)
    store.wait()
    assert names_in(tmp_path) == []
