"""local.sh and deepspeed.sh: several ranks, signals, and exit codes that say what status.json says."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from megatron_lite.commands.launch import scripts_dir
from tests import runs
from tests.launch import local_run
from tests.launch.slurm_cluster import wait_for

pytestmark = pytest.mark.slow
CLOSE = {"rel": 1e-4}  # another number of ranks adds in another order, and 20 steps at a rate of 1e-2 let it grow


def trained(run) -> bool:
    return (run / "metrics.jsonl").exists() and len(runs.rows(run)) >= 3


def test_preempted_and_again(tiny_data, tmp_path, straight):
    """SIGTERM to the script alone, as Kubernetes and systemd send it; the save takes longer than torchrun's 30 s."""
    run = tmp_path / "run"
    job = local_run.start(tiny_data, run, "checkpoint.every=0", RANKS_PER_NODE="2", SLOW_STEP="0.5", SLOW_SAVE="32")
    wait_for(lambda: trained(run), seconds=600, what=lambda: local_run.output(run))
    job.send_signal(signal.SIGTERM)
    assert local_run.finish(job) == 75, local_run.output(run)
    assert runs.status(run)["state"] == "preempted"
    assert local_run.finish(local_run.start(tiny_data, run, "checkpoint.every=0", RANKS_PER_NODE="2")) == 0
    rows = runs.curve(run)
    assert [row[:2] for row in rows] == [row[:2] for row in runs.curve(straight)]
    assert [row[2] for row in rows] == pytest.approx([row[2] for row in runs.curve(straight)], **CLOSE)


def test_a_signal_to_everybody_twice(tiny_data, tmp_path):
    """A scheduler signals every process, and torchrun passes its own on once more: the ranks still save."""
    run = tmp_path / "run"
    job = local_run.start(tiny_data, run, "checkpoint.every=0", RANKS_PER_NODE="2", SLOW_STEP="0.5")
    wait_for(lambda: trained(run), seconds=600, what=lambda: local_run.output(run))
    for process in reversed([job.pid, *local_run.below(job.pid)]):
        os.kill(process, signal.SIGTERM)
    assert local_run.finish(job) == 75, local_run.output(run)
    assert runs.status(run)["state"] == "preempted"


def test_exit_codes(tiny_data, tmp_path):
    run = tmp_path / "run"
    assert local_run.finish(local_run.start(tiny_data, run, "train.stop_at=4")) == 0
    assert local_run.finish(local_run.start(tiny_data, run)) == 0
    assert runs.status(run)["state"] == "finished"
    assert local_run.finish(local_run.start(tiny_data, run)) == 0  # finished before
    assert local_run.finish(local_run.start(tiny_data, tmp_path / "wrong", "train.micro_batch_size=3")) == 2


def test_a_wrong_config_on_several_ranks(tiny_data, tmp_path):
    """torchrun ends with 1 then; Kubernetes must not start such a run again and again."""
    job = local_run.start(tiny_data, tmp_path / "wrong", "train.micro_batch_size=3", RANKS_PER_NODE="2")
    assert local_run.finish(job) == 2


def test_a_node_waits_for_the_first_one_as_long_as_it_is_told(tiny_data, tmp_path):
    """torchrun alone gives up after two or three minutes, which a large image takes to arrive."""
    shared = {"NODES": "2", "NODE_INDEX": "1", "RANKS_PER_NODE": "1", "RENDEZVOUS": "127.0.0.1:1", "JOB": "j"}
    begun = time.monotonic()
    job = local_run.start(tiny_data, tmp_path / "run", **shared, START_SECONDS="2")
    assert local_run.finish(job, 120) == 1
    assert time.monotonic() < begun + 100


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_second_signal_ends_it_at_once(ranks, tiny_data, tmp_path):
    """Nothing is saved, and nothing is left behind."""
    run = tmp_path / "run"
    job = local_run.start(
        tiny_data, run, "checkpoint.every=0", "train.max_steps=500", RANKS_PER_NODE=ranks, RANK="0", SLOW_STEP="1", SLOW_SAVE="600"
    )  # fmt: skip
    wait_for(lambda: trained(run), seconds=600, what=lambda: local_run.output(run))
    processes = local_run.below(job.pid)
    job.send_signal(signal.SIGTERM)
    told = time.monotonic()
    wait_for(lambda: time.monotonic() > told + 3, seconds=300, what=str)  # sooner it counts as the same one
    job.send_signal(signal.SIGTERM)
    assert local_run.finish(job, 60) != 0
    gone = lambda: not any(os.path.exists(f"/proc/{process}") for process in processes)  # noqa: E731
    wait_for(gone, seconds=300, what=lambda: local_run.output(run))


def deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (pip install 'megatron-lite[deepspeed]')")
    if shutil.which("pgrep") is None:
        pytest.skip("pgrep is not installed (Debian: procps)")


