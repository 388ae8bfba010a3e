"""What `profile.steps` leaves behind, and that it changes no number."""

from __future__ import annotations

import json

import pytest

from megatron_lite.tracking.profile import TABLE, TRACE, ProfileConfig, Profiler
from tests import runs


def spans(trace, name) -> list[dict]:
    events = json.loads(trace.read_text())["traceEvents"]
    return [event for event in events if event.get("name") == name and event.get("ph") == "X"]


def test_a_profiled_run_is_the_same_run(tiny_data, straight, tmp_path):
    runs.run(tiny_data, tmp_path / "r", "profile.steps=3", "profile.skip=4")
    assert runs.curve(tmp_path / "r") == runs.curve(straight)
    assert runs.digest(tmp_path / "r" / "checkpoints" / "step_00000020") == runs.digest(
        straight / "checkpoints" / "step_00000020"
    )
    folder = tmp_path / "r" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [TABLE, TRACE]
    assert len(spans(folder / TRACE, "step")) == 3
    table = (folder / TABLE).read_text()
    assert table.startswith("3 steps after the first 4 of the job")
    for row in ("aten::mm", "AdamW.step", "wait for data", "Self CPU %"):
        assert row in table
    # what a step did lies inside it: one optimizer update each
    steps, updates = spans(folder / TRACE, "step"), spans(folder / TRACE, "AdamW.step")
    inside = [any(s["ts"] <= u["ts"] <= s["ts"] + s["dur"] for s in steps) for u in updates]
    assert inside == [True] * 3


def test_without_it_nothing_is_recorded(straight):
    assert not (straight / "profile").exists()


@pytest.mark.parametrize(("steps", "skip", "recorded"), [(2, 0, 2), (3, 5, 3), (10, 5, 3), (2, 8, 0)])
def test_every_step_passes_and_the_asked_ones_are_recorded(steps, skip, recorded, tmp_path):
    profiler = Profiler(ProfileConfig(steps=steps, skip=skip), tmp_path / "p")
    assert list(profiler.watch(iter(range(8)))) == list(range(8))
    found = spans(tmp_path / "p" / TRACE, "step") if recorded else []
    assert len(found) == recorded
    assert (tmp_path / "p").exists() == bool(recorded)


def test_a_job_that_ends_early_leaves_what_it_has(tmp_path):
    steps = Profiler(ProfileConfig(steps=5, skip=1), tmp_path / "p").watch(iter(range(100)))
    assert [next(steps), next(steps), next(steps)] == [0, 1, 2]
    steps.close()
    assert len(spans(tmp_path / "p" / TRACE, "step")) == 2


def test_a_job_that_goes_back_records_once(tmp_path):
    profiler = Profiler(ProfileConfig(steps=2, skip=1), tmp_path / "p")
    early, late = profiler.watch(iter(range(8))), profiler.watch(iter(range(3, 8)))
    assert [next(early) for _ in range(5)] == [0, 1, 2, 3, 4]
    early.close()
    written = (tmp_path / "p" / TRACE).stat().st_mtime_ns
    assert list(late) == [3, 4, 5, 6, 7]
    assert (tmp_path / "p" / TRACE).stat().st_mtime_ns == written


def test_other_ranks_record_nothing(tmp_path):
    profiler = Profiler(ProfileConfig(steps=2, skip=0), tmp_path / "p", main_process=False)
    assert list(profiler.watch(iter(range(4)))) == [0, 1, 2, 3]
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("key", ["steps", "skip"])
def test_negative_numbers_are_refused(key, tiny_data, tmp_path):
    with pytest.raises(ValueError, match=f"profile.{key}=-1 must not be negative"):
        runs.run(tiny_data, tmp_path / "r", f"profile.{key}=-1")
