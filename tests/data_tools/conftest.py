"""Small sources with a known flaw for every stage, a recipe for them, and one finished corpus for all tests that only read it."""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from data_tools.prepare import PrepareConfig, prepare
from data_tools.recipe import Columns, DecontaminateConfig, RecipeConfig, SourceConfig
from tests.data_tools.texts import article, program, sentence, write_jsonl


def recipe_in(folder: Path, **changes: object) -> RecipeConfig:
    """Prose and code with duplicates and a stub in `folder/raw`, written to `folder/corpus`; a 400-token tokenizer."""
    raw = folder / "raw"
    prose = [{"text": article(i), "lang": "en", "license": "CC0"} for i in range(60)]
    prose += [{"text": article(3), "lang": "en"}, {"text": article(5).upper(), "lang": "en"}]  # exact duplicates
    prose += [{"text": article(7) + "\n" + sentence(random.Random(99), 3), "lang": "en"}]  # a near duplicate
    prose += [{"text": "Too short.", "lang": "en"}]
    write_jsonl(raw / "prose.jsonl", prose)
    write_jsonl(raw / "code.jsonl", [{"content": program(i), "language": "python"} for i in range(20)])
    recipe = RecipeConfig(name="test", output=str(folder / "corpus"), seed=1)
    columns = Columns(language="lang", license="license")
    recipe.sources = {
        "prose": SourceConfig(path=str(raw / "prose.jsonl"), language="en", columns=columns),
        "code": SourceConfig(
            path=str(raw / "code.jsonl"),
            group="code",
            kind="code",
            columns=Columns(text="content", language="language"),
        ),
    }
    recipe.read.shard_bytes = 8_000
    recipe.tokenizer.vocab_size = 400
    recipe.tokenize.held_out = 0.1
    recipe.normalize.boilerplate_documents = 1000
    for key, value in changes.items():
        setattr(recipe, key, value)
    return recipe


def run(recipe: RecipeConfig, **changes) -> Path:
    """`mlite prepare` in this process, silent."""
    return prepare(PrepareConfig(recipe, **changes), Console(file=io.StringIO()))


def shown(recipe: RecipeConfig, **changes) -> str:
    """What `mlite prepare` prints."""
    output = io.StringIO()
    prepare(PrepareConfig(recipe, **changes), Console(file=output, width=80))
    return output.getvalue()


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., RecipeConfig]:
    """`make_recipe(**changes)`: `recipe_in` a folder of the test's own."""
    return lambda **changes: recipe_in(tmp_path, **changes)


@pytest.fixture(scope="session")
def finished_recipe(tmp_path_factory) -> RecipeConfig:
    """The recipe of a finished corpus, with an evaluation that one document contains. Not to be changed: see `copied`."""
    folder = tmp_path_factory.mktemp("finished")
    evaluation = write_jsonl(folder / "eval.jsonl", [{"text": article(11, 2)}])
    recipe = recipe_in(folder, decontaminate=DecontaminateConfig(files={"quiz": str(evaluation)}))
    run(recipe)
    return recipe


@pytest.fixture
def finished(finished_recipe) -> Path:
    """The finished corpus; only to be read."""
    return Path(finished_recipe.output)


@pytest.fixture
def copied(finished_recipe, tmp_path) -> RecipeConfig:
    """The recipe of a copy of the finished corpus with its work, to be changed and run again."""
    from dataclasses import replace

    shutil.copytree(finished_recipe.output, tmp_path / "copied")
    return replace(finished_recipe, output=str(tmp_path / "copied"))
