"""Does FP8 train as well as bf16? Paired runs of a tiny Nemotron Nano 2 on the sample blend.

    python -m benchmarks.fp8 [--size full|small|tiny] [--arms fp32 bf16 current ...] [--seeds N] [--folder F] [-- overrides]
    python -m benchmarks.fp8 --size small --seeds 1 --arms bf16 current mx --folder runs/fp8/nemotron4 -- model=nemotron4_tiny

Every arm trains the same weights on the same samples in the same order, once a seed. Its number is the mean of the last tenth of its
training losses; the table shows the relative gap to bf16 and to fp32 over pairs of the same seed, with a 95 % interval (Student's t).

NVIDIA reports for Nemotron Nano 2's recipe (block scaling) a relative gap to bf16 below 0.25 %. The last column holds an arm against
that number: `under` or `above` if the whole interval lies there, `cannot tell` if it does not, which three seeds of a tiny model often
cannot. Two arms are coarser than any recipe and show what a gap looks like: `all_e5m2` has two bits of mantissa everywhere, where the
recipes have three for weights and activations; `underflow` has E4M3 for gradients too, and scales 2^14 times too small, which leaves
448 / 2^14 / 2^-9 = 14 steps between 0 and the largest number of a tensor.

All linear layers of the model's layers compute in FP8: Nano 2 keeps the first and the last ones in bf16, which is easier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.arms import Arm, Result, Study
from benchmarks.summary import (
    Interval,
    Options,
    interval,
    markdown,
    options_of,
    paired_gap,
    plot,
    run_demo,
    write_summary,
)

CLAIM = 0.0025

EMULATED = "precision.backend=emulated"
ARMS = {
    arm.name: arm
    for arm in (
        Arm("fp32", ("precision=fp32",)),
        Arm("bf16", ("precision=bf16",)),
        Arm("current", ("precision=fp8_current", EMULATED)),
        Arm("block", ("precision=fp8_block", EMULATED)),
        Arm("all_e5m2", ("precision=fp8_current", EMULATED, "precision.format=e5m2")),
        Arm("delayed", ("precision=fp8_delayed", EMULATED)),
        Arm("underflow", ("precision=fp8_delayed", EMULATED, "precision.format=e4m3", "precision.margin=14")),
        Arm("mx", ("precision=mxfp8", EMULATED)),
    )
}
COMPARED = ("fp32", "bf16", "current", "block", "all_e5m2", "underflow")

# size -> (tokens of a run, tokens of a sample)
LENGTHS = {"full": (300_000, 256), "small": (60_000, 256), "tiny": (1_024, 64)}
SEEDS = {"full": 3, "small": 3, "tiny": 1}
MODEL = (
    "model=nano2_tiny", "data=sample", "data.validation.windows=1", "schedule=wsd",
    "schedule.min_lr=1e-5", "optim.lr=1e-3", "train.global_batch_size=4", "train.micro_batch_size=4", "train.max_steps=null",
    "checkpoint.every=50", "checkpoint.keep=1",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the arms and write fp8.md, fp8.json and fp8.png into the folder."""
    options = options_of(__doc__, name="fp8", arms=(tuple(ARMS), COMPARED), seeds=SEEDS, arguments=arguments)
    tokens, seq_len = LENGTHS[options.size]
    length = [f"train.max_tokens={tokens}", f"data.seq_len={seq_len}", f"schedule.warmup_steps={tokens // 15_000}"]
    study = Study(options.folder, [*MODEL, *length, *options.overrides], jobs=options.jobs)
    results = study.run([ARMS[name] for name in options.arms], range(options.seeds))
    report(results, options)


def report(results: Mapping[str, Sequence[Result]], options: Options) -> None:
    """Table, plot and JSON of finished arms. The gaps of a diverged arm are NaN."""
    tokens = max(run.training()[-1][0] for runs in results.values() for run in runs)
    losses = {name: [run.last_losses() for run in runs] for name, runs in results.items()}
    gaps = {
        name: {base: paired_gap(values, losses[base]) for base in ("bf16", "fp32") if base in losses and base != name}
        for name, values in losses.items()
    }
    rows = [
        [
            name,
            interval(values).text(),
            *(gaps[name][base].text("+.3f", scale=100) if base in gaps[name] else "" for base in ("bf16", "fp32")),
            verdict(gaps[name]["bf16"]) if "bf16" in gaps[name] and name != "fp32" else "",
        ]
        for name, values in losses.items()
    ]
    headers = ("arm", "loss, last 10 %", "gap to bf16, %", "gap to fp32, %", f"gap to bf16 under {100 * CLAIM:g} %?")
    seeds = len(next(iter(losses.values())))
    plot(
        options.folder / "fp8.png",
        {name: [run.training() for run in runs] for name, runs in results.items()},
        title=f"Training loss by precision, {seeds} seed(s)",
        ylabel="loss (nats per token)",
    )
    data = {
        "tokens": tokens,
        "claim": CLAIM,
        "losses": losses,
        "gaps": {name: {base: [gap.mean, gap.half] for base, gap in found.items()} for name, found in gaps.items()},
        "outcomes": {name: [run.outcome for run in runs] for name, runs in results.items()},
    }
    text = f"{tokens:,} tokens, {seeds} seed(s)\n\n{markdown(headers, rows)}"
    write_summary(options, "fp8", text=text, data=data)


def verdict(gap: Interval) -> str:
    """Where the whole interval lies, `under` the claim or `above` it; else, or where it is wider than the claim, `cannot tell`.

    An arm that diverged is above.
    """
    if math.isnan(gap.mean) or gap.low > CLAIM:
        return "above"
    return "under" if gap.high < CLAIM and gap.half <= CLAIM else "cannot tell"


if __name__ == "__main__":
    run_demo(main)
