"""Who is named for a hang, on a CPU by the stacks and on a GPU by the phases and the flight recorder."""

from __future__ import annotations

import json
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from megatron_lite.parallel import collectives
from megatron_lite.training import metrics
from megatron_lite.training.hang import (
    culprits,
    has_unfinished_collective,
    numbers,
    place,
    verdict,
    waits_for_others,
)


def test_numbers():
    assert numbers([3]) == "rank 3"
    assert numbers([0, 1, 2, 7, 9, 10]) == "ranks 0-2, 7, 9-10"


def test_a_frame_of_ours_waits_for_nobody():
    assert not waits_for_others(sys._getframe())
    assert place(sys._getframe()).endswith("test_a_frame_of_ours_waits_for_nobody")
    assert not waits_for_others(None)


def frame(file: str, back: SimpleNamespace | None = None, **names: object) -> SimpleNamespace:
    """A frame of a function in `file`."""
    return SimpleNamespace(f_code=SimpleNamespace(co_filename=f"/somewhere/{file}"), f_globals=names, f_back=back)


def test_a_rank_waits_for_others_in_torchs_collectives():
    """Also when torch's wrappers are the innermost frames; code that a collective calls back works for itself."""
    collective = frame("torch/distributed/distributed_c10d.py")
    assert waits_for_others(collective)
    assert waits_for_others(frame("torch/_ops.py", frame("torch/utils/_contextlib.py", collective)))
    assert not waits_for_others(frame("torch/nn/functional.py", collective))
    assert not waits_for_others(frame("torch/_ops.py"))


def test_a_module_says_that_it_waits_for_others(monkeypatch):
    monkeypatch.setitem(globals(), "WAITS_FOR_OTHER_RANKS", True)
    assert waits_for_others(sys._getframe())
    for module in (collectives, metrics):
        assert module.WAITS_FOR_OTHER_RANKS


def note(entered: int, *, waits: bool = False, phase: str = "train_step", at: str = "models/linear.py:46 forward"):
    return {"step": 7, "phase": phase, "entered": entered, "waits": waits, "at": at}


def test_backward_of_a_gpu_runs_in_another_thread_and_its_stack_does_not_tell():
    """The main thread's frames are torch's own, above our train_step, which is not a collective."""
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(waits_for_others(sys._current_frames()[main.ident]))
            return grad

    main = threading.Thread(target=lambda: Look.apply(torch.ones(1, requires_grad=True)).sum().backward())
    main.start()
    main.join()
    assert seen == [False]


@pytest.mark.parametrize(
    ("notes", "named"),
    [
        # three hosts stopped where their queues of kernels were full, one never got its batch
        ({0: note(70), 1: note(69, phase="data"), 2: note(70), 3: note(71, phase="log")}, [1]),
        # all in the same phase: one has no unfinished collective
        ({0: note(70, waits=True), 1: note(70, waits=True), 2: note(70)}, [2]),
        # two are behind, one of them waits for the other
        ({0: note(70), 1: note(69, waits=True), 2: note(69)}, [2]),
        # nothing tells them apart
        ({0: note(70), 1: note(70)}, []),
        ({0: note(70, waits=True), 1: note(70, waits=True)}, []),
        ({}, []),
    ],
)
def test_culprits_on_a_gpu(notes, named):
    assert culprits(notes, on_gpu=True) == named


def test_a_verdict_names_silent_ranks_culprits_and_the_rest():
    notes = {0: note(70), 1: note(69, phase="data", at="data/loader.py:9 steps"), 3: note(70)}
    assert verdict(notes, last_seen={2: {"step": 6, "phase": "log"}}, world_size=4, on_gpu=True) == [
        "rank 2 does not answer (last seen in step 6, log)",
        "rank 1 is stuck in step 7, data, at data/loader.py:9 steps",
        "ranks 0, 3 wait for others in step 7, train_step, at models/linear.py:46 forward",
    ]


def test_unfinished_collectives():
    def record(**groups: tuple[int, int]) -> bytes:
        keys = ("last_enqueued_collective", "last_completed_collective")
        return json.dumps({"pg_status": {name: dict(zip(keys, map(str, of))) for name, of in groups.items()}}).encode()

    assert has_unfinished_collective(record(tp=(12, 12), dp=(4, 3)))
    assert not has_unfinished_collective(record(tp=(12, 12), dp=(-1, -1)))
    assert not has_unfinished_collective(b"{}")
