"""`mlite generate`: continue a prompt, streaming to the terminal.

python -m megatron_lite generate checkpoint=runs/smoke prompt='def main(' max_new_tokens=40
echo 'a prompt' | python -m megatron_lite generate checkpoint=runs/smoke prompt=-
python -m megatron_lite generate checkpoint=runs/smoke prompt_file=prompts.txt sampling.temperature=0.8 sampling.top_p=0.9
python -m megatron_lite generate checkpoint=runs/smoke prompt_file=prompts.txt batch_size=16
torchrun --nproc-per-node 2 -m megatron_lite generate checkpoint=runs/large prompt='def main(' parallel.tp=2
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.commands.command import check_at_least_one, run_command
from megatron_lite.commands.ranks import all_ranks
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.huggingface.generation import end_tokens, not_applied
from megatron_lite.models.sampling import SamplingConfig, check_prompt, generate_batch, generate_tokens
from megatron_lite.parallel.assemble import assemble, bare, from_tensors
from megatron_lite.parallel.mesh import ParallelConfig, build_mesh
from megatron_lite.parallel.parallelize import Recipe
from megatron_lite.ranks import Ranks
from megatron_lite.runtime import Runtime
from megatron_lite.training.support import refuse_unsupported
from megatron_lite.weights import Weights, open_weights


@dataclass
class GenerateConfig:
    """`mlite generate`: one `prompt`, or a `prompt_file` with one a line; "-" reads standard input.

    batch_size: prompts of a file that are continued together; with 1 the text is printed while it is generated.
    """

    checkpoint: str = "???"
    prompt: str | None = None
    prompt_file: str | None = None
    max_new_tokens: int = 64
    batch_size: int = 1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def validate(self, world_size: int = 1) -> None:
        """Raise ValueError naming the key if a value is invalid."""
        self.sampling.validate()
        check_at_least_one(self, "max_new_tokens", "batch_size")
        self.parallel.validate(world_size)
        refuse_unsupported("generate", parallel=self.parallel, world_size=world_size)


def main() -> None:
    """Parse, generate, exit."""
    run_command("generate", GenerateConfig, "Continue a prompt, or each line of a file of prompts.", generate)


def generate(config: GenerateConfig) -> int:
    """Print every prompt and its continuation.

    Raises ValueError (on several ranks CheckpointError) when there is no prompt, no tokenizer, or the layout does not fit.
    """
    with all_ranks() as (runtime, ranks):
        for text in texts(config, runtime, ranks):
            if runtime.is_main:
                sys.stdout.write(text)
                sys.stdout.flush()
    return 0


def texts(config: GenerateConfig, runtime: Runtime, ranks: Ranks) -> Iterator[str]:
    """What is to be printed, part by part as it is made, the same on every rank. Collective."""
    ranks.attempt("check the config", lambda: config.validate(runtime.world_size))
    # standard input is rank 0's
    prompts = _prompts(config) if ranks.size == 1 else ranks.first("read the prompts", lambda: _prompts(config))
    weights = open_weights(config.checkpoint, ranks)
    tokenizer = ranks.attempt("open the tokenizer", lambda: _tokenizer(config, weights))
    if runtime.is_main:
        for key, value in not_applied(weights.extra).items():
            print(f"warning: generation_config.json sets {key}={value}, which is not applied", file=sys.stderr)
    read = ranks.attempt("read the prompts", lambda: _tokens(config, weights, tokenizer, prompts))
    ends = end_tokens(weights.extra, tokenizer.eos_token_id)
    mesh = build_mesh(config.parallel.degrees(runtime.world_size), device=runtime.device)
    fill = from_tensors(weights.tensors)
    model, _ = ranks.attempt(
        "read the weights",
        lambda: assemble(weights.config, mesh=mesh, recipe=Recipe(config.parallel), fill=fill, wrap=bare),
    )
    model.eval()
    for first in range(0, len(prompts), config.batch_size):
        together = prompts[first : first + config.batch_size]
        tokens = read[first : first + config.batch_size]
        for prompt, before, new in zip(together, tokens, _continue(model, tokens, config, ends)):
            yield prompt
            yield from stream_text(tokenizer, new, before=before)
            yield "\n"


def _tokens(config: GenerateConfig, weights: Weights, tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Of each prompt. Raises ValueError for one that the model cannot continue, before anything is computed or printed."""
    # A model of a Hugging Face folder gets the begin token that the folder's tokenizer adds; a run of ours was trained without.
    begins = bool(weights.extra)
    tokens = [tokenizer(one, add_special_tokens=begins)["input_ids"] or [tokenizer.eos_token_id] for one in prompts]
    for number, of_prompt in enumerate(tokens, 1):
        try:
            check_prompt(weights.config, of_prompt, config.max_new_tokens)
        except ValueError as error:
            where = f"prompt {number} of prompt_file={config.prompt_file}: " if config.prompt_file else ""
            raise ValueError(f"{where}{error}") from None
    return tokens


