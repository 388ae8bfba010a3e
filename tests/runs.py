"""Tiny real runs for tests: a tokenizer, three sources, and `mlite train` in this process."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from megatron_lite.commands import ranks
from megatron_lite.commands import train as training
from megatron_lite.data.indexed import IndexedWriter, best_dtype
from megatron_lite.data.sidecar import Sidecar, write_sidecar
from megatron_lite.data.tokenizer import encode_documents, fingerprint, load_tokenizer, train_tokenizer
from megatron_lite.training.config import compose_run

GROUPS = {"english": ("prose", 0.70), "multilingual": ("other", 0.15), "code": ("program", 0.15)}
WORDS = {
    "prose": "the a model of text reads every word and learns what comes next in it",
    "other": "модель читает текст und lernt das nächste Wort モデル は 文章 を 読む",
    "program": "def return for in if else import class self x y ( ) : = + [ ] \n    ",
}

# A model of about 60,000 parameters; every step takes milliseconds.
TINY = [
    "model=nemotron4_tiny", "model.num_layers=2", "model.hidden_size=32", "model.attention.heads=4", "model.attention.kv_heads=2",
    "model.attention.head_dim=8", "model.mlp.ffn_size=64", "model.vocab_size=384", "data=tiny", "data.seq_len=32", "tracking=none",
    "train.global_batch_size=8", "train.micro_batch_size=4", "train.max_steps=20", "train.threads=1", "optim.lr=1e-2",
    "schedule.warmup_steps=2", "checkpoint.every=4", "checkpoint.keep=3",
]  # fmt: skip

DRAWINGS = ("write_loss_plot", "write_report")


def make_data(folder: Path) -> Path:
    """A folder to be given as `--config-dir`: token files of three sources and `data/tiny.yaml`, which names them."""
    draw = random.Random(0)
    documents = {
        name: [" ".join(draw.choices(words.split(" "), k=draw.randint(3, 60))) for _ in range(160)]
        for name, words in WORDS.items()
    }
    train_tokenizer((text for texts in documents.values() for text in texts), folder / "tokenizer", vocab_size=384)
    tokenizer = load_tokenizer(folder / "tokenizer")
    groups = {}
    for group, (name, weight) in GROUPS.items():
        for part, texts in (("", documents[name][:140]), (".validation", documents[name][140:])):
            write_source(folder / f"{name}{part}", tokenizer, texts)
        prefix = str(folder / name)
        groups[group] = {"weight": weight, "sources": {name: {"path": prefix, "validation": f"{prefix}.validation"}}}
    config = {
        "tokenizer": str(folder / "tokenizer"),
        "reset_attention": True,
        "validation": {"windows": 4},
        "groups": groups,
        "phases": [{"until_fraction": 0.5}, {"weights": {"english": 0.2, "code": 0.8}}],
    }
    (folder / "data").mkdir()
    (folder / "data" / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_source(prefix: Path, tokenizer, texts: list[str]) -> None:
    """Tokenize `texts` to `prefix`.bin, .idx and .json."""
    arrays = list(encode_documents(tokenizer, texts))
    with IndexedWriter(prefix, best_dtype(len(tokenizer))) as writer:
        for array in arrays:
            writer.add_document(array)
    counts = {"documents": len(arrays), "tokens": sum(len(array) for array in arrays)}
    write_sidecar(prefix, Sidecar(fingerprint(tokenizer), "tiny", tokenizer.eos_token_id, len(tokenizer), **counts))


def arguments(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    """The command line of a tiny run."""
    return ["--config-dir", str(data), *TINY, f"run.dir={run_dir}", *overrides]


def run(data: Path, run_dir: Path, *overrides: str, drawn: bool = False) -> int:
    """Train in this process. drawn: with loss.png and report.html, which take longer than the twenty steps."""
    run = compose_run(arguments(data, run_dir, *overrides))
    with nullcontext() if drawn else undrawn():
        return training.train(run)


def undrawn() -> AbstractContextManager[object]:
    """In it `mlite train` in this process draws nothing at its end."""
    return patch.multiple(training, **dict.fromkeys(DRAWINGS, lambda directory: None))


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[pytest.MonkeyPatch]:
    """In it a command is a rank of the pool (`tests.distributed`), whose process group it leaves open, and draws nothing."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "here", "MASTER_PORT": 0}
    with pytest.MonkeyPatch.context() as patch, undrawn():
        for key, value in place.items():
            patch.setenv(key, str(value))
        for module in (training, ranks):
            patch.setattr(module, "stop", lambda: None)
        yield patch


def rows(run_dir: Path) -> list[dict]:
    """The training rows of metrics.jsonl, without those that a rollback dropped."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row and "dropped" not in row]


def curve(run_dir: Path) -> list[tuple]:
    """What must not depend on restarts: step, samples, loss, gradient norm, learning rate."""
    return [(r["step"], r["consumed_samples"], r["loss"], r["grad_norm"], r["lr"]) for r in rows(run_dir)]


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


def digest(checkpoint: Path) -> str:
    """sha256 over the names and bytes of every tensor of a checkpoint."""
    from megatron_lite.checkpoint.opening import load_tensors

    found = hashlib.sha256()
    for name, tensor in load_tensors(checkpoint):
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
