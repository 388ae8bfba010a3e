"""The whole command: stages, restart to the same bytes, locks, errors."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from data_tools.inspect import InspectConfig, inspect
from data_tools.pipeline import STAGES
from data_tools.prepare import main
from data_tools.recipe import RecipeConfig
from megatron_lite import cli
from megatron_lite.config.compose import compose_config
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.tokenizer import fingerprint, load_tokenizer
from megatron_lite.file_lock import FileLock
from tests.data_tools.conftest import run, shown
from tests.data_tools.texts import article


def digests(corpus: Path) -> dict[str, str]:
    """sha256 of everything in the output but the work folder, times and the lock."""
    files = [path for path in sorted(corpus.rglob("*")) if path.is_file()]
    files = [path for path in files if path.relative_to(corpus).parts[0] != "work"]
    files = [path for path in files if path.name not in ("timing.json", ".lock")]
    return {str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_whole_way(finished) -> None:
    corpus = finished
    report = json.loads((corpus / "report.json").read_text())
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert stages["read"]["documents_out"] == 84
    assert stages["filter"]["reasons"] == {"too_short": {"prose": [1, 10]}}
    assert stages["exact"]["reasons"]["exact duplicate"]["prose"][0] == 2
    assert stages["near"]["reasons"]["near duplicate"]["prose"][0] == 1
    assert stages["near"]["examples"]["near duplicate"][0]["kept_text"][:200] == article(7)[:200]
    assert stages["decontaminate"]["reasons"] == {"overlap: quiz": {"prose": [1, len(article(11))]}}
    tokenizer = load_tokenizer(corpus / "tokenizer")
    decoded = {"prose": set(), "code": set()}
    for name in decoded:
        for suffix in ("", ".validation"):
            data = IndexedDataset(corpus / f"{name}{suffix}")
            manifest = json.loads((corpus / f"{name}{suffix}.json").read_text())
            assert manifest["tokenizer"] == fingerprint(tokenizer)
            assert (manifest["documents"], manifest["tokens"]) == (data.num_documents, data.num_tokens)
            for i in range(data.num_documents):
                ids = data.tokens(data.document_start(i), data.document_start(i + 1)).tolist()
                assert ids[-1] == tokenizer.eos_token_id
                decoded[name].add(tokenizer.decode(ids[:-1]))
    assert decoded["prose"] == {article(i) for i in range(60) if i != 11}
    assert len(decoded["code"]) == 20
    assert "quiz" in (corpus / "report.md").read_text()


def test_documents_are_shuffled_and_held_out_by_their_text(finished, copied) -> None:
    corpus = finished
    tokenizer = load_tokenizer(corpus / "tokenizer")

    def documents(prefix: Path) -> list[str]:
        data = IndexedDataset(prefix)
        edges = [data.document_start(i) for i in range(data.num_documents + 1)]
        return [tokenizer.decode(data.tokens(a, b - 1).tolist()) for a, b in itertools.pairwise(edges)]

    order = [i for text in documents(corpus / "prose") for i in range(60) if text == article(i)]
    held_out = documents(corpus / "prose.validation")
    assert 0 < len(held_out) < 20
    assert not set(held_out) & set(documents(corpus / "prose"))
    # Neighbors in the source are neighbors in the file no more often than in a random order (2 of about 54).
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 8
    copied.seed = 2
    other = [i for text in documents(run(copied) / "prose") for i in range(60) if text == article(i)]
    assert other != order
    assert sorted(other) == sorted(order)


def test_stages_one_at_a_time_give_the_same_bytes(finished_recipe, finished, tmp_path) -> None:
    recipe = replace(finished_recipe, output=str(tmp_path / "parts"))
    with pytest.raises(ValueError, match="filter needs read"):
        run(recipe, stages=["filter"])
    for stage in STAGES:
        corpus = run(recipe, stages=[stage])
    assert digests(corpus) == digests(finished)
    # Times are those of all steps, whenever they ran; sums differ by rounding.
    timing = json.loads((corpus / "timing.json").read_text())
    assert {"read", "filter", "tokenize_merge"} < set(timing["steps"])
    assert timing["seconds"] == pytest.approx(sum(step["seconds"] for step in timing["steps"].values()), abs=0.1)
    assert timing["steps"]["read"]["seconds"] > 0


def test_a_finished_corpus_is_not_made_again_and_a_change_runs_from_there(copied, finished) -> None:
    assert shown(copied).count("finished before") == 14
    assert digests(Path(copied.output)) == digests(finished)
    copied.near = replace(copied.near, enabled=False)
    assert shown(copied).count("finished before") == 6  # read, lines, normalize, filter, exact_hash, exact
    assert not run(copied, keep_work=False).joinpath("work").exists()


def write_recipe(recipe: RecipeConfig, folder: Path) -> Path:
    """`configs/` of its own with the recipe `test` and the command's defaults."""
    for group in ("data_recipe", "executor"):
        (folder / group).mkdir(parents=True, exist_ok=True)
    (folder / "data_recipe" / "test.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)))
    (folder / "executor" / "local.yaml").write_text("kind: local\nworkers: 1\n")
    (folder / "prepare.yaml").write_text("defaults: [prepare_schema, {data_recipe: test}, {executor: local}, _self_]\n")
    return folder


COMMAND = """
import pathlib, sys
import megatron_lite.config.compose as compose
folder = pathlib.Path(sys.argv.pop(1))
compose.config_dir = lambda: folder
from data_tools.prepare import main
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_killed_at_random_two_workers_end_with_the_bytes_of_one(finished_recipe, finished, tmp_path) -> None:
    recipe = replace(finished_recipe, output=str(tmp_path / "killed"))
    configs = write_recipe(recipe, tmp_path / "configs")
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    command = [sys.executable, str(script), str(configs), "executor.workers=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    generator = random.Random(0)
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        before = len(list((tmp_path / "killed").rglob("DONE.json")))
        # Killed a moment after it made progress, so the test ends however slow the machine is.
        while process.poll() is None and len(list((tmp_path / "killed").rglob("DONE.json"))) < before + 4:
            time.sleep(0.02)
        time.sleep(generator.random() * 0.3)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2
    assert digests(tmp_path / "killed") == digests(finished)


def test_two_runs_on_one_output(make_recipe, tmp_path) -> None:
    recipe = make_recipe()
    output = tmp_path / "corpus"
    lock = FileLock(output / ".lock", key="data_recipe.output", value=output)
    with lock, pytest.raises(ValueError, match=r"data_recipe.output=.*corpus is in use by process \d+ on"):
        run(recipe)
    run(recipe, stages=["read"])


def test_rows_in_quarantine_are_reported(make_recipe, tmp_path) -> None:
    recipe = make_recipe()
    path = tmp_path / "raw" / "code.jsonl"
    path.write_text("{broken\n" + path.read_text())
    output = shown(recipe, stages=["read"])
    assert f"1 rows or files cannot be used, first {path}:1: not JSON" in output
    assert ".quarantine.jsonl" in output


def test_a_source_without_documents(make_recipe, tmp_path) -> None:
    recipe = make_recipe()
    (tmp_path / "raw" / "code.jsonl").write_text("")
    for _ in range(2):  # the second time it must not pass for finished
        with pytest.raises(ValueError, match=r"data_recipe.sources.code: no document in"):
            run(recipe)


def test_a_full_disk(make_recipe, tmp_path, monkeypatch) -> None:
    import errno

    import data_tools.documents as documents

    written = 0

    def full(self, document):
        nonlocal written
        written += 1
        if written > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, document)

    original = documents.ShardWriter.write
    monkeypatch.setattr(documents.ShardWriter, "write", full)
    recipe = make_recipe()
    with pytest.raises(ValueError, match="No space left on device"):
        run(recipe)
    assert not list((tmp_path / "corpus").rglob(".*.tmp-*"))
    monkeypatch.undo()
    run(recipe, stages=["read"])


def command(monkeypatch, *arguments: str) -> int:
    """The exit code of `mlite prepare <arguments>`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mlite prepare", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["data_recipe=nowhere"], "local_jsonl"),
        (
            ["data_recipe=local_jsonl", "data_recipe.sources.text.path=/nowhere"],
            "data_recipe.sources.text.path=/nowhere",
        ),
        (
            [
                "data_recipe=local_jsonl",
                f"data_recipe.sources.text.path={__file__}",
                "data_recipe.tokenizer.path=/nowhere",
            ],
            "data_recipe.tokenizer.path=/nowhere does not exist",
        ),
        (
            [
                "data_recipe=local_jsonl",
                f"data_recipe.sources.text.path={__file__}",
                "+data_recipe.decontaminate.files.gsm=/nowhere",
            ],
            "data_recipe.decontaminate.files.gsm=/nowhere does not exist",
        ),
        (
            ["data_recipe=local_jsonl", "data_recipe.decontaminate.files.gsm=/nowhere"],
            "a new name is added with a +: +data_recipe.decontaminate.files.gsm=/nowhere",
        ),
        (["data_recipe=local_jsonl", "data_recipe.sources.x.path=a"], "did you mean data_recipe.sources.text.path"),
        (["data_recipe=local_jsonl", "data_recipe.near.treshold=0.8"], "did you mean data_recipe.near.threshold"),
        (["data_recipe=three_groups", "stages=[tokenise]"], "did you mean tokenize"),
        (["data_recipe=three_groups", "executor.workers=0"], "executor.workers=0 must be at least 1"),
    ],
)
def test_wrong_keys_are_reported(monkeypatch, capsys, arguments, named: str) -> None:
    assert command(monkeypatch, *arguments) == 2
    assert named in capsys.readouterr().err


