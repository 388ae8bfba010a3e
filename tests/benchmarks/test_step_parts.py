"""The parts of a step: whose time an operator's is, and one table of a tiny model."""

from __future__ import annotations

import pytest

from benchmarks import step_parts
from benchmarks.peers.serving import Work
from benchmarks.train_step import SIZES

WORK = Work(**SIZES["tiny"], batch=8, log_every=1, threads=1, compiled=False, folder="")


def event(name: str, ts: float, dur: float) -> dict:
    return {"name": name, "ts": ts, "dur": dur}


def test_an_event_has_the_time_that_is_not_of_those_inside_it():
    events = [
        event("step", 0, 100),
        event("aten::linear", 10, 40),
        event("aten::mm", 15, 30),
        event("aten::mul", 50, 5),
    ]
    events += [event("step", 100, 7)]
    assert sorted(step_parts.own_times(events)) == [
        (("aten::linear", "step"), 10),
        (("aten::mm", "aten::linear", "step"), 30),
        (("aten::mul", "step"), 5),
        (("step",), 7),
        (("step",), 55),
    ]


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("aten::addmm_", "_ChunkedLossSum", "step"), "matrix products"),
        (("aten::exp_", "_ChunkedLossSum", "step"), "loss, its products aside"),
        (("aten::mul", "_RotaryBackward", "step"), "rotation"),
        (("aten::addcmul", "_SquaredReLUBackward", "step"), "squared ReLU"),
        (("aten::add", "step"), "residual sums"),
        (("aten::_foreach_add_", "AdamW.step", "step"), "AdamW"),
        (("aten::native_layer_norm", "aten::layer_norm", "step"), "norms"),
        (("aten::sigmoid", "step"), "other operators"),
        (("_SquaredReLU", "step"), step_parts.BETWEEN),
    ],
)
def test_an_operator_belongs_to_what_it_is_called_by(names, group):
    assert step_parts.group_of(names, step_parts.groups(WORK)) == group


@pytest.mark.slow
def test_the_table_of_a_step(capsys):
    step_parts.main(["--model", "tiny"])
    cells = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    found = {name.strip(): float(ms) for name, ms, *_ in cells}
    missing = {group.name for group in step_parts.groups(WORK)} - found.keys()
    assert not missing
    assert all(found[name] > 0 for name in ("matrix products", "attention", "rotation", "squared ReLU", "AdamW"))
    total = found.pop("a step")
    assert sum(found.values()) == pytest.approx(total, abs=0.1)  # each is rounded to a hundredth
