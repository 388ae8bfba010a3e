"""Every kind of damage: skipped with a warning when any will do, refused when it was named. Nothing is unpickled."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle

import pytest
import torch

from megatron_lite.checkpoint import CheckpointConfig, CheckpointStore, describe, find_checkpoint, load_tensors
from megatron_lite.checkpoint.manifest import encode
from megatron_lite.checkpoint.storage import open_for_writing
from megatron_lite.errors import CheckpointError
from tests.checkpoint.processes import STATE, bitwise_equal, empty_like, flip_byte, tensors_of


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())
    for step in (1, 2):
        store.save(step, tensors_of(step), STATE)
    return store


def tensor_files(path):
    return sorted(path.glob("*.safetensors"))


def edit(path, **changes):
    """A manifest with other values and a right checksum."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    manifest |= changes
    (path / "manifest.json").write_bytes(encode({k: v for k, v in manifest.items() if v is not None}))


def recut(path, cuts):
    """A manifest whose groups are all cut in another way."""
    edit(path, groups=dict.fromkeys(json.loads((path / "manifest.json").read_text())["groups"], cuts))


def truncate(path):
    file = tensor_files(path)[0]
    file.write_bytes(file.read_bytes()[:-3])


def write_extra(path):
    (path / "model-00009.safetensors").write_bytes(tensor_files(path)[0].read_bytes())


