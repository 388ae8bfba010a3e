"""The main job as a person runs it: train, stop, be killed, go on. Real runs of a tiny model, bitwise comparisons."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time

import pytest

from megatron_lite.checkpoint.opening import find_checkpoint, load_tensors
from megatron_lite.commands import train
from megatron_lite.errors import CheckpointError, TrainingDivergedError
from tests import runs
from tests.distributed import PATIENCE_SECONDS
from tests.forked import PROCESSES

ROW = {
    "step", "consumed_samples", "consumed_tokens", "loss", "grad_norm", "lr", "step_seconds", "tokens_per_second",
    "tflops_per_device", "mfu", "memory_gib",
}  # fmt: skip


def newest(run_dir):
    return find_checkpoint(run_dir)


def assert_same_run(run_dir, straight):
    assert runs.curve(run_dir) == runs.curve(straight)
    assert runs.digest(newest(run_dir)) == runs.digest(newest(straight))


def test_a_run_leaves_what_others_rely_on(straight):
    assert runs.status(straight)["state"] == "finished"
    assert {path.name for path in straight.iterdir()} >= {
        "config.yaml", "status.json", "metrics.jsonl", "checkpoints", "loss.png", "report.html",
    }  # fmt: skip
    rows = runs.rows(straight)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(set(row) >= ROW for row in rows)
    assert rows[-1]["consumed_tokens"] == 20 * 8 * 32
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == [
        "step_00000012", "step_00000016", "step_00000020",
    ]  # fmt: skip


def test_the_first_loss_is_that_of_guessing(straight):
    # A model of small random weights knows nothing: ln(384) = 5.95 with a spread of its logits far below 0.1.
    assert runs.rows(straight)[0]["loss"] == pytest.approx(math.log(384), abs=0.1)


def test_held_out_loss_of_every_source_is_logged(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    (row,) = [line for line in lines if "val_loss" in line]
    assert set(row["val_loss"]) == {"english/prose", "multilingual/other", "code/program"}
    assert "loss" not in row


def test_the_blend_seen_is_that_of_the_weights(straight):
    seen = runs.status(straight)["blend_seen"]
    # 80 samples at 70/15/15, then 80 at 20/0/80; counts stay within a sample or two of the weights.
    assert seen["english/prose"]["samples"] == pytest.approx(80 * 0.7 + 80 * 0.2, abs=2)
    assert seen["code/program"]["samples"] == pytest.approx(80 * 0.15 + 80 * 0.8, abs=2)
    assert seen["code/program"]["share"] == pytest.approx(seen["code/program"]["target"], abs=0.02)


def test_stopped_and_resumed_is_the_same_run(tiny_data, straight, tmp_path):
    for stop in (3, 7, 11):
        assert runs.run(tiny_data, tmp_path / "r", f"train.stop_at={stop}") == 0
        assert runs.status(tmp_path / "r")["state"] == "preempted"
    assert runs.run(tiny_data, tmp_path / "r") == 0
    assert_same_run(tmp_path / "r", straight)


def test_the_same_command_twice_is_bitwise_the_same(tiny_data, straight, tmp_path):
    runs.run(tiny_data, tmp_path / "r", "checkpoint.async_save=true")
    assert_same_run(tmp_path / "r", straight)


def train_as_a_command(words: list[str]) -> None:
    sys.argv = ["train", *words]
    train.main()


def test_a_signal_saves_and_exits_zero(tiny_data, straight, tmp_path):
    words = runs.arguments(tiny_data, tmp_path / "r", "train.max_steps=20", "checkpoint.every=0")
    process = PROCESSES.Process(target=train_as_a_command, args=(words,), daemon=True)
    process.start()
    metrics = tmp_path / "r" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 0
    left = runs.status(tmp_path / "r")
    assert left["state"] in ("preempted", "finished")  # the tiny run may just have ended
    assert newest(tmp_path / "r").name == f"step_{left['step']:08d}"
    assert runs.run(tiny_data, tmp_path / "r") == 0
    assert runs.curve(tmp_path / "r") == runs.curve(straight)


def test_a_finished_run_says_so(tiny_data, straight, copy_of, capsys):
    run_dir = copy_of(straight)
    assert runs.run(tiny_data, run_dir) == 0
    assert "is finished" in capsys.readouterr().out
    assert runs.curve(run_dir) == runs.curve(straight)


def test_a_longer_horizon_goes_on(tiny_data, straight, copy_of):
    run_dir = copy_of(straight)
    assert runs.run(tiny_data, run_dir, "train.max_steps=24") == 0
    assert runs.curve(run_dir)[:20] == runs.curve(straight)
    assert len(runs.curve(run_dir)) == 24


def test_a_damaged_checkpoint_costs_only_itself(tiny_data, straight, tmp_path, caplog):
    run_dir = tmp_path / "r"
    runs.run(tiny_data, run_dir, "train.stop_at=8")
    victim = max((run_dir / "checkpoints" / "step_00000008").glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    assert runs.run(tiny_data, run_dir) == 0
    assert "step 8 is skipped" in caplog.text
    assert_same_run(run_dir, straight)


def test_a_named_damaged_checkpoint_is_refused(tiny_data, straight, copy_of):
    run_dir = copy_of(straight)
    victim = run_dir / "checkpoints" / "step_00000016"
    next(victim.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        runs.run(tiny_data, run_dir, f"resume={victim}", "train.max_steps=30")


def test_going_back_to_an_earlier_checkpoint(tiny_data, straight, copy_of):
    run_dir = copy_of(straight)
    runs.run(tiny_data, run_dir, f"resume={run_dir}/checkpoints/step_00000012")
    assert_same_run(run_dir, straight)


def test_never_refuses_to_write_over_a_run(tiny_data, straight, copy_of):
    run_dir = copy_of(straight)
    with pytest.raises(ValueError, match=r"resume=never.*already holds a run"):
        runs.run(tiny_data, run_dir, "resume=never")
    assert runs.curve(run_dir) == runs.curve(straight)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.mlp.ffn_size=128", "model.mlp.ffn_size"),
        ("seed=1", "seed"),
        ("data.seq_len=16", "data.seq_len"),
        ("train.global_batch_size=4", "train.global_batch_size"),
        ("data.groups.english.weight=0.5", r"sample \d+ came from"),
    ],
)
def test_another_run_in_the_same_directory_is_refused(tiny_data, straight, copy_of, override, named):
    run_dir = copy_of(straight)
    with pytest.raises(ValueError, match=named):
        runs.run(tiny_data, run_dir, "train.max_steps=30", override)
    assert runs.curve(run_dir) == runs.curve(straight)
    assert runs.status(run_dir)["state"] == "finished"


def test_resume_allow_lets_a_named_difference_pass(tiny_data, straight, copy_of):
    run_dir = copy_of(straight)
    runs.run(tiny_data, run_dir, "train.max_steps=22", "seed=1", "resume_allow=[seed]")
    assert len(runs.curve(run_dir)) == 22


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tiny_data, straight, copy_of):
    run_dir = copy_of(straight)
    good = newest(run_dir).name
    with pytest.raises(TrainingDivergedError, match="5 steps in a row"):
        runs.run(tiny_data, run_dir, "train.max_steps=60", "optim.lr=1e38", "schedule=constant", "checkpoint.every=1")
    left = runs.status(run_dir)
    assert left["state"] == "failed"
    assert "optim.lr" in left["reason"]
    # The step that ruined the weights had a finite loss itself and may be saved; none of the skipped ones is.
    assert newest(run_dir).name in (good, "step_00000021")


def test_rows_can_be_rarer(tiny_data, straight, tmp_path):
    runs.run(tiny_data, tmp_path / "r", "train.log_every=5", "train.max_steps=20")
    assert [row["step"] for row in runs.rows(tmp_path / "r")] == [5, 10, 15, 20]
    assert runs.digest(newest(tmp_path / "r")) == runs.digest(newest(straight))


def test_bf16_follows_fp32(tiny_data, straight, tmp_path):
    runs.run(tiny_data, tmp_path / "r", "precision=bf16")
    both = zip(runs.curve(tmp_path / "r"), runs.curve(straight))
    # bf16 has 8 bits: products are off by 0.4 %, their sums and so the loss by less.
    assert all(half[2] == pytest.approx(full[2], rel=0.02) for half, full in both)
    assert runs.curve(tmp_path / "r") != runs.curve(straight)


def test_a_batch_ramp_consumes_what_it_says(tiny_data, tmp_path):
    ramp = "train.batch_ramp=[{from_samples:16,global_batch_size:16},{from_samples:48,global_batch_size:32}]"
    runs.run(tiny_data, tmp_path / "r", ramp, "train.max_steps=6", "train.stop_at=3")
    runs.run(tiny_data, tmp_path / "r", ramp, "train.max_steps=6")
    assert [row["consumed_samples"] for row in runs.rows(tmp_path / "r")] == [8, 16, 32, 48, 80, 112]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["train.global_batch_size=16"], 20),
        (["train.global_batch_size=4", "schedule.unit=tokens", "schedule.warmup_steps=0"], 20),
        # 12 steps of 8 x 32 tokens are done of the 20 that were asked for: 8 x 8 x 32 tokens are left, which are 16 steps of 4 x 32
        (["train.global_batch_size=4", "train.max_steps=null", "train.max_tokens=5120"], 28),
        (["data.seq_len=16", "train.max_steps=null", "train.max_tokens=5120"], 28),
        (["train.global_batch_size=12", "train.batch_ramp=[{from_samples:108,global_batch_size:24}]"], 20),
    ],
)
def test_changed_sizes_keep_the_end(tiny_data, straight, copy_of, overrides, steps, capsys):
    run_dir = copy_of(straight)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000020")
    shutil.rmtree(run_dir / "checkpoints" / "step_00000016")
    allow = "resume_allow=[train.global_batch_size,train.batch_ramp,data.seq_len]"
    assert runs.run(tiny_data, run_dir, *overrides, allow, "train.stop_at=14") == 0
    assert runs.rows(run_dir)[-1]["step"] == 14
    assert runs.run(tiny_data, run_dir, *overrides, allow) == 0
    assert runs.status(run_dir)["state"] == "finished"
    rows = runs.rows(run_dir)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["lr"] == 0.0 for row in rows] == [False] * (steps - 1) + [True]
    if "train.max_tokens=5120" in overrides:
        assert rows[-1]["consumed_tokens"] == 5120
    # the second phase begins at sample 80, which was one half of 160
    said = "until_fraction=0.5 stays at sample 80" in capsys.readouterr().out
    assert said == (rows[-1]["consumed_samples"] != 160)


def test_a_rate_that_jumps_is_warned_of(tiny_data, straight, copy_of, recwarn):
    run_dir = copy_of(straight)
    runs.run(tiny_data, run_dir, "train.stop_at=20")
    assert not [w for w in recwarn if "learning rate" in str(w.message)]
    with pytest.warns(UserWarning, match=r"jumps at step 20: .* gives 0 there, this one 0\.0"):
        runs.run(tiny_data, run_dir, "train.max_steps=40", "train.stop_at=21")


@pytest.mark.slow
def test_two_processes_on_one_run_directory(tiny_data, tmp_path):
    arguments = (tiny_data, tmp_path / "r", "train.max_steps=100000")
    first = PROCESSES.Process(target=runs.run, args=arguments, daemon=True)
    first.start()
    while not (tmp_path / "r" / "status.json").exists() and first.is_alive():
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match=f"in use by process {first.pid}"):
        runs.run(tiny_data, tmp_path / "r")
    first.kill()
    first.join()


def test_rows_of_the_vocabularys_padding_stay_zero(tiny_data, tmp_path):
    runs.run(tiny_data, tmp_path / "r", "model.vocab_size=390", "train.max_steps=6", "optim.decay_embeddings=true")
    tensors = dict(load_tensors(newest(tmp_path / "r")))
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        for name in ("embedding.weight", "head.weight"):
            rows = tensors[f"{kind}.{name}"]
            assert rows.shape[0] == 512
            assert not rows[390:].any()
            assert rows[:384].any()


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_bit_in_bf16_either(tiny_data, tmp_path, recompute):
    for name, mode in (("plain", "none"), ("again", recompute)):
        runs.run(tiny_data, tmp_path / name, "precision=bf16", f"parallel.recompute={mode}", "train.max_steps=4")
    assert runs.curve(tmp_path / "again") == runs.curve(tmp_path / "plain")


def test_another_runs_checkpoint_never_replaces_a_runs_own(tiny_data, straight, copy_of, tmp_path):
    run_dir = copy_of(straight)
    runs.run(tiny_data, tmp_path / "other", "train.stop_at=4")
    with pytest.raises(ValueError, match="checkpoint of another run"):
        runs.run(tiny_data, run_dir, f"resume={tmp_path / 'other'}/checkpoints/step_00000004")
    assert_same_run(run_dir, straight)


def test_killed_after_the_last_save_it_still_becomes_finished(tiny_data, straight, copy_of):
    run_dir = copy_of(straight)
    (run_dir / "status.json").write_text('{"state": "running", "step": 1, "reason": ""}')
    (run_dir / "report.html").unlink()
    assert runs.run(tiny_data, run_dir, drawn=True) == 0
    assert runs.status(run_dir)["state"] == "finished"
    assert (run_dir / "report.html").exists()


def test_a_validation_before_the_first_step_is_logged_once_and_changes_nothing(tiny_data, straight, tmp_path):
    keys = ("train.eval_at_start=true", "train.eval_every=5")
    assert runs.run(tiny_data, tmp_path / "r", *keys, "train.stop_at=7") == 0
    assert runs.run(tiny_data, tmp_path / "r", *keys) == 0
    lines = map(json.loads, (tmp_path / "r" / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in lines if "val_loss" in row] == [0, 5, 10, 15, 20]
    assert runs.curve(tmp_path / "r") == runs.curve(straight)
