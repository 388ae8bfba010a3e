"""`mlite launch`: start a run on a laptop, a node, a Slurm cluster, a list of hosts or Kubernetes, with the same overrides.

mlite launch local experiment=smoke
mlite launch slurm --dry-run NODES=4 PARTITION=batch experiment=nemotron4_15b
mlite launch deepspeed HOSTFILE=hosts engine=deepspeed experiment=smoke
mlite launch kubernetes NODES=2 IMAGE=registry.example/mlite:1 experiment=smoke | kubectl apply -f -
mlite launch recipe nemotron4_15b PARTITION=batch

Notable features:
- The work is done by the scripts of `launch/`, which run without this command too; it finds them in the checkout or in the wheel.
- NAME=value words are settings (described at the head of each script), key=value words are Hydra overrides.
- `kubernetes` prints the manifest with the settings filled in; nothing is sent anywhere.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

SCRIPTS = {"local": "local.sh", "slurm": "slurm.sh", "deepspeed": "deepspeed.sh"}
USAGE = """usage: mlite launch <where> [--dry-run] [SETTING=value ...] [Hydra overrides]

where:
  local        this machine: one process, one GPU, or all GPUs of a node
  slurm        submit a job; it is requeued until the run is finished
  deepspeed    the hosts of HOSTFILE, by DeepSpeed's launcher
  kubernetes   print the manifest of an indexed Job
  recipe NAME  print the chained Slurm jobs of a published run: {recipes}

