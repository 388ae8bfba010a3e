"""A corpus that version 0.1 prepared is still read, trained on, and replaced by the same recipe.

`fixtures/corpus_1` was made by the recipe in its folder `data_recipe/`; only the place that its blend names was changed afterwards. It
is never made again, since only the version that wrote it can.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from data_tools.inspect import InspectConfig, inspect
from data_tools.prepare import PrepareConfig
from data_tools.recipe import Columns, SourceConfig
from megatron_lite.commands.train import train
from megatron_lite.config.compose import compose_config
from megatron_lite.config.errors import ConfigError
from megatron_lite.data.sidecar import read_sidecar
from megatron_lite.training.config import compose_run
from tests import runs
from tests.data_tools.conftest import run
from tests.data_tools.texts import article, program, write_jsonl

FIXTURE = Path(__file__).parent.parent / "fixtures" / "corpus_1"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A copy, with the paths in its blend as version 0.1 wrote them: absolute."""
    folder = shutil.copytree(FIXTURE, tmp_path / "corpus_1")
    blend = folder / "data" / "corpus_1.yaml"
    blend.write_text(blend.read_text().replace("/somewhere/corpus_1", str(folder)))
    return folder


def test_it_trains_and_is_inspected(corpus, tmp_path) -> None:
    model = [override for override in runs.TINY if override != "data=tiny"]
    model += [
        "data=corpus_1",
        "model.vocab_size=400",
        "train.max_steps=2",
        "schedule.warmup_steps=0",
        "checkpoint.every=0",
    ]
    assert train(compose_run(["--config-dir", str(corpus), *model, f"run.dir={tmp_path / 'run'}"])) == 0
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == [1, 2]
    config = compose_config("inspect", InspectConfig, ["--config-dir", str(corpus), "data=corpus_1", "picture="])
    output = io.StringIO()
    inspect(config, Console(file=output, width=200))
    for name in ("english", "code"):
        sidecar = json.loads((corpus / f"{name}.json").read_text())
        assert read_sidecar(corpus / name).licenses == sidecar["licences"]  # the old key
        assert f"{sidecar['tokens']:,}" in output.getvalue()


def test_its_recipe_is_answered_with_the_new_keys(corpus) -> None:
    with pytest.raises(ConfigError, match=r"corpus_1\.yaml: data_recipe\.\S+ is now data_recipe\.\S+"):
        compose_config("prepare", PrepareConfig, ["--config-dir", str(corpus), "data_recipe=corpus_1"])


def test_the_same_recipe_replaces_it_and_nothing_else(corpus, make_recipe, tmp_path) -> None:
    other = make_recipe(output=str(corpus))
    with pytest.raises(ValueError, match="holds the corpus of recipe corpus_1, not of test"):
        run(other)
    columns = Columns(language="lang", license="license")
    write_jsonl(tmp_path / "english.jsonl", [{"text": article(i), "lang": "en", "license": "CC0"} for i in range(60)])
    write_jsonl(tmp_path / "code.jsonl", [{"text": program(i), "lang": "python", "license": "MIT"} for i in range(30)])
    recipe = make_recipe(name="corpus_1", output=str(corpus))
    recipe.sources = {
        "english": SourceConfig(path=str(tmp_path / "english.jsonl"), language="en", columns=columns),
        "code": SourceConfig(path=str(tmp_path / "code.jsonl"), group="code", kind="code", columns=columns),
    }
    recipe.tokenize.held_out = 0
    run(recipe)
    assert (corpus / "data_recipe" / "corpus_1.yaml").exists()  # added by hand
    assert not (corpus / "english.validation.bin").exists()
    assert "licenses" in json.loads((corpus / "english.json").read_text())
