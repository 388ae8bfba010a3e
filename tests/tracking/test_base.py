from __future__ import annotations

import threading
import warnings
from pathlib import Path

import pytest

from megatron_lite.background import Lost
from megatron_lite.tracking import RunInfo, Trackers, TrackingConfig, WandbConfig, base, build_tracker
from megatron_lite.tracking.base import flatten
from megatron_lite.training.config import compose_run


class Noting:
    """A tracker that notes its calls, and raises `error` in the one named `fails`."""

    def __init__(self, fails: str = "", error: BaseException | None = None) -> None:
        self.fails, self.error, self.calls = fails, error, []

    def start(self, run: RunInfo) -> None:
        self._note("start")

    def log(self, row: dict) -> None:
        self._note(row["step"])

    def close(self, status: str) -> None:
        self._note(status)

    def _note(self, call: object) -> None:
        self.calls.append(call)
        if call == self.fails and self.error:
            raise self.error


def play(trackers: Trackers, tmp_path: Path) -> None:
    trackers.start(RunInfo(run_dir=tmp_path, name="x", total_steps=2))
    trackers.log({"step": 1})
    trackers.log({"step": 2})
    trackers.close("finished")


WHOLE = ["start", 1, 2, "finished"]


@pytest.mark.parametrize("error", [ValueError("full"), OSError("gone"), SystemExit(1)])
@pytest.mark.parametrize("fails", WHOLE)
def test_an_observer_that_fails_is_left_out_with_one_warning(
    fails: object, error: BaseException, tmp_path: Path
) -> None:
    broken, record, other = Noting(fails, error), Noting(), Noting()
    with pytest.warns(UserWarning, match=f"Noting.*{type(error).__name__}") as caught:
        play(Trackers(record, [broken, other]), tmp_path)
    assert len(caught) == 1
    assert broken.calls == WHOLE[: WHOLE.index(fails) + 1]
    assert record.calls == other.calls == WHOLE


def test_the_record_must_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"):
        play(Trackers(Noting(1, OSError("disk"))), tmp_path)


@pytest.mark.parametrize("hangs", WHOLE)
def test_an_observer_that_hangs_is_left_behind(hangs: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(Noting):
        def _note(self, call: object) -> None:
            super()._note(call)
            if call == hangs:
                threading.Event().wait()

    monkeypatch.setattr(base, "PATIENCE_SECONDS", 0.1)
    stuck, record, other, lost = Hanging(), Noting(), Noting(), Lost()
    with pytest.warns(UserWarning, match="Hanging"):
        play(Trackers(record, [stuck, other], on_loss=lost), tmp_path)
    assert record.calls == other.calls == WHOLE
    assert stuck.calls == WHOLE[: WHOLE.index(hangs) + 1]
    assert [reason.split(" ")[0] for reason in lost.reasons] == ["Hanging"]


@pytest.mark.parametrize(
    ("overrides", "observers"),
    [
        (["tracking=none"], []),
        ([], ["ConsoleTracker"]),
        (["tracking=wandb"], ["WandbTracker", "ConsoleTracker"]),
        (["tracking=tensorboard"], ["TensorBoardTracker", "ConsoleTracker"]),
        (["tracking=[wandb,tensorboard]"], ["WandbTracker", "TensorBoardTracker", "ConsoleTracker"]),
        (["tracking=[none,tensorboard]"], ["TensorBoardTracker"]),
        (["tracking=none", "tracking.tensorboard=true"], ["TensorBoardTracker"]),
    ],
)
def test_any_number_of_trackers_beside_the_record(overrides: list[str], observers: list[str]) -> None:
    trackers = build_tracker(compose_run(overrides).tracking)
    assert type(trackers.record).__name__ == "JsonlTracker"
    assert [type(tracker).__name__ for tracker in trackers.observers] == observers


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    config = TrackingConfig(tensorboard=True, wandb=WandbConfig(enabled=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        play(build_tracker(config, main_process=False), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_choice_is_named() -> None:
    with pytest.raises(ValueError, match=r"tracking\.wandb\.mode=shared.*online, offline, disabled"):
        build_tracker(TrackingConfig(wandb=WandbConfig(mode="shared")))


def test_flatten() -> None:
    row = {"step": 3, "val_loss": {"a": 1.0, "b": {"c": 2.0}}, "mfu": None}
    assert flatten(row) == {"step": 3, "val_loss/a": 1.0, "val_loss/b/c": 2.0}
