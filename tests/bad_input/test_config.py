"""Wrong keys, types, values, choices and combinations: refused in one line that names the key and a way out; nothing is written."""

from __future__ import annotations

import re

import pytest
import torch

import megatron_lite.commands.train
from megatron_lite.runtime import Runtime
from tests import runs

# what is typed (words that follow the command line of a tiny run) -> what is said
KEYS = [
    ("train.max_step=3", r"no key train\.max_step; did you mean train\.max_steps"),
    ("max_steps=3", r"no key max_steps; did you mean train\.max_steps"),
    ("modle=nemotron4_tiny", r"no key modle; did you mean model\?"),
    ("model.hidden=64", r"no key model\.hidden; did you mean .*model\.hidden_size"),
    ("data.groups.english.sourcs.prose.path=x", r"did you mean data\.groups\.english\.sources\.prose\.path"),
    ("+optim.momentum=1", r"no key optim\.momentum; did you mean"),
    ("+engine.zero=1", r"no key engine\.zero"),
    ("engine=deepspeed engine.shard=full", r"no key engine\.shard; did you mean engine\.zero_stage or"),
    ("~train.max_stepz", r"~train\.max_stepz: there is no key train\.max_stepz; did you mean train\.max_steps"),
    ("nonsense", r"nonsense cannot be read as key=value"),
    ("=3", r"=3 has no key"),
    ("train.max_steps=3=4", r"train\.max_steps=3=4 cannot be read as key=value"),
    ("--confg-dir=/tmp", r"--confg-dir=/tmp is unknown; .* --help"),
    ("--config-dir /nowhere", r"--config-dir /nowhere is not a folder"),
    ("--config-dir", r"--config-dir \(nothing\) is not a folder"),
    ("+x=1", r"there is no key x;"),
    ("model.num_heads=4", r"error: model\.num_heads is now model\.attention\.heads\n"),
    ("+model.rope_base=4", r"model\.rope_base is now model\.rope\.base"),
    ("model.unit=*-", r"model\.unit is gone: .*model\.pattern"),
    ("resume_allow=[model.ffn_size]", r"model\.ffn_size is now model\.mlp\.ffn_size"),
    ("resume_allow=[sead]", r"resume_allow names 'sead'.*did you mean seed"),
]
CHOICES = [
    ("model=nemotron5", r"model=nemotron5 is unknown; choose one of .*nemotron4_tiny"),
    ("data=nothere", r"data=nothere is unknown; choose one of .*sample"),
    ("engine=none", r"engine=none is unknown; choose one of deepspeed, fsdp"),
    ("engine.kind=other", r"engine\.kind.*engine=fsdp"),
    ("engine.shard=half", r"engine\.shard=half is unknown; choose one of"),
    ("schedule=linear", r"schedule=linear is unknown; choose one of constant, cosine, wsd"),
    ("schedule.unit=epochs", r"schedule\.unit=epochs is unknown; choose one of steps, tokens"),
    ("precision.name=fp64", r"precision\.name=fp64 is unknown; choose one of fp32, bf16"),
    ("tracking=tensorbord", r"tracking=tensorbord is unknown; choose one of console, none, tensorboard, wandb"),
    ("tracking.wandb.mode=perhaps", r"tracking\.wandb\.mode=perhaps is unknown; choose one of"),
    ("parallel.recompute=some", r"parallel\.recompute=some is unknown; choose one of none, selective, full"),
    ("model.family=gpt", r"model\.family='gpt' is not one of .*nemotron4"),
    ("model.mlp.activation=gelu", r"model\.mlp\.activation='gelu' is not one of"),
    ("tracking=[wandb,tensorbord]", r"tracking=\[wandb,tensorbord\]: tensorbord is unknown; .*choices of tracking"),
    ("model=5", r"model=5: a group's choice is a name"),
    ("experiment=foo", r"experiment=foo is unknown; choose one of .*smoke"),
    ("init_from=x init_from.model=mine", r"init_from\.model=mine is unknown; choose source or config"),
]
VALUES = [
    ("train.max_steps=ten", r"train\.max_steps=ten: Value 'ten'.*Integer"),
    ("train.max_steps=1.5", r"train\.max_steps=1\.5: Value '1\.5'.*Integer"),
    ("train.micro_batch_size=", r"train\.micro_batch_size=: Value ''.*Integer"),
    ("train.deterministic=maybe", r"train\.deterministic=maybe: Value 'maybe' is not a valid bool"),
    ("train=5", r"train=5: Invalid type"),
    ("optim.betas=0.9", r"optim\.betas=0\.9: Invalid value"),
    ("optim.betas=[0.9]", r"optim\.betas=\[0\.9\] must be two numbers"),
    ("optim.betas=[0.9,nan]", r"optim\.betas\[1\]=nan is not a finite number"),
    ("optim.lr=nan", r"optim\.lr=nan is not a finite number"),
    ("optim.lr=inf", r"optim\.lr=inf is not a finite number"),
    ("optim.lr=-1", r"optim\.lr=-1\.0 must be above 0"),
    ("optim.clip_grad=nan", r"optim\.clip_grad=nan is not a finite number"),
    ("optim.weight_decay=-0.1", r"optim\.weight_decay=-0\.1 must not be negative"),
    ("schedule.min_lr=inf", r"schedule\.min_lr=inf is not a finite number"),
    ("data.groups.english.alpha=nan", r"data\.groups\.english\.alpha=nan is not a finite number"),
    ("data.groups.english.weight=-1", r"data\.groups\.english\.weight=-1\.0 must be"),
    ("seed=-1", r"seed=-1 must be 0 or more"),
    ("seed=x", r"seed=x: Value 'x'"),
    ("run.dir=", r"run\.dir is empty"),
    ("resume=", r"resume is empty; give auto"),
    ("train.max_steps=0", r"train\.max_steps=0 must be at least 1"),
    ("train.stop_at=-4", r"train\.stop_at=-4 must be at least 1"),
    ("train.threads=100000", r"train\.threads=100000 must be at most 1024"),
    ("schedule=cosine schedule.decay=5", r"schedule\.decay=5 has no meaning with schedule=cosine; choose schedule=wsd"),
    ("schedule=constant schedule.decay_shape=cosine", r"decay_shape=cosine has no meaning .* back to linear"),
    ("train.threads=0", r"train\.threads=0 must be at least 1"),
    ("train.log_every=0", r"train\.log_every=0 must be at least 1"),
    ("train.batch_ramp=[{from:8}]", r"train\.batch_ramp=.*'from'"),
    ("train.batch_ramp=[{from_samples:0,global_batch_size:16}]", r"train\.batch_ramp: from_samples must be above 0"),
    ("model.hidden_size=0", r"model\.hidden_size=0 must be at least 1"),
    ("model.vocab_size=-1", r"model\.vocab_size=-1 must be at least 1"),
    ("model.num_layers=null model.pattern=", r"model\.pattern='' has no layers"),
    ("model.num_layers=null model.pattern=*x", r"model\.pattern='\*x' has 'x' as layer 1; the known layer types"),
    ("model.attention.window=0", r"model\.attention\.window=0 must be at least 1"),
    ("model.rope.fraction=2", r"model\.rope\.fraction=2\.0"),
    ("data.seq_len=0", r"data\.seq_len=0 must be at least 1"),
    ("data.validation.windows=0", r"data\.validation\.windows=0 must be at least 1"),
    ("checkpoint.every=-1", r"checkpoint\.every=-1 must be at least 0"),
    ("checkpoint.keep=0", r"checkpoint\.keep=0 must be at least 1"),
    ("profile.steps=-1", r"profile\.steps=-1 must not be negative"),
]
COMBINATIONS = [
    ("train.max_tokens=100", r"train\.max_steps=20, train\.max_tokens=100: set exactly one"),
    ("train.max_steps=null", r"train\.max_steps=None.*set exactly one"),
    ("train.micro_batch_size=3", r"global batch of 8 .*train\.micro_batch_size=3 .*6 or 9 would do"),
    ("train.batch_ramp=[{from_samples:8,global_batch_size:10}]", r"global batch of 10 .*train\.micro_batch_size=4"),
    ("schedule.warmup_steps=100", r"schedule\.warmup_steps=100 .*20 steps of the run"),
    ("schedule.warmup_tokens=100", r"schedule\.warmup_tokens .*schedule\.unit=steps"),
    (
        "schedule=wsd schedule.decay=5",
        r"schedule\.decay=5 and schedule\.decay_fraction=.* exclude each other; set one to null",
    ),
    ("schedule.min_lr=1", r"schedule\.min_lr=1\.0 .*optim\.lr=0\.01"),
    ("data.seq_len=100000", r"data\.seq_len=100000 is longer than model\.max_seq_len"),
    ("model.attention.kv_heads=3", r"model\.attention\.heads=4 does not divide by model\.attention\.kv_heads=3"),
    (
        "model.hidden_size=33 model.attention.head_dim=null",
        r"model\.hidden_size=33 does not divide by model\.attention\.heads=4",
    ),
    ("model.attention.head_dim=7", r"model\.rope\.fraction=.* head dim 7"),
    ("model.pattern='*-'", r"model\.pattern='\*-' and model\.num_layers=2 exclude each other"),
    ("data.phases=[{},{}]", r"data\.phases\[0\] has no end"),
    ("data.phases=[{until_fraction:2},{}]", r"data\.phases\[0\]\.until_fraction=2\.0"),
    ("data.phases=[{weights:{latin:1}}]", r"data\.phases\[0\]\.weights names 'latin', which is not among"),
    ("data.phases=[{weights:{english:0}}]", r"data\.phases\[0\]\.weights are all 0"),
    ("~data.groups.english", r"data\.phases\[1\]\.weights names 'english'"),
    ("init_from.optimizer=true", r"init_from\.optimizer=true .*init_from=<path>"),
    ("init_from=", r"init_from is empty; give a run"),
    ("init_from=/nowhere", r"/nowhere does not exist; give a run directory"),
    ("data.groups.english.sources.prose.path=", r"data\.groups\.english\.sources\.prose has an empty path"),
    ("data.groups.english.sources.prose.validation=", r"sources\.prose has an empty path; .*validation=null"),
    ("resume=/nowhere", r"resume=/nowhere does not exist; give a checkpoint"),
]


