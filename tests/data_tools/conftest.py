"""Small corpora with a known flaw in every stage, and a recipe for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.recipe import Columns, RecipeConfig, SourceConfig
from tests.data_tools.texts import article, program, sentence, write_jsonl


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., RecipeConfig]:
    """`make_recipe(**changes)`: prose and code with duplicates, stubs and a contaminated document; a 400-token tokenizer."""

    def make(**changes: object) -> RecipeConfig:
        raw = tmp_path / "raw"
        prose = [{"text": article(i), "lang": "en", "license": "CC0"} for i in range(60)]
        prose += [{"text": article(3), "lang": "en"}, {"text": article(5).upper(), "lang": "en"}]  # exact duplicates
        prose += [{"text": article(7) + "\n" + sentence(random.Random(99), 3), "lang": "en"}]  # a near duplicate
        prose += [{"text": "Too short.", "lang": "en"}]
        write_jsonl(raw / "prose.jsonl", prose)
        write_jsonl(raw / "code.jsonl", [{"content": program(i), "language": "python"} for i in range(20)])
        recipe = RecipeConfig(name="test", output=str(tmp_path / "corpus"), seed=1)
        recipe.sources = {
            "prose": SourceConfig(
                path=str(raw / "prose.jsonl"), language="en", columns=Columns(language="lang", license="license")
            ),
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

    return make
