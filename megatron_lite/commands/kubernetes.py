"""The manifest of a run on Kubernetes: launch/kubernetes.yaml with settings and overrides filled in.

Notable features:
- a plain indexed Job with one pod a node needs no controller; `KIND=jobset` wraps the same Job into a JobSet
  (https://jobset.sigs.k8s.io), which restarts all pods together;
- what a site adds (tolerations, queues, networks, RDMA devices) is a file of its own, OVERLAY, merged into the Job.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

# Settings that go to a place of their own in the manifest; those of local.sh become variables of the container.
PLACED = (
    "NAME", "NAMESPACE", "IMAGE", "NODES", "GPUS_PER_NODE", "CLAIM", "GRACE_SECONDS", "CPU", "MEMORY", "SHM", "SECRET", "OVERLAY",
    "KIND",
)  # fmt: skip
OF_LOCAL = (
    "RANKS_PER_NODE", "MIN_NODES", "MAX_RESTARTS", "RENDEZVOUS", "RUN_DIR", "JOB", "SHUTDOWN_TIMEOUT", "SAVE_SECONDS",
    "START_SECONDS", "ENV_FILE", "PYTHON", "LOCAL_ADDR", "NUMA_BINDING",
)  # fmt: skip
OF_SLURM = (
    "ACCOUNT", "PARTITION", "QOS", "RESERVATION", "CONSTRAINT", "COMMENT", "DEPENDENCY", "MEM", "CPUS_PER_NODE", "GRES", "TIME",
    "SIGNAL_SECONDS", "MAX_FAILURES", "EXCLUSIVE", "SBATCH_ARGS", "JOB_NAME", "LOG_DIR", "MASTER_PORT", "CONTAINER", "CONTAINER_MOUNTS",
    "CONTAINER_ENV", "CONTAINER_ARGS",
)  # fmt: skip


def manifest(template: Path, settings: dict[str, str], overrides: list[str]) -> str:
    """The template (launch/kubernetes.yaml) with settings and overrides filled in, as YAML.

    Settings that are in neither PLACED nor OF_LOCAL become variables of the container (CORPUS, HF_HOME, NCCL_DEBUG).
    Raises ValueError for a setting of Slurm's, a name close to a setting's, and a value that does not fit.
    """
    _check_names(settings)
    service, job = yaml.safe_load_all(_renamed(template.read_text(), settings.get("NAME")))
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    if "NODES" in settings:
        spec["completions"] = spec["parallelism"] = whole_number(settings, "NODES", 1)
    # Failures of all pods count together, and a crash fails every pod of the run.
    spec["backoffLimit"] = 0 if "check=true" in overrides else max(100, 20 * spec["completions"])
    _set_resources(pod, container, settings)
    _set_grace(pod, settings)
    container["image"] = settings.get("IMAGE", container["image"])
    if claim := settings.get("CLAIM"):
        pod["volumes"][0]["persistentVolumeClaim"]["claimName"] = claim
    if secrets := settings.get("SECRET"):
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in secrets.split(",")]
    variables = {key: value for key, value in settings.items() if key not in PLACED}
    if "GPUS_PER_NODE" in settings:
        variables.setdefault("RANKS_PER_NODE", settings["GPUS_PER_NODE"])
    variables |= {key: settings[key] for key in ("NODES",) if key in settings}
    _set_variables(container, variables)
    container["args"] = [*container["args"], *overrides]
    for path in filter(None, settings.get("OVERLAY", "").split(",")):
        job = merged(job, _overlay(Path(path)))
    documents = [service, job] if settings.get("KIND", "job") == "job" else [jobset(job, name)]
    if namespace := settings.get("NAMESPACE"):
        for document in documents:
            document["metadata"]["namespace"] = namespace
    return yaml.safe_dump_all(documents, sort_keys=False, width=120)


def ranks(settings: dict[str, str]) -> int:
    """How many ranks the manifest starts."""
    gpus = settings.get("GPUS_PER_NODE", "8")
    counts = {"NODES": "2", "RANKS_PER_NODE": gpus, **settings}
    return whole_number(counts, "NODES", 1) * whole_number(counts, "RANKS_PER_NODE", 1)


def merged(base: Any, overlay: Any) -> Any:
    """`base` with `overlay` laid over it: mappings key by key, lists of named things by name, other lists joined; else the overlay."""
    if isinstance(base, dict) and isinstance(overlay, dict):
        return {**base, **{key: merged(base[key], value) if key in base else value for key, value in overlay.items()}}
    if isinstance(base, list) and isinstance(overlay, list):
        if not all(isinstance(item, dict) and "name" in item for item in [*base, *overlay]):
            return [*base, *overlay]
        by_name = {item["name"]: item for item in base}
        for item in overlay:
            by_name[item["name"]] = merged(by_name.get(item["name"], {}), item)
        return list(by_name.values())
    return overlay


def jobset(job: dict[str, Any], name: str) -> dict[str, Any]:
    """The Job as the only member of a JobSet, whose controller makes the Service and restarts all pods when the Job fails."""
    spec = {**job["spec"], "backoffLimit": 0}
    container = spec["template"]["spec"]["containers"][0]
    first = {"name": "RENDEZVOUS", "value": f"{name}-run-0-0.{name}:29400"}
    container["env"] = [first if v["name"] == "RENDEZVOUS" else v for v in container["env"]]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": job["metadata"],
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": job["spec"]["backoffLimit"],
                # a wrong config, which the Job's podFailurePolicy ends, is not better the second time
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "run", "replicas": 1, "template": {"spec": spec}}],
        },
    }


def whole_number(settings: dict[str, str], name: str, lowest: int) -> int:
    """The value of a setting. Raises ValueError if it is not a whole number from `lowest` on."""
    value = settings[name]
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < lowest:
        raise ValueError(f"{name}={value} is not a whole number from {lowest} on")
    return int(value)


def _check_names(settings: dict[str, str]) -> None:
    known = [*PLACED, *OF_LOCAL]
    for name in settings:
        if name in OF_SLURM:
            raise ValueError(f"{name} is a setting of launch slurm; launch kubernetes takes {', '.join(known)}")
        if name not in known and (meant := difflib.get_close_matches(name, known, n=1, cutoff=0.8)):
            raise ValueError(f"{name} is not a setting of launch kubernetes; {meant[0]} is")
    for name, lowest in {"RANKS_PER_NODE": 1, "MIN_NODES": 1, "MAX_RESTARTS": 0, "START_SECONDS": 1}.items():
        if name in settings:
            whole_number(settings, name, lowest)
    if settings.get("KIND", "job") not in ("job", "jobset"):
        raise ValueError(f"KIND={settings['KIND']} is unknown; choose job or jobset")


def _overlay(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"OVERLAY={path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not set(found) <= {"metadata", "spec"}:
        raise ValueError(f"OVERLAY={path} is not a part of a Job: it may have the keys metadata and spec")
    return found


def _set_resources(pod: dict[str, Any], container: dict[str, Any], settings: dict[str, str]) -> None:
    """Requests equal limits, so that the pod is the last one to be evicted (class Guaranteed) where CPU and MEMORY are given."""
    resources = dict(container["resources"]["limits"])
    if "GPUS_PER_NODE" in settings:
        gpus = whole_number(settings, "GPUS_PER_NODE", 0)
        if not gpus and "RANKS_PER_NODE" not in settings:
            raise ValueError("GPUS_PER_NODE=0 needs RANKS_PER_NODE, the processes of a node")
        resources.pop("nvidia.com/gpu")
        resources |= {"nvidia.com/gpu": gpus} if gpus else {}
    for name, key in (("CPU", "cpu"), ("MEMORY", "memory")):
        resources |= {key: settings[name]} if name in settings else {}
    container["resources"] = {"limits": resources, "requests": dict(resources)}
    if "SHM" in settings:
        pod["volumes"][1]["emptyDir"]["sizeLimit"] = settings["SHM"]


def _set_grace(pod: dict[str, Any], settings: dict[str, str]) -> None:
    """The pod's grace period covers SHUTDOWN_TIMEOUT (what torchrun grants its ranks), and that covers SAVE_SECONDS."""
    defaults = {v["name"]: v["value"] for v in pod["containers"][0]["env"] if "value" in v}
    values = {**defaults, **settings}
    shutdown, save = (whole_number(values, name, 0) for name in ("SHUTDOWN_TIMEOUT", "SAVE_SECONDS"))
    grace = whole_number({"GRACE_SECONDS": str(shutdown + 60), **settings}, "GRACE_SECONDS", 0)
    if not grace > shutdown >= save:
        raise ValueError(
            f"GRACE_SECONDS={grace} must be above SHUTDOWN_TIMEOUT={shutdown}, and that not below SAVE_SECONDS={save}, the "
            "seconds of a step (at least 5) and a save"
        )
    pod["terminationGracePeriodSeconds"] = grace


def _set_variables(container: dict[str, Any], values: dict[str, str]) -> None:
    kept = [v for v in container["env"] if v["name"] not in values]
    container["env"] = kept + [{"name": name, "value": value} for name, value in values.items()]


def _renamed(text: str, name: str | None) -> str:
    """The manifest with another name in every place that has it (service, labels, the first pod's address)."""
    if name is None:
        return text
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?", name):
        raise ValueError(f"NAME={name} is not a Kubernetes name: use lower-case letters, digits and dashes")
    return re.sub(r"\bmlite-run\b", name, text)
