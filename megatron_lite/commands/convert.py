"""`mlite convert`: to and from Hugging Face folders.

python -m megatron_lite convert source=runs/smoke target=exported to=hf
python -m megatron_lite convert source=exported target=runs/imported to=native
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lite.atomic import check_place
from megatron_lite.commands.command import run_command
from megatron_lite.data.tokenizer import fingerprint, load_tokenizer
from megatron_lite.models.huggingface import export_folder, exportable
from megatron_lite.tensor_files import WholeTensors
from megatron_lite.weights import Weights, check_empty, copy_tokenizer, open_weights, save_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ConvertConfig:
    """`mlite convert`: from `source` (a run, a checkpoint or a Hugging Face folder) to the folder `target`."""

    source: str = "???"
    target: str = "???"
    to: str = "hf"
    dtype: str = "source"
    max_shard_gb: float = 5.0


def main() -> None:
    """Parse, convert, exit."""
    run_command("convert", ConvertConfig, "Convert a run, a checkpoint or a Hugging Face folder.", convert)


def convert(config: ConvertConfig) -> int:
    """Write `target` from `source`. Raises ValueError when either cannot hold the model."""
    if config.to not in ("hf", "native"):
        raise ValueError(f"to={config.to} is unknown; choose hf or native")
    if config.dtype not in ("source", *DTYPES):
        raise ValueError(f"dtype={config.dtype} is unknown; choose source, {', '.join(DTYPES)}")
    if not config.max_shard_gb > 0:
        raise ValueError(f"max_shard_gb={config.max_shard_gb} must be above 0")
    if not config.target.strip() or Path(config.target).resolve() == Path.cwd():
        raise ValueError(f"target={config.target} is the folder that you are in; name a new one")
    check_empty(Path(config.target), key="target")
    check_place(Path(config.target))  # before all files of the source are verified
    weights = open_weights(config.source)
    if config.to == "hf":
        _to_hugging_face(config, weights)
    else:
        save_weights(Path(config.target), weights, dtype=DTYPES.get(config.dtype))
    print(f"{weights.path} -> {config.target}")
    return 0


def _to_hugging_face(config: ConvertConfig, weights: Weights) -> None:
    extra = weights.extra
    if exportable(weights.config) != weights.config:
        print(
            "LlamaForCausalLM refuses a hidden size that the heads do not divide: written as MistralForCausalLM, which is the same"
        )
    if weights.tokenizer is None:
        print("warning: there is no tokenizer beside the source; the exported folder has none")
    elif not extra:
        tokenizer = load_tokenizer(weights.tokenizer)
        extra = {"config": {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}}
    export_folder(
        config.target,
        config=weights.config,
        tensors=WholeTensors(weights.tensors, DTYPES.get(config.dtype)),
        extra=extra,
        max_shard_bytes=int(min(config.max_shard_gb * 2**30, 2**63)),
    )
    if weights.tokenizer is not None:
        try:
            copy_tokenizer(weights.tokenizer, Path(config.target))
        except OSError:  # a folder without its tokenizer would look whole
            shutil.rmtree(config.target, ignore_errors=True)
            raise
        if fingerprint(config.target) != weights.tokenizer_fingerprint:
            print(
                f"warning: beside this config.json transformers' AutoTokenizer reads the tokenizer as the class that it has for "
                f"{weights.config.family}, which gives other tokens; PreTrainedTokenizerFast.from_pretrained({config.target!r}) reads it "
                "as it is"
            )
