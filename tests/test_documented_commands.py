"""Every command of the pages, as a shell reads it: its config is composed and checked, its launch goes through a dry run."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_lite.cli import COMMANDS
from megatron_lite.commands import kubernetes, train
from megatron_lite.commands.launch import command, scripts_dir, split_words
from megatron_lite.config.compose import compose_config, config_dir
from megatron_lite.training.config import RunConfig, compose_run

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "launch" / "README.md",
    ROOT / "data_tools" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]
OURS = re.compile(r"^(?:mlite|torchrun) ", re.MULTILINE)
SHARED = "/lustre/llm"  # the shared file system of the pages; below the test's own folder here
GPUS = 8  # of a node, where a command does not say


def blocks(page: Path) -> str:
    """The shell blocks of a page; one without a language is one if it has a command of ours."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return "\n".join(
        text for language, text in found if language in ("bash", "sh") or (not language and OURS.search(text))
    )


def commands(page: Path, folder: Path) -> list[list[str]]:
    """The words of every `mlite` and `torchrun` command of a page: bash runs its blocks, and finds hardly any other program."""
    (folder / "bin").mkdir()
    for name in ("cat", "head"):
        (folder / "bin" / name).symlink_to(shutil.which(name))
    stubs = [f"{name}() {{ printf '%s\\0' {name} \"$@\" $'\\n' >&3; }}" for name in ("mlite", "torchrun")]
    root = str(folder).removesuffix(f"{SHARED}/megatron_lite")
    code = "\n".join(["exec 3>&1 1>&2", *stubs, blocks(page).replace(SHARED, f"{root}{SHARED}")])
    names = {"PATH": str(folder / "bin"), "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_TASK_ID": "t"}
    names |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "DSTACK_NODES_NUM": "2", "DSTACK_NODE_RANK": "1"}
    names |= {"DSTACK_RUN_NAME": "t", "DSTACK_MASTER_NODE_IP": "10.0.0.1"}
    bash = shutil.which("bash")
    done = subprocess.run(
        [bash, "-c", code], env=names, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return [line.strip("\0").split("\0") for line in done.stdout.split("\n\0") if line]


def lay_out(words: list[str]) -> None:
    """The folder of `--config-dir`, with a file for every choice that `configs/` does not have."""
    if "--config-dir" not in words:
        return
    folder = Path(words[words.index("--config-dir") + 1])
    for group in ("data", "experiment", "data_recipe"):
        for name in (word.split("=")[1] for word in words if word.startswith(f"{group}=")):
            if not (config_dir() / group / f"{name}.yaml").exists():
                file = folder / group / f"{name}.yaml"
                file.parent.mkdir(parents=True, exist_ok=True)
                content = {
                    "data": "groups: {a: {sources: {b: {path: c}}}}\n",
                    "experiment": "# @package _global_\ntrain: {max_steps: 500}\n",
                }
                file.write_text(content.get(group, ""))


def check_launch(where: str, words: list[str]) -> None:
    """The scripts take the settings, and the config is right for all ranks."""
    settings, overrides = split_words(words)
    values = dict(setting.split("=", 1) for setting in settings)
    overrides = [word for word in overrides if word != "check=true"]
    if where == "kubernetes":
        kubernetes.manifest(scripts_dir() / "kubernetes.yaml", values, overrides)
        ranks = kubernetes.ranks(values)
    else:
        line = [
            "MLITE_PYTHON=true" if "MLITE_PYTHON=" in word else word for word in command(where, [*words, "--dry-run"])
        ]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        ranks = int(values.get("NODES", "1")) * int(values.get("RANKS_PER_NODE", values.get("GPUS_PER_NODE", GPUS)))
        assert not values.get("SETTINGS") or Path(values["SETTINGS"]).exists()
    if where != "recipe":
        train.validate_only(compose_run(overrides), world_size=ranks)


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = words
    lay_out(words)
    ranks = 1
    if program == "torchrun":
        ranks = int(words[words.index("--nproc-per-node") + 1])
        words = words[words.index("megatron_lite") + 1 :]
    name, *words = words
    assert name in COMMANDS
    if "--help" in words:
        return
    if name == "launch":
        check_launch(words[0], words[1:])
    elif name in ("train", "preflight"):
        train.validate_only(compose_config("train", RunConfig, words), world_size=ranks)
    else:
        module = importlib.import_module(COMMANDS[name][0])
        composed = []
        monkeypatch.setattr(
            module,
            "run_command",
            lambda name, schema, *_, compose=None: composed.append(
                compose(words) if compose else compose_config(name, schema, words)
            ),
        )
        module.main()
        assert composed


@pytest.mark.parametrize(
    "page", [page for page in PAGES if OURS.search(blocks(page))], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_command_of_a_page(page, tmp_path, monkeypatch):
    folder = tmp_path / SHARED[1:] / "megatron_lite"
    folder.mkdir(parents=True)
    (folder / "hosts").write_text("a slots=8\nb slots=8\n")
    (folder / "launch").symlink_to(scripts_dir())
    (folder / "mlite.sqsh").touch()
    found = commands(page, folder)
    assert len(found) == len(OURS.findall(blocks(page)))
    monkeypatch.chdir(folder)
    for words in found:
        try:
            check(words, monkeypatch)
        except Exception as error:
            raise AssertionError(f"{page.name}: {' '.join(words)}: {error}") from error


def test_a_wrong_command_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (
        ["mlite", "launch", "slurm", "NODES=2", "experiment=smoke"],  # a batch of 8 on 16 ranks
        ["mlite", "launch", "kubernetes", "IMAGES=x", "experiment=smoke_cluster"],
        ["mlite", "train", "experiment=smoke", "optim.rate=1"],
        ["mlite", "evaluate", "checkpoint=x", "tokens=1"],
    ):
        with pytest.raises(ValueError):
            check(words, monkeypatch)