def test_hostfile(tiny_data, tmp_path, straight):
    deepspeed()
    run, hosts = tmp_path / "run", tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    words = runs.arguments(tiny_data, run, "train.micro_batch_size=1", "engine=deepspeed")
    done = subprocess.run(
        ["bash", str(scripts_dir() / "deepspeed.sh"), *words],
        env=local_run.environment(HOSTFILE=str(hosts), MASTER_PORT="29613", DS_ACCELERATOR="cpu"),
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row[2] for row in runs.curve(run)] == pytest.approx([row[2] for row in runs.curve(straight)], **CLOSE)


def test_hostfile_preempted(tiny_data, tmp_path):
    """The other engine, so that both are seen there."""
    deepspeed()
    run, hosts = tmp_path / "run", tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    words = runs.arguments(tiny_data, run, "train.micro_batch_size=1", "checkpoint.every=0")
    settings = {"HOSTFILE": str(hosts), "MASTER_PORT": "29614", "DS_ACCELERATOR": "cpu", "SLOW_STEP": "0.5"}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            ["bash", str(scripts_dir() / "deepspeed.sh"), *words],
            env=local_run.environment(**settings), stdout=log, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
    wait_for(lambda: trained(run), seconds=600, what=(tmp_path / "log").read_text)
    job.send_signal(signal.SIGTERM)
    assert local_run.finish(job) == 75, (tmp_path / "log").read_text()
    assert runs.status(run)["state"] == "preempted"


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable, 10.7.31.1 and 10.7.31.2; names resolve in neither."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and `ip` (Debian: iproute2)")
    names = [f"mlite{os.getpid()}{side}" for side in "ab"]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add {names[0]} type veth peer name {names[1]}",
        *(f"ip link set {name} netns {name}" for name in names),
        *(f"ip -n {name} addr add 10.7.31.{i}/24 dev {name}" for i, name in enumerate(names, 1)),
        *(f"ip -n {name} link set {device} up" for name in names for device in (name, "lo")),
    ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"{command}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_hosts(two_hosts, tiny_data, tmp_path, straight):
    run = tmp_path / "run"
    words = runs.arguments(tiny_data, run, "train.micro_batch_size=1")
    shared = {"NODES": "2", "RANKS_PER_NODE": "1", "RENDEZVOUS": "10.7.31.1:29400", "JOB": "hosts"}
    jobs = []
    with (tmp_path / "log").open("w") as log:
        for number, host in enumerate(two_hosts, 1):
            settings = local_run.environment(**shared, LOCAL_ADDR=f"10.7.31.{number}", GLOO_SOCKET_IFNAME=host)
            command = ["ip", "netns", "exec", host, "bash", str(scripts_dir() / "local.sh"), *words]
            jobs.append(
                subprocess.Popen(command, env=settings, stdout=log, stderr=log, text=True, start_new_session=True)
            )
        codes = [local_run.finish(job) for job in jobs]
    assert codes == [0, 0], (tmp_path / "log").read_text()
    assert [row[2] for row in runs.curve(run)] == pytest.approx([row[2] for row in runs.curve(straight)], **CLOSE)


def test_kubernetes_manifest(tiny_data, tmp_path, straight):
    """The manifest's command, arguments, environment and volumes, as two pods that are two processes here."""
    import yaml

    from megatron_lite.commands.launch import manifest
    from tests.launch.slurm_cluster import free_ports

    words = runs.arguments(tiny_data, tmp_path, "train.micro_batch_size=1")
    words = [word for word in words if not word.startswith("run.dir=")]
    text = manifest({"NODES": "2", "GPUS_PER_NODE": "0", "RANKS_PER_NODE": "1", "NAME": "tiny"}, words)
    service, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    port, values = free_ports(1)[0], {}
    for variable in container["env"]:
        value = variable.get("value") or labels["app"]  # the only reference is to that label
        value = value.replace("tiny-0.tiny:29400", f"127.0.0.1:{port}")  # there is no cluster DNS here
        values[variable["name"]] = value.replace(mounts["workspace"], str(tmp_path))
    assert values["RENDEZVOUS"] == f"127.0.0.1:{port}"
    assert int(pod["terminationGracePeriodSeconds"]) > int(values["SHUTDOWN_TIMEOUT"])
    command = [*container["command"], *container["args"]]
    assert command[0] == "mlite"
    command = [sys.executable, "-m", "megatron_lite", *command[1:]]
    pods = [
        subprocess.Popen(
            command, env=local_run.environment(**values, LOCAL_ADDR="127.0.0.1", JOB_COMPLETION_INDEX=str(index)),
            cwd=tmp_path, start_new_session=True, text=True, stderr=subprocess.DEVNULL,
        )
        for index in range(2)
    ]  # fmt: skip
    assert [local_run.finish(pod) for pod in pods] == [0, 0]
    run = tmp_path / "runs" / "tiny"
    assert [row[2] for row in runs.curve(run)] == pytest.approx([row[2] for row in runs.curve(straight)], **CLOSE)
