from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.tracking import RunInfo, TrackingConfig, build_tracker


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("none", ["JsonlTracker"]),
        ("console", ["JsonlTracker", "ConsoleTracker"]),
        ("wandb", ["JsonlTracker", "ConsoleTracker", "WandbTracker"]),
    ],
)
def test_jsonl_is_always_on_and_first(kind: str, names: list[str]) -> None:
    trackers = build_tracker(TrackingConfig(kind=kind)).trackers
    assert [type(tracker).__name__ for tracker in trackers] == names


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = build_tracker(TrackingConfig(kind="wandb"), main_process=False)
    tracker.start(RunInfo(run_dir=tmp_path, name="x", total_steps=1))
    tracker.log({"step": 1, "loss": 1.0})
    tracker.close("finished")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("key", "value"), [("kind", "tensorboard"), ("mode", "shared")])
def test_a_wrong_choice_is_named(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"tracking.{key}={value}.*choose one of"):
        build_tracker(TrackingConfig(**{key: value}))


def test_the_config_group_gives_valid_configs() -> None:
    import yaml

    folder = Path(__file__).parents[2] / "configs" / "tracking"
    for path in sorted(folder.glob("*.yaml")):
        config = TrackingConfig(**yaml.safe_load(path.read_text()))
        config.validate()
        assert config.kind == path.stem
