from __future__ import annotations

import random

import numpy as np
import pytest

from data_tools.documents import Corpus, Document, ShardWriter
from data_tools.recipe import NearConfig
from data_tools.stages.exact_dedup import PAIR
from data_tools.stages.near_dedup import CandidateStep, MinHash, NearStep, SignatureStep, decide, similar_pairs
from data_tools.steps import Progress
from megatron_lite.atomic import write_json

VOCABULARY = [f"w{i}" for i in range(5000)]


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(a: str, b: str) -> float:
    left, right = shingles(a), shingles(b)
    return len(left & right) / len(left | right)


def changed(text: str, target: float, generator: random.Random) -> str:
    """`text` with a tail replaced so that the Jaccard similarity of the 5-gram sets is near `target`."""
    words = text.split()
    keep = round(len(words) * 2 * target / (1 + target))
    return " ".join(words[:keep] + [generator.choice(VOCABULARY) for _ in range(len(words) - keep)])


def run(tmp_path, texts: list[str], config: NearConfig, shards: int = 3) -> np.ndarray:
    """All three steps over `texts`; the pairs (dropped, kept)."""
    folder = tmp_path / "normalize"
    for shard, part in enumerate(np.array_split(np.arange(len(texts)), shards)):
        with ShardWriter(folder / f"{shard:05d}.jsonl.zst") as writer:
            for i in part:
                writer.write(Document(texts[i], str(i), "s", "english", "prose", "en", ""))
        write_json(folder / f"{shard:05d}.stats.json", {"documents_out": len(part)})
    corpus = Corpus(folder)
    signatures = SignatureStep("signatures", tmp_path / "signatures", config, corpus)
    candidates = CandidateStep("candidates", tmp_path / "candidates", config, corpus, signatures.folder)
    last = NearStep("near", tmp_path / "near", config, candidates.folder)
    for step in (signatures, candidates, last):
        for rank in range(step.tasks()):
            step.run_task(rank, Progress(None))
    return np.load(last.folder / "pairs-00000.npy")


def test_recall_and_precision_of_planted_duplicates(tmp_path) -> None:
    generator = random.Random(0)
    originals = [" ".join(generator.choice(VOCABULARY) for _ in range(300)) for _ in range(300)]
    near = [changed(text, 0.955, generator) for text in originals[:150]]
    alike = [changed(text, 0.47, generator) for text in originals[150:]]
    assert min(map(jaccard, originals[:150], near)) >= 0.94
    assert 0.4 < min(map(jaccard, originals[150:], alike)) <= max(map(jaccard, originals[150:], alike)) < 0.5
    pairs = {(int(a), int(b)) for a, b in run(tmp_path, originals + near + alike, NearConfig()).tolist()}
    planted = {(300 + i, i) for i in range(150)}
    assert len(pairs & planted) >= 0.99 * len(planted)
    # Every other pair is below J = 0.5: none of them may go, at more than 1 %.
    assert len(pairs - planted) <= 0.01 * len(pairs)


def test_similarity_is_estimated_without_bias() -> None:
    generator = random.Random(1)
    minhash = MinHash(NearConfig(bands=40, rows=10))
    text = " ".join(generator.choice(VOCABULARY) for _ in range(400))
    other = changed(text, 0.6, generator)
    estimate = (minhash.signature(text) == minhash.signature(other)).mean()
    # 400 minima: deviation sqrt(0.6 * 0.4 / 400) = 0.025; four of them
    assert abs(estimate - jaccard(text, other)) < 0.1


def test_scripts_without_spaces_have_near_duplicates_too(tmp_path) -> None:
    text = (
        "春はあけぼの。やうやう白くなりゆく山ぎは、すこしあかりて、紫だちたる雲のほそくたなびきたる。夏は夜。月のころはさらなり。"
        * 2
    )
    other = (
        "秋は夕暮れ。夕日のさして山の端いと近うなりたるに、烏の寝どころへ行くとて、三つ四つ、二つ三つなど飛び急ぐさへあはれなり。"
        * 2
    )
    assert run(tmp_path, [text, other, text + "おわり"], NearConfig()).tolist() == [(2, 0)]


def test_a_document_goes_only_for_one_that_stays() -> None:
    chain = np.array([(1, 0), (2, 1), (3, 2), (9, 5)], PAIR)  # 0 ~ 1 ~ 2 ~ 3, but 0 and 2 are not alike
    assert decide(chain).tolist() == [(1, 0), (3, 2), (9, 5)]


def test_a_bucket_of_copies_is_not_compared_with_itself() -> None:
    signatures = np.zeros((3000, 8), np.uint32)
    pairs = similar_pairs(signatures, np.arange(3000), 0.75)
    assert pairs == [(i, 0) for i in range(1, 3000)]  # 3,000 comparisons, not 4.5 million


@pytest.mark.parametrize("shards", [1, 4])
def test_the_result_does_not_depend_on_the_cut(tmp_path, shards: int) -> None:
    generator = random.Random(2)
    texts = [" ".join(generator.choice(VOCABULARY) for _ in range(80)) for _ in range(20)]
    texts += [changed(text, 0.9, generator) for text in texts[:8]] + [texts[3]]
    whole = run(tmp_path / "a", texts, NearConfig(), shards=2).tolist()
    assert run(tmp_path / "b", texts, NearConfig(), shards=shards).tolist() == whole
    assert {pair[0] for pair in whole} >= {28}
