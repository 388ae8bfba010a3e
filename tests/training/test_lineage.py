"""`resume=<path>` goes back once: the same command goes on where its last job stopped, however often it is given."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_lite.checkpoint import directory as folder
from megatron_lite.checkpoint.manifest import encode, identity, read_manifest
from megatron_lite.checkpoint.opening import find_checkpoint
from megatron_lite.training.lineage import Origin
from tests import runs

SLOWER = "optim.lr=5e-3"  # so that what was done after going back can be told from what was there


def step(run_dir, number):
    return run_dir / "checkpoints" / f"step_{number:08d}"


def steps(run_dir):
    return [read_manifest(path)["step"] for path in sorted((run_dir / "checkpoints").glob("step_*"))]


@pytest.fixture
def going_back(tiny_data, straight, tmp_path):
    """Runs a command that goes back to step 12 of a copy of `straight` in `name`; `stop_at` and such come on top."""

    def call(name, *overrides):
        run_dir = tmp_path / name
        if not run_dir.exists():
            shutil.copytree(straight, run_dir)
        assert runs.run(tiny_data, run_dir, SLOWER, f"resume={step(run_dir, 12)}", *overrides) == 0
        return run_dir

    return call


@pytest.fixture(scope="module")
def whole(tiny_data, straight, tmp_path_factory):
    """The curve of a run that goes back to step 12 and is not stopped again."""
    run_dir = tmp_path_factory.mktemp("whole") / "r"
    shutil.copytree(straight, run_dir)
    assert runs.run(tiny_data, run_dir, SLOWER, f"resume={step(run_dir, 12)}") == 0
    return runs.curve(run_dir)


def test_a_rollback_is_done_once(going_back, whole, capsys):
    """Stopped or not, with a checkpoint to go back to that retention has deleted meanwhile: the curve of one without a stop."""
    going_back("r", "train.stop_at=13")
    run_dir = going_back("r", "train.stop_at=14")
    assert steps(run_dir) == [12, 13, 14]
    going_back("r", "checkpoint.keep=1", "train.stop_at=15")
    assert steps(run_dir) == [15]
    going_back("r")
    assert runs.curve(run_dir) == whole
    capsys.readouterr()
    going_back("r")
    assert "is finished" in capsys.readouterr().out


def test_auto_goes_on_after_a_rollback_and_the_rollback_after_auto(tiny_data, going_back, whole):
    run_dir = going_back("r", "train.stop_at=13")
    runs.run(tiny_data, run_dir, SLOWER, "train.stop_at=15")
    going_back("r", "train.stop_at=17")
    assert runs.status(run_dir)["step"] == 17
    assert runs.curve(run_dir) == whole[:17]
    (entry,) = read_manifest(step(run_dir, 17))["lineage"]
    assert (entry["path"], entry["step"]) == (str(step(run_dir, 12)), 12)


def test_a_second_rollback_is_asked_for_by_a_word_and_done_once_too(going_back, whole):
    run_dir = going_back("r", "train.stop_at=14")
    for word in ("true", "third"):
        again = f"resume_again={word}"
        going_back("r", again, "train.stop_at=13")
        assert steps(run_dir)[-1] == 13
        going_back("r", again, "train.stop_at=15")
        assert steps(run_dir)[-2:] == [13, 15]
    going_back("r", "resume_again=third")
    assert runs.curve(run_dir) == whole


def test_a_rollback_that_is_killed_before_its_first_save_begins_again(going_back, whole, monkeypatch):
    moved, move = [], folder._move

    def killed(directory, name, hidden):
        moved.append(name)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return move(directory, name, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "_move", killed)
        with pytest.raises(KeyboardInterrupt):
            going_back("r")
    run_dir = going_back("r", "train.stop_at=12")  # hides the rest, and trains nothing
    assert moved == ["step_00000020", "step_00000016"]  # what is left was at every moment a run's first part
    assert steps(run_dir) == [12]
    going_back("r")
    assert runs.curve(run_dir) == whole


def test_a_checkpoint_that_was_replaced_does_not_return_after_a_rollback(going_back, straight, tmp_path):
    """A kill in the midst of a save of a step that was there already leaves both."""
    shutil.copytree(straight, tmp_path / "r")
    shutil.copytree(step(straight, 16), tmp_path / "r" / "checkpoints" / ".tmp-replaced-step_00000016")
    run_dir = going_back("r", "train.stop_at=13")
    assert steps(run_dir) == [12, 13]


def test_a_branch_goes_on_though_its_trunk_is_gone(tiny_data, copy_of, straight, tmp_path):
    trunk = copy_of(straight)
    branching = [SLOWER, "train.max_steps=18", f"resume={step(trunk, 12)}"]
    for name in ("whole", "branch"):
        runs.run(tiny_data, tmp_path / name, *branching, *["train.stop_at=14"] * (name == "branch"))
    runs.run(tiny_data, tmp_path / "branch", *branching, "train.stop_at=15")
    shutil.rmtree(step(trunk, 12))
    runs.run(tiny_data, tmp_path / "branch", *branching)
    assert runs.status(tmp_path / "branch")["state"] == "finished"
    assert runs.curve(tmp_path / "branch") == runs.curve(tmp_path / "whole")
    # a branch of the branch, then the same of its newest checkpoint, named by its run
    for path, name in ((step(tmp_path / "branch", 16), "twig"), (tmp_path / "branch", "leaf")):
        for stop in (19, 20):
            words = [SLOWER, f"resume={path}", f"train.stop_at={stop}"]
            runs.run(tiny_data, tmp_path / name, *words, "train.max_steps=22")
    assert [row["step"] for row in runs.rows(tmp_path / "twig")] == [17, 18, 19, 20]
    assert [row["step"] for row in runs.rows(tmp_path / "leaf")] == [19, 20]
    assert [entry["step"] for entry in read_manifest(step(tmp_path / "twig", 20))["lineage"]] == [12, 16]


def test_a_branch_from_a_moved_trunk_goes_on(tiny_data, copy_of, straight, tmp_path):
    """It is the same checkpoint; that of another step is refused, for it would drop what the branch has done."""
    trunk, branch = copy_of(straight), tmp_path / "branch"
    runs.run(tiny_data, branch, SLOWER, f"resume={step(trunk, 12)}", "train.stop_at=14")
    trunk.rename(tmp_path / "moved")
    runs.run(tiny_data, branch, SLOWER, f"resume={step(tmp_path / 'moved', 12)}", "train.stop_at=15")
    assert [row["step"] for row in runs.rows(branch)] == [13, 14, 15]
    with pytest.raises(ValueError, match="checkpoint of another run"):
        runs.run(tiny_data, branch, f"resume={step(tmp_path / 'moved', 16)}")
    again = f"resume={step(tmp_path / 'moved', 12)}"
    runs.run(tiny_data, branch, SLOWER, again, "resume_again=true", "train.stop_at=13")
    assert [row["step"] for row in runs.rows(branch)] == [13]


def test_a_trunk_that_went_on_past_the_branch_is_refused(tiny_data, copy_of, straight, tmp_path):
    """Its newest checkpoint is not where the branch went off, and would drop what the branch has done."""
    trunk, branch = copy_of(straight), tmp_path / "branch"
    later = step(trunk, 20).rename(tmp_path / "later")
    shutil.rmtree(step(trunk, 16))
    runs.run(tiny_data, branch, SLOWER, f"resume={trunk}", "train.stop_at=13")
    later.rename(step(trunk, 20))
    with pytest.raises(ValueError, match="checkpoint of another run"):
        runs.run(tiny_data, branch, SLOWER, f"resume={trunk}", "resume_again=true")
    assert steps(branch) == [13]


def test_what_a_path_names(straight, tmp_path, monkeypatch):
    """However it is written; a checkpoint of the same step with other numbers is another one."""
    monkeypatch.chdir(straight)
    named = Origin.named("checkpoints/step_00000012", "TRUE")
    assert named == Origin.named(str(step(straight, 12)), "true")
    manifest = read_manifest(step(straight, 12))
    file, entry = next(iter(manifest["files"].items()))
    assert named.checkpoint == identity(manifest)
    assert named.checkpoint != identity(
        {**manifest, "files": {**manifest["files"], file: {**entry, "blocks_sha256": "0"}}}
    )


def test_a_word_without_a_path_is_refused(tiny_data, tmp_path):
    with pytest.raises(ValueError, match=r"resume_again=true needs resume=<path>"):
        runs.run(tiny_data, tmp_path / "r", "resume_again=true")


def test_a_checkpoint_from_before_lineages_is_gone_back_to(going_back, whole, straight, tmp_path):
    shutil.copytree(straight, tmp_path / "r")
    for path in (tmp_path / "r" / "checkpoints").iterdir():
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_bytes(
            encode({k: v for k, v in manifest.items() if k not in ("lineage", "consumed_tokens", "checksum")})
        )
    run_dir = going_back("r")
    assert runs.curve(run_dir) == whole
    assert find_checkpoint(run_dir).name == "step_00000020"
