"""Does EleutherAI's lm-eval find in an exported folder what we find in the checkpoint?

    pip install -c constraints.txt 'megatron-lite[eval]'
    python -m benchmarks.lm_eval_agreement runs/smoke --documents data/sample/documents --count 50

Exports the checkpoint to a Hugging Face folder, lets lm-eval load it with `transformers`, and compares `loglikelihood_rolling` (the
log-likelihood of a whole text, the end token before it) with the sum of our own log-probabilities, document by document, for held-out
documents that fit into the model's context. Ends with 1 if one of them differs by more than 1e-5 of its value.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_lite
from megatron_lite.commands.convert import ConvertConfig, convert
from megatron_lite.models.decoder import Decoder

BOUND = 1e-5


def main() -> int:
    """Print a row for each document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--documents", type=Path, default=Path("data/sample/documents"))
    parser.add_argument("--count", type=int, default=50)
    arguments = parser.parse_args()
    model, tokenizer = megatron_lite.load(arguments.checkpoint)
    texts = fitting(held_out(arguments.documents), tokenizer, model.config.max_seq_len, arguments.count)
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/hf"
        convert(ConvertConfig(source=arguments.checkpoint, target=target, to="hf"))
        theirs = rolling(target, texts, max_length=model.config.max_seq_len)
    worst = 0.0
    for text, their in zip(texts, theirs, strict=True):
        our = log_likelihood(model, [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
        worst = max(worst, abs(our - their) / abs(our))
        print(f"{our:14.4f} {their:14.4f}  {text[:60]!r}")
    print(f"{len(texts)} documents, largest relative difference {worst:.1e} (at most {BOUND:.0e})")
    return int(worst > BOUND)


def held_out(folder: Path) -> Iterator[str]:
    """The validation documents of a sample corpus, a file after the other."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["split"] == "validation":
                yield row["text"]


def fitting(texts: Iterator[str], tokenizer: Any, length: int, count: int) -> list[str]:
    """The first `count` texts that are one window: shorter than `length` tokens."""
    found = []
    for text in texts:
        if len(text) < 20 * length and 0 < len(tokenizer(text)["input_ids"]) < length:
            found.append(text)
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} documents are shorter than {length} tokens; lower --count")


def rolling(folder: str, texts: list[str], *, max_length: int) -> list[float]:
    """lm-eval's log-likelihood of each text (nats)."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, dtype="float32", device="cpu", max_length=max_length, batch_size=1)
    requests = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
    return [float(value) for value in model.loglikelihood_rolling(requests)]


@torch.no_grad()
def log_likelihood(model: Decoder, tokens: list[int]) -> float:
    """The sum of log p(token | those before it) over all tokens but the first (nats)."""
    tokens_BT = torch.tensor([tokens])
    logits_BTV: Tensor = model(tokens_BT[:, :-1])
    log_p_BTV = logits_BTV.float().log_softmax(-1)
    return float(log_p_BTV.gather(2, tokens_BT[:, 1:, None]).double().sum())


if __name__ == "__main__":
    raise SystemExit(main())
