"""Does a model find a key in a sequence eight times as long as those it was trained on, after a short extension on 4 ranks?

    python -m benchmarks.retrieval                        # about 45 minutes on 2 quiet cores (estimated)
    python -m benchmarks.retrieval --size small           # one seed, shorter: for a look

A tiny hybrid of Mamba-2 and attention with rotary positions is trained on sequences of 256 tokens (`short`). `extended` goes on from it
with sequences of 2,048 tokens, divided over 4 ranks by `parallel.cp=4`, and an eight times larger rotary base. 1k and 8k tokens, as one
would do it on a GPU, cannot be trained on two cores within two hours.

The data is the sample corpus, with lines of three words between its text (`benchmarks/retrieval_data.py`); questions ask for the third
word of a line that stands at one of four depths, among 15 others. The keys of questions are in no training document. An answer counts if
it is the most likely of all tokens. Two claims are checked, and either can fail, with the mean over the depths, for every seed:
  - extended, the model answers at least 90 % at 2,048 tokens;
  - without the extension it answers less than 20 % there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.arms import Arm, Study
from benchmarks.retrieval_data import Material, material, write
from benchmarks.summary import Options, interval, markdown, options_of, run_demo, write_summary
from megatron_lite import load
from megatron_lite.atomic import whole_file, whole_folder
from megatron_lite.data.sample.corpus import prepare, sources
from megatron_lite.data.sidecar import TokenizerIdentity
from megatron_lite.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from megatron_lite.models.decoder import Decoder
from megatron_lite.tracking.plot import COLORS

VOCABULARY = 1024  # so that the head is not most of the work
DEPTHS = (0.1, 0.35, 0.6, 0.85)  # at 2,048 tokens, the nearest is still farther away than 256
FOUND, LOST = 0.9, 0.2
ROPE_BASE = 1000.0
MODEL = (
    "model=nano2_tiny",
    "model.pattern=M*M*",
    "model.hidden_size=64",
    "model.tie_embeddings=true",
    "model.attention.heads=2",
    "model.attention.kv_heads=2",
    "model.attention.head_dim=32",
    "model.rope.fraction=1.0",
    "model.mamba.heads=2",
    "model.mamba.groups=1",
    "model.init_std=0.05",
    "model.scaled_output_init=false",
)


@dataclass(frozen=True)
class Stage:
    """A training. ranks: that a sequence is divided over. samples: of a batch."""

    length: int
    steps: int
    samples: int
    lr: float
    ranks: int = 1


@dataclass(frozen=True)
class Size:
    """words: of each of the three kinds. lines: at most in a training document. others: lines beside the asked one.

    corpus: the share of the sample corpus that is read.
    """

    short: Stage
    long: Stage
    seeds: tuple[int, ...] = (0, 1, 2)
    questions: int = 200  # at each depth
    words: int = 16
    lines: int = 63
    others: int = 15
    corpus: float = 0.2


SIZES = {
    "full": Size(Stage(256, 2500, 8, 4e-3), Stage(2048, 250, 2, 2e-3, ranks=4)),
    "small": Size(Stage(256, 1200, 8, 4e-3), Stage(1024, 100, 4, 2e-3, ranks=4), seeds=(0,), questions=50),
    "tiny": Size(
        Stage(32, 2, 2, 4e-3),
        Stage(64, 2, 2, 2e-3, ranks=2),
        seeds=(0,),
        questions=4,
        words=4,
        lines=5,
        others=2,
        corpus=0.03,
    ),
}


@dataclass(frozen=True)
class Data:
    """The training files, in a folder for `--config-dir`, and what questions are made of."""

    folder: Path
    material: Material

    def words(self, stage: str) -> list[str]:
        """The overrides with which a run reads the documents of a stage."""
        return ["--config-dir", str(self.folder), f"data={stage}"]


def data_of(options: Options, size: Size) -> Data:
    """The files below `options.folder`, made if they are not there yet."""
    corpus = prepare(options.folder / "corpus", vocab_size=VOCABULARY, scale=size.corpus, report=print)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    prefixes = [str(source.train) for source in sources(corpus) if source.group == "english"]
    made = Data(options.folder / "data", material(prefixes, tokenizer, words=size.words))
    identity = TokenizerIdentity(fingerprint(tokenizer), "sample", tokenizer.eos_token_id, vocabulary_size(tokenizer))
    if not made.folder.exists():
        with whole_folder(made.folder) as temporary:
            (temporary / "data").mkdir()
            for name, stage in (("short", size.short), ("long", size.long)):
                draw = np.random.default_rng(stage.length)
                count = stage.steps * stage.samples + 1  # a window also reads the token behind it
                write(
                    temporary / name,
                    (made.material.document(draw, stage.length, lines=size.lines) for _ in range(count)),
                    identity,
                )
                config = {
                    "tokenizer": str(corpus / "tokenizer"),
                    "seq_len": stage.length,
                    "groups": {"lines": {"sources": {"lines": {"path": f"${{config_dir:}}/{name}"}}}},
                }
                (temporary / "data" / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the data, train, ask, print."""
    options = options_of(__doc__, name="retrieval", arguments=arguments)
    size = SIZES[options.size]
    data = data_of(options, size)
    models = trained(options, size, data)
    rows = {
        (arm, length): [accuracies(folder, data.material, size, length) for folder in folders]
        for arm, folders in models.items()
        for length in (size.short.length, size.long.length)
    }
    draw_depths(options.folder / "retrieval.png", rows)
    columns = ("training", "asked at", *(f"depth {depth:.0%}" for depth in DEPTHS), "all depths", "every seed")
    cells = [
        [
            arm,
            f"{length:,}",
            *(f"{np.mean(shares):.1%}" for shares in np.transpose(found)),
            interval(np.mean(found, axis=1).tolist()).text(".1f", scale=100),
            ", ".join(f"{np.mean(shares):.1%}" for shares in found),
        ]
        for (arm, length), found in rows.items()
    ]
    claims = {
        f"at least {FOUND:.0%} at {size.long.length:,}": bool(
            np.mean(rows["extended", size.long.length], axis=1).min() >= FOUND
        ),
        f"under {LOST:.0%} without the extension": bool(np.mean(rows["short", size.long.length], axis=1).max() < LOST),
    }
    text = (
        f"Share of {size.questions} questions at each depth that are answered, {len(size.seeds)} seeds; trained on "
        f"{tokens(size.short):,} tokens in sequences of {size.short.length:,}, extended with {tokens(size.long):,} in sequences of "
        f"{size.long.length:,} on {size.long.ranks} ranks (cp {size.long.ranks})\n\n{markdown(columns, cells)}\n"
        + "".join(f"{claim}, every seed: {'yes' if holds else 'no'}\n" for claim, holds in claims.items())
    )
    numbers = {f"{arm} at {length}": found for (arm, length), found in rows.items()}
    write_summary(options, "retrieval", text=text, data={"depths": DEPTHS, "claims": claims, "accuracy": numbers})


