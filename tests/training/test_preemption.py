"""Signals: all ranks stop at one step, soon, and without a collective over all hosts in every step."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_lite.commands import train as command
from megatron_lite.engine.fsdp import FsdpEngine
from megatron_lite.training.preemption import REACTION_SECONDS, Preemption


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


def signaled_rank(rank: int, world_size: int, data: str, run_dir: str, every_step: bool) -> dict:
    """Trains; rank 1 signals itself after its 40th step. Tells at which step it stopped and counts collectives over the world."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "", "MASTER_PORT": ""}
    steps, asked, reduced, sent = [0], [], dist.all_reduce, [0.0]
    train_step, stop, ask = FsdpEngine.train_step, command.stop, Preemption._ask

    def stepped(self, *args, **kwargs):
        steps[0] += 1
        if rank == 1 and steps[0] == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        sent[0] = sent[0] or (time.monotonic() if steps[0] == 40 else 0.0)
        return train_step(self, *args, **kwargs)

    def counted(tensor, op=dist.ReduceOp.SUM, group=None, **kwargs):
        if group is None:
            asked.append(steps[0])
        return reduced(tensor, op=op, group=group, **kwargs)

    FsdpEngine.train_step, command.stop, dist.all_reduce = stepped, lambda: None, counted
    if every_step:
        Preemption.requested_after = lambda self, kind: [ask(self), self.signal is not None][1]
    try:
        overrides = ["train.max_steps=100000", "train.log_every=1000", "checkpoint.every=0"]
        command.train(command_line(data, run_dir, *overrides))
    finally:
        FsdpEngine.train_step, command.stop, dist.all_reduce = train_step, stop, reduced
        for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[key]
    return {"step": steps[0], "asked": asked, "seconds": time.monotonic() - sent[0]}
