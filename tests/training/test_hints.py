"""What a finished run says about a longer one, and a job that is to stop behind where the run stands."""

from __future__ import annotations

import re

import pytest

from tests import runs

TEN = ("train.max_steps=10", "checkpoint.every=2")
WSD = ("schedule=wsd", "schedule.decay_fraction=0.3", *TEN)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        # the decay starts after step 7: at step 6 the rate is the peak
        ((*WSD, "checkpoint.keep=3"), r"resume=\S+/checkpoints/step_00000006 run\.dir=\S+ train\.max_steps=20"),
        ((*WSD, "checkpoint.keep=2"), r"train\.max_steps=20: .*jumps up again"),
        ((*TEN, "schedule=constant"), r"same command with train\.max_steps=20: continues"),
    ],
)
def test_the_hint_for_a_longer_run_goes_on_from_before_the_decay(keys, says, tiny_data, tmp_path, capsys):
    assert runs.run(tiny_data, tmp_path / "r", *keys) == 0
    assert re.search(says, capsys.readouterr().out)


def test_the_hinted_command_works(tiny_data, tmp_path, capsys):
    runs.run(tiny_data, tmp_path / "r", *WSD)
    hint = next(line for line in capsys.readouterr().out.splitlines() if "resume=" in line)
    words = re.findall(r"(?:resume|run\.dir|train\.max_steps)=[^\s:]+", hint)
    assert runs.run(tiny_data, tmp_path / "r", *WSD, *words) == 0
    longer = runs.rows(tmp_path / "r_longer")
    assert [row["step"] for row in longer] == list(range(7, 21))
    assert longer[0]["lr"] == longer[7]["lr"] == 1e-2


def test_a_stop_behind_the_run_is_refused(tiny_data, straight, copy_of):
    run_dir = copy_of(straight)
    with pytest.raises(ValueError, match=r"train\.stop_at=7 is behind run\.dir=.* step 20"):
        runs.run(tiny_data, run_dir, "train.max_steps=24", "train.stop_at=7")
    assert runs.curve(run_dir) == runs.curve(straight)
    assert runs.run(tiny_data, run_dir, "train.max_steps=24", "train.stop_at=20") == 0  # reached: nothing to do
