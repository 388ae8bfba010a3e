"""Four model families side by side at equal numbers of non-embedding parameters: what they learn, how fast, what they remember.

    make families                                     full: 500,000 tokens a run, three seeds
    make families SMALL=1                             the same with 36,864 tokens in sequences of 256
    python -m benchmarks.families --size small --jobs 2 --folder runs/families/small

Hidden size, vocabulary, data, order of the data and batch are the same in all arms, input and output embeddings are tied in all,
and the feed-forward width makes the non-embedding parameters equal within 2 % (checked). The learning rate of each family is the
best of three on the first seed, at a fifth of the length, and beyond them where the best is an end; then every seed is trained.

In the folder: families.md (one table), families.json, families.png (held-out loss over tokens). The columns:

    held-out loss by group    mean over the group's sources, nats for each token; mean and 95 % interval over the seeds
    training                  median tokens/s of a few steps, one thread, with no other run beside it
    generation, cache         one sequence, one thread, fp32, up to the 8,192nd token: new tokens/s, and what the cache holds then
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.arms import Arm, Result, Study
from benchmarks.generation import measure
from benchmarks.summary import Options, interval, markdown, options_of, plot, run_demo, write_summary
from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.flops import parameter_count
from megatron_lite.models.initialization import initialize_model_
from megatron_lite.training.config import compose_run

SAMPLES = 4  # in a batch
TOLERANCE = 0.02  # of the non-embedding parameters
COMMON = (
    "model.hidden_size=192",
    "model.tie_embeddings=true",
    "model.attention.heads=3",
    "model.attention.kv_heads=1",
    "schedule=wsd",
    "schedule.min_lr=1e-5",
    f"train.global_batch_size={SAMPLES}",
    f"train.micro_batch_size={SAMPLES}",
    "checkpoint.keep=1",
)
# As many blocks as give each family about the feed-forward width that its published models have, relative to the hidden size.
ARMS = (
    Arm("Nemotron-4", ("model=nemotron4_tiny", "model.num_layers=6", "model.mlp.ffn_size=960")),
    Arm("Llama", ("model=llama_tiny", "model.num_layers=6", "model.mlp.ffn_size=640")),
    Arm(
        "Nano 2",
        (
            "model=nano2_tiny",
            "model.pattern=M-M-M*-M-M-",
            "model.mlp.ffn_size=784",
            "model.mamba.heads=12",
            "model.mamba.groups=1",
        ),
    ),
    Arm(
        "Hymba",
        ("model=hymba_tiny", "model.mlp.ffn_size=664", "model.mamba.heads=3", "model.mamba.dt_rank=12"),
    ),
)
GROUPS = ("english", "multilingual", "code")


@dataclass(frozen=True)
class Size:
    """steps: of a run, of `seq_len` x SAMPLES tokens each. windows: held-out sequences of a source.

    prompt, new: tokens of the generation, which together are the length at which the cache is counted.
    """

    steps: int
    seq_len: int
    windows: int
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    prompt: int = 8192 - 32
    new: int = 32

    def whole(self) -> list[str]:
        """The overrides for a run of full length, with five evaluations and one checkpoint on the way."""
        every = [f"train.eval_every={max(1, self.steps // 5)}", f"checkpoint.every={max(1, self.steps // 2)}"]
        return [*_length(self.steps), "train.eval_at_start=true", *every]

    def short(self) -> list[str]:
        """The overrides for a fifth of it, evaluated at its end."""
        return [*_length(max(1, self.steps // 5)), *_NOTHING_BESIDE]

    def timed(self) -> list[str]:
        """The overrides for a few steps whose speed is taken."""
        return [*_length(min(self.steps, 9)), *_NOTHING_BESIDE]


def _length(steps: int) -> list[str]:
    return [f"train.max_steps={steps}", f"schedule.warmup_steps={steps // 10}"]


_NOTHING_BESIDE = ("train.eval_at_start=false", "train.eval_every=0", "checkpoint.every=0")


SIZES = {
    "full": Size(steps=244, seq_len=512, windows=2),
    "small": Size(steps=36, seq_len=256, windows=1),
    "tiny": Size(steps=2, seq_len=32, windows=1, seeds=(0,), learning_rates=(4e-3,), prompt=120, new=8),
}


@dataclass(frozen=True)
class Row:
    """What the table says about a family. rates: held-out loss by learning rate, of the short runs.

    training, generation: tokens/s.
    """

    family: str
    parameters: int
    rates: Mapping[float, float]
    results: Sequence[Result]
    training: float
    generation: float
    cache_bytes: int

    @property
    def rate(self) -> float:
        return min(self.rates, key=self.rates.__getitem__)

    def losses(self, group: str) -> list[float]:
        """Of each seed."""
        return [result.final(f"{group}/") for result in self.results]

    def cells(self) -> list[str]:
        """In the order of the table's columns."""
        return [
            self.family,
            f"{self.parameters:,}",
            f"{self.rate:g}",
            *(interval(self.losses(group)).text(".3f") for group in GROUPS),
            f"{self.training:,.0f}",
            f"{self.generation:,.0f}",
            f"{self.cache_bytes / 2**20:.2f}",
        ]

    def numbers(self) -> dict[str, object]:
        """For the JSON file."""
        return {
            "parameters": self.parameters,
            "held_out_by_learning_rate": {str(rate): loss for rate, loss in self.rates.items()},
            "held_out_by_seed": {group: self.losses(group) for group in GROUPS},
            "training_tokens_per_second": self.training,
            "generation_tokens_per_second": self.generation,
            "cache_bytes": self.cache_bytes,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, train, measure, print."""
    options = options_of(__doc__, name="families", arguments=arguments)
    size = SIZES[options.size]
    models = models_of(options)
    rows = [trained(arm, models[arm.name], options, size) for arm in ARMS]
    columns = ("family", "non-embedding parameters", "learning rate", *(f"held-out loss, {group}" for group in GROUPS))
    length = size.prompt + size.new
    speeds = ("training, tokens/s", f"generation at {length:,}, tokens/s", f"cache at {length:,}, MiB")
    tokens = size.steps * SAMPLES * size.seq_len
    title = f"{tokens:,} tokens, {len(size.seeds)} seeds, sequences of {size.seq_len}"
    plot(
        options.folder / "families.png",
        {row.family: [result.held_out() for result in row.results] for row in rows},
        title=title,
        ylabel="held-out loss, mean over all sources",
    )
    text = f"{title}\n\n{markdown((*columns, *speeds), [row.cells() for row in rows])}"
    write_summary(options, "families", text=text, data={row.family: row.numbers() for row in rows})


def models_of(options: Options) -> dict[str, ModelConfig]:
    """The model of each arm. Raises ValueError if their non-embedding parameters differ by more than TOLERANCE."""
    models = {arm.name: compose_run([*COMMON, *arm.overrides, *options.overrides]).model for arm in ARMS}
    counts = {name: non_embedding(model) for name, model in models.items()}
    if max(counts.values()) > (1 + TOLERANCE) * min(counts.values()):
        raise ValueError(f"the non-embedding parameters differ by more than {TOLERANCE:.0%}: {counts}")
    return models


def non_embedding(model: ModelConfig) -> int:
    """Parameters beside those of input and output embedding."""
    return parameter_count(model) - (1 if model.tie_embeddings else 2) * model.vocab_size * model.hidden_size


def trained(arm: Arm, model: ModelConfig, options: Options, size: Size) -> Row:
    """Pick the learning rate, train the seeds, measure the speeds."""
    common = [*COMMON, f"data.seq_len={size.seq_len}", f"data.validation.windows={size.windows}"]
    study = Study(options.folder, [*common, *size.whole()], jobs=options.jobs)
    # overrides of the command line come last, so that they also reach what an arm says
    arm = arm.extended(*options.overrides)
    best, rates = study.sweep(
        arm,
        "optim.lr",
        size.learning_rates,
        overrides=size.short(),
        seed=size.seeds[0],
        score=lambda result: result.final(),
    )
    results = study.run([best], size.seeds)[arm.name]
    timed = best.extended(*size.timed(), name=f"{arm.name}/speed")
    ((training,),) = replace(study, jobs=1).run([timed], size.seeds[:1]).values()
    decoder = Decoder(model).eval()
    initialize_model_(decoder, seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cache_bytes, _, generation = measure(decoder, 1, size.prompt, size.new)
    torch.set_num_threads(threads)
    return Row(
        arm.name, non_embedding(model), rates, results, training.tokens_per_second(), generation, cache_bytes
    )  # fmt: skip


if __name__ == "__main__":
    run_demo(main)