@pytest.mark.parametrize(("typed", "says"), [*KEYS, *CHOICES, *VALUES, *COMBINATIONS])
def test_a_wrong_config_is_refused(tour, typed, says):
    tour.refused("train", *runs.arguments(tour.data, tour.home / "r"), *typed.split(), says=says)


# what an experiment's file holds after `# @package _global_`, what is typed after its name -> what is said
FILES = [
    (
        "engine: {shard: optimizer}",
        "engine=deepspeed",
        r"mine\.yaml sets engine\.shard, which engine=deepspeed does not",
    ),
    ("objective: {teacher: x}", "", r"mine\.yaml: there is no key objective\.teacher"),
    ("train: {max_stps: 3}", "", r"mine\.yaml: there is no key train\.max_stps; did you mean train\.max_steps"),
    ("train: {max_steps: many}", "", r"mine\.yaml: train\.max_steps: Value 'many'"),
    ("train: [3", "", r"mine\.yaml, line 3: not YAML"),
    ("train:\n\tmax_steps: 3", "", r"mine\.yaml, line 3: not YAML"),
    ("defaults: [smke]", "", r"mine\.yaml: its defaults name experiment/smke"),
    ("defaults: [override /engine: fsdpp]", "", r"engine=fsdpp is unknown; choose one of deepspeed, fsdp"),
]


