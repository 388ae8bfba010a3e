"""The whole command: stages, restart to the same bytes, locks, refusals."""

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
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from data_tools.configuration import compose
from data_tools.inspect import InspectConfig, inspect
from data_tools.prepare import PrepareConfig, main, prepare
from data_tools.recipe import DecontaminateConfig, ExecutorConfig
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.tokenizer import fingerprint, load_tokenizer
from megatron_lite.file_lock import FileLock
from tests.data_tools.texts import article, write_jsonl


def run(recipe, **changes) -> Path:
    return prepare(PrepareConfig(recipe, **changes), Console(file=io.StringIO()))


def digests(corpus: Path) -> dict[str, str]:
    """sha256 of everything in the output but the work folder, the blend (it holds the output's own path), times and the lock."""
    files = [path for path in sorted(corpus.rglob("*")) if path.is_file()]
    files = [path for path in files if path.relative_to(corpus).parts[0] not in ("work", "data")]
    files = [path for path in files if path.name not in ("timing.json", ".lock")]
    return {str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_whole_way(make_recipe, tmp_path) -> None:
    evaluation = write_jsonl(tmp_path / "eval.jsonl", [{"text": article(11, 2)}])
    recipe = make_recipe(decontaminate=DecontaminateConfig(files={"quiz": str(evaluation)}))
    corpus = run(recipe)
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


def test_documents_are_shuffled_and_held_out_by_their_text(make_recipe) -> None:
    corpus = run(make_recipe())
    tokenizer = load_tokenizer(corpus / "tokenizer")

    def documents(prefix: Path) -> list[str]:
        data = IndexedDataset(prefix)
        edges = [data.document_start(i) for i in range(data.num_documents + 1)]
        return [tokenizer.decode(data.tokens(a, b - 1).tolist()) for a, b in itertools.pairwise(edges)]

    order = [i for text in documents(corpus / "prose") for i in range(60) if text == article(i)]
    held_out = documents(corpus / "prose.validation")
    assert 0 < len(held_out) < 20
    assert not set(held_out) & set(documents(corpus / "prose"))
    # Neighbours in the source are neighbors in the file no more often than in a random order (2 of about 54).
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 8
    again = make_recipe(seed=2, output=str(corpus.parent / "other"))
    other = [i for text in documents(run(again) / "prose") for i in range(60) if text == article(i)]
    assert other != order
    assert sorted(other) == sorted(order)


def test_stages_one_at_a_time_give_the_same_bytes(make_recipe, tmp_path) -> None:
    whole = digests(run(make_recipe(output=str(tmp_path / "whole"))))
    recipe = make_recipe(output=str(tmp_path / "parts"))
    with pytest.raises(ValueError, match="filter needs read, which is not finished"):
        run(recipe, stages=["filter"])
    for stage in ("read", "normalize", "filter", "exact", "near", "decontaminate", "tokenizer", "tokenize"):
        corpus = run(recipe, stages=[stage])
    assert digests(corpus) == whole


def test_workers_and_shards_do_not_change_the_tokens(make_recipe, tmp_path) -> None:
    one = digests(run(make_recipe(output=str(tmp_path / "one"))))
    recipe = make_recipe(output=str(tmp_path / "two"))
    two = digests(run(recipe, executor=ExecutorConfig(workers=2)))
    assert one == two


def test_a_finished_corpus_is_not_made_again_and_a_change_runs_from_there(make_recipe) -> None:
    recipe = make_recipe()
    run(recipe)
    output = io.StringIO()
    prepare(PrepareConfig(recipe), Console(file=output))
    assert output.getvalue().count("finished before") == 13
    recipe.near.enabled = False
    output = io.StringIO()
    prepare(PrepareConfig(recipe), Console(file=output))
    assert output.getvalue().count("finished before") == 6  # read, lines, normalize, filter, exact_hash, exact


def write_recipe(make_recipe, folder: Path, output: Path) -> Path:
    """`configs/` of its own with the recipe `test` and the command's defaults."""
    recipe = make_recipe(output=str(output))
    for group in ("data_recipe", "executor"):
        (folder / group).mkdir(parents=True, exist_ok=True)
    (folder / "data_recipe" / "test.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)))
    (folder / "executor" / "local.yaml").write_text("kind: local\nworkers: 1\n")
    (folder / "prepare.yaml").write_text("defaults: [prepare_schema, {data_recipe: test}, {executor: local}, _self_]\n")
    return folder


COMMAND = """
import sys, pathlib
import data_tools.configuration as configuration
configuration.config_dir = lambda: pathlib.Path(sys.argv[1])
from data_tools.prepare import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
"""


def test_killed_at_random_it_ends_with_the_same_bytes(make_recipe, tmp_path) -> None:
    expected = digests(run(make_recipe(output=str(tmp_path / "straight"))))
    configs = write_recipe(make_recipe, tmp_path / "configs", tmp_path / "killed")
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
    assert digests(tmp_path / "killed") == expected


def test_times_are_those_of_all_steps_whenever_they_ran(make_recipe) -> None:
    recipe = make_recipe()
    run(recipe, stages=["read", "normalize"])
    timing = json.loads((run(recipe) / "timing.json").read_text())
    assert {"read", "filter", "tokenize_merge"} < set(timing["steps"])
    assert timing["seconds"] == pytest.approx(
        sum(step["seconds"] for step in timing["steps"].values()), abs=0.1
    )  # rounded
    assert timing["steps"]["read"]["seconds"] > 0


def test_two_runs_on_one_output(make_recipe, tmp_path) -> None:
    recipe = make_recipe()
    output = tmp_path / "corpus"
    lock = FileLock(output / ".lock", key="data_recipe.output", value=output)
    with lock, pytest.raises(ValueError, match=r"data_recipe.output=.*corpus is in use by process \d+ on"):
        run(recipe)
    run(recipe, stages=["read"])


def test_rows_in_quarantine_are_told(make_recipe, tmp_path) -> None:
    recipe = make_recipe()
    path = tmp_path / "raw" / "code.jsonl"
    path.write_text("{broken\n" + path.read_text())
    output = io.StringIO()
    prepare(PrepareConfig(recipe, stages=["read"]), Console(file=output, width=80))
    assert f"1 rows or files cannot be used, first {path}:1: not JSON" in output.getvalue()
    assert ".quarantine.jsonl" in output.getvalue()


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
    with pytest.raises(ValueError, match=r"cannot write, No space left on device; nothing half-written was kept"):
        run(recipe)
    assert not list((tmp_path / "corpus").rglob(".*.tmp-*"))
    monkeypatch.undo()
    assert (run(recipe) / "corpus.json").exists()


def test_wrong_keys_are_told(capsys) -> None:
    assert main(["data_recipe=nowhere"]) == 2
    assert "local_jsonl" in capsys.readouterr().err
    assert main(["data_recipe=local_jsonl", "data_recipe.sources.text.path=/nowhere"]) == 2
    assert "data_recipe.sources.text.path=/nowhere: no file there" in capsys.readouterr().err
    assert main(["data_recipe=local_jsonl", "data_recipe.near.treshold=0.8"]) == 2
    assert "treshold" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "shard_bytes" in capsys.readouterr().out


def test_inspect_a_corpus(make_recipe, tmp_path) -> None:
    corpus = run(make_recipe())
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
    config = compose("inspect", InspectConfig, arguments)
    assert inspect(config, Console(file=output, width=200)) == []
    shown = output.getvalue()
    assert "english/prose" in shown
    assert "code/code" in shown
    assert "document 0, tokens 0 to" in shown
    assert (tmp_path / "blend.png").stat().st_size > 5_000
    config.tokens, config.max_epochs = 1_000_000, 4.0
    warnings = inspect(config, Console(file=io.StringIO()))
    assert any("code/code would be read" in warning for warning in warnings)