settings of each: """


def scripts_dir() -> Path:
    """The launch scripts: `launch/` of the checkout, or the copy inside an installed wheel."""
    package = Path(__file__).parent.parent
    inside = package / "launchers"
    return inside if inside.is_dir() else package.parent / "launch"


def recipes() -> list[str]:
    """The names of the published runs in `launch/recipes`."""
    return sorted(path.stem for path in (scripts_dir() / "recipes").glob("*.sh"))


def main() -> None:
    """Become the script that the first word names (signals reach it directly), or print the manifest."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE.format(recipes=", ".join(recipes())) + f"the heads of {scripts_dir()}/*.sh, and README.md there")
        return
    try:
        if words[0] == "kubernetes":
            settings, overrides = split_words(words[1:])
            print(manifest(dict(s.split("=", 1) for s in settings), overrides), end="")
            return
        words = command(words[0], words[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.stdout.flush()
    os.execvp(words[0], words)


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """(NAME=value settings, Hydra overrides) of a command line. Raises ValueError for unknown options."""
    settings = [word for word in words if re.match(r"[A-Z][A-Z0-9_]*=", word)]
    overrides = [word for word in words if word not in settings and word != "--dry-run"]
    for before, word in zip(["", *overrides], overrides):
        if word.startswith("-") and not word.startswith("--config-dir") and before != "--config-dir":
            raise ValueError(
                f"{word} is unknown; options are --dry-run and --config-dir, settings NAME=value, overrides key=value"
            )
    return settings, overrides


def command(where: str, words: list[str]) -> list[str]:
    """The command line that `mlite launch <where> <words>` becomes. Raises ValueError for an unknown place, recipe or option."""
    if where == "recipe":
        name, *words = words or [""]
        if name not in recipes():
            raise ValueError(f"launch recipe {name!r} is unknown; choose one of {', '.join(recipes())}")
        script = f"recipes/{name}.sh"
    elif where in SCRIPTS:
        script = SCRIPTS[where]
    else:
        raise ValueError(f"launch {where!r} is unknown; choose one of {', '.join([*SCRIPTS, 'kubernetes', 'recipe'])}")
    settings, overrides = split_words(words)
    dry = ["--dry-run"] if "--dry-run" in words else []
    return [
        "env",
        f"MLITE_PYTHON={sys.executable}",
        *settings,
        "bash",
        str(scripts_dir() / script),
        *dry,
        *overrides,
    ]


def manifest(settings: dict[str, str], overrides: list[str]) -> str:
    """launch/kubernetes.yaml with settings and overrides filled in. Raises ValueError for an unknown setting.

    NAME, NAMESPACE, IMAGE, NODES, GPUS_PER_NODE, CLAIM (a shared volume, mounted at /workspace), RUN_DIR and GRACE_SECONDS go where
    they belong; any of local.sh's settings becomes a variable of the container.
    """
    text = _renamed((scripts_dir() / "kubernetes.yaml").read_text(), settings.get("NAME"))
    documents = list(yaml.safe_load_all(text))
    job = next(d for d in documents if d["kind"] == "Job")
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    known = {v["name"] for v in container["env"]} | {"MIN_NODES", "MAX_RESTARTS", "ENV_FILE", "PYTHON", "LOCAL_ADDR"}
    placed = {"NAME", "NAMESPACE", "IMAGE", "NODES", "GPUS_PER_NODE", "CLAIM", "GRACE_SECONDS"}
    unknown = sorted(set(settings) - known - placed)
    if unknown:
        raise ValueError(
            f"{unknown[0]} is not a setting of launch kubernetes; known are {', '.join(sorted(known | placed))}"
        )
    if "NODES" in settings:
        job["spec"]["completions"] = job["spec"]["parallelism"] = _whole_number(settings, "NODES", 1)
    if "GPUS_PER_NODE" in settings:
        gpus = _whole_number(settings, "GPUS_PER_NODE", 0)
        if not gpus and "RANKS_PER_NODE" not in settings:
            raise ValueError("GPUS_PER_NODE=0 needs RANKS_PER_NODE, the processes of a node")
        _set_gpus(container, gpus)
        settings = {"RANKS_PER_NODE": str(gpus), **settings}
    for name, lowest in {"RANKS_PER_NODE": 1, "MIN_NODES": 1, "MAX_RESTARTS": 0}.items():
        if name in settings:
            _whole_number(settings, name, lowest)
    _set_grace(pod, settings)
    container["image"] = settings.get("IMAGE", container["image"])
    if claim := settings.get("CLAIM"):
        pod["volumes"][0]["persistentVolumeClaim"]["claimName"] = claim
    _set_variables(container, {key: settings[key] for key in settings if key in known})
    container["args"] = [*container["args"], *overrides]
    if namespace := settings.get("NAMESPACE"):
        for document in documents:
            document["metadata"]["namespace"] = namespace
    return yaml.safe_dump_all(documents, sort_keys=False, width=120)


def _whole_number(settings: dict[str, str], name: str, lowest: int) -> int:
    value = settings[name]
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < lowest:
        raise ValueError(f"{name}={value} is not a whole number from {lowest} on")
    return int(value)


def _set_grace(pod: dict[str, Any], settings: dict[str, str]) -> None:
    """The pod's grace period covers SHUTDOWN_TIMEOUT (what torchrun grants its ranks), and that covers SAVE_SECONDS."""
    defaults = {v["name"]: v["value"] for v in pod["containers"][0]["env"] if "value" in v}
    defaults["GRACE_SECONDS"] = str(pod["terminationGracePeriodSeconds"])
    values = {**defaults, **settings}
    grace, shutdown, save = (
        _whole_number(values, name, 0) for name in ("GRACE_SECONDS", "SHUTDOWN_TIMEOUT", "SAVE_SECONDS")
    )
    if not grace > shutdown >= save:
        raise ValueError(
            f"GRACE_SECONDS={grace} must be above SHUTDOWN_TIMEOUT={shutdown}, and that not below SAVE_SECONDS={save}, the "
            "seconds of a step (at least 5) and a save"
        )
    pod["terminationGracePeriodSeconds"] = grace


def _set_gpus(container: dict[str, Any], gpus: int) -> None:
    for limits in container["resources"].values():
        limits.pop("nvidia.com/gpu", None)
        if gpus:
            limits["nvidia.com/gpu"] = gpus


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
