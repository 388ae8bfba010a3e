"""`mlite prune` as a person types it: what comes out trains, converts and evaluates like any other model; what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_lite.commands import prune as prune_command
from megatron_lite.commands import prune_session
from megatron_lite.commands.plan import PlanConfig
from megatron_lite.commands.prune import compose_prune, cut
from megatron_lite.commands.prune_session import Progress
from megatron_lite.commands.train import train
from megatron_lite.compress.scores import Scores
from megatron_lite.compress.target import TargetConfig, embedded
from megatron_lite.config.compose import compose_config
from megatron_lite.errors import CheckpointError
from megatron_lite.tensor_files import read_whole
from megatron_lite.training.config import compose_run
from megatron_lite.weights import SCALES, open_weights
from tests import runs
from tests.commands.test_on_ranks import place
from tests.distributed import run_ranks
from tests.hf_folders import command, make_folder
from tests.model_configs import model_config

SMALL = ["target.hidden_size=24", "target.ffn_size=48", "target.heads=2", "target.num_layers=1"]
FEW = ["importance.samples=20", "importance.save_every=8", "micro_batch_size=3"]


def prune(capsys, *overrides) -> dict:
    assert command("prune", "json=true", *overrides) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def losses(capsys, path) -> dict:
    assert command("evaluate", f"checkpoint={path}", "json=true") == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["val_loss"]


def test_the_pruned_model_is_a_model_like_any_other(tiny_data, straight, tmp_path, capsys):
    small = tmp_path / "small"
    report = prune(capsys, f"checkpoint={straight}", f"output={small}", *SMALL, *FEW)
    weights = open_weights(small)
    assert report["sizes"] == {"hidden_size": [32, 24], "ffn_size": [64, 48], "heads": [4, 2]}
    sizes = weights.config.hidden_size, weights.config.mlp.ffn_size, weights.config.attention.heads
    assert (*sizes, weights.config.num_layers, weights.config.head_dim) == (24, 48, 2, 1, 8)
    assert json.loads((small / "prune.json").read_text())["layer_map"] == report["layer_map"]
    assert (tmp_path / "small-scores" / "importance.png").stat().st_size > 5000
    for path, key in ((straight, "loss_before"), (small, "loss_after")):
        assert report[key] == pytest.approx(losses(capsys, path), rel=1e-6)  # micro-batches of other sizes
    command("convert", f"source={small}", f"target={tmp_path}/hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.hidden_size == 24
    kept = [word for word in runs.TINY if not word.startswith("model") and "max_steps" not in word]
    words = [
        "--config-dir",
        str(tiny_data),
        *kept,
        f"run.dir={tmp_path}/run",
        f"init_from={small}",
        "train.max_steps=4",
    ]
    for stop in ("train.stop_at=2", "train.stop_at=null"):
        assert train(compose_run([*words, "checkpoint.every=2", stop])) == 0
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_calibration_that_was_interrupted_goes_on(straight, tmp_path, capsys, monkeypatch):
    words = [f"checkpoint={straight}", *SMALL, *FEW]
    whole = prune(capsys, *words, f"output={tmp_path}/whole")
    save, saves = prune_command.Scores.save, []

    def stopped(scores, folder):
        save(scores, folder)
        saves.append(scores.samples)
        if len(saves) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(prune_command.Scores, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        prune(capsys, *words, f"output={tmp_path}/later")
    report = prune(capsys, *words, f"output={tmp_path}/later")
    assert saves == [8, 16, 20]
    assert report["loss_after"] == whole["loss_after"]
    prune(capsys, *words, f"output={tmp_path}/again", f"scores={tmp_path}/later-scores")
    assert saves == [8, 16, 20]  # nothing was measured again
    for other in ("importance.sequence=l2", "seed=7", "precision=bf16"):
        with pytest.raises(CheckpointError, match=r"scores=.*was computed with"):
            prune(capsys, *words, f"output={tmp_path}/b", f"scores={tmp_path}/later-scores", other)


def test_progress_is_said_now_and_then_and_at_the_end(capsys):
    quick, slow = Progress("samples", 10, 30), Progress("samples", 10, 30, seconds=0)
    for done in (20, 30):
        quick(done)
        slow(done)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["samples: 20 of 30", *["samples: 30 of 30"] * 2]
    assert all(re.search(r"[\d.e+]+ a second, 0\.0 minutes left$", line) for line in lines)


def on_ranks(rank: int, world_size: int, *words: str) -> dict:
    return cut(compose_prune(list(words)), *place(rank, world_size))


def refused_on_ranks(rank: int, world_size: int, *words: str) -> str:
    with pytest.raises(CheckpointError) as raised:
        on_ranks(rank, world_size, *words)
    return str(raised.value)


def test_ranks_cut_what_one_process_cuts(tiny_data, straight, tmp_path, capsys):
    """Also to sizes that their tensor-parallel ranks cannot share."""
    words = ["--config-dir", str(tiny_data), f"checkpoint={straight}", *SMALL, *FEW, "target.ffn_size=47"]
    alone = prune(capsys, *words, f"output={tmp_path}/alone")
    layout = ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.cp=2", "micro_batch_size=2"]
    reports = run_ranks(4, on_ranks, *words, *layout, f"output={tmp_path}/ranks")
    steps = [tmp_path / name / "checkpoints" / "step_00000000" for name in ("alone", "ranks")]
    assert runs.digest(steps[0]) == runs.digest(steps[1])
    assert not any("measured with" in line for line in alone["warnings"])
    for report in reports:
        assert report["loss_after"] == pytest.approx(alone["loss_after"], rel=1e-6)
        assert any("measured with parallel.tp=1" in line for line in report["warnings"])
    errors = run_ranks(4, refused_on_ranks, *words, f"output={tmp_path}/c", "target.heads=3")
    assert all("target.heads=3 must be a multiple of 2" in error for error in errors)


def test_the_scales_of_an_fp8_run_stay(tiny_data, tmp_path, capsys):
    """Delayed scaling: the pruned model computes with the scales of the layers that it is made of."""
    words = ["--config-dir", str(tiny_data), *runs.TINY, "precision=fp8_delayed", "train.max_steps=4"]
    assert train(compose_run([*words, f"run.dir={tmp_path}/run"])) == 0
    cut_words = ["--config-dir", str(tiny_data), f"checkpoint={tmp_path}/run", *FEW, "target.ffn_size=48"]
    report = prune(capsys, *cut_words, f"output={tmp_path}/out", "target.layers=[2,3]")
    before, after = (open_weights(tmp_path / name, more=SCALES).more["scale_fwd"] for name in ("run", "out"))
    assert {name.replace("layers.", "") for name in after.names()} == {
        f"{layer}.mixer.{part}" for layer, parts in enumerate((("qkv", "out"), ("up", "down"))) for part in parts
    }
    for name in after.names():
        _, layer, rest = name.split(".", 2)
        expected = read_whole(before, f"layers.{int(layer) + 2}.{rest}")
        assert torch.equal(read_whole(after, name), expected)
        assert (expected != 1).all()  # what a layer without one would compute with
    for path, key in (("run", "loss_before"), ("out", "loss_after")):
        assert report[key] == pytest.approx(losses(capsys, tmp_path / path), rel=1e-6)
    plain = prune(capsys, *cut_words, f"output={tmp_path}/bf16", "target.layers=[2,3]", "precision=bf16")
    assert plain["loss_after"] == pytest.approx(report["loss_after"], rel=5e-3)
    assert plain["loss_after"] != report["loss_after"]
    measured = [Scores.load(tmp_path / f"{name}-scores").sums for name in ("out", "bf16")]
    for read, fp8 in measured[0].items():  # off by the roundings of FP8, 2^-4 of an operand
        assert (fp8.sqrt() - measured[1][read].sqrt()).norm() < 0.1 * fp8.sqrt().norm(), read


def test_a_folder_is_pruned_without_data(tmp_path, capsys):
    folder = make_folder(tmp_path / "hf", "nemotron_h")
    words = [f"checkpoint={folder}", f"output={tmp_path}/out", "target.mamba_heads=4", "target.pattern=M-*"]
    with pytest.raises(ValueError, match=r"does not say what data.*data=<a group>.*scores="):
        prune(capsys, *words)
    report = prune(capsys, *words, "importance.score=random", "importance.seed=5")
    assert report["layer_map"][:2] in ([0, 1], [2, 3][:2])
    assert report["loss_before"] == report["loss_after"] == {}
    assert open_weights(tmp_path / "out").config.pattern == "M-*"
    other = prune(
        capsys, *words[:1], *words[2:], f"output={tmp_path}/b", "importance.score=random", "importance.seed=6"
    )
    assert other["parameters"] == report["parameters"]


def test_what_is_read_belongs_to_this_model(tiny_data, tmp_path, capsys, monkeypatch):
    folder = make_folder(tmp_path / "hf", "llama")
    words = ["--config-dir", str(tiny_data), "data=tiny", f"checkpoint={folder}", f"scores={tmp_path}/scores", *FEW]
    removal, counted = prune_session.removal_order, []

    def counting(decoder, forward, batches, **options):
        counted.append(sum(int(batch["loss_mask"].any(dim=1).sum()) for batch in batches()))
        removal(decoder, forward, batches, **options)

    monkeypatch.setattr(prune_session, "removal_order", counting)
    short = ["data.seq_len=8", "importance.samples=4", "importance.depth=loss", "importance.depth_samples=7"]
    report = prune(capsys, *words, *short, "target.num_layers=2", f"output={tmp_path}/whole")
    assert counted == [7]  # however few samples the other scores are from
    assert "nothing was cut" in report["warnings"][-1]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=r"scores=.*was computed with checkpoint="):  # the tensors are the same
        prune(capsys, *words, *short, "target.ffn_size=40", f"output={tmp_path}/other")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"read at .*layers\.3\.mixer is not finite"):
        prune(capsys, *words, "target.ffn_size=40", f"output={tmp_path}/nan", f"scores={tmp_path}/nan-scores")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("nan")]


HYBRID = model_config(
    {"family": "nemotron_h", "pattern": "M-M*|M-*", "hidden_size": 32, "attention.heads": 8, "attention.kv_heads": 2,
     "mlp.ffn_size": 64, "mamba.heads": 8, "mamba.head_dim": 4, "mamba.groups": 4, "mamba.state": 8, "vocab_size": 64,
     "max_seq_len": 8, "norm": "rmsnorm"}
)  # fmt: skip
DENSE = compose_config("plan", PlanConfig, ["model=nemotron4_tiny"]).model


@pytest.mark.parametrize(
    ("config", "target", "says"),
    [
        (HYBRID, {"heads": 5}, r"target\.heads=5 must be a multiple of 2.*4 or 6"),
        (HYBRID, {"mamba_heads": 3}, r"target\.mamba_heads=3 must be a multiple of 4.*4 would do"),
        (HYBRID, {"hidden_size": 33}, r"target\.hidden_size=33 must be between 1 and .*32"),
        (HYBRID, {"ffn_size": 0}, r"target\.ffn_size=0 must be between"),
        (DENSE, {"mamba_heads": 2}, r"target\.mamba_heads=2: this model has no model\.mamba\.heads"),
        (HYBRID, {"num_layers": 8}, r"target\.num_layers=8 must be between 1 and .*7"),
        (HYBRID, {"num_layers": 3, "pattern": "M-"}, r"target\.num_layers and target\.pattern exclude"),
        (DENSE, {"pattern": "*-"}, r"target\.pattern=\*-: this model has no pattern but 4 equal blocks"),
        (HYBRID, {"pattern": "**M"}, r"target\.pattern=\*\*M is not what is left"),
        (HYBRID, {"layers": [1, 1]}, r"target\.layers=\[1, 1\] must be ascending"),
        (DENSE, {"layers": [0, 1, 3]}, r"target\.layers=\[0, 1, 3\] cuts a block: layers 2 and 3"),
    ],
)
def test_what_a_model_cannot_be_cut_to_is_refused(config, target, says):
    made = TargetConfig(**target)
    with pytest.raises(ValueError, match=says):
        made.sizes(config) and made.layers_of(config, range(len(config.symbols)))


def test_hymba_is_refused_by_name():
    config = compose_config("plan", PlanConfig, ["model=hymba_tiny"]).model
    with pytest.raises(ValueError, match=r"layer 0 is a Hymba, which cannot be pruned"):
        TargetConfig(ffn_size=16).sizes(config)


def test_layers_that_spell_a_pattern():
    """The best of all ways, found by trying them all."""
    from itertools import combinations

    generator = torch.Generator().manual_seed(0)
    for pattern in ("M-", "M-*", "MM*", "--", "M-M*M-*"):
        order = torch.randperm(7, generator=generator).tolist()
        ways = [
            way for way in combinations(range(7), len(pattern)) if "".join(HYBRID.symbols[i] for i in way) == pattern
        ]
        best = max(sum(order.index(layer) for layer in way) for way in ways)
        found = embedded(pattern, HYBRID.symbols, order)
        assert found in ways
        assert sum(order.index(layer) for layer in found) == best


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "target is empty"),
        (["target.hidden_size=24", "output=DIR"], r"output=.* exists and is not an empty folder"),
        (["target.hidden_size=24", "importance.batch=var"], r"importance\.batch=var is unknown"),
        (["target.hidden_size=24", "engine=deepspeed"], "engine=deepspeed only trains"),
        (["budget.parameters=10"], r"budget\.parameters=10 is not met"),
        # a calibration would have left its scores
        (["target.hidden_size=24", "output=/proc/a/b", "scores=OUT-scores"], r"/proc/a: No such file"),
        (["target.hidden_size=24", "scores=/proc/a/b"], r"/proc/a: No such file"),
        (["budget.parameters=9000", "budget.axes=[heads,heads]"], r"budget\.axes=\['heads', 'heads'\].*at most once"),
        (["target.ffn_size=24", "scores="], "scores is empty"),
        (["target.ffn_size=24", "scores=DIR/status.json"], r"scores=.*status\.json is not a folder"),
        (["target.ffn_size=24", "scores=OUT/scores"], r"scores=.*scores is in output="),
        (
            ["target.hidden_size=24", "head_residual=true", "precision=fp8_delayed"],
            r"head_residual=true with .*fp8_delayed",
        ),
    ],
)
def test_what_is_refused_before_anything_is_read(words, says, straight, tmp_path):
    words = [word.replace("DIR", str(straight)).replace("OUT", f"{tmp_path}/out") for word in words]
    words = [f"output={tmp_path}/out", *words]
    with pytest.raises((ValueError, CheckpointError), match=says):
        command("prune", f"checkpoint={straight}", *words)
    assert not list(tmp_path.iterdir())