def break_json(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def change_a_digit(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"consumed_samples": 640', '"consumed_samples": 641'))


def garbage_header(path):
    file = tensor_files(path)[0]
    data = file.read_bytes()
    file.write_bytes(b"\xff" * 8 + data[8:])


def exchange(path):
    first, second = tensor_files(path)[:2]
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)


def other_step(path):
    for file in path.iterdir():
        file.unlink()
    for file in (path.parent / "step_00000001").iterdir():
        (path / file.name).write_bytes(file.read_bytes())


DAMAGES = {
    "truncated": (truncate, r"has \d+ bytes, not \d+"),
    "flipped byte": (lambda path: flip_byte(tensor_files(path)[0]), "SHA-256"),
    "flipped byte in the header": (lambda path: flip_byte(tensor_files(path)[0], 20), "SHA-256"),
    "missing file": (lambda path: tensor_files(path)[0].unlink(), "cannot be read: No such file"),
    "extra file": (write_extra, "does not know: model-00009"),
    "exchanged files": (exchange, "bytes, not|SHA-256"),
    "garbage header": (garbage_header, "SHA-256"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "broken JSON": (break_json, "is not JSON"),
    "binary manifest": (lambda path: (path / "manifest.json").write_bytes(b"\x80\x02\xff"), "is not JSON"),
    "deep JSON": (lambda path: (path / "manifest.json").write_text("[" * 10**5), "is not JSON"),
    "a list": (lambda path: (path / "manifest.json").write_text("[]"), "is not a JSON object"),
    "another digit": (change_a_digit, "checksum"),
    "missing key": (lambda path: edit(path, counters=None), "no key 'counters'"),
    "missing files": (lambda path: edit(path, files=None), "no key 'files'"),
    "wrong type": (lambda path: edit(path, consumed_samples="640"), "'consumed_samples' is str, not int"),
    "foreign version": (lambda path: edit(path, format_version=3), "format_version 3"),
    "foreign format": (lambda path: edit(path, format="other"), "format 'other'"),
    "path outside": (
        lambda path: edit(path, files={"../x.safetensors": {"size": 1, "blocks_sha256": ""}}),
        "impossible file",
    ),
    "bad dtype": (
        lambda path: edit(path, tensors={"model.a": {"shape": [1], "dtype": "save", "group": "a"}}),
        "model.a.*'save'",
    ),
    "a cut into no parts": (lambda path: recut(path, [[0, 0]]), "describes an impossible group"),
    "a cut of a dimension that is not there": (lambda path: recut(path, [[7, 2]]), "impossible group"),
    "an unknown group": (lambda path: edit(path, groups={}), "impossible group"),
    "another step": (other_step, "holds step 1, not what its name says"),
    "empty directory": (lambda path: [file.unlink() for file in path.iterdir()], "cannot be read"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage(store, caplog, damage):
    harm, reason = DAMAGES[damage]
    harm(store.path(2))

    with pytest.raises(CheckpointError, match=reason):  # named: refused
        CheckpointStore(store.directory, CheckpointConfig()).load(2, empty_like(tensors_of(2)))

    with caplog.at_level(logging.WARNING):
        found = store.newest_valid()  # any: the older one
    assert found == store.path(1)
    assert "checkpoint of step 2 is skipped" in caplog.text
    assert "step_00000002" in caplog.text

    target = empty_like(tensors_of(1))
    store.load(found, target)
    assert bitwise_equal(target, tensors_of(1))
    assert find_checkpoint(store.directory.parent) == store.path(1)


def test_all_damaged_is_none(store, caplog):
    for step in (1, 2):
        truncate(store.path(step))
    assert store.newest_valid() is None
    with pytest.raises(ValueError, match="checkpoints/"):
        find_checkpoint(store.directory.parent)


def test_damage_after_it_was_found_valid_is_noticed(store):
    path = store.newest_valid()
    flip_byte(tensor_files(path)[0])
    with pytest.raises(CheckpointError, match="SHA-256"):
        store.load(path, empty_like(tensors_of(2)))


def test_a_damaged_step_can_be_saved_again_and_counts_as_sound(store):
    store = CheckpointStore(store.directory, CheckpointConfig(keep=1))
    truncate(store.path(2))
    assert store.newest_valid() == store.path(1)
    store.save(2, tensors_of(2), STATE)
    assert store.steps() == [2]
    assert store.newest_valid() == store.path(2)


def test_rows_that_no_file_holds_are_noticed(store):
    """A manifest that was made to fit: the reader still does not leave numbers unread."""
    path = store.path(2)
    gone = next(file for file in tensor_files(path) if b"exp_avg_sq" in file.read_bytes())
    files = json.loads((path / "manifest.json").read_text())["files"]
    gone.unlink()
    edit(path, files={name: entry for name, entry in files.items() if name != gone.name})
    with pytest.raises(CheckpointError, match=r"no file .* holds a part of 'exp_avg_sq"):
        store.load(2, empty_like(tensors_of(2)))
    with pytest.raises(CheckpointError, match=r"no file .* holds a part of 'exp_avg_sq"):
        list(load_tensors(path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shape": [6, 11]}, r"with shape \(11, 6\), not \(6, 11\)"),
        ({"dtype": "int32"}, r"as torch.float32, not torch.int32"),
    ],
)
def test_a_file_that_holds_another_tensor_than_its_manifest_says(store, change, says):
    path = store.path(2)
    tensors = json.loads((path / "manifest.json").read_text())["tensors"]
    edit(path, tensors=tensors | {"model.embedding.weight": tensors["model.embedding.weight"] | change})
    with pytest.raises(CheckpointError, match=says):
        list(load_tensors(path))


class BadDisk:
    """A file whose writes go through `write(file, data)`."""

    def __init__(self, path, write):
        self.file, self._write = open_for_writing(path), write

    def write(self, data):
        return self._write(self.file, data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def test_bytes_that_the_disk_changed_are_found(tmp_path):
    """The hash is of what was meant, not of what lies there."""

    def flipped(file, data):
        bad = bytearray(data)
        bad[-1] ^= 1
        return file.write(bad)

    def open_stream(path):
        return open_for_writing(path) if path.suffix == ".json" else BadDisk(path, flipped)

    store = CheckpointStore(tmp_path, CheckpointConfig(), open_stream=open_stream)
    store.save(1, tensors_of(1), STATE)
    with pytest.raises(CheckpointError, match="SHA-256"):
        store.load(1, empty_like(tensors_of(1)))


@pytest.mark.parametrize("failing", ["model-", "exp_avg_sq-", "manifest.json"])
@pytest.mark.parametrize("when", ["open", "write"])
def test_a_full_disk(store, failing, when):
    def full(file, data):
        file.write(bytes(data)[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_stream(path):
        if failing not in path.name:
            return open_for_writing(path)
        if when == "open":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return BadDisk(path, full)

    on_full_disk = CheckpointStore(store.directory, CheckpointConfig(), open_stream=open_stream)
    with pytest.raises(CheckpointError, match=r"step 3 was not saved.*No space left on device"):
        on_full_disk.save(3, tensors_of(3), STATE)
    assert sorted(entry.name for entry in store.directory.iterdir()) == ["step_00000001", "step_00000002"]
    assert store.newest_valid() == store.path(2)


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_no_file_is_unpickled(store, tmp_path):
    mark = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(mark))
    torch.save(Bomb(mark), tmp_path / "torch.pt")
    path = store.path(2)
    originals = {file.name: file.read_bytes() for file in path.iterdir()}

    def load_every_way():
        with pytest.raises((CheckpointError, ValueError)):
            store.load(2, empty_like(tensors_of(2)))
        assert store.newest_valid() == store.path(1)
        with pytest.raises((CheckpointError, ValueError)):
            list(load_tensors(path))

    for payload in (bomb, (tmp_path / "torch.pt").read_bytes()):
        for name in originals:
            (path / name).write_bytes(payload)
            load_every_way()
            (path / name).write_bytes(originals[name])
        for name in originals:
            (path / name).write_bytes(payload)
        load_every_way()
        for name, data in originals.items():
            (path / name).write_bytes(data)
    # DCP's own metadata, which its default reader unpickles: a hidden file that is never opened
    for name in (".metadata", "__0.metadata", "__0_0.distcp"):
        (path / name).write_bytes(bomb)
    with pytest.raises(CheckpointError, match="does not know"):
        store.load(2, empty_like(tensors_of(2)))
    for name in ("__0.metadata", "__0_0.distcp"):
        (path / name).unlink()
    target = empty_like(tensors_of(2))
    store.load(2, target)
    assert bitwise_equal(target, tensors_of(2))
    assert describe(path)
    assert not mark.exists()
    pickle.loads(bomb)  # the payload is a live one
    assert mark.exists()
