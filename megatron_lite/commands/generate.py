"""`mlite generate`: continue a prompt, streaming to the terminal.

python -m megatron_lite generate checkpoint=runs/smoke prompt='def main(' max_new_tokens=40
python -m megatron_lite generate checkpoint=runs/smoke prompt_file=prompts.txt sampling.temperature=0.8 sampling.top_p=0.9
torchrun --nproc-per-node 2 -m megatron_lite generate checkpoint=runs/large prompt='def main(' parallel.tp=2
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.commands.command import run_command
from megatron_lite.commands.ranks import all_ranks
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.models.sampling import SamplingConfig, generate_tokens
from megatron_lite.parallel.assemble import assemble, bare, from_tensors
from megatron_lite.parallel.mesh import ParallelConfig, build_mesh
from megatron_lite.ranks import Ranks
from megatron_lite.runtime import Runtime
from megatron_lite.weights import Weights, open_weights


@dataclass
class GenerateConfig:
    """`mlite generate`: one `prompt`, or a `prompt_file` with one a line."""

    checkpoint: str = "???"
    prompt: str | None = None
    prompt_file: str | None = None
    max_new_tokens: int = 64
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def validate(self, world_size: int = 1) -> None:
        """Raise ValueError naming the key if a value is invalid."""
        self.sampling.validate()
        self.parallel.validate(world_size)
        if self.parallel.tp != world_size:
            raise ValueError(
                f"parallel.tp={self.parallel.tp} with {world_size} processes: generate divides a model by tensor "
                f"parallelism only; set parallel.tp={world_size}, or start {self.parallel.tp} processes"
            )
        if self.parallel.sequence_parallel:
            raise ValueError(
                "parallel.sequence_parallel=true: tokens are generated one by one, which leaves no sequence to cut; set it "
                "to false"
            )


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
    prompts = ranks.attempt("read the prompts", lambda: _prompts(config, runtime.world_size))
    weights = open_weights(config.checkpoint, ranks)
    tokenizer = ranks.attempt("open the tokenizer", lambda: _tokenizer(config, weights))
    mesh = build_mesh(config.parallel.degrees(runtime.world_size), device=runtime.device)
    fill = from_tensors(weights.tensors)
    model, _ = ranks.attempt(
        "read the weights",
        lambda: assemble(weights.config, mesh=mesh, parallel=config.parallel, fill=fill, wrap=bare),
    )
    model.eval()
    for prompt in prompts:
        tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
        new = generate_tokens(
            model,
            tokens,
            max_new_tokens=config.max_new_tokens,
            eod=tokenizer.eos_token_id,
            sampling=config.sampling,
        )
        yield prompt
        yield from stream_text(tokenizer, new, before=tokens)
        yield "\n"


def _tokenizer(config: GenerateConfig, weights: Weights) -> Any:
    if weights.tokenizer is None:
        raise ValueError(
            f"no tokenizer lies beside checkpoint={config.checkpoint}; put it into a folder `tokenizer` there"
        )
    return load_tokenizer(weights.tokenizer)


def stream_text(tokenizer: Any, tokens: Iterable[int], *, before: Sequence[int] = ()) -> Iterator[str]:
    """The text of `tokens` piece by piece, as it continues the text of the tokens `before`.

    Some tokenizers drop the space that begins a text (SentencePiece), so a token is decoded behind those that came before it and
    only what it adds is given. The window decoded for this begins at the last piece but one, so that a long text costs what its
    pieces cost. A character whose bytes are spread over tokens waits for its last one.
    """
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


def _prompts(config: GenerateConfig, world_size: int) -> list[str]:
    config.validate(world_size)
    if (config.prompt is None) == (config.prompt_file is None):
        raise ValueError("give either prompt='...' or prompt_file=<a text file with one prompt a line>")
    if config.prompt is not None:
        return [config.prompt]
    path = Path(config.prompt_file or "")
    if not path.exists():
        raise ValueError(f"prompt_file={config.prompt_file} does not exist")
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file={path} is no UTF-8 text ({error}); give one prompt a line") from None
    if not prompts:
        raise ValueError(f"prompt_file={path} holds no prompt; write one a line")
    return prompts
