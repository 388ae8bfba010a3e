"""Runs that meet a bad document or a bad gradient: what `train.on_spike` makes of it, and that a kill changes no bit of it."""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.opening import find_checkpoint
from megatron_lite.checkpoint.store import CheckpointStore
from megatron_lite.commands import train as command
from megatron_lite.data.blend import Blend
from megatron_lite.errors import TrainingDivergedError
from megatron_lite.objectives.next_token import NextToken
from megatron_lite.optim.spikes import SpikeConfig, Spikes
from megatron_lite.tracking.jsonl import JsonlTracker
from megatron_lite.training.config import compose_run
from megatron_lite.training.spikes import SpikeGuard, roll_back
from megatron_lite.training.trainer import Trainer
from tests import runs
from tests.distributed import run_ranks

BAD_SAMPLES = range(120, 128)  # all that step 16 reads, and nothing before reads them
STRANGE = 383  # a token that is never followed by itself elsewhere
SETTINGS = ["train.log_every=2", "spike.window=6", "spike.threshold=20", "checkpoint.keep=9", "data.phases=[]"]


@contextmanager
def planted_document():
    getitem = Blend.__getitem__

    def planted(self, i):
        example = getitem(self, i)
        if i in BAD_SAMPLES:
            example |= {key: np.full_like(example[key], STRANGE) for key in ("tokens", "targets")}
        return example

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blend, "__getitem__", planted)
        yield


@pytest.fixture(scope="module", autouse=True)
def bad_document():
    """The samples of step 16 hold nothing but one token."""
    with planted_document():
        yield


@pytest.fixture
def bad_gradient(monkeypatch):
    """The loss of these samples is as good as any, their gradient is a thousand times too large."""
    forward = NextToken.forward

    def planted(self, batch):
        loss = forward(self, batch)
        if not (batch["tokens"] == STRANGE).all(dim=-1).any():
            return loss
        usual = 5.0 * loss.tokens
        return loss._replace(total=usual + 1000 * (loss.total - loss.total.detach()))

    monkeypatch.setattr(NextToken, "forward", planted)


def marked(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if "dropped" in row]


def manifest(run_dir):
    return read_manifest(find_checkpoint(run_dir))


@pytest.fixture
def train(tiny_data, tmp_path):
    def call(mode, *overrides, name="r"):
        runs.run(tiny_data, tmp_path / name, *SETTINGS, f"train.on_spike={mode}", *overrides)
        return tmp_path / name

    return call


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """A run that goes back and is never killed."""
    run_dir = tmp_path_factory.mktemp("whole") / "r"
    runs.run(tiny_data, run_dir, *SETTINGS, "train.on_spike=rollback")
    return run_dir


@pytest.mark.parametrize("kind", ["bad_document", "bad_gradient"])
def test_the_update_of_a_spike_is_left_out(train, kind, request):
    plain = runs.rows(train("skip", "train.stop_at=14", name="plain"))
    request.getfixturevalue(kind)
    run_dir = train("skip")
    assert [row.get("spikes") for row in runs.rows(run_dir)] == [None] * 7 + [1] + [None] * 2
    assert [row["loss"] for row in runs.rows(run_dir)[:7]] == [row["loss"] for row in plain]
    assert manifest(run_dir)["counters"]["adam_step"] == 19


@pytest.mark.parametrize("length", [[], ["train.max_steps=null", "train.max_tokens=5120"]])
def test_the_run_goes_back_and_reads_on_behind_it(train, length):
    with pytest.warns(UserWarning, match="a spike at step 16: .* went back to step 8"):
        run_dir = train("rollback", *length)
    rows = runs.rows(run_dir)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert [row["consumed_samples"] for row in rows[3:6]] == [64, 144, 160]
    assert rows[-1]["consumed_tokens"] == 5120  # what was skipped does not count
    assert rows[-1]["lr"] == 0.0
    assert marked(run_dir) == [10, 12, 14, 16]
    assert manifest(run_dir)["skipped_samples"] == [{"step": 16, "start": 64, "end": 128, "back_to": 8}]
    assert not any("spikes" in row for row in rows)


