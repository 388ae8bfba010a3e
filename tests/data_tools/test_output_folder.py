"""The output folder: only what `mlite prepare` wrote is replaced or removed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.output_folder import open_output
from data_tools.recipe import RecipeConfig, SourceConfig
from tests.data_tools.conftest import run, shown
from tests.data_tools.texts import article, write_jsonl


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_the_user_is_refused_and_left_as_it_is(make_recipe, tmp_path) -> None:
    mine = tmp_path / "mine"
    source = write_jsonl(mine / "wiki.json", [{"text": article(i)} for i in range(3)])
    for name in (
        "data/raw/notes.txt",
        "package.json",
        "corpus.json",
        "recipe.json",
        "older.bin",
        "older.idx",
        "work/x",
        ".lock",
    ):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text('{"theirs": true}')
    before = contents(mine)
    recipe = make_recipe(output=str(mine), sources={"text": SourceConfig(path=str(source))})
    with pytest.raises(ValueError, match=r"data_recipe\.output=.*mine.*data"):
        run(recipe)
    assert contents(mine) == before
    with pytest.raises(ValueError, match=r"package\.json is a file"):
        run(replace(recipe, output=str(mine / "package.json")))


@pytest.fixture
def published(tmp_path) -> tuple[Path, RecipeConfig]:
    """A folder with the corpus of recipe `a` of one source, as far as ownership goes."""
    recipe = RecipeConfig(name="a", sources={"text": SourceConfig(path="texts")})
    output = open_output(tmp_path / "out", recipe, replace=False)
    output.reserve({"corpus.json"})
    (tmp_path / "out" / "corpus.json").write_text("{}")
    return tmp_path / "out", recipe


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "b"}, "recipe a, not of b"),
        ({"sources": {"text": SourceConfig(path="others")}}, r"source text was .*texts, here it is .*others"),
        ({"sources": {"more": SourceConfig(path="texts")}}, "source text was .*texts, this recipe has no such source"),
    ],
)
def test_another_recipe_replaces_a_corpus_only_when_it_is_told_to(published, change, named: str) -> None:
    folder, recipe = published
    other = replace(recipe, **change)
    with pytest.raises(ValueError, match=f"{named}.*data_recipe.output.*replace=true"):
        open_output(folder, other, replace=False)
    assert open_output(folder, other, replace=True).files == {"corpus.json"}


def test_a_changed_or_extended_recipe_goes_on_in_its_folder(published) -> None:
    folder, recipe = published
    more = {**recipe.sources, "more": SourceConfig(path="more")}
    assert open_output(folder, replace(recipe, seed=9, sources=more), replace=False).files == {"corpus.json"}


def test_the_same_words_in_another_folder_are_another_source(published, tmp_path, monkeypatch) -> None:
    folder, recipe = published
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"source text was .*texts, here it is .*elsewhere/texts"):
        open_output(folder, recipe, replace=False)


def test_until_something_is_published_the_recipe_may_be_another(tmp_path) -> None:
    recipe = RecipeConfig(name="a", sources={"text": SourceConfig(path="a typo")})
    open_output(tmp_path, recipe, replace=False).claim()
    open_output(tmp_path, replace(recipe, sources={"text": SourceConfig(path="texts")}), replace=False)


@pytest.mark.slow
def test_files_of_the_user_in_a_corpus_stay(copied, tmp_path) -> None:
    corpus = Path(copied.output)
    for name in ("notes.txt", "mine.bin", "mine.idx", "data/mine.yaml", "tokenizer/notes.txt", "work/mine/x"):
        (corpus / name).parent.mkdir(exist_ok=True)
        (corpus / name).write_text("mine")
    blend = corpus / "data" / "test.yaml"
    blend.write_text(blend.read_text() + "phases: []\n")
    (corpus / "work" / "read-00000000").symlink_to(tmp_path)
    mine = {name: content for name, content in contents(corpus).items() if content == b"mine"}
    edited = blend.read_bytes()
    (corpus / ".prose.bin.tmp-1").write_text("of a killed run")
    copied.sources = {"prose": copied.sources["prose"]}
    with pytest.raises(ValueError, match="source code"):
        run(copied)
    output = shown(copied, replace=True, keep_work=False)
    assert "test_new.yaml" in output
    assert not (corpus / ".prose.bin.tmp-1").exists()
    assert not list(corpus.glob("code*"))  # of the source that the recipe no longer has
    after = contents(corpus)
    assert mine.items() <= after.items()
    assert after["data/test.yaml"] == edited
    assert set(json.loads(after["recipe.json"])["files"]) <= set(after)
    assert sorted(path.name for path in (corpus / "work").iterdir()) == ["mine", "read-00000000"]


def test_a_file_of_the_user_with_a_name_that_is_needed(copied) -> None:
    corpus = Path(copied.output)
    copied.tokenize = replace(copied.tokenize, min_documents=40)  # code becomes code_small
    (corpus / "code_small.bin").write_text("mine")
    before = contents(corpus)
    with pytest.raises(ValueError, match=r"code_small\.bin was not written by"):
        run(copied)
    after = contents(corpus)
    assert {name: after[name] for name in before if not name.startswith((".lock", "work"))} == {
        name: content for name, content in before.items() if not name.startswith((".lock", "work"))
    }