def tokens(stage: Stage) -> int:
    """That a training reads."""
    return stage.steps * stage.samples * stage.length


def trained(options: Options, size: Size, data: Data) -> dict[str, list[Path]]:
    """The run directories of `short` and `extended`, one for each seed."""
    model = [*MODEL, f"model.vocab_size={VOCABULARY}"]
    short = Arm("short", (*data.words("short"), *model, *stage_words(size.short, base=ROPE_BASE)))
    stretched = ROPE_BASE * size.long.length / size.short.length
    start = f"init_from={options.folder}/short/seed_{{seed}}"
    extended = Arm("extended", (*data.words("long"), *model, *stage_words(size.long, base=stretched), start))
    runs = Study(options.folder, jobs=options.jobs).run([short.extended(*options.overrides)], size.seeds)
    # the ranks of one run keep all cores busy
    runs |= Study(options.folder, ranks=size.long.ranks).run([extended.extended(*options.overrides)], size.seeds)
    return {arm: [result.directory for result in results] for arm, results in runs.items()}


def stage_words(stage: Stage, *, base: float) -> list[str]:
    """The overrides of a stage."""
    return [
        f"model.max_seq_len={stage.length}",
        f"model.rope.base={base:g}",
        f"data.seq_len={stage.length}",
        f"parallel.cp={stage.ranks}",
        f"train.max_steps={stage.steps}",
        f"train.global_batch_size={stage.samples}",
        f"train.micro_batch_size={stage.samples}",
        f"optim.lr={stage.lr:g}",
        "schedule=wsd",
        "schedule.decay_fraction=0.4",
        f"schedule.warmup_steps={min(20, stage.steps // 2)}",
        "train.eval_every=0",
        f"checkpoint.every={max(1, stage.steps // 2)}",
        "checkpoint.keep=1",
    ]


def accuracies(folder: Path, made_of: Material, size: Size, length: int) -> list[float]:
    """The share of right answers at each depth, of the model of a run at a length."""
    decoder: Any = load(folder)[0].eval()
    found = []
    for number, depth in enumerate(DEPTHS):
        draw = np.random.default_rng((length, number))
        keys = made_of.keys[1][draw.integers(0, len(made_of.keys[1]), size.questions)]
        asked = [made_of.question(draw, length, key=key, depth=depth, others=size.others) for key in keys]
        found.append(share_right(decoder, np.stack([tokens for tokens, _ in asked]), [value for _, value in asked]))
    return found


@torch.inference_mode()
def share_right(decoder: Decoder, questions: np.ndarray, values: Sequence[int], *, batch: int = 10) -> float:
    """Of questions (n, T): how often the value is the most likely token."""
    right = 0
    for start in range(0, len(questions), batch):
        last_BD = decoder.hidden(torch.from_numpy(questions[start : start + batch]))[:, -1]
        right += int((decoder.logits(last_BD).argmax(-1) == torch.tensor(values[start : start + batch])).sum())
    return right / len(questions)


def draw_depths(path: Path, rows: dict[tuple[str, int], list[list[float]]]) -> None:
    """A PNG of the share of right answers over the depth: the mean over the seeds, with a band from the least to the largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5), layout="constrained")
    axes = figure.subplots()
    for i, ((arm, length), found) in enumerate(rows.items()):
        axes.plot(DEPTHS, np.mean(found, axis=0), "o-", color=COLORS[i], label=f"{arm}, asked at {length:,} tokens")
        axes.fill_between(DEPTHS, np.min(found, axis=0), np.max(found, axis=0), color=COLORS[i], alpha=0.15)
    axes.set(xlabel="depth of the key (0: at the start)", ylabel="right answers", ylim=(0, 1.02), xticks=DEPTHS)
    axes.grid(alpha=0.4)
    axes.legend(frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


if __name__ == "__main__":
    run_demo(main)
