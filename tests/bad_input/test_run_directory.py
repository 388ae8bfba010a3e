"""A run directory that is something else, is in use, is damaged or diverges: refused or failed, and what was there stays."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_lite.checkpoint.manifest import encode, read_manifest
from megatron_lite.file_lock import FileLock
from tests import runs
from tests.bad_input.test_data import cut, edit_json, overwrite
from tests.bad_input.tour import snapshot


def shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.safetensors"))


def rewrite(checkpoint: Path, **changes) -> None:
    """A manifest with other values and a checksum that fits them."""
    (checkpoint / "manifest.json").write_bytes(encode(read_manifest(checkpoint) | changes))


DAMAGE = {
    "no manifest": (lambda c: (c / "manifest.json").unlink(), r"step_00000016 is not a checkpoint"),
    "an empty manifest": (lambda c: cut(c / "manifest.json", 0), r"manifest\.json is not JSON"),
    "half a manifest": (lambda c: cut(c / "manifest.json", 500), r"manifest\.json is not JSON"),
    "a list": (lambda c: (c / "manifest.json").write_text("[]"), r"manifest\.json is not a JSON object"),
    "an edited number": (lambda c: edit_json(c / "manifest.json", consumed_samples=0), r"does not match its own checksum"),
    "a foreign format": (lambda c: edit_json(c / "manifest.json", format="orbax"), r"has format 'orbax', not 'megatron_lite'"),
    "a later version": (lambda c: edit_json(c / "manifest.json", format_version=9), r"format_version 9; .*load it with the version"),
    "a missing key": (lambda c: (c / "manifest.json").write_text('{"format": "megatron_lite"}'), r"is incomplete: no key"),
    "a size in words": (lambda c: rewrite(c, files={"x.safetensors": {"size": "1", "blocks_sha256": ""}}), r"an impossible size or hash"),
    "a shape in words": (lambda c: rewrite(c, tensors={"x": {"shape": ["1"], "dtype": "", "group": ""}}), r"an impossible shape \['1'\]"),
    "a number of forty digits": (lambda c: rewrite(c, counters={"adam_step": 10**40}), r"'adam_step' is 1000.*not between 0 and 2\*\*63"),
    "no generator state": (lambda c: rewrite(c, rng={}), r"state of random generators"),
    "a missing file": (lambda c: shard(c).unlink(), r"safetensors cannot be read: No such file"),
    "an empty file": (lambda c: cut(shard(c), 0), r"safetensors has 0 bytes, not \d+"),
    "a truncated file": (lambda c: cut(shard(c), -1), r"safetensors has \d+ bytes, not \d+"),
    "a flipped byte": (lambda c: overwrite(shard(c), 9000, b"\xff\xff\xff\xff"), r"is damaged: its SHA-256"),
    "a pickle beside it": (lambda c: (c / "model.pt").write_bytes(b"\x80"), r"files that its manifest does not know: model\.pt"),
    "another step's name": (lambda c: c.rename(c.with_name("step_00000099")), r"step_00000099 holds step 16"),
}  # fmt: skip


@pytest.fixture
def run_dir(tour, straight):
    """A finished run of 20 steps with checkpoints of steps 12, 16 and 20."""
    return Path(shutil.copytree(straight, tour.home / "r"))


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_that_is_named_is_refused(tour, run_dir, damage, says):
    checkpoint = run_dir / "checkpoints" / "step_00000016"
    damage(checkpoint)
    if not checkpoint.exists():
        checkpoint = checkpoint.with_name("step_00000099")
    tour.refused("train", *runs.arguments(tour.data, run_dir, "train.max_steps=30", f"resume={checkpoint}"), says=says)


def test_without_a_whole_checkpoint_a_run_does_not_start_afresh_over_its_record(tour, run_dir):
    for checkpoint in (run_dir / "checkpoints").iterdir():
        cut(shard(checkpoint), 100)
    tour.refused(
        "train",
        *runs.arguments(tour.data, run_dir, "train.max_steps=30"),
        says=r"none of them is whole .*give another run\.dir",
    )


OTHER_RUNS = [
    ("model.mlp.ffn_size=128", r"another config: model\.mlp\.ffn_size=128 \(checkpoint: 64\).*resume_allow"),
    ("train.global_batch_size=4", r"train\.global_batch_size=4 \(checkpoint: 8\)"),
    ("seed=1", r"seed=1, but the checkpoint was trained with 0.*set it back"),
    ("data.seq_len=16", r"data\.seq_len=16, but .* trained with 32"),
    ("data.reset_attention=false", r"data\.reset_attention=False, but .* trained with True"),
    ("data.groups.english.weight=0.5", r"sample \d+ came from .* restore the weights"),
    ("~data.groups.multilingual", r"data\.groups lacks multilingual/other, which the run has read"),
    ("resume=never", r"resume=never, but run\.dir=.* already holds a run"),
]


@pytest.mark.parametrize(("typed", "says"), OTHER_RUNS)
def test_another_run_in_the_same_directory_is_refused(tour, run_dir, typed, says):
    tour.refused("train", *runs.arguments(tour.data, run_dir, "train.max_steps=30", typed), says=says)


def test_a_source_that_changed_is_refused(tour, run_dir):
    folder = Path(shutil.copytree(tour.data, tour.home / "data"))
    overwrite(folder / "prose.bin", 40, b"\x05\x01")
    typed = ["train.max_steps=30", f"data.groups.english.sources.prose.path={folder / 'prose'}"]
    says = r"english/prose has changed since the checkpoint: .*restore the old files"
    tour.refused("train", *runs.arguments(tour.data, run_dir, *typed), says=says)


def test_a_run_directory_that_is_a_file_is_refused(tour):
    (tour.home / "r").write_text("mine")
    tour.refused("train", *runs.arguments(tour.data, tour.home / "r"), says=r"/r: File exists; .*name another place")
    tour.refused(
        "train",
        *runs.arguments(tour.data, tour.home / "r" / "s"),
        says=r"/r/s.*: Not a directory; .*name another place",
    )


def test_a_file_where_the_checkpoints_would_lie_is_refused(tour):
    (tour.home / "r").mkdir()
    (tour.home / "r" / "checkpoints").write_text("mine")
    says = r"/r/checkpoints is a file, where the checkpoints belong; move it away"
    tour.refused("train", *runs.arguments(tour.data, tour.home / "r"), says=says)


def test_a_finished_run_of_another_directory_is_nothing_to_resume(tour, straight):
    says = r"resume=.*20 steps.*run\.dir=.*train\.max_steps"
    tour.refused("train", *runs.arguments(tour.data, tour.home / "r", f"resume={straight}"), says=says)


def test_a_second_process_is_refused(tour, run_dir):
    with FileLock(run_dir / "run.lock", key="run.dir", value=run_dir):
        typed = runs.arguments(tour.data, run_dir, "train.max_steps=30")
        tour.refused("train", *typed, says=r"/r is in use by process \d+ on host .*set another run\.dir")


def test_a_run_that_diverges_fails_and_keeps_what_it_has(tour, run_dir):
    before, rows = snapshot(run_dir / "checkpoints"), runs.rows(run_dir)
    typed = ["train.max_steps=60", "optim.lr=1e38", "schedule=constant", "checkpoint.every=0"]
    ended = tour.call("train", *runs.arguments(tour.data, run_dir, *typed))
    assert ended.code == 1
    assert re.search(
        r"\nfailed: 5 steps in a row without a finite loss .*lower optim\.lr[^\n]*\n$", "\n" + ended.err
    ), ended.err
    assert snapshot(run_dir / "checkpoints") == before
    assert runs.rows(run_dir)[:20] == rows
    assert runs.status(run_dir)["state"] == "failed"


def test_converted_weights_are_no_run_to_go_on_with(tour, straight):
    assert tour.call("convert", f"source={straight}", f"target={tour.home / 'w'}", "to=native").code == 0
    says = r"holds converted weights and no training state.*init_from="
    tour.refused("train", *runs.arguments(tour.data, tour.home / "w"), says=says)


def changed(values: dict, *path: str, value) -> dict:
    """The same nested dictionaries but for the value at `path`."""
    return values | {path[0]: changed(values[path[0]], *path[1:], value=value) if path[1:] else value}


EMBEDDING = "model.embedding.weight"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["config"], {}, r"does not describe a model that can be built: model\.family is not given"),
        (["config", "model"], "x", r"ModelConfig: "),
        (
            ["config", "model", "hidden_size"],
            10**15,
            r"step_00000020 is not a checkpoint of the model that its manifest describes",
        ),
        (["tensors", EMBEDDING, "shape"], [10**12, 10**6], r"embedding\.weight has shape \[1000000000000, 1000000\]"),
        (["tensors", EMBEDDING, "shape"], [-1, 32], r"embedding\.weight' an impossible shape \[-1, 32\]"),
        (["tensors", EMBEDDING, "shape"], "ab", r"embedding\.weight' an impossible shape ab"),
        (["tensors"], {}, r"embedding\.weight has shape None"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "convert"])
def test_a_manifest_that_was_edited_to_describe_other_tensors_is_refused(tour, run_dir, command, path, value, says):
    """Its checksum was made to fit, so only sense can tell; nothing of such a size is ever asked of memory."""
    checkpoint = run_dir / "checkpoints" / "step_00000020"
    rewrite(checkpoint, **changed(read_manifest(checkpoint), *path, value=value))
    typed = ["prompt=the"] if command == "generate" else [f"target={tour.home / 'x'}"]
    tour.refused(command, f"{'checkpoint' if command == 'generate' else 'source'}={checkpoint}", *typed, says=says)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["seed"], None),
        (["sources"], {}),
        (["phases"], [{"start": 0, "shares": {"english/prose": "1/0"}}]),
        (["boundaries"], {"1/2": "x"}),
        (["boundaries"], [1]),
    ],
)
def test_a_record_of_the_data_that_makes_no_sense_is_refused(tour, run_dir, path, value):
    for checkpoint in (run_dir / "checkpoints").iterdir():
        data = changed(read_manifest(checkpoint)["data"], *path, value=value)
        if value is None:
            del data["seed"]
        rewrite(checkpoint, data=data)
    says = r"record of what was read .*resume from another checkpoint"
    tour.refused("train", *runs.arguments(tour.data, run_dir, "train.max_steps=30"), says=says)


def test_a_model_config_that_is_not_ours_in_a_manifest_is_refused(tour, run_dir):
    checkpoint = run_dir / "checkpoints" / "step_00000020"
    config = json.loads((checkpoint / "manifest.json").read_text())["config"]
    rewrite(checkpoint, config=config | {"model": config["model"] | {"depth": 3}})
    tour.refused("evaluate", f"checkpoint={checkpoint}", says=r"depth")
