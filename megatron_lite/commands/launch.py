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

import difflib
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

from megatron_lite.commands import kubernetes

SCRIPTS = {"local": "local.sh", "slurm": "slurm.sh", "deepspeed": "deepspeed.sh"}
ON_NODES = {"local": "node.sh", "slurm": "slurm.sbatch"}  # what the first script hands its settings on to
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
    _check_names("slurm" if where == "recipe" else where, settings)
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


def known_settings(where: str) -> set[str]:
    """The settings that the heads of the scripts of `where` describe."""
    head = r"^#   ([A-Z][A-Z0-9_]+(?:, [A-Z][A-Z0-9_]+)*)[ ,]"
    scripts = [scripts[where] for scripts in (SCRIPTS, ON_NODES) if where in scripts]
    found = [
        line for script in scripts for line in re.findall(head, (scripts_dir() / script).read_text(), re.MULTILINE)
    ]
    return {name for line in found for name in line.split(", ")}


def _check_names(where: str, settings: list[str]) -> None:
    """Raise ValueError for a name that is close to a setting's. Other names may be variables of the job, such as NCCL_DEBUG."""
    known = known_settings(where)
    for name in (setting.split("=")[0] for setting in settings):
        if name not in known and (meant := difflib.get_close_matches(name, known, n=1, cutoff=0.8)):
            raise ValueError(f"{name} is not a setting of launch {where}; {meant[0]} is")


def manifest(settings: dict[str, str], overrides: list[str]) -> str:
    """The manifest of launch/kubernetes.yaml, with a config that its ranks accept. Raises ValueError for a wrong setting or config."""
    text = kubernetes.manifest(scripts_dir() / "kubernetes.yaml", settings, overrides)
    # A folder of --config-dir is one of the pods'.
    if not any(word.startswith("--config-dir") for word in overrides):
        from megatron_lite.commands.train import validate_only
        from megatron_lite.training.config import compose_run

        with redirect_stdout(sys.stderr):
            run = compose_run([word for word in overrides if not word.startswith("check=")])
            validate_only(run, world_size=kubernetes.ranks(settings))
    return text
