"""Signals: all ranks stop at one step, soon, and without a collective over all hosts in every step."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.commands import train as command
from megatron_lite.engine.fsdp import FsdpEngine
from megatron_lite.training import preemption
from megatron_lite.training.config import compose_run
from megatron_lite.training.preemption import REACTION_SECONDS, Preemption
from tests import runs
from tests.distributed import run_ranks


class Clock:
    """Time that passes where a test says so; counts the questions, which others answer with what they have measured."""

    def __init__(self, other: float = 0.0) -> None:
        self.now, self.questions, self.other = 0.0, [], other
        self.signals = SimpleNamespace(number=None)
        runtime = SimpleNamespace(world_size=2, maximum=self.maximum)
        self.preemption = Preemption(runtime, self.signals, clock=lambda: self.now)

    def maximum(self, values: list[float]) -> list[float]:
        self.questions.append(self.now)
        number, step, batch = values
        return [number, max(step, self.other) if step else 0.0, batch]

    def work(self, seconds: float, kind: str = "step") -> bool:
        self.now += seconds
        return self.preemption.requested_after(kind)


@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.4, 2.0, 60.0])
def test_questions_are_rare_and_the_reaction_is_short(seconds):
    clock = Clock()
    for _ in range(5000):
        clock.work(seconds)
    assert clock.questions[0] == pytest.approx(seconds)  # the first step is followed by one
    gaps = [late - early for early, late in zip([0.0, *clock.questions], clock.questions)]
    assert max(gaps) <= max(seconds, REACTION_SECONDS) + 1e-6
    rare = 5000 * seconds / (REACTION_SECONDS / 2) if seconds < REACTION_SECONDS / 2 else 5000
    assert len(clock.questions) <= 2 * rare + 15  # the first ones, whose distance doubles


def test_the_slowest_rank_decides():
    clock = Clock(other=1.0)
    for _ in range(100):
        clock.work(0.1)
    assert max(b - a for a, b in zip(clock.questions, clock.questions[1:])) <= 0.3  # three steps, of a second elsewhere


def test_steps_and_validation_batches_share_the_time():
    clock = Clock()
    for _ in range(40):
        for _ in range(25):
            clock.work(0.05)
        for _ in range(7):
            clock.work(0.3, "validation batch")
    gaps = [late - early for early, late in zip(clock.questions, clock.questions[1:])]
    assert max(gaps) <= REACTION_SECONDS
    assert len(clock.questions) < 40 * 32 / 8


def test_the_step_after_a_save_is_followed_by_a_question():
    clock = Clock()
    for _ in range(1000):
        clock.work(0.01)
    clock.now += 300.0
    clock.preemption.resume()
    asked = len(clock.questions)
    clock.signals.number = signal.SIGUSR1
    assert clock.work(0.01)
    assert len(clock.questions) == asked + 1
    assert clock.preemption.signal == "SIGUSR1"
    assert clock.preemption.step_seconds == pytest.approx(0.01)  # the save is not a step


def signaled_rank(rank: int, world_size: int, words: list[str], every_step: bool) -> tuple[int, int]:
    """Train; rank 1 gets a signal in its 10th step. Returns the steps done and the all-reduces over all ranks."""
    steps, reduced = [], []
    train_step, all_reduce = FsdpEngine.train_step, dist.all_reduce

    def counted_step(self, *args, **kwargs):
        steps.append(rank)
        if rank == 1 and len(steps) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, *args, **kwargs)

    def counted_reduce(tensor, op=dist.ReduceOp.SUM, group=None, **kwargs):
        if group is None:
            reduced.append(tensor)
        return all_reduce(tensor, op=op, group=group, **kwargs)

    with runs.as_rank(rank, world_size) as patch:
        patch.setattr(FsdpEngine, "train_step", counted_step)
        patch.setattr(dist, "all_reduce", counted_reduce)
        patch.setattr(preemption, "REACTION_SECONDS", 600.0)  # a busy machine must not ask more often
        if every_step:  # the planted bug
            patch.setattr(Preemption, "requested_after", lambda self, kind: [self._ask(), self.signal is not None][1])
        command.train(compose_run(words))
    return len(steps), len(reduced)


@pytest.mark.parametrize(
    ("every_step", "step", "questions"), [(False, 15, 4), pytest.param(True, 10, 10, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_rank_stops_all(every_step, step, questions, tiny_data, tmp_path):
    """At the same step, and but for the questions after steps 1, 3, 7 and 15 without a collective over all ranks."""
    overrides = ["train.max_steps=1000", "checkpoint.every=0", "watchdog.timeout_seconds=0", "train.micro_batch_size=1"]
    words = runs.arguments(tiny_data, tmp_path / "r", *overrides)
    assert run_ranks(2, signaled_rank, words, every_step) == [(step, questions)] * 2
    left = runs.status(tmp_path / "r")
    assert (left["state"], left["reason"], left["step"]) == ("preempted", "SIGTERM", step)
    assert left["grace_seconds"] >= REACTION_SECONDS


@pytest.fixture
def signal_in_validation(monkeypatch):
    """SIGTERM at the second validation batch of a step."""
    evaluate, batches = FsdpEngine.evaluate, []

    def signaled(self, batch):
        batches.append(batch)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, batch)

    monkeypatch.setattr(FsdpEngine, "evaluate", signaled)


def validations(run_dir) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "val_loss" in row]


@pytest.mark.parametrize(("every", "cut"), [(7, 7), (0, 20)])
def test_a_validation_cut_short_is_done_once_on_resume(tiny_data, straight, tmp_path, every, cut, signal_in_validation):
    run_dir = tmp_path / "r"
    assert runs.run(tiny_data, run_dir, f"train.eval_every={every}") == 0
    left = runs.status(run_dir)
    assert (left["state"], left["step"]) == ("preempted", cut)
    assert read_manifest(run_dir / "checkpoints" / f"step_{cut:08d}")["validation_due"]
    assert validations(run_dir) == []
    assert runs.run(tiny_data, run_dir, f"train.eval_every={every}") == 0
    assert runs.status(run_dir)["state"] == "finished"
    assert [row["step"] for row in validations(run_dir)] == ([7, 14, 20] if every else [20])
    assert validations(run_dir)[-1] == validations(straight)[-1]
    assert runs.curve(run_dir) == runs.curve(straight)
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)  # the row comes before the next step's


def test_a_signal_before_a_validation_saves_first(tiny_data, tmp_path, monkeypatch):
    evaluated = []
    train_step = FsdpEngine.train_step

    def signaled(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, *args, **kwargs)

    monkeypatch.setattr(FsdpEngine, "train_step", signaled)
    monkeypatch.setattr(FsdpEngine, "evaluate", lambda self, batch: evaluated.append(batch))
    runs.run(tiny_data, tmp_path / "r", "train.eval_every=1")
    assert runs.status(tmp_path / "r")["step"] == 1
    assert evaluated == []
    assert read_manifest(tmp_path / "r" / "checkpoints" / "step_00000001")["validation_due"]
