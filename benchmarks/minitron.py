"""Does pruning and distilling a trained model save tokens, compared with training the small model from scratch?

    python -m benchmarks.minitron                              # about an hour on 2 quiet cores
    python -m benchmarks.minitron --size small                 # one seed, two arms: for a look
    python -m benchmarks.minitron -- model=nano2_tiny          # a Mamba-2/attention hybrid

A teacher is trained on the sample corpus and pruned by a third of its non-embedding parameters. Held-out loss over tokens of

    distilled   (a) the pruned model learns from the teacher (Minitron)
    plain       (b) the pruned model goes on with next-token prediction
    random      (c) as (a), but the channels and neurons that stay are drawn at random
    scratch     (d) the same architecture from fresh weights, for three times as many tokens

each with the learning rate that a short sweep finds best for it, which goes on beyond its list where the best is an end of it. Two
claims are checked, and either can fail:
  - (a) reaches the final loss of (d) with at most a third of its tokens (also printed with the teacher's own tokens added);
  - (a) is below (b) and below (c) at every validation after the first fifth.
Last, eight pruned models of equal size are ordered by their loss before and after 200 steps of distillation (Spearman's correlation).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.arms import Arm, Points, Result, Study
from benchmarks.minitron_ranking import candidates, spearman
from benchmarks.summary import Options, interval, markdown, options_of, plot, run_demo, write_summary
from megatron_lite.commands.evaluate import compose_over_run
from megatron_lite.commands.prune import REPORT, PruneConfig, prune
from megatron_lite.ranks import Ranks
from megatron_lite.weights import model_config

STEP = 8  # samples of a global batch
THIRD = 1 / 3
TARGETS = {  # of a model config, two thirds of its non-embedding parameters: key of `target` -> size
    "nemotron4_tiny": {"hidden_size": 208, "ffn_size": 768},
    "nano2_tiny": {"hidden_size": 192, "ffn_size": 448},
}
MODEL_KEYS = {"hidden_size": "model.hidden_size", "ffn_size": "model.mlp.ffn_size", "num_layers": "model.num_layers"}
LABELS = {
    "distilled": "(a) pruned, distilled",
    "plain": "(b) pruned, plain training",
    "random": "(c) random channels, distilled",
    "scratch": "(d) from scratch",
}


_ORDERS = ("pruned", "distilled")


@dataclass(frozen=True)
class Plan:
    """Lengths in tokens. scratch: of (d); the others get a third. rates: that the sweeps try, for (d) and for the others."""

    arms: tuple[str, ...]
    seeds: int
    teacher: int
    scratch: int
    sweep: int
    rates: tuple[tuple[float, ...], tuple[float, ...]]
    seq_len: int = 256
    samples: int = 1024  # that importance is measured on
    validations: int = 15  # of a run
    target: tuple[int, int] | None = None  # instead of TARGETS: hidden size and feed-forward width
    candidates: int = 0  # pruned models of equal size that are ordered
    ranking_steps: int = 200

    def steps(self, arm: str) -> int:
        """Of a run of an arm: whole numbers of validations, and (d) three times as many as the others."""
        every = max(1, round(self.scratch * THIRD / (STEP * self.seq_len) / self.validations))
        return every * self.validations * (3 if arm == "scratch" else 1)


PLANS = {
    "full": Plan(
        tuple(LABELS), 3, 3_000_000, 1_800_000, 160_000, ((1e-3, 2e-3, 4e-3), (5e-4, 1e-3, 2e-3)), candidates=8
    ),
    "small": Plan(("distilled", "scratch"), 1, 500_000, 360_000, 40_000, ((2e-3, 4e-3), (1e-3, 2e-3)), samples=256),
    "tiny": Plan(
        tuple(LABELS),
        1,
        2048,
        6144,
        512,
        ((1e-3, 2e-3), (1e-3,)),
        seq_len=32,
        samples=8,
        validations=2,
        target=(24, 48),
        candidates=2,
        ranking_steps=1,
    ),
}


@dataclass(frozen=True)
class Demo:
    """The runs of one command, below `options.folder`."""

    options: Options
    plan: Plan

    @property
    def model(self) -> str:
        """The teacher's model config, which a word `model=...` of the command line names."""
        named = [word.split("=", 1)[1] for word in self.options.overrides if word.startswith("model=")]
        return named[-1] if named else "nemotron4_tiny"

    @property
    def target(self) -> dict[str, int]:
        """Sizes of the pruned model."""
        return dict(zip(MODEL_KEYS, self.plan.target)) if self.plan.target else TARGETS[self.model]

    def study(self) -> Study:
        common = [
            "data=sample", f"model={self.model}", "schedule=cosine", "optim.lr=2e-3", "schedule.min_lr=1e-5",
            f"data.seq_len={self.plan.seq_len}", "data.validation.windows=4", f"train.global_batch_size={STEP}",
            f"train.micro_batch_size={STEP}", "train.log_every=1", "train.eval_at_start=true",
        ]  # fmt: skip
        return Study(self.options.folder, [*common, *self.options.overrides], self.options.jobs)

    def teacher(self, study: Study) -> Path:
        """A trained teacher: seed 0, whatever the seeds of the arms."""
        length = self._length(self.plan.teacher // (STEP * self.plan.seq_len))
        return study.run([Arm("teacher", length)], [0])["teacher"][0].directory

    def pruned(self, teacher: Path, *words: str, name: str, target: dict[str, int] | None = None) -> Path:
        """A pruned teacher; what is there is taken."""
        output = self.options.folder / name
        if not output.exists():
            sizes = [f"target.{key}={size}" for key, size in (target or self.target).items()]
            samples, scores = f"importance.samples={self.plan.samples}", f"scores={self.options.folder / 'scores'}"
            words = (f"checkpoint={teacher}", f"output={output}", samples, scores, "threads=1", *sizes, *words)
            prune(compose_over_run("prune", PruneConfig, list(words)))
        return output

    def arm(self, name: str, teacher: Path) -> Arm:
        """As in the table at the head of this file, at a learning rate that is not yet chosen."""
        sizes = [f"{MODEL_KEYS[key]}={size}" for key, size in self.target.items()]
        words = [*sizes, *self._length(self.plan.steps(name))]
        if name in ("distilled", "plain"):
            words.append(f"init_from={self.options.folder / 'pruned'}")
        if name == "random":
            words.append(f"init_from={self.options.folder}/pruned_at_random_{{seed}}")
        return Arm(name, (*words, *self._objective(name, teacher)))

    def results(self) -> tuple[dict[str, list[Result]], dict[str, dict[float, float]]]:
        """Runs of every arm at its best learning rate, and what the sweeps found."""
        study, seeds = self.study(), range(self.plan.seeds)
        teacher = self.teacher(study)
        self.pruned(teacher, name="pruned")
        for seed in seeds if "random" in self.plan.arms else ():
            words = ("importance.score=random", f"importance.seed={seed}")
            self.pruned(teacher, *words, name=f"pruned_at_random_{seed}")
        arms, swept = [], {}
        for name in self.plan.arms:
            rates = self.plan.rates[0 if name == "scratch" else 1]
            length = self._length(max(1, self.plan.sweep // (STEP * self.plan.seq_len)), validations=1)
            arm = self.arm(name, teacher)
            if len(rates) == 1:  # nothing to choose from
                arm, swept[name] = arm.extended(f"optim.lr={rates[0]}"), {rates[0]: math.nan}
            else:
                arm, swept[name] = study.sweep(arm, "optim.lr", rates, overrides=length, score=Result.final)
            arms.append(arm)
        return study.run(arms, seeds), swept

    def ranking(self, lr: float) -> list[dict[str, Any]]:
        """Of every candidate its target and its held-out loss after pruning and after `ranking_steps` of distillation."""
        if not self.plan.candidates:
            return []
        study = self.study()
        teacher, found, arms = self.teacher(study), [], []
        for number, target in enumerate(candidates(model_config(teacher, Ranks()), self.plan.candidates)):
            pruned = self.pruned(teacher, name=f"candidate_{number}", target=target)
            loss = statistics.fmean(json.loads((pruned / REPORT).read_text())["loss_after"].values())
            found.append({"target": target, "pruned": loss})
            sizes = [f"{MODEL_KEYS[key]}={size}" for key, size in target.items()]
            words = (*sizes, *self._length(self.plan.ranking_steps, validations=1), f"init_from={pruned}")
            arms.append(Arm(f"ranked_{number}", (*words, *self._objective("distilled", teacher), f"optim.lr={lr}")))
        results = study.run(arms, [0])
        return [entry | {"distilled": results[arm.name][0].final()} for entry, arm in zip(found, arms)]

    def _objective(self, name: str, teacher: Path) -> tuple[str, ...]:
        learns = name in ("distilled", "random")
        return ("objective=distillation", f"objective.teacher={teacher}") if learns else ()

    def _length(self, steps: int, validations: int = 0) -> tuple[str, ...]:
        every = max(1, steps // (validations or self.plan.validations))
        return (
            f"train.max_steps={steps}", f"schedule.warmup_steps={max(1, steps // 20)}", f"train.eval_every={every}",
            f"checkpoint.every={every}", "checkpoint.keep=1",
        )  # fmt: skip


def tokens_until(points: Points, loss: float) -> float:
    """The tokens after which a curve is at `loss` or below for the first time; infinite where it never is."""
    return next((float(tokens) for tokens, value in points if value <= loss), math.inf)


def share_below(lower: Sequence[Result], upper: Sequence[Result]) -> tuple[int, int]:
    """(validations after the first fifth at which the mean over the seeds of `lower` is below that of `upper`, their number)."""
    curves = [[result.held_out() for result in arm] for arm in (lower, upper)]
    means = [[statistics.fmean(curve[k][1] for curve in arm) for k in range(len(arm[0]))] for arm in curves]
    first = math.ceil((len(means[0]) - 1) / 5) + 1
    pairs = list(zip(*means))[first:]
    return sum(low < high for low, high in pairs), len(pairs)


def verdicts(results: dict[str, list[Result]], teacher_tokens: int) -> dict[str, Any]:
    """The claims, as numbers."""
    scratch = results["scratch"]
    length = scratch[0].held_out()[-1][0]
    until = [tokens_until(a.held_out(), d.final()) for a, d in zip(results["distilled"], scratch)]
    share = statistics.fmean(tokens / length for tokens in until)
    found: dict[str, Any] = {
        "share of the tokens": share,
        "per seed": [tokens / length for tokens in until],
        "with the teacher's tokens": share + teacher_tokens / length,
        "holds": share <= THIRD + 1e-9,
    }
    for other in ("plain", "random"):
        if other in results:
            found[f"below {other}"] = share_below(results["distilled"], results[other])
    return found


def report(results: dict[str, list[Result]], swept: dict[str, dict[float, float]], found: dict[str, Any]) -> str:
    """The table, and the claims in sentences."""
    rows = [
        (
            LABELS[name],
            f"{min(swept[name], key=lambda rate: _or_infinity(swept[name][rate])):g}",
            f"{runs[0].held_out()[-1][0]:,}",
            f"{statistics.fmean(run.held_out()[0][1] for run in runs):.4f}",
            interval([run.final() for run in runs]).text(),
        )
        for name, runs in results.items()
    ]
    text = markdown(("arm", "learning rate", "tokens", "held-out loss at the start", "at the end"), rows)
    share, with_teacher = interval(found["per seed"]).text(".3f"), found["with the teacher's tokens"]
    says = "holds" if found["holds"] else "FAILS"
    text += (
        f"\n(a) needs {share} of the tokens of (d) for its final loss; at most 0.333 was claimed: {says}. "
        f"With the teacher's own tokens it is {with_teacher:.3f}.\n"
    )
    for name, letter in (("plain", "b"), ("random", "c")):
        if f"below {name}" in found:
            below, of = found[f"below {name}"]
            says = "holds" if below == of else "FAILS"
            text += f"(a) is below ({letter}) at {below} of {of} validations after the first fifth: {says}.\n"
    return text


def ranking_report(ranked: Sequence[dict[str, Any]]) -> str:
    """The table of the candidates and how well the two orders agree."""
    rows = [
        (", ".join(f"{key} {size}" for key, size in entry["target"].items()), *(f"{entry[key]:.4f}" for key in _ORDERS))
        for entry in ranked
    ]
    table = markdown(("candidate of equal size", "loss when pruned", "after a short distillation"), rows)
    rho = spearman(*([entry[key] for entry in ranked] for key in _ORDERS))
    return f"\n{table}\nThe two orders agree with a rank correlation of {rho:.2f} (Spearman).\n"


def _or_infinity(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, train, print."""
    options = options_of(__doc__, name="minitron", arguments=arguments)
    demo = Demo(options, PLANS[options.size])
    results, swept = demo.results()
    teacher_tokens = Result("teacher", 0, options.folder / "teacher" / "seed_0", "finished").training()[-1][0]
    found = verdicts(results, teacher_tokens)
    curves = {LABELS[name]: [run.held_out() for run in runs] for name, runs in results.items()}
    plot(options.folder / "minitron.png", curves, title=f"{demo.model}, pruned by a third", ylabel="held-out loss")
    text = report(results, swept, found)
    ranked = demo.ranking(min(swept["distilled"], key=lambda rate: _or_infinity(swept["distilled"][rate])))
    if ranked:
        text += ranking_report(ranked)
    rates = {name: {str(rate): loss for rate, loss in of.items()} for name, of in swept.items()}
    data = {"claims": found, "sweeps": rates, "curves": curves, "teacher_tokens": teacher_tokens, "ranking": ranked}
    write_summary(options, "minitron", text=text, data=data)


if __name__ == "__main__":
    run_demo(main)
