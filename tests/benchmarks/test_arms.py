"""The harness of the demos: arms over seeds, continuing, and the statistics against published tables."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from benchmarks.arms import Arm, Study
from benchmarks.summary import (
    Interval,
    interval,
    markdown,
    options_of,
    paired_gap,
    plot,
    run_demo,
    t_quantile,
    write_summary,
)
from megatron_lite.commands import train as command
from megatron_lite.errors import WorkFailedError
from tests import runs

SHORT = ("train.max_steps=4", "train.eval_every=2", "train.eval_at_start=true", "checkpoint.every=2")
ARMS = [Arm("small"), Arm("large", ("model.mlp.ffn_size=96",))]


@pytest.fixture
def study(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_report", lambda *args: None)  # drawing takes longer than these runs
    words = [word for word in runs.TINY if not word.startswith(("tracking=", "train.threads="))]
    return Study(tmp_path / "study", ["--config-dir", str(tiny_data), *words, *SHORT])


def test_arms_are_ordinary_runs_and_a_second_call_reads_them(study, monkeypatch, tmp_path, capsys):
    results = study.run(ARMS, seeds=[3])
    assert list(results) == ["small", "large"]
    (result,) = results["large"]
    assert (result.seed, result.outcome) == (3, "finished")
    rows = runs.rows(study.folder / "large" / "seed_3")
    assert result.training() == [(row["consumed_tokens"], row["loss"]) for row in rows]
    assert result.last_losses(0.5) == statistics.fmean(row["loss"] for row in rows[-2:])
    lines = map(json.loads, (result.directory / "metrics.jsonl").read_text().splitlines())
    losses = [row["val_loss"] for row in lines if "val_loss" in row]
    assert result.held_out("english/") == [(256 * 2 * i, row["english/prose"]) for i, row in enumerate(losses)]
    assert result.final() == pytest.approx(statistics.fmean(losses[-1].values()))
    with pytest.raises(ValueError, match="french/"):
        result.held_out("french/")

    monkeypatch.setattr("benchmarks.arms.train", lambda run: pytest.fail("trained again"))
    assert study.run(ARMS, seeds=[3]) == results
    with pytest.raises(ValueError, match=r"small/seed_3 was made with other settings.*optim\.lr=1e-3"):
        study.run([Arm("small", ("optim.lr=1e-3",))], seeds=[3])

    options = options_of("", name="x", arguments=["--folder", str(tmp_path / "out"), "--", "optim.lr=1e-3"])
    assert (options.size, options.overrides) == ("full", ("optim.lr=1e-3",))
    for more, seeds in (([], 3), (["--seeds", "2"], 2)):
        assert options_of("", name="x", seeds={"full": 3}, arguments=more).seeds == seeds
    with pytest.raises(SystemExit):
        options_of("", name="x", seeds={"full": 3}, arguments=["--seeds", "0"])
    plot(
        options.folder / "x.png", {n: [r.held_out() for r in rs] for n, rs in results.items()}, title="", ylabel="loss"
    )
    write_summary(options, "x", text=markdown(("arm",), [("small",)]), data={"gap": math.inf})
    assert sorted(path.name for path in options.folder.iterdir()) == ["x.json", "x.md", "x.png"]
    written = json.loads((options.folder / "x.json").read_text())
    assert written["gap"] == "Infinity"
    assert {"date", "command", "processor", "cores", "load", "python", "torch", "size"} == set(written["machine"])


@pytest.mark.slow
def test_what_fails_is_one_line_that_names_its_log(study, tmp_path):
    bad = Arm("bad", ("train.threads=0",))
    with pytest.raises(SystemExit, match=r"^failed: .*train\.threads=0.*bad/seed_0/log\.txt$") as ended:
        run_demo(lambda: study.run([bad], seeds=[0]))
    assert "\n" not in str(ended.value)
    assert "Traceback" in (study.folder / "bad" / "seed_0" / "log.txt").read_text()
    with pytest.raises(WorkFailedError, match=r"mlite convert failed \(exit code 2: .*nowhere.*out\.log$"):
        study.command(["convert", "source=nowhere", f"target={tmp_path}/out", "to=hf"], makes=tmp_path / "out")


@pytest.mark.slow
def test_an_interrupted_study_continues_with_the_same_numbers(study, tmp_path, monkeypatch):
    whole = Study(tmp_path / "whole", study.common).run(ARMS[:1], seeds=[0])["small"][0]
    compose = command.build_trainer

    def stopped(run, *args, **kwargs):
        run.train.stop_at = 2
        return compose(run, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(command, "build_trainer", stopped)
        with pytest.raises(SystemExit, match="the same command continues"):
            study.run(ARMS[:1], seeds=[0])
    (again,) = study.run(ARMS[:1], seeds=[0])["small"]
    assert (again.training(), again.held_out()) == (whole.training(), whole.held_out())


@pytest.mark.slow
def test_a_sweep_picks_the_best_rate_that_did_not_diverge(study, capsys):
    arm = Arm("one", ("train.max_skipped_steps=1",))
    chosen, scores = study.sweep(
        arm, "optim.lr", [1e-6, 1e-2, 1e30], overrides=["train.max_steps=3"], score=lambda result: result.final()
    )
    assert chosen == arm.extended("optim.lr=0.01")
    assert scores[1e-2] < scores[1e-6]
    assert math.isnan(scores[1e30])
    assert "one/optim.lr_1e+30, seed 0: diverged" in capsys.readouterr().out
    with pytest.raises(WorkFailedError, match=r"one diverged.*optim\.lr"):
        study.sweep(arm, "optim.lr", [1e30], overrides=["train.max_steps=3"], score=lambda result: result.final())


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1.1e-3, [5e-4, 1e-3, 2e-3]),
        (3e-4, [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3]),
        (5e-3, [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]),
        (1.0, [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]),  # not for ever
    ],
)
def test_a_sweep_goes_on_beyond_its_ends(best, tried, monkeypatch):
    def runs(study, arms, seeds):
        rates = {arm.name: float(arm.overrides[-1].removeprefix("optim.lr=")) for arm in arms}
        return {name: [abs(math.log(rate / best))] for name, rate in rates.items()}

    monkeypatch.setattr(Study, "run", runs)
    arm, scores = Study(None).sweep(Arm("a"), "optim.lr", [2e-3, 5e-4, 1e-3], overrides=(), score=lambda found: found)
    assert list(scores) == pytest.approx(tried)
    assert arm.overrides == (f"optim.lr={min(tried, key=lambda rate: abs(math.log(rate / best)))}",)


@pytest.mark.slow
def test_two_jobs_give_the_numbers_of_one(study, tmp_path):
    """Each in a process of its own: one trains, and one fails at once, whose reason arrives."""
    bad = Arm("bad", ("train.threads=0",))
    two = Study(tmp_path / "two", study.common, jobs=2)
    with pytest.raises(WorkFailedError, match=r"train\.threads=0.*bad/seed_0/log\.txt$"):
        two.run([*ARMS[:1], bad], seeds=[0])
    ((found,), (expected,)) = (some.run(ARMS[:1], seeds=[0])["small"] for some in (two, study))
    assert found.training() == expected.training()


@pytest.mark.parametrize(
    ("degrees", "confidence", "value"),
    [  # any table of Student's t
        (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (9, 0.95, 2.262), (30, 0.95, 2.042),
        (2, 0.99, 9.925), (120, 0.90, 1.658),
    ],
)  # fmt: skip
def test_quantiles_of_students_t(degrees, confidence, value):
    assert t_quantile(degrees, confidence=confidence) == pytest.approx(value, abs=5e-4)


def test_intervals_over_seeds_and_pairs():
    found = interval([1.0, 2.0, 3.0])  # s = 1
    assert (found.mean, found.half) == (2.0, pytest.approx(4.3027 / math.sqrt(3), abs=1e-4))
    # what all seeds share is not part of the interval of paired differences
    gap = paired_gap([1.01, 2.02, 4.04], [1.0, 2.0, 4.0])
    assert (gap.mean, gap.half) == (pytest.approx(0.01), pytest.approx(0.0, abs=1e-12))
    assert gap.text("+.2f", scale=100) == "+1.00 ± 0.00"
    assert interval([2.0]).text() == "2.0000 (one seed)"
    assert interval([2.0, math.nan]).text() == "diverged"
    assert (Interval(1.0, 0.5).low, Interval(1.0, 0.5).high) == (0.5, 1.5)
    with pytest.raises(ValueError, match="at least one"):
        interval([])
    with pytest.raises(ValueError):
        paired_gap([1.0], [1.0, 2.0])
