from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest

from megatron_lite.tracking import RunInfo, TensorBoardTracker, TrackingConfig

pytest.importorskip("tensorboard")


def info(run_dir: Path, start: int = 0) -> RunInfo:
    return RunInfo(run_dir=run_dir, name="smoke", total_steps=9, start_step=start, config={"seed": 7, "data": "écrit"})


def log(run_dir: Path, steps: range, *, start: int, offset: float) -> TensorBoardTracker:
    tracker = TensorBoardTracker()
    tracker.start(info(run_dir, start))
    for step in steps:
        tracker.log(
            {"step": step, "loss": offset + step, "mfu": None, "lr": 0.1 * step, "fp8": {"module": f"layers.{step}"}}
        )
        if step % 2 == 0:
            tracker.log({"step": step, "val_loss": {"english text": offset + step / 2, "中文": math.nan}})
    return tracker


def read(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars as TensorBoard shows them."""
    found = load(run_dir)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def load(run_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        try:
            log(tmp_path, range(1, 7), start=0, offset=0.0)
        finally:
            os._exit(0)  # as by a kill: nothing is closed or flushed
    os.waitpid(child, 0)
    (file,) = (tmp_path / "tensorboard").iterdir()
    file = file.rename(
        file.with_name("events.out.tfevents.0000000001.host.1.0")
    )  # names begin with the time in seconds
    with file.open("ab") as torn:
        torn.write(b"\x10\x00\x00")
    log(tmp_path, range(5, 9), start=4, offset=100.0).close("finished")  # from the checkpoint of step 4
    scalars = read(tmp_path)
    assert set(scalars) == {"loss", "lr", "val_loss/english text", "val_loss/中文"}
    assert scalars["loss"] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 105), (6, 106), (7, 107), (8, 108)]
    assert scalars["val_loss/english text"] == [(2, 1), (4, 2), (6, 103), (8, 104)]
    assert scalars["lr"] == [(i, pytest.approx(0.1 * i, rel=1e-7)) for i in range(1, 9)]  # fp32
    assert [math.isnan(value) for _, value in scalars["val_loss/中文"]] == [True] * 4
    texts = load(tmp_path).Tensors("fp8/module/text_summary")
    assert texts[-1].tensor_proto.string_val[0].decode() == "layers.8"


def test_without_a_checkpoint_the_record_begins_anew(tmp_path: Path) -> None:
    first = TensorBoardTracker()
    first.start(info(tmp_path))
    first.log({"step": 0, "val_loss": {"a": 9.0}})
    log(tmp_path, range(1, 3), start=0, offset=0.0).close("finished")
    scalars = read(tmp_path)
    assert scalars.get("val_loss/a", []) == []
    assert scalars["loss"] == [(1, 1), (2, 2)]


def test_the_config_is_shown(tmp_path: Path) -> None:
    log(tmp_path, range(0), start=0, offset=0.0).close("finished")
    (event,) = load(tmp_path).Tensors("run/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert json.loads(text)["config"] == {"seed": 7, "data": "écrit"}


@pytest.mark.parametrize(
    ("package", "values", "key"),
    [
        ("tensorboard", {"tensorboard": True}, "tracking.tensorboard"),
        ("wandb", {"wandb": {"enabled": True}}, "tracking.wandb.enabled"),
    ],
)
def test_a_missing_package_is_named(package: str, values: dict, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_lite.config.compose import from_dict

    config = from_dict(TrackingConfig, values)
    config.validate()
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    with pytest.raises(ValueError, match=rf"{key}=true.*pip install"):
        config.validate()
