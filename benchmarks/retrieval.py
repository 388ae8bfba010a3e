"""Does a model find a key in a sequence eight times as long as those it was trained on, after a short extension on 4 ranks?

    python -m benchmarks.retrieval                        # 65 minutes of CPU time
    python -m benchmarks.retrieval --size small           # one seed, 256 and 2,048 tokens: for a look

A tiny hybrid, one Mamba-2 layer and one attention layer with rotary positions, is trained on sequences of 1,024 tokens (`short`).
`extended` goes on from it with sequences of 8,192 tokens, divided over 4 ranks by `parallel.cp=4`, and a larger rotary base. What
the base alone does is a row of its own: the short model's weights, asked with the base of the extended one.

The data is the sample corpus, with lines of three words between its text (`benchmarks/retrieval_data.py`). Questions ask for the third
word of lines at four depths, among 12 other lines. The keys of questions are in no training document. An answer counts if
it is the most likely of all tokens; one of the sequence's values at random would be right 6 % to 8 % of the time. Two claims are
checked, and either can fail, with the mean over the depths, for every seed:
  - extended, the model answers at least 90 % at 8,192 tokens;
  - without the extension it answers less than 20 % there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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

VOCABULARY = 512  # so that the head is not most of the work
DEPTHS = (0.0, 0.25, 0.5, 0.75)  # with 8 times the length, even the nearest is twice as far away as training ever saw
FOUND, LOST = 0.9, 0.2
# The convolution brings a key's two words and the value together, attention compares them.
MODEL = (
    "model=nano2_tiny",
    f"model.vocab_size={VOCABULARY}",
    "model.pattern=M*",
    "model.hidden_size=128",
    "model.tie_embeddings=true",
    "model.attention.heads=4",
    "model.attention.kv_heads=4",
    "model.attention.head_dim=64",
    "model.attention.qk_norm=true",
    "model.rope.fraction=1.0",
    "model.mamba.heads=4",
    "model.mamba.head_dim=32",
    "model.mamba.groups=1",
    "model.mamba.state=4",
    "model.init_std=0.1",
    "model.scaled_output_init=false",
)


@dataclass(frozen=True)
class Stage:
    """A training. samples: of a batch. lines: least and most in a document. base: of the rotary positions.

    ranks: that a sequence is divided over.
    """

    length: int
    steps: int
    samples: int
    lr: float
    lines: tuple[int, int]
    base: float
    ranks: int = 1

    @property
    def tokens(self) -> int:
        """That the training reads."""
        return self.steps * self.samples * self.length


@dataclass(frozen=True)
class Size:
    """words: of each of the three kinds. others: lines beside each asked one.

    corpus: the share of the sample corpus that is read.
    """

    short: Stage
    long: Stage
    seeds: tuple[int, ...] = (0, 1, 2)
    questions: int = 200
    words: int = 16
    others: int = 3
    corpus: float = 0.1


# The base grows as in arXiv 2309.16039: 10,000 to 500,000 for 8 times the length.
SIZES = {
    "full": Size(
        Stage(1024, 600, 16, 7e-3, (128, 252), base=1e4),
        Stage(8192, 60, 2, 3e-3, (128, 2047), base=5e5, ranks=4),
    ),
    "small": Size(
        Stage(256, 800, 16, 7e-3, (32, 63), base=1e3),
        Stage(2048, 60, 2, 3e-3, (32, 511), base=5e4, ranks=4),
        seeds=(0,),
        questions=50,
    ),
    "tiny": Size(
        Stage(32, 2, 2, 7e-3, (2, 5), base=1e3),
        Stage(64, 2, 2, 3e-3, (2, 5), base=5e4, ranks=2),
        seeds=(0,),
        questions=4,
        words=8,
        others=0,
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
                documents = (made.material.document(draw, stage.length, lines=stage.lines) for _ in range(count))
                write(temporary / name, documents, identity)
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
    lengths = (size.short.length, size.long.length)
    rows: dict[tuple[str, int], list[list[float]]] = {}
    for row, decoder in models_of(trained(options, size, data), size):
        for length in lengths:
            rows.setdefault((row, length), []).append(accuracies(decoder, data.material, size, length))
    draw_depths(options.folder / "retrieval.png", rows, length=lengths[1])
    claims = {
        f"at least {FOUND:.0%} at {lengths[1]:,}": bool(np.mean(rows["extended", lengths[1]], axis=1).min() >= FOUND),
        f"under {LOST:.0%} without the extension": bool(np.mean(rows["short", lengths[1]], axis=1).max() < LOST),
    }
    text = (
        f"Share of {size.questions} questions at each depth that are answered, {len(size.seeds)} seeds; trained on "
        f"{size.short.tokens:,} tokens in sequences of {lengths[0]:,}, extended with {size.long.tokens:,} in sequences of "
        f"{lengths[1]:,} on {size.long.ranks} ranks (cp {size.long.ranks})\n\n{table(rows)}\n"
        + "".join(f"{claim}, every seed: {'yes' if holds else 'no'}\n" for claim, holds in claims.items())
    )
    numbers = {f"{arm} at {length}": found for (arm, length), found in rows.items()}
    write_summary(options, "retrieval", text=text, data={"depths": DEPTHS, "claims": claims, "accuracy": numbers})


def table(rows: dict[tuple[str, int], list[list[float]]]) -> str:
    """A row for each model and length, of the shares by seed and depth."""
    columns = ("model", "asked at", *(f"depth {depth:.0%}" for depth in DEPTHS), "all depths", "every seed")
    cells = [
        [
            row,
            f"{length:,}",
            *(f"{np.mean(shares):.1%}" for shares in np.transpose(found)),
            interval(np.mean(found, axis=1).tolist()).text(".1f", scale=100),
            ", ".join(f"{np.mean(shares):.1%}" for shares in found),
        ]
        for (row, length), found in rows.items()
    ]
    return markdown(columns, cells)


def trained(options: Options, size: Size, data: Data) -> dict[str, list[Path]]:
    """The run directories of `short` and `extended`, one for each seed."""
    short = Arm("short", (*data.words("short"), *MODEL, *stage_words(size.short)))
    start = f"init_from={options.folder}/short/seed_{{seed}}"
    extended = Arm("extended", (*data.words("long"), *MODEL, *stage_words(size.long), start))
    runs = Study(options.folder, jobs=options.jobs).run([short.extended(*options.overrides)], size.seeds)
    # the ranks of one run keep all cores busy
    runs |= Study(options.folder, ranks=size.long.ranks).run([extended.extended(*options.overrides)], size.seeds)
    return {arm: [result.directory for result in results] for arm, results in runs.items()}


def stage_words(stage: Stage) -> list[str]:
    """The overrides of a stage."""
    return [
        f"model.max_seq_len={stage.length}",
        f"model.rope.base={stage.base:g}",
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


def models_of(folders: dict[str, list[Path]], size: Size) -> Iterator[tuple[str, Decoder]]:
    """(row of the table, model) for each row and seed: of the runs, and of the short run with the rotary base of the extended one."""
    for arm, of_seeds in folders.items():
        for folder in of_seeds:
            yield arm, load(folder)[0]
    for folder in folders["short"]:
        yield "short, larger base", with_rope_base(load(folder)[0], size.long.base)


def with_rope_base(decoder: Decoder, base: float) -> Decoder:
    """The same weights; positions rotate with another base."""
    config = replace(decoder.config, rope=replace(decoder.config.rope, base=base))
    changed = Decoder(config).eval()
    changed.load_state_dict(decoder.state_dict())
    return changed


@torch.inference_mode()
def accuracies(decoder: Decoder, made_of: Material, size: Size, length: int) -> list[float]:
    """The share of right answers for each depth: `size.questions` questions of `length` tokens, which are the same for every model.

    An answer is right if it is the most likely of all tokens.
    """
    draw = np.random.default_rng(length)
    right = []
    for _ in range(size.questions):
        question = made_of.question(draw, length, asked=len(DEPTHS), others=size.others)
        states_TD = decoder.hidden(torch.from_numpy(question.tokens)[None])[0]
        answers = decoder.logits(states_TD[question.asked_at]).argmax(-1)
        right.append(answers.numpy() == question.values)
    return np.mean(right, axis=0).tolist()


def draw_depths(path: Path, rows: dict[tuple[str, int], list[list[float]]], *, length: int) -> None:
    """A PNG of the share of right answers at a length over the depth: the mean over the seeds, with a band from the least to the
    largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5), layout="constrained")
    axes = figure.subplots()
    shown = {row: found for (row, asked_at), found in rows.items() if asked_at == length}
    for color, (row, found) in zip(COLORS, shown.items()):
        axes.plot(DEPTHS, np.mean(found, axis=0), "o-", color=color, label=row)
        axes.fill_between(DEPTHS, np.min(found, axis=0), np.max(found, axis=0), color=color, alpha=0.15)
    axes.set(title=f"asked at {length:,} tokens", ylabel="right answers", ylim=(0, 1.02), xticks=DEPTHS)
    axes.set_xlabel("depth of the key (0: at the start)")
    axes.grid(alpha=0.4)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


if __name__ == "__main__":
    run_demo(main)
