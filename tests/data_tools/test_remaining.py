"""A stage that leaves nothing says so where it happens, with the reasons; stages can be switched off."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools.documents import is_held_out, read_shard
from data_tools.recipe import SourceConfig
from tests.data_tools.conftest import run, shown
from tests.data_tools.texts import article, write_jsonl

FIRST = ["read", "normalize", "filter"]


@pytest.fixture
def recipe_of(make_recipe, tmp_path):
    """`recipe_of(texts)`: a recipe of one source."""

    def make(texts: list[str]):
        path = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
        recipe = make_recipe(sources={"text": SourceConfig(path=str(path), language="en")})
        recipe.exact.enabled = recipe.near.enabled = False
        return recipe

    return make


def test_everything_filtered(recipe_of, tmp_path) -> None:
    numbers = [" ".join(str(100 + i * n) for n in range(99)) for i in range(2, 7)]
    recipe = recipe_of([*numbers, *(" ".join(article(i).split()[:20]) for i in range(30))])
    says = r"^filter dropped all 35 documents: too_short 30, no_sentences 5 .*data_recipe\.filter\.enabled=false"
    for _ in range(2):  # the second time the stage is finished, and it must not pass for that
        with pytest.raises(ValueError, match=says):
            run(recipe)
    assert not (tmp_path / "corpus" / "corpus.json").exists()
    recipe.filter.enabled = False
    run(recipe, stages=FIRST)


def test_nothing_left_by_normalizing(recipe_of) -> None:
    recipe = recipe_of(["\u200b\n"] * 3)
    # repairs, which drop nothing, are not among the reasons
    says = r"normalize dropped all 3 documents: nothing_left 3 \(for .*normalize\.enabled=false"
    with pytest.raises(ValueError, match=says):
        run(recipe)


def test_what_every_stage_left_is_shown(make_recipe) -> None:
    output = shown(make_recipe(), stages=["read", "normalize", "filter", "exact"])
    assert "84 of 84 documents are left" in output
    assert "83 of 84 documents are left: too_short 1" in output
    assert "2 duplicates are dropped" in output


def test_a_source_of_which_nothing_is_left_is_named(make_recipe, tmp_path) -> None:
    recipe = make_recipe()
    path = write_jsonl(tmp_path / "short.jsonl", [{"text": "Too short."}])
    recipe.sources["short"] = SourceConfig(path=str(path))
    assert "no document of source short is left" in shown(recipe, stages=FIRST)


def test_without_normalizing_texts_stay_as_they_were_read(recipe_of, tmp_path) -> None:
    texts = [article(1).replace("\n", "\r\n") + "\u200b \n", "\u200b"]
    recipe = recipe_of(texts)
    recipe.normalize.enabled = False
    run(recipe, stages=["read", "normalize"])
    (shard,) = Path(tmp_path / "corpus" / "work").glob("normalize-*/*.zst")
    assert [document.text for _, document in read_shard(shard)] == texts
    recipe.normalize.mask_pii = True
    with pytest.raises(ValueError, match=r"normalize\.mask_pii=True.*normalize\.enabled=true"):
        run(recipe)


def test_everything_held_out(recipe_of, finished) -> None:
    class Held:  # is_held_out looks at the text only
        def __init__(self, text: str) -> None:
            self.text = text

    texts = [text for text in map(article, range(20)) if is_held_out(Held(text), 0.45)]  # type: ignore[arg-type]
    recipe = recipe_of(texts)
    recipe.tokenize.held_out = 0.45
    with pytest.raises(ValueError, match=r"no text to train on.*data_recipe\.tokenize\.held_out"):
        run(recipe)
    recipe.tokenizer.path = str(finished / "tokenizer")
    with pytest.raises(ValueError, match=rf"data_recipe\.tokenize\.held_out=0\.45 holds out all {len(texts)}"):
        run(recipe)
