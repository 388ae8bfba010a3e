"""deepspeed.sh, two hosts in network namespaces, and the pods of the Kubernetes manifest as processes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys

import pytest

from megatron_lite.commands.launch import scripts_dir
from tests import runs
from tests.launch import local_run
from tests.launch.slurm_cluster import free_ports

pytestmark = pytest.mark.slow
CLOSE = {"rel": 1e-4}  # another number of ranks adds in another order, and 20 steps at a rate of 1e-2 let it grow


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
    local_run.wait_until_it_trains(run, log=tmp_path / "log")
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
