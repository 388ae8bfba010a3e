"""Texts that pass the filters, and JSON lines."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = (  # noqa: SIM905
    "river stone morning letter garden winter travel window summer market silver branch answer number friend music bridge castle "
    "dinner engine forest gentle harbour island jacket kitchen ladder mirror needle orange pocket quiet ribbon school table umbrella "
    "valley walnut yellow zebra autumn butter candle danger eleven father ginger hammer"
).split()


def sentence(generator: random.Random, words: int = 12) -> str:
    """Words that pass the prose filters: with stop words, ended by a full stop."""
    chosen = [generator.choice(WORDS) for _ in range(words)]
    for function in ("the", "of", "and"):
        chosen.insert(generator.randrange(1, len(chosen)), function)
    return " ".join(chosen).capitalize() + "."


def article(seed: int, sentences: int = 8) -> str:
    """A text of `sentences` different sentences."""
    generator = random.Random(seed)
    return "\n".join(sentence(generator) for _ in range(sentences))


def program(seed: int) -> str:
    """A little Python file."""
    generator = random.Random(seed)
    names = [f"{generator.choice(WORDS)}_{i}" for i in range(6)]
    return "\n".join(
        f"def {name}(value):\n    result = value + {i}\n    return result\n" for i, name in enumerate(names)
    )


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """`rows` as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
