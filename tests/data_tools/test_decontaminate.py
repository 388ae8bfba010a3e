from __future__ import annotations

import random

import pytest

from data_tools.recipe import DecontaminateConfig
from data_tools.stages.decontaminate import Evaluations
from tests.data_tools.texts import WORDS, write_jsonl


def words(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    return [generator.choice(WORDS) + str(generator.randrange(100)) for _ in range(count)]


def evaluations(tmp_path, texts: list[str], **changes) -> Evaluations:
    path = write_jsonl(tmp_path / "quiz.jsonl", [{"text": text} for text in texts])
    return Evaluations(DecontaminateConfig(files={"quiz": str(path)}, **changes))


def test_shared_runs_are_found_in_any_form(tmp_path) -> None:
    question = words(0, 40)
    found = evaluations(tmp_path, [" ".join(question)])
    before, after = words(1, 50), words(2, 50)
    assert found.hits(" ".join(before + question[5:18] + after)) == {"quiz": 1}  # thirteen words
    assert found.hits(" ".join(before + question[5:17] + after)) == {}  # twelve
    shouted = ",\n".join(question[5:25]).upper()
    assert found.hits(" ".join(before) + " " + shouted) == {"quiz": 8}
    assert found.hits(" ".join(before)) == {}
    assert found.hits("") == {}


def test_short_evaluation_texts_are_found_whole(tmp_path) -> None:
    question = words(3, 8)
    found = evaluations(tmp_path, [" ".join(question), "yes", "too short to tell"])
    assert found.hits(" ".join(words(4, 9) + question + words(5, 3))) == {"quiz": 1}
    assert found.hits(" ".join(question[:7])) == {}
    assert found.hits("yes it is too short to tell yes") == {}


def test_max_hits(tmp_path) -> None:
    question = words(6, 30)
    found = evaluations(tmp_path, [" ".join(question)], max_hits=3)
    assert found.hits(" ".join(question[:15])) == {}  # three runs of thirteen
    assert found.hits(" ".join(question[:16])) == {"quiz": 4}


def test_a_wrong_file_is_told(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"decontaminate.files.quiz: .*quiz\.jsonl:1 has no text in column 'question'"):
        evaluations(tmp_path, ["x"], column="question")
    with pytest.raises(ValueError, match=r"decontaminate.files.none=.* does not exist"):
        Evaluations(DecontaminateConfig(files={"none": str(tmp_path / "none.jsonl")}))
