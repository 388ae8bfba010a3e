"""Keeps track of the files in the output folder that `prepare` wrote. No other file is replaced or removed.

`<output>/recipe.json` is written before anything else. It names the recipe, its sources and every published file, so that a folder
of the user's, a corpus of another recipe and a file added by hand are recognized.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_tools.recipe import RecipeConfig
from megatron_lite.atomic import read_json, write_json, write_text

MARKER = "recipe.json"
CORPUS = "corpus.json"
_STEP_FOLDER = re.compile(r"[a-z_]+-[0-9a-f]{8}")


@dataclass
class OutputFolder:
    """The output folder of a recipe, and what is published there.

    `recipe`, `sources`: of which corpus; `files`: every published file, relative; `blend`: hash of the blend as it was written.
    """

    path: Path
    recipe: str
    sources: dict[str, str]
    files: set[str]
    blend: str = ""

    def save(self) -> None:
        """Write `recipe.json`."""
        content = {"format": 1, "recipe": self.recipe, "sources": self.sources, "files": sorted(self.files)}
        write_json(self.path / MARKER, {**content, "blend": self.blend})

    def claim(self) -> None:
        """Mark the folder as ours."""
        if not (self.path / MARKER).exists():
            self.save()

    def reserve(self, names: Iterable[str]) -> None:
        """Record `names` as ours before they are written, so that a killed run is recognized.

        Raises:
            ValueError: a file of that name exists and was not published by `prepare`.
        """
        names = set(names)
        foreign = sorted(name for name in names - self.files if (self.path / name).exists())
        if foreign:
            raise ValueError(
                f"{self.path / foreign[0]} was not written by `mlite prepare`, which needs this name; move the file away and run "
                "the same command again: finished stages are not repeated"
            )
        self.files |= names
        self.save()

    def keep_only(self, names: Iterable[str]) -> None:
        """Remove the published files that are not among `names`, and leftovers of a run that was killed while publishing."""
        names = set(names)
        for name in self.files:
            path = self.path / name
            for leftover in path.parent.glob(f".{path.name}.tmp-*"):
                leftover.unlink()
            if name not in names:
                path.unlink(missing_ok=True)
        self.files = names
        self.save()

    def write_blend(self, name: str, text: str) -> None:
        """Write the starter blend and remember what was written."""
        write_text(self.path / name, text)
        self.blend = _hash(text.encode())
        self.save()

    def release_edited_blend(self) -> None:
        """A blend that was edited since it was written belongs to the user: it is no longer ours to replace or remove."""
        for name in [name for name in self.files if name.startswith("data/")]:
            path = self.path / name
            if self.blend and path.exists() and _hash(path.read_bytes()) != self.blend:
                self.files.discard(name)

    def remove_work(self) -> None:
        """Remove the stages' folders, and `work/` itself if nothing else is in it."""
        work = self.path / "work"
        for folder in work.iterdir():
            if folder.is_dir() and not folder.is_symlink() and _STEP_FOLDER.fullmatch(folder.name):
                shutil.rmtree(folder)
        if not any(work.iterdir()):
            work.rmdir()


def open_output(path: Path, recipe: RecipeConfig, *, replace: bool) -> OutputFolder:
    """The output folder of `recipe`; only looks, writes nothing.

    Raises:
        ValueError: the folder holds something that `prepare` did not write, or (unless `replace`) the corpus of another recipe.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"data_recipe.output={path} is a file; give a new or empty folder")
    before = _marker(path)
    if before is None:
        if foreign := sorted(_foreign(path)):
            shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise ValueError(
                f"data_recipe.output={path} holds files that `mlite prepare` did not write ({shown}); give a new or empty folder"
            )
        return OutputFolder(path, recipe.name, recipe_sources(recipe), set())
    if before["files"] and not replace:
        _require_same_recipe(path, before, recipe)
    return OutputFolder(path, recipe.name, recipe_sources(recipe), set(before["files"]), before["blend"])


def _hash(content: bytes) -> str:
    return f"{xxhash.xxh3_64_intdigest(content):016x}"


def recipe_sources(recipe: RecipeConfig) -> dict[str, str]:
    """Source -> its absolute path (type=datasets: its name)."""
    return {
        name: source.path if source.type == "datasets" else str(Path(source.path).expanduser().absolute())
        for name, source in recipe.sources.items()
    }


def _require_same_recipe(path: Path, before: dict[str, Any], recipe: RecipeConfig) -> None:
    """A changed or extended recipe replaces its own corpus; one of another name, or without the sources of before, does not."""
    ways_out = "give this one another data_recipe.output, or replace that corpus with replace=true"
    if before["recipe"] != recipe.name:
        raise ValueError(
            f"data_recipe.output={path} holds the corpus of recipe {before['recipe']}, not of {recipe.name}; {ways_out}"
        )
    now = recipe_sources(recipe)
    for name, place in before["sources"].items():
        if now.get(name) != place:
            instead = f"here it is {now[name]}" if name in now else "this recipe has no such source"
            raise ValueError(
                f"data_recipe.output={path} holds a corpus whose source {name} was {place}, {instead}; {ways_out}"
            )


def _marker(path: Path) -> dict[str, Any] | None:
    """The content of `recipe.json`, or what follows from `corpus.json` of a version that wrote no `recipe.json`."""
    for name in (MARKER, CORPUS):
        try:
            content = read_json(path / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path / name} is damaged ({error}), so `mlite prepare` cannot tell which files are its own; give a new or empty "
                "data_recipe.output"
            ) from None
        if name == MARKER and isinstance(content, dict) and content.get("format") == 1:
            return content
        if name == CORPUS and isinstance(content, dict) and {"recipe", "datasets", "tokenizer"} <= set(content):
            return {"recipe": content["recipe"], "sources": {}, "files": list(_old_files(path, content)), "blend": ""}
    return None


def _old_files(path: Path, corpus: dict[str, Any]) -> Iterator[str]:
    """What version 0.1 published."""
    for name in corpus["datasets"]:
        dataset, split = name.rsplit("/", 1)
        prefix = dataset if split == "train" else f"{dataset}.validation"
        yield from (f"{prefix}{suffix}" for suffix in (".bin", ".idx", ".json"))
    yield from (f"tokenizer/{file.name}" for file in (path / "tokenizer").glob("*") if file.is_file())
    yield from ("quarantine.jsonl", "report.json", "report.md", "timing.json", CORPUS)
    yield f"data/{corpus['recipe']}.yaml"


def _foreign(path: Path) -> Iterator[str]:
    """Names in a folder without a marker, except what a run leaves that was killed before it wrote the marker."""
    for entry in path.iterdir() if path.is_dir() else ():
        if entry.name != ".lock" and not entry.name.startswith(f".{MARKER}.tmp-"):
            yield entry.name
