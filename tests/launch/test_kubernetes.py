"""The manifest of `mlite launch kubernetes`: where the settings go, and that an API server would take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lite.commands import kubernetes
from megatron_lite.commands.launch import manifest as checked_manifest
from megatron_lite.commands.launch import scripts_dir

LAUNCH = scripts_dir()
OVERLAYS = sorted((LAUNCH / "overlays").glob("*.yaml"))


def manifest(overrides: list[str] | None = None, **settings: str) -> list[dict[str, Any]]:
    """The documents of a manifest whose config nobody checks."""
    return list(yaml.safe_load_all(kubernetes.manifest(LAUNCH / "kubernetes.yaml", settings, overrides or [])))


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def variables(job: dict[str, Any]) -> dict[str, str]:
    return {v["name"]: v.get("value") for v in pod_of(job)["containers"][0]["env"]}


def test_a_name_changes_nothing_but_the_name():
    _, job = manifest(["data.path=/x/mlite-run/y"], NAME="big-run", IMAGE="r/mlite-run:2", CLAIM="mlite-run")
    (container,) = pod_of(job)["containers"]
    assert (container["image"], container["args"]) == ("r/mlite-run:2", ["data.path=/x/mlite-run/y"])
    assert pod_of(job)["volumes"][0]["persistentVolumeClaim"]["claimName"] == "mlite-run"


def test_the_manifest_takes_its_settings():
    settings = {
        "NODES": "3",
        "NAME": "big-run",
        "IMAGE": "r/i:2",
        "GPUS_PER_NODE": "4",
        "NAMESPACE": "llm",
        "CLAIM": "c",
    }
    service, job = manifest(["a=b"], CPU="64", MEMORY="900Gi", SHM="32Gi", SECRET="wandb,hub", **settings)
    assert service["metadata"] == {"name": "big-run", "namespace": "llm"}
    assert job["metadata"]["namespace"] == "llm"
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
    values = variables(job)
    assert (values["NODES"], values["RANKS_PER_NODE"]) == ("3", "4")
    assert values["RENDEZVOUS"] == "big-run-0.big-run:29400"
    (container,) = pod_of(job)["containers"]
    assert (container["image"], container["args"]) == ("r/i:2", ["a=b"])
    expected = {"nvidia.com/gpu": 4, "cpu": "64", "memory": "900Gi"}
    assert container["resources"] == {"limits": expected, "requests": expected}
    assert pod_of(job)["volumes"][1]["emptyDir"]["sizeLimit"] == "32Gi"
    assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["wandb", "hub"]


def test_other_names_are_variables_of_the_container():
    values = variables(manifest(CORPUS="/workspace/corpus", HF_HOME="/workspace/hf", NCCL_DEBUG="INFO")[1])
    assert values["CORPUS"] == "/workspace/corpus"
    assert {"HF_HOME", "NCCL_DEBUG"} <= set(values)


@pytest.mark.parametrize(("nodes", "failures"), [("2", 100), ("64", 1280)])
def test_failures_that_a_run_may_have(nodes, failures):
    """Those of all pods count together; a check is not repeated."""
    assert manifest(["check=true"], NODES=nodes)[1]["spec"]["backoffLimit"] == 0
    assert manifest(NODES=nodes)[1]["spec"]["backoffLimit"] == failures


def test_the_grace_period_follows_the_time_to_save():
    assert pod_of(manifest(SHUTDOWN_TIMEOUT="1800")[1])["terminationGracePeriodSeconds"] == 1860
    assert pod_of(manifest(SHUTDOWN_TIMEOUT="1800", GRACE_SECONDS="2000")[1])["terminationGracePeriodSeconds"] == 2000


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ACCOUNT": "x"}, "ACCOUNT"),
        ({"IMAGES": "x"}, "IMAGE "),
        ({"RANK_PER_NODE": "8"}, "RANKS_PER_NODE"),
        ({"NAME": "A_b"}, "NAME=A_b"),
        ({"NODES": "abc"}, "NODES=abc"),
        ({"GPUS_PER_NODE": "0"}, "RANKS_PER_NODE"),
        ({"GRACE_SECONDS": "600"}, "GRACE_SECONDS=600"),
        ({"SHUTDOWN_TIMEOUT": "29"}, "SHUTDOWN_TIMEOUT=29"),
        ({"KIND": "pod"}, "KIND=pod"),
        ({"OVERLAY": "/nowhere"}, "OVERLAY=/nowhere"),
        ({"OVERLAY": str(LAUNCH / "kubernetes.yaml")}, "OVERLAY=.*kubernetes.yaml"),
    ],
)
def test_wrong_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        manifest(**settings)


def test_a_wrong_config_is_refused_for_all_ranks(capsys):
    """The smoke experiment's batch of 8 does not divide by 16 ranks."""
    with pytest.raises(ValueError, match=r"train.micro_batch_size=8 x 16"):
        checked_manifest({}, ["experiment=smoke"])
    assert checked_manifest({"NODES": "4"}, ["experiment=smoke_cluster"]).startswith("apiVersion")
    assert capsys.readouterr().out == ""


