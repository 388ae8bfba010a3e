"""The recipes in `configs/`: what they compose to, and the shares that a run would really see."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from data_tools.inspect import InspectConfig
from data_tools.prepare import PrepareConfig
from data_tools.recipe import SourceConfig
from data_tools.starter_blend import data_yaml, left_out
from megatron_lite.config.compose import compose_config, config_dir
from megatron_lite.config.errors import ConfigError
from megatron_lite.data.config import DataConfig
from megatron_lite.data.phases import phase_shares, resolve

RECIPES = sorted(path.stem for path in (config_dir() / "data_recipe").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("executor", ["local", "slurm", "ray"])
def test_every_recipe_composes_and_is_valid(name: str, executor: str) -> None:
    overrides = [f"data_recipe={name}", f"executor={executor}"]
    if name == "local_jsonl":
        overrides.append("data_recipe.sources.text.path=x.jsonl")
    config = compose_config("prepare", PrepareConfig, overrides)
    config.data_recipe.validate()
    assert config.executor.kind == executor
    assert config.data_recipe.output == f"data/corpora/{config.data_recipe.name}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data_recipe.near.threshold=0.2", r"data_recipe.near.threshold=0.2 .*0.5 to 1"),
        (
            "data_recipe.sources.english.kind=poem",
            r"data_recipe.sources.english.kind=poem .*prose or code",
        ),
        ("data_recipe.sources.english.dataset='{tongue}'", r"only \{source\}, \{group\} and \{language\} are replaced"),
        (
            "+data_recipe.filter.languages.ja.min_word=3",
            r"filter.languages.ja .*min_word",
        ),
        ("data_recipe.read.on_damaged_file=cry", r"read.on_damaged_file=cry .*stop or keep_rows"),
        ("data_recipe.tokenizer.vocab_size=-4", r"data_recipe\.tokenizer\.vocab_size=-4 .*at least 257"),
        ("data_recipe.tokenize.merge_bytes=0", r"data_recipe\.tokenize\.merge_bytes=0 .*at least 1"),
    ],
)
def test_wrong_values_are_named(override: str, message: str) -> None:
    config = compose_config("prepare", PrepareConfig, ["data_recipe=three_groups", override])
    with pytest.raises(ValueError, match=message):
        config.data_recipe.validate()


def test_wrong_keys_are_named() -> None:
    with pytest.raises(ConfigError, match="nearr"):
        compose_config("prepare", PrepareConfig, ["data_recipe=three_groups", "data_recipe.nearr.threshold=1"])
    recipe = compose_config("prepare", PrepareConfig, ["data_recipe=three_groups"]).data_recipe
    sources = [("a b", {}), ("a" * 101, {}), ("text", {"group": "a/b"}), ("text", {"group": ""})]
    for name, changes in sources:
        recipe.sources = {name: SourceConfig(path="x", **changes)}
        with pytest.raises(ValueError, match=r"data_recipe\.sources\."):
            recipe.validate()


def blend(name: str) -> DataConfig:
    config = compose_config("inspect", InspectConfig, [f"data={name}"]).data
    config.validate()
    return config


def by_group(shares: dict) -> dict[str, float]:
    total: dict[str, float] = {}
    for name, share in shares.items():
        group = name.split("/")[0]
        total[group] = total.get(group, 0.0) + float(share)
    return total


def test_nemotron4_blend_is_the_papers() -> None:
    config = blend("nemotron4_blend")
    tokens = {name: 1000 * (i + 1) ** 2 for i, name in enumerate(config.sources())}
    (segment,) = resolve(config, tokens, total_samples=1000).segments
    assert by_group(segment.shares) == pytest.approx({"english": 0.70, "multilingual": 0.15, "code": 0.15})
    # tokens^0.5 inside the multilingual group: four times the text is drawn twice as often.
    languages = {name: float(share) for name, share in segment.shares.items() if name.startswith("multilingual/")}
    roots = {name: tokens[name] ** 0.5 for name in languages}
    assert languages == pytest.approx(
        {name: 0.15 * root / sum(roots.values()) for name, root in roots.items()}, abs=1e-8
    )


def test_nano2_changes_at_60_and_90_percent() -> None:
    config = blend("nano2_phases")
    phases = resolve(config, dict.fromkeys(config.sources(), 1000), total_samples=10_000)
    assert [segment.start for segment in phases.segments] == [0, 6_000, 9_000]
    python = [float(segment.shares["code/python"]) for segment in phases.segments]
    assert python == sorted(python)
    assert by_group(phases.segments[0].shares) == pytest.approx({"english": 0.70, "multilingual": 0.15, "code": 0.15})


def test_continued_training_is_the_last_ninth_in_two_distributions() -> None:
    config = blend("nemotron4_continued")
    phases = resolve(config, dict.fromkeys(config.sources(), 1000), total_samples=90_000)
    starts = [segment.start for segment in phases.segments]
    assert len(starts) == 3
    assert starts[1] / 90_000 == pytest.approx(8 / 9, abs=1e-3)  # 1T tokens after 8T
    assert starts[2] - starts[1] > 90_000 - starts[2]  # the first distribution is the larger
    for phase in config.phases:
        assert sum(phase_shares(config, phase, dict.fromkeys(config.sources(), 1)).values()) == 1


def test_the_starter_blend_of_a_corpus(tmp_path: Path) -> None:
    datasets = {
        "en/train": {"group": "english"},
        "en/validation": {"group": "english", "tokens": 5000},
        "de/train": {"group": "multilingual"},
        "de/validation": {"group": "multilingual", "tokens": 200},
        "fr/validation": {"group": "multilingual", "tokens": 9000},
        "poems/train": {"group": "poetry"},
    }
    corpus = tmp_path / "corpus"
    (corpus / "data").mkdir(parents=True)
    (corpus / "data" / "mine.yaml").write_text(data_yaml("mine", datasets))
    corpus = corpus.rename(tmp_path / "moved")
    config = compose_config("inspect", InspectConfig, ["--config-dir", str(corpus), "data=mine"]).data
    config.validate()
    assert {name: group.weight for name, group in config.groups.items()} == {
        "english": 0.7,
        "multilingual": 0.15,
        "poetry": 0.1,
    }
    assert config.groups["multilingual"].alpha == 0.5
    assert config.groups["english"].sources["en"].validation == str(corpus / "en.validation")
    assert config.tokenizer == str(corpus / "tokenizer")
    assert list(config.groups["multilingual"].sources) == ["de"]
    assert config.groups["multilingual"].sources["de"].validation is None  # shorter than a window
    (tmp_path / "data").mkdir()
    copy = tmp_path / "data" / "mine.yaml"  # elsewhere, with the corpus's path written into one line
    copy.write_text((corpus / "data" / "mine.yaml").read_text().replace("${config_dir:}", str(corpus)))
    assert compose_config("inspect", InspectConfig, [f"--config-dir={tmp_path}", "data=mine"]).data == config
    said = {line.split(":")[0]: line for line in left_out(datasets)}
    assert set(said) == {"de", "fr", "poems"}
    assert "200 held-out tokens" in said["de"]
    assert "all its documents are held out" in said["fr"]
    assert "no document was held out" in said["poems"]
    with pytest.raises(ConfigError, match="nowhere"):
        compose_config("inspect", InspectConfig, ["--config-dir", str(tmp_path / "nowhere"), "data=mine"])


def test_a_folder_relative_blend_needs_a_config_dir() -> None:
    with pytest.raises(ConfigError, match="--config-dir"):
        compose_config("inspect", InspectConfig, ["data=sample", "data.folder='${config_dir:}'"])


def test_the_blends_read_what_the_recipe_writes() -> None:
    """`nemotron4_blend` names files that `three_groups` can give: its datasets are named after languages."""
    recipe = compose_config("prepare", PrepareConfig, ["data_recipe=three_groups"]).data_recipe
    templates = {source.group: source.dataset for source in recipe.sources.values()}
    assert templates == {"english": "{source}", "multilingual": "{language}", "code": "code_{language}"}
    raw = OmegaConf.to_container(OmegaConf.load(config_dir() / "data" / "nemotron4_blend.yaml"), resolve=False)
    for group, members in raw["groups"].items():
        for name, source in members["sources"].items():
            expected = templates[group].format(source=name, language=name)
            assert source["path"].endswith(f"/{expected}")
            assert source["validation"].endswith(f"/{expected}.validation")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tokenise.held_out", "tokenize.held_out"),
        ("normalise.mask_pii", "normalize.mask_pii"),
        ("normalise.strip_licence_headers", "normalize.strip_license_headers"),
        ("normalize.strip_licence_headers", "normalize.strip_license_headers"),
        ("filter.prose.max_licence_share", "filter.prose.max_license_share"),
        ("sources.text.licence", "sources.text.license"),
        ("sources.text.columns.licence", "sources.text.columns.license"),
    ],
)
def test_an_old_key_of_a_recipe_is_answered_with_the_new_one(tmp_path, old, new):
    typed = ["data_recipe=local_jsonl", f"data_recipe.{old}=0.1"]
    with pytest.raises(ConfigError, match=rf"^data_recipe\.{old} is now data_recipe\.{new}$"):
        compose_config("prepare", PrepareConfig, typed)
    content: dict = {"defaults": ["local_jsonl", "_self_"]}
    *path, last = old.split(".")
    section = content
    for part in path:
        section = section.setdefault(part, {})
    section[last] = 0.1
    (tmp_path / "data_recipe").mkdir()
    (tmp_path / "data_recipe" / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"data_recipe/mine\.yaml: data_recipe\.\S+ is now data_recipe\.\S+") as error:
        compose_config("prepare", PrepareConfig, ["--config-dir", str(tmp_path), "data_recipe=mine"])
    answer = str(error.value).rsplit(" is now ", 1)[1]
    assert f"data_recipe.{new}".startswith(answer)  # of a renamed section, the section is named