@pytest.mark.parametrize(("text", "typed", "says"), FILES)
def test_a_wrong_experiment_file_is_refused(tour, text, typed, says):
    (tour.home / "experiment").mkdir()
    (tour.home / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    tour.refused("train", "--config-dir", str(tour.home), "experiment=mine", *typed.split(), says=says)


def test_an_experiment_file_without_its_first_line_is_refused(tour):
    (tour.home / "experiment").mkdir()
    (tour.home / "experiment" / "mine.yaml").write_text("train: {max_steps: 3}\n")
    says = r"mine\.yaml: its keys are taken for keys of experiment; .*@package _global_"
    tour.refused("train", "--config-dir", str(tour.home), "experiment=mine", says=says)


def test_a_model_that_no_memory_holds_ends_with_what_to_do(tour):
    ended = tour.call("train", *runs.arguments(tour.data, tour.home / "r", "model.vocab_size=1000000000000000"))
    assert ended.code == 1, ended
    assert re.fullmatch(r"failed: not enough memory: [^\n]*; lower train\.micro_batch_size [^\n]*\n", ended.err), (
        ended.err
    )
    assert not (tour.home / "r").exists()


# world size, what is typed -> what is said. Rank 0's view of a run of that many processes; nobody answers it, so a refusal that came
# after the first agreement of the ranks would hang.
LAYOUTS = [
    (1, "parallel.tp=2", r"tp\(2\) = 2 does not divide the world size 1 .*parallel\.tp=1 would work"),
    (6, "parallel.tp=4", r"tp\(4\) = 4 does not divide the world size 6 .*parallel\.tp=2 would work"),
    (4, "parallel.dp_shard=3", r"dp_shard\(3\).* != world size 4 .*parallel\.dp_shard=4"),
    (
        4,
        "parallel.dp_replicate=3",
        r"dp_replicate\(3\).* does not divide the world size 4 .*parallel\.dp_replicate=1 would",
    ),
    (2, "parallel.tp=0", r"parallel\.tp=0 must be at least 1"),
    (
        4,
        "parallel.tp=4",
        r"model\.attention\.kv_heads=2 does not divide by parallel\.tp=4.*parallel\.tp=1 or 2 would work",
    ),
    (2, "parallel.tp=2 model.mlp.ffn_size=63", r"model\.mlp\.ffn_size=63 does not divide by parallel\.tp=2"),
    (2, "parallel.tp=2 model.vocab_multiple=1 model.vocab_size=385", r"385.* does not divide by parallel\.tp=2"),
    (
        2,
        "parallel.tp=2 parallel.sequence_parallel=true data.seq_len=31",
        r"data\.seq_len=31 does not divide by parallel\.tp=2",
    ),
    (4, "train.global_batch_size=8", r"global batch of 8 .*4 data-parallel ranks = 16; 16 would do"),
]


@pytest.mark.parametrize(("world_size", "typed", "says"), LAYOUTS)
def test_a_layout_that_does_not_fit_is_refused(tour, world_size, typed, says):
    runtime = Runtime(rank=0, world_size=world_size, local_rank=0, device=torch.device("cpu"))
    tour.monkeypatch.setattr(megatron_lite.commands.train, "start", lambda **_: runtime)
    typed = ["watchdog.timeout_seconds=0", *typed.split()]  # it would look for the other ranks
    tour.refused("train", *runs.arguments(tour.data, tour.home / "r"), *typed, says=says)
