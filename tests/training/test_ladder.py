"""FP8 runs that meet spikes: the module that is named, the rungs, and that neither a kill nor a diagnosis changes a bit."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import warnings

import numpy as np
import pytest

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.opening import find_checkpoint
from megatron_lite.checkpoint.store import CheckpointStore
from megatron_lite.commands import train as command
from megatron_lite.commands.evaluate import compose_evaluate, evaluate
from megatron_lite.data.blend import Blend
from megatron_lite.errors import TrainingDivergedError
from megatron_lite.objectives.next_token import NextToken
from megatron_lite.optim.schedule import BatchSize, RampStage
from megatron_lite.precision.numerics import Numerics
from megatron_lite.precision.quantized_linear import QuantizedLinear
from megatron_lite.tracking import write_report
from megatron_lite.training import spikes
from megatron_lite.training.config import compose_run
from megatron_lite.training.ladder import Ladder, Operand, Reading, first_out_of_line
from megatron_lite.training.trainer import Trainer
from tests import runs
from tests.checkpoint.processes import fresh_ranks
from tests.distributed import run_ranks
from tests.forked import PROCESSES

MARK = 383  # a token that is never followed by itself elsewhere
BAD_STEPS = (10, 11, 14, 15, 18)  # the first sample of each is bad
PLANTED = "layers.1.mixer.down"  # its input is far too large for a bad sample
RUNGS = ["fp8", "fp8_forward", "fp8_forward", "bf16"]  # after each of two events on a rung
LOSS = {"factor": 50.0}  # what such a sample's loss is multiplied by
SETTINGS = [
    "train.log_every=1", "spike.window=3", "spike.threshold=200", "checkpoint.every=4", "checkpoint.keep=9", "data.phases=[]",
    "train.on_spike=skip", "precision.fallback_after=2",
]  # fmt: skip


# --- without a training ---------------------------------------------------------------------------------------------------------


class ThreeRungs(Numerics):
    rungs = ("fp8", "fp8_forward", "bf16")
    rung = "fp8"


def ladder(after: int = 2, recipe: str = "fp8_current") -> Ladder:
    return Ladder(ThreeRungs(), recipe, after)


def add(ladder: Ladder, step: int, *, at_once: bool = False) -> str:
    ladder.add({"step": step, "end": 8 * step}, at_once=at_once)
    return ladder.numerics.rung


def test_so_many_events_a_rung_or_at_once():
    steps = ladder()
    assert [add(steps, step) for step in range(1, 5)] == ["fp8", "fp8_forward", "fp8_forward", "bf16"]
    assert [add(ladder(after=1), 1), add(ladder(after=0), 1), add(ladder(after=0), 1, at_once=True)] == [
        "fp8_forward", "fp8", "fp8",
    ]  # fmt: skip
    hopeless = ladder(after=9)
    assert [add(hopeless, step, at_once=True) for step in (1, 2)] == ["fp8_forward", "bf16"]


def test_events_survive_a_checkpoint_and_going_back_to_one():
    first = ladder()
    add(first, 1)
    older = json.loads(json.dumps(first.state()))
    add(first, 2)
    add(first, 3)
    first.load_state(older)  # a rollback
    assert ([event["step"] for event in first.events], first.numerics.rung) == ([1, 2, 3], "fp8_forward")
    resumed = ladder()
    resumed.load_state(json.loads(json.dumps(first.state())))
    assert add(resumed, 4) == "bf16"
    for other in (ladder(after=0), ladder(recipe="fp8_block")):  # as configured: the record stays, the rung does not
        other.load_state(first.state())
        assert (other.numerics.rung, other.state()) == ("fp8", first.state())
    assert [add(other, 4), add(other, 5)] == ["fp8", "fp8_forward"]
    assert ladder().state() == {}


def test_the_first_operand_out_of_line_is_named():
    names = [Operand(f"layers.{i}", kind) for i in range(4) for kind in ("input", "weight")]
    good = {name: Reading(1.0 + i, 0.0, 0.1) for i, name in enumerate(names)}

    def found(name: Operand, usual: dict = good, **wrong: float) -> tuple[Operand, str] | None:
        later = {names[6]: Reading(math.inf, 1.0, 1.0)} if wrong else {}  # what follows is worse and not named
        return first_out_of_line({**good, **later, name: good[name]._replace(**wrong)}, usual)

    assert found(names[3]) is None
    for wrong, why in (({"amax": math.inf}, "not finite"), ({"overflow": 0.02}, "2.00% of it overflows"),
                       ({"underflow": 0.9}, "90.0% of it underflows"), ({"amax": 100.0}, "amax 100")):  # fmt: skip
        operand, text = found(names[2], **wrong)
        assert (operand, why in text) == (names[2], True)
    assert found(names[2], {}, amax=100.0)[0] == names[6]  # nothing to compare it with
    assert found(names[3], {}, amax=1000.0)[0] == names[3]  # but for the other weights
    lossy = {name: reading._replace(underflow=0.6) for name, reading in good.items()}
    assert first_out_of_line(lossy, lossy) is None  # as always


def test_the_batch_size_of_a_step_that_ended():
    size = BatchSize(4, [RampStage(10, 6), RampStage(40, 12)])
    ends = [size.samples(steps) for steps in range(1, 12)]
    assert [size.before(end) for end in ends] == [end - start for start, end in zip([0, *ends], ends)]


# --- with one -------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def planted():
    """A bad sample is one token only. In its micro-batch the input of `PLANTED` is a million times too large, and the loss is high.

    Gives a list with the factor of this moment.
    """
    getitem, product, objective = Blend.__getitem__, QuantizedLinear.product, NextToken.forward
    factor = [1.0]

    def sample(self, i):
        example = getitem(self, i)
        if i in {8 * (step - 1) for step in BAD_STEPS}:
            example |= {key: np.full_like(example[key], MARK) for key in ("tokens", "targets")}
        return example

    def overflowing(self, x, bias=None):
        return product(self, x * factor[0] if self.path == PLANTED else x, bias)

    def forward(self, batch):
        bad = (batch["tokens"] == MARK).all(dim=-1).any()
        factor[0] = 1e6 if bad else 1.0
        loss = objective(self, batch)
        return loss._replace(total=loss.total * LOSS["factor"]) if bad else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blend, "__getitem__", sample)
        patch.setattr(QuantizedLinear, "product", overflowing)
        patch.setattr(NextToken, "forward", forward)
        yield factor


@pytest.fixture(scope="module", autouse=True)
def bad_samples():
    with planted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_report", lambda *args: None)  # drawing takes longer than these runs
        yield


@pytest.fixture
def train(tiny_data, tmp_path):
    def call(precision, *overrides, name="r"):
        runs.run(tiny_data, tmp_path / name, *SETTINGS, f"precision={precision}", *overrides)
        return tmp_path / name

    return call


def events(run_dir):
    return read_manifest(find_checkpoint(run_dir)).get("precision_events")


def outcome(run_dir):
    """All that must not depend on a kill: the rows, every tensor, and what is known of the spikes."""
    return runs.curve(run_dir), runs.digest(find_checkpoint(run_dir)), events(run_dir)


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory, bad_samples):
    """A run that goes down to bf16 and is never killed."""
    run_dir = tmp_path_factory.mktemp("whole") / "r"
    with pytest.warns(UserWarning, match=rf"step 10: {PLANTED}, input: amax .*, on the samples before"):
        runs.run(tiny_data, run_dir, *SETTINGS, "precision=fp8_current")
    return run_dir


def check(run_dir, rungs):
    """Events at the bad steps, each of which names the planted module in the checkpoint, the row and the report."""
    found = events(run_dir)
    assert [(event["step"], event["rung"]) for event in found] == list(zip(BAD_STEPS, rungs))
    assert {(event["module"], event["operand"]) for event in found} == {(PLANTED, "input")}
    rows = {row["step"]: row["fp8"] for row in runs.rows(run_dir) if "fp8" in row}
    assert rows == {e["step"]: {key: e[key] for key in ("module", "operand", "why", "rung")} for e in found}
    assert write_report(run_dir).read_text().count(PLANTED) == len(found)


def test_a_run_goes_down_the_ladder_and_names_the_module(whole, tiny_data, capsys):
    check(whole, RUNGS)
    words = ["--config-dir", str(tiny_data), f"checkpoint={whole}", "json=true"]
    found = []
    for after in ("2", "0"):  # on the rung where the run stood, or as if it had not gone down
        assert evaluate(compose_evaluate([*words, f"precision.fallback_after={after}"])) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["val_loss"])
    logged = [row["val_loss"] for row in map(json.loads, (whole / "metrics.jsonl").open()) if "val_loss" in row][-1]
    assert found[0] == logged != found[1]


@pytest.mark.slow
def test_delayed_scaling_falls_straight_to_bf16(train):
    check(train("fp8_delayed"), ["fp8", "bf16"])


@pytest.mark.slow
def test_without_spikes_being_looked_for_it_goes_down_where_it_would_give_up(train, monkeypatch):
    monkeypatch.setitem(LOSS, "factor", math.nan)
    words = ["train.on_spike=ignore", "train.max_skipped_steps=2", "precision.fallback_after=9"]
    run_dir = train("fp8_current", *words)
    assert [(e["step"], e["module"], e["rung"]) for e in events(run_dir)] == [
        (10, PLANTED, "fp8_forward"), (14, PLANTED, "bf16"),
    ]  # fmt: skip
    with pytest.raises(TrainingDivergedError, match=r"2 steps in a row.*max_skipped_steps"):
        train("fp8_current", *words, "precision.fallback_after=0", name="never")


@pytest.mark.parametrize("after", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_between_two_events_it_is_the_same_run(train, whole, monkeypatch, after):
    """Killed before or after the save of step 12, when the run has gone down once."""
    method, calls = Trainer.write_checkpoint, []

    def killed(self):
        calls.append(self)
        if len(calls) == 3 and not after:
            raise KeyboardInterrupt
        method(self)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "write_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train("fp8_current")
    assert outcome(train("fp8_current")) == outcome(whole)


def run_that_dies(words: list[str]) -> None:
    """Trains until it kills itself."""
    with planted():
        kill_at_step_12()
        command.train(compose_run(words))


def kill_at_step_12() -> None:
    """From now on, this process is killed when the checkpoint of step 12, after the first descent, has been written."""
    method, calls = Trainer.write_checkpoint, []

    def killed(self):
        method(self)
        calls.append(self)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.write_checkpoint = killed


@pytest.mark.slow
def test_a_killed_process_is_the_same_run(train, whole, tiny_data, tmp_path):
    words = [*SETTINGS, "precision=fp8_current"]
    process = PROCESSES.Process(target=run_that_dies, args=(runs.arguments(tiny_data, tmp_path / "r", *words),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert find_checkpoint(tmp_path / "r").name == "step_00000012"
    assert outcome(train("fp8_current")) == outcome(whole)


@pytest.mark.slow
def test_stopped_in_the_middle_of_a_row_it_is_the_same_run(train):
    """Skipped updates in a row are counted over jobs: with a row in five steps, those of steps 14 and 15 are too many together."""
    words = ["train.log_every=5", "train.max_skipped_steps=2", "precision.fallback_after=9", "train.max_steps=16"]
    whole = train("fp8_delayed", *words, name="whole")
    assert [(event["step"], event["rung"]) for event in events(whole)] == [(10, "fp8"), (11, "bf16")]
    train("fp8_delayed", *words, "train.stop_at=14")
    assert outcome(train("fp8_delayed", *words))[1:] == outcome(whole)[1:]


@pytest.mark.slow
def test_going_back_keeps_the_events(train, monkeypatch):
    """Also of a job that is killed once it has gone back: it sees the first spike a second time."""
    words = ["train.on_spike=rollback", "spike.max_rollbacks=9"]
    whole = train("fp8_current", *words, name="whole")
    found = [(event["end"], event["module"], event["rung"]) for event in events(whole)]
    assert found == [(end, PLANTED, rung) for end, rung in zip((80, 88, 112, 120), RUNGS)]
    skipped = read_manifest(find_checkpoint(whole))["skipped_samples"]
    assert [(entry["end"], entry["back_to"]) for entry in skipped] == [(80, 4), (112, 4), (144, 4)]
    with monkeypatch.context() as patch:
        patch.setattr(
            CheckpointStore, "abandon_after", lambda self, step: step and (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            train("fp8_current", *words)
    assert outcome(train("fp8_current", *words)) == outcome(whole)


def test_a_diagnosis_and_an_evaluation_change_no_bit(train, monkeypatch):
    """Nor an amax history, which is part of the digest."""
    words = ["precision.fallback_after=0", "train.max_steps=12"]
    looked = outcome(train("fp8_delayed", *words, "train.eval_every=6"))
    monkeypatch.setattr(spikes, "climb_down", lambda *args, **kwargs: ({}, False))
    assert outcome(train("fp8_delayed", *words, name="plain"))[:2] == looked[:2]
    assert len(looked[2]) == 2


def rank_of_a_run(rank: int, world_size: int, words: list[str]) -> int:
    with runs.as_rank(rank, world_size), planted(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command.train(compose_run(words))
    return sum(PLANTED in str(warning.message) for warning in caught)


def rank_that_dies(rank: int, world_size: int, words: list[str]) -> None:
    kill_at_step_12()
    rank_of_a_run(rank, world_size, words)


@pytest.mark.slow
def test_killed_in_the_middle_of_divided_sequences(tiny_data, tmp_path):
    """Both ranks die at once; the same two resume, and one process does, on the same rungs."""
    words = [*SETTINGS, "precision=fp8_current", "watchdog.timeout_seconds=0", "parallel.cp=2", "train.eval_every=6"]
    of = {name: runs.arguments(tiny_data, tmp_path / name, *words) for name in ("whole", "killed")}
    assert run_ranks(2, rank_of_a_run, of["whole"]) == [4, 0]
    check(tmp_path / "whole", RUNGS)
    assert fresh_ranks(2, rank_that_dies, of["killed"]) == [None, None]
    assert find_checkpoint(tmp_path / "killed").name == "step_00000012"
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    run_ranks(2, rank_of_a_run, of["killed"])
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    runs.run(tiny_data, tmp_path / "alone", *words, "parallel.cp=1")
    check(tmp_path / "alone", RUNGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["engine.shard=full", "engine.shard=optimizer", "parallel.tp=2 engine=deepspeed engine.zero_stage=2"]
)
def test_all_ranks_agree(tiny_data, tmp_path, layout):
    """Only one data-parallel rank has the bad sample; both go down, and the main one says so."""
    words = [
        *SETTINGS,
        "precision=fp8_current",
        "train.micro_batch_size=2",
        "watchdog.timeout_seconds=0",
        *layout.split(" "),
    ]
    assert run_ranks(2, rank_of_a_run, runs.arguments(tiny_data, tmp_path / "r", *words)) == [4, 0]
    check(tmp_path / "r", RUNGS)