def _continue(
    model: Decoder, prompts: list[list[int]], config: GenerateConfig, ends: frozenset[int]
) -> list[Iterator[int]] | list[list[int]]:
    """The new tokens of each prompt; of a single one while they are made."""
    keys: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "end_tokens": ends, "sampling": config.sampling}
    if len(prompts) == 1:
        return [generate_tokens(model, prompts[0], **keys)]
    return generate_batch(model, prompts, **keys)


def _tokenizer(config: GenerateConfig, weights: Weights) -> Any:
    if weights.tokenizer is None:
        raise ValueError(
            f"there is no tokenizer beside checkpoint={config.checkpoint}; put it into a folder `tokenizer` there"
        )
    return load_tokenizer(weights.tokenizer)


def stream_text(tokenizer: Any, tokens: Iterable[int], *, before: Sequence[int] = ()) -> Iterator[str]:
    """The text of `tokens` piece by piece, as it continues the text of the tokens `before`.

    Some tokenizers drop the space that begins a text (SentencePiece), so a token is decoded behind those that came before it and
    only what it adds is given. The window decoded for this begins at the last piece but one, so that a long text costs what its
    pieces cost. A character whose bytes are spread over tokens waits for its last one. A tokenizer that removes spaces before
    punctuation (`clean_up_tokenization_spaces`) changes text that it has already given, so its text comes as one piece.
    """
    if getattr(tokenizer, "clean_up_tokenization_spaces", False):
        yield tokenizer.decode([*before, *tokens])[len(tokenizer.decode(before)) if before else 0 :]
        return
    window = list(before)
    known = len(_decode(tokenizer, window))
    last_piece = len(window)  # where in the window the newest piece begins
    text = ""
    for token in tokens:
        window.append(token)
        text = _decode(tokenizer, window)
        if len(text) > known and not text.endswith("\ufffd"):
            yield text[known:]
            window = window[last_piece:]
            last_piece = len(window)
            known = len(_decode(tokenizer, window))
            text = ""
    if len(text) > known:
        yield text[known:]


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False) if tokens else ""


def _prompts(config: GenerateConfig) -> list[str]:
    """One prompt, or the lines of a file that are not empty. A line ends with a line feed and with nothing else."""
    if (config.prompt is None) == (config.prompt_file is None):
        raise ValueError("give either prompt='...' or prompt_file=<a text file with one prompt a line>")
    if config.prompt is not None:
        # The line end that `echo` puts behind a prompt is not part of it.
        return [config.prompt if config.prompt != "-" else _read("prompt", "-").removesuffix("\n").removesuffix("\r")]
    lines = _read("prompt_file", config.prompt_file or "").split("\n")
    prompts = [line for line in (line.removesuffix("\r") for line in lines) if line]
    if not prompts:
        raise ValueError(f"prompt_file={config.prompt_file} holds no prompt; write one a line")
    return prompts


def _read(key: str, name: str) -> str:
    """The text of a file, or of standard input for "-", with its line ends as they are."""
    if name != "-" and (not Path(name).exists() or Path(name).is_dir()):
        raise ValueError(f"{key}={name} does not exist or is a folder; name a text file with one prompt a line")
    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}={name} is not UTF-8 text ({error}); convert it to UTF-8") from None