@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [
        (Trainer, "write_checkpoint", 4, False),  # the fourth is that of the rollback
        (Trainer, "write_checkpoint", 4, True),
        (JsonlTracker, "drop_after", 1, True),
        pytest.param(CheckpointStore, "abandon_after", 1, True, marks=pytest.mark.slow),
    ],
)
def test_killed_around_a_rollback_it_is_the_same_run(train, whole, monkeypatch, owner, name, call, after):
    """Before it, and after each thing that it leaves on the disk."""
    method, calls = getattr(owner, name), []

    def killed(self, *args):
        calls.append(args)
        if len(calls) == call and not after:
            raise KeyboardInterrupt
        method(self, *args)
        if len(calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            train("rollback")
    run_dir = train("rollback")
    assert runs.curve(run_dir) == runs.curve(whole)
    assert runs.digest(find_checkpoint(run_dir)) == runs.digest(find_checkpoint(whole))
    assert manifest(run_dir)["skipped_samples"] == manifest(whole)["skipped_samples"]


def test_stopped_between_a_spike_and_its_row_it_is_the_same_run(train):
    options = ["train.log_every=5", "checkpoint.every=2"]
    whole = train("rollback", *options, name="whole")
    train("rollback", *options, "train.stop_at=17")
    run_dir = train("rollback", *options)
    good = {row["step"]: row["loss"] for row in runs.rows(whole)}
    for row in runs.rows(whole):  # the speed counts the tokens of the steps that the row is of
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(8 * 32)
    assert {row["step"]: row["loss"] for row in runs.rows(run_dir) if row["step"] in good} == good
    assert runs.digest(find_checkpoint(run_dir)) == runs.digest(find_checkpoint(whole))


def rank_of_a_run(rank: int, world_size: int, words: list[str]) -> int:
    with runs.as_rank(rank, world_size), planted_document(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command.train(compose_run(words))
    return sum("went back to step 8" in str(warning.message) for warning in caught)


@pytest.mark.slow
def test_all_ranks_go_back(tiny_data, tmp_path, whole):
    words = [*SETTINGS, "train.on_spike=rollback", "train.micro_batch_size=2", "watchdog.timeout_seconds=0"]
    assert run_ranks(2, rank_of_a_run, runs.arguments(tiny_data, tmp_path / "r", *words)) == [1, 0]
    assert manifest(tmp_path / "r")["skipped_samples"] == manifest(whole)["skipped_samples"]
    # two ranks add up fp32 losses in another order
    assert [row["loss"] for row in runs.rows(tmp_path / "r")] == pytest.approx(
        [row["loss"] for row in runs.rows(whole)], rel=1e-5
    )


def test_stop_fails_and_says_where(train):
    with pytest.raises(TrainingDivergedError, match=r"from step 16 on.*before 128"):
        train("stop")


def test_it_does_not_go_back_for_ever(train):
    with pytest.raises(TrainingDivergedError, match=r"step 16.*spike\.max_rollbacks"):
        train("rollback", "spike.max_rollbacks=0")


@pytest.mark.parametrize(("within", "raises"), [(6, False), (7, True)])
def test_only_recent_rollbacks_and_regular_checkpoints_count(within, raises):
    """One rollback is allowed within so many steps. Steps 2 and 9 were saved by a signal, step 12 is too new."""
    config = SpikeConfig(window=6, max_rollbacks=1, within_steps=within)
    offered: list[list[int]] = []
    store = SimpleNamespace(
        config=SimpleNamespace(every=4), recovered_steps=lambda: [2, 4, 8, 9, 12], newest_of=offered.append
    )
    trainer = SimpleNamespace(
        spikes=SpikeGuard("rollback", config, torch.device("cpu"), [{"step": 10}]), position=SimpleNamespace(step=16),
        store=store, runtime=SimpleNamespace(is_main=False),
    )  # fmt: skip
    with pytest.raises(TrainingDivergedError, match=r"within 7 steps") if raises else nullcontext():
        assert not roll_back(trainer, Spikes(1, 16, 128))
        assert offered == [[4, 8]]


def test_without_an_old_checkpoint_the_update_is_left_out(train):
    with pytest.warns(UserWarning, match=r"no checkpoint at least spike\.window=6"):
        run_dir = train("rollback", "checkpoint.every=0")
    assert runs.status(run_dir)["state"] == "finished"


@pytest.mark.parametrize(
    ("override", "says"), [("train.on_spike=no", "rollback"), ("spike.window=1", r"spike\.window=1")]
)
def test_other_settings_are_refused(tiny_data, tmp_path, override, says):
    with pytest.raises(ValueError, match=says):
        runs.run(tiny_data, tmp_path / "r", override)
