"""`make minitron TINY=1`: every arm, column and file is there, and a second call trains nothing."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import minitron
from benchmarks.arms import Result
from tests import runs


@pytest.mark.slow
def test_the_whole_demo(tiny_data, tmp_path, capsys, monkeypatch):
    model = [word for word in runs.TINY if word.startswith("model.")]
    words = ["--size", "tiny", "--folder", str(tmp_path), "--", "--config-dir", str(tiny_data), "data=tiny", *model]
    minitron.main(words)
    printed = capsys.readouterr().out
    for label in minitron.LABELS.values():
        assert label in printed
    found = json.loads((tmp_path / "minitron.json").read_text())
    assert found["claims"].keys() >= {
        "share of the tokens",
        "with the teacher's tokens",
        "holds",
        "below plain",
        "below random",
    }
    assert found["teacher_tokens"] == 2048
    ends = {label: [curve[-1][0] for curve in curves] for label, curves in found["curves"].items()}
    assert ends.pop("(d) from scratch") == [3 * next(iter(ends.values()))[0]]
    assert {path.name for path in tmp_path.glob("minitron.*")} == {"minitron.md", "minitron.json", "minitron.png"}
    # the pruned arms start where the pruned model is, and the drawn one elsewhere
    starts = {label: curves[0][0][1] for label, curves in found["curves"].items()}
    assert (
        starts["(a) pruned, distilled"]
        == starts["(b) pruned, plain training"]
        != starts["(c) random channels, distilled"]
    )
    assert max(found["claims"]["below plain"][1], 0) == 1  # two validations, the first fifth left out

    assert len(found["ranking"]) == 2
    assert "(Spearman)" in printed

    monkeypatch.setattr("benchmarks.arms.train", lambda run: pytest.fail("trained again"))
    minitron.main(words)
    assert json.loads((tmp_path / "minitron.json").read_text())["claims"] == found["claims"]


class Curve(Result):
    """A result with a curve."""

    def __init__(self, *points):
        super().__init__("", 0, None, "finished")
        object.__setattr__(self, "points", list(points))

    def held_out(self, prefix=""):
        return self.points


def test_the_claims_can_fail():
    scratch = [Curve((0, 9.0), (10, 5.0), (30, 4.0))]
    fast, slow = [Curve((0, 8.0), (5, 4.5), (10, 3.9))], [Curve((0, 8.0), (5, 4.5), (10, 4.1))]
    good = minitron.verdicts({"distilled": fast, "scratch": scratch, "plain": slow}, 60)
    assert good["share of the tokens"] == pytest.approx(1 / 3)
    assert good["holds"]
    assert good["with the teacher's tokens"] == pytest.approx(1 / 3 + 2)
    assert good["below plain"] == (1, 1)
    bad = minitron.verdicts({"distilled": slow, "scratch": scratch, "plain": fast}, 60)
    assert math.isinf(bad["share of the tokens"])
    assert not bad["holds"]
    assert bad["below plain"] == (0, 1)
    assert "FAILS" in minitron.report(
        {"distilled": slow, "scratch": scratch}, {"distilled": {1e-3: 4.1}, "scratch": {1e-3: 4.0}}, bad
    )


def test_candidates_are_of_equal_size():
    from benchmarks.minitron_ranking import _sized, candidates, inner_parameters, spearman
    from megatron_lite.training.config import compose_run

    for model, number, depths in (("nemotron4_tiny", 8, {None, 3}), ("nano2_tiny", 6, {None})):
        config = compose_run([f"model={model}"]).model
        found = candidates(config, 8)
        assert len(found) == number == len({tuple(target.items()) for target in found})
        assert {target.get("num_layers") for target in found} == depths
        for target in found:
            sized = _sized(config, target["hidden_size"], target["ffn_size"], target.get("num_layers"))
            assert inner_parameters(sized) / inner_parameters(config) == pytest.approx(2 / 3, rel=0.02)
    assert spearman([1, 2, 3], [10, 20, 30]) == 1
    assert spearman([1, 2, 3], [30, 20, 10]) == -1
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6 * 4 / 120


def test_a_third_is_pruned():
    """Of the parameters that are not embeddings, give or take a twentieth."""
    from megatron_lite.models.flops import parameter_count
    from megatron_lite.training.config import compose_run

    for model, target in minitron.TARGETS.items():
        sizes = [f"{minitron.MODEL_KEYS[key]}={size}" for key, size in target.items()]
        configs = [compose_run([f"model={model}", *words]).model for words in ([], sizes)]
        inner = [parameter_count(c) - 2 * c.vocab_size * c.hidden_size for c in configs]
        assert inner[1] / inner[0] == pytest.approx(2 / 3, abs=0.05), (model, inner)
