from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.stages.tokenize import ENTRY, merge_sorted, plan_datasets
from data_tools.take_tokenizer import FastTokenizer, take_tokenizer
from megatron_lite.data.config import DataConfig
from megatron_lite.data.tokenizer import encode_documents, load_tokenizer, train_tokenizer, vocabulary_size
from megatron_lite.models.config import ModelConfig
from megatron_lite.training.data import check_vocabulary, open_tokenizer
from tests.data_tools.texts import article, program


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 5)), max_size=8), min_size=1, max_size=4),
    st.integers(1, 200),
)
def test_merging_is_sorting(tmp_path_factory, shards, memory_bytes: int) -> None:
    folder = tmp_path_factory.mktemp("merge")
    every, ordinal = [], 0
    for number, shard in enumerate(shards):
        entries = []
        for key, length in shard:
            entries.append((key, ordinal, length))
            ordinal += 1
        entries.sort()
        texts = [np.full(length, o, np.uint16) for _, o, length in entries]
        np.save(folder / f"{number:05d}.documents.npy", np.array(entries, ENTRY))
        np.save(folder / f"{number:05d}.tokens.npy", np.concatenate([np.empty(0, np.uint16), *texts]))
        every += entries
    found = [(int(text[0]), len(text)) for text in merge_sorted([folder], memory_bytes)]
    assert found == [(o, length) for _, o, length in sorted(every)]


def test_small_datasets_are_put_together(tmp_path) -> None:
    def facts(documents: int, language: str) -> dict:
        counts = {"bytes": 1, "tokens": 2, "documents": documents}
        return {"group": "m", "languages": {language: documents}, "licenses": {"x": documents}, **counts}

    found = {
        "de/train": facts(30, "de"),
        "fo/train": facts(1, "fo"),
        "is/train": facts(2, "is"),
        "is/validation": facts(1, "is"),
    }
    (tmp_path / "00000.datasets.json").write_text(json.dumps(found))
    plan = plan_datasets(tmp_path, 10)
    assert list(plan) == ["de/train", "m_small/train", "m_small/validation"]
    assert plan["m_small/train"]["members"] == ["fo/train", "is/train"]
    assert plan["m_small/train"]["languages"] == {"is": 2, "fo": 1}
    assert list(plan_datasets(tmp_path, 1)) == sorted(found)


TEXTS = [
    "Hello, world 2024!",
    "  two  spaces\tand\n",
    "naïve Привет 你好",
    "def f(x):\n    return x\n",
    "🙂 zażółć",
    "",
]


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text(
        "\n".join(article(i) for i in range(40)) + "\n".join(program(i) for i in range(20))
    )
    for name, kind, extra in (
        (
            "bpe",
            "bpe",
            {"split_digits": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
        ),
        ("unigram", "unigram", {}),
    ):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"), model_prefix=str(folder / name), model_type=kind, vocab_size=380,
            byte_fallback=True, character_coverage=0.99, minloglevel=2, num_threads=1, **extra,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_sentencepiece_models_give_their_own_ids(sentencepiece_models, tmp_path, name: str) -> None:
    import sentencepiece

    path = sentencepiece_models / f"{name}.model"
    take_tokenizer(path, tmp_path)
    ours = load_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in [*TEXTS, *(article(i) for i in range(100, 110)), program(99)]:
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
    assert ours.eos_token_id == theirs.eos_id()


def test_hugging_face_folders_and_files(tmp_path) -> None:
    given_folder = train_tokenizer([article(i) for i in range(50)], tmp_path / "given", vocab_size=400)
    for number, path in enumerate((given_folder, given_folder / "tokenizer.json")):
        target = tmp_path / f"taken{number}"
        target.mkdir()
        take_tokenizer(path, target)
        ids = load_tokenizer(target)("A little text.")["input_ids"]
        assert ids == load_tokenizer(given_folder)("A little text.")["input_ids"]
    with pytest.raises(ValueError, match=r"data_recipe.tokenizer.path=.*nowhere does not exist"):
        take_tokenizer(tmp_path / "nowhere", tmp_path)


def test_ids_with_holes_decide_about_the_dtype(tmp_path) -> None:
    """A tokenizer of 400 entries whose largest id is 70,000: published ones have such holes."""
    folder = train_tokenizer([article(i) for i in range(50)], tmp_path / "holes", vocab_size=400)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    before = vocabulary[last]
    text = "\n".join(article(i) for i in range(50))  # what it was trained on, so the last merge occurs in it
    (expected,) = FastTokenizer(folder).encode([text])
    vocabulary[last] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = FastTokenizer(folder)
    (ids,) = tokenizer.encode([text])
    assert ids.max() == 70_000
    assert ids.tolist() == [70_000 if i == before else i for i in expected.tolist()]
    loaded = load_tokenizer(folder)
    assert (len(loaded), vocabulary_size(loaded)) == (400, 70_001)
    assert [part.tolist() for part in encode_documents(loaded, [text])] == [ids.tolist()]
    with pytest.raises(ValueError, match=r"model\.vocab_size=400 .*70000.*model\.vocab_size=70001"):
        check_vocabulary(ModelConfig(vocab_size=400), open_tokenizer(DataConfig(tokenizer=str(folder))))