def test_help_lists_keys_and_recipes(monkeypatch, capsys) -> None:
    assert command(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert "shard_bytes" in shown
    assert "data_recipe=local_jsonl|three_groups" in shown


@pytest.mark.parametrize("package", ["datatrove", "orjson", "ftfy", "py3langid"])
def test_without_the_extra_it_is_named(monkeypatch, capsys, tmp_path, package: str) -> None:
    for module in [name for name in sys.modules if name.startswith(("data_tools", f"{package}."))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.setattr(
        sys, "argv", ["mlite", "prepare", "data_recipe=three_groups", f"data_recipe.output={tmp_path}/out"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert f"{package}, which is not installed: pip install 'megatron-lite[data]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_a_corpus(finished, tmp_path) -> None:
    corpus = finished
    output = io.StringIO()
    arguments = [
        "--config-dir",
        str(corpus),
        "data=test",
        "tokens=1e4",
        "samples=2",
        "places=5",
        f"picture={tmp_path / 'blend.png'}",
    ]
    config = compose_config("inspect", InspectConfig, arguments)
    assert inspect(config, Console(file=output, width=200)) == []
    shown = output.getvalue()
    assert "english/prose" in shown
    assert "code/code" in shown
    assert "document 0, tokens 0 to" in shown
    assert "median" in shown
    assert "128k" in shown
    assert (tmp_path / "blend.png").stat().st_size > 5_000
    assert inspect(config, Console(file=io.StringIO())) == []  # its own picture is replaced, another file is not
    (tmp_path / "blend.png").write_bytes(b"a photograph")
    output = io.StringIO()
    with pytest.raises(ValueError, match=r"picture=.*blend\.png"):
        inspect(config, Console(file=output))
    assert not output.getvalue()
    config.picture, config.places = "", -1
    with pytest.raises(ValueError, match=r"places=-1"):
        inspect(config, Console(file=output))
    config.places = 5
    config.tokens, config.max_epochs = 1_000_000, 4.0
    warnings = inspect(config, Console(file=io.StringIO()))
    assert any("code/code would be read" in warning for warning in warnings)