def test_an_overlay_is_merged():
    base = {"a": {"b": 1, "c": [1]}, "env": [{"name": "x", "value": 1}, {"name": "y"}]}
    overlay = {"a": {"c": [2], "d": 3}, "env": [{"name": "x", "value": 2}, {"name": "z"}]}
    assert kubernetes.merged(base, overlay) == {
        "a": {"b": 1, "c": [1, 2], "d": 3},
        "env": [{"name": "x", "value": 2}, {"name": "y"}, {"name": "z"}],
    }
    _, job = manifest(OVERLAY=",".join(map(str, OVERLAYS)))
    (container,) = pod_of(job)["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "rdma/rdma_shared_device_a": 1}
    assert variables(job)["ENV_FILE"] == "launch/env/dgx_h100.env"
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "user-queue"}


def test_a_jobset_has_the_same_pods():
    (whole,) = manifest(KIND="jobset", NODES="4", NAME="big")
    (member,) = whole["spec"]["replicatedJobs"]
    job = member["template"]
    _, alone = manifest(NODES="4", NAME="big")
    # <jobset>-<member>-<number of the job>-<number of the pod>.<subdomain>
    assert variables(job)["RENDEZVOUS"] == "big-run-0-0.big:29400"
    assert {k: v for k, v in variables(job).items() if k != "RENDEZVOUS"} == {
        k: v for k, v in variables(alone).items() if k != "RENDEZVOUS"
    }
    assert job["spec"]["completions"] == 4
    assert job["spec"]["backoffLimit"] == 0  # one failed pod fails the Job, and the JobSet restarts all of them
    assert whole["spec"]["failurePolicy"]["maxRestarts"] == alone["spec"]["backoffLimit"] == 100
    assert whole["spec"]["network"]["subdomain"] == "big"


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_an_api_server_takes_it(version):
    """Against the schemas of a release, without unknown keys."""
    validator = pytest.importorskip("kubernetes_validate")
    jobs = [manifest()[1], *(manifest(OVERLAY=str(path), SECRET="s", CPU="8")[1] for path in OVERLAYS)]
    (whole,) = manifest(KIND="jobset", SHM="1Gi", MEMORY="9Gi")
    inner = whole["spec"]["replicatedJobs"][0]["template"]
    jobs.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **inner})
    for document in [manifest(NAMESPACE="llm")[0], *jobs]:
        validator.validate(document, version, strict=True)
    with pytest.raises(validator.ValidationError):  # it would see a key in the wrong place
        validator.validate(merged_in_the_wrong_place(jobs[0]), version, strict=True)


def merged_in_the_wrong_place(job: dict[str, Any]) -> dict[str, Any]:
    return kubernetes.merged(job, {"spec": {"tolerations": []}})


def test_every_overlay_is_of_use():
    assert {path.stem for path in OVERLAYS} == {"gke", "kueue", "rdma"}
    assert all(isinstance(yaml.safe_load(path.read_text()), dict) for path in map(Path, OVERLAYS))
