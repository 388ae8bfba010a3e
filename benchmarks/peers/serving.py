"""What every process of `benchmarks/train_step.py` shares: the work it does, and how it is told to do so many steps of it.

A process loops over `Pace.over(batches)` as over any batches. The iterator hands out as many as standard input asks for (one line: a
number of steps), and when the loop comes back for more, answers with the seconds that passed. So the whole loop is timed, whoever
wrote it, and the process that asks can run two of them in turn.

This file and its neighbors import torch and the peer, and nothing of this project: they run in an environment of their own.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0

Item = TypeVar("Item")


@dataclass(frozen=True)
class Work:
    """A decoder's sizes, a batch of `batch` sequences of `length` tokens, and a loss that is read once in `log_every` steps. overrides: of
    `mlite train`, beside these."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    length: int
    batch: int
    log_every: int
    threads: int
    compiled: bool
    folder: str  # an empty one, for what a trainer writes
    overrides: tuple[str, ...] = ()

    @classmethod
    def from_command_line(cls) -> Work:
        """The work that the first argument describes in JSON; this process has its threads from now on."""
        work = cls(**json.loads(sys.argv[1]))
        torch.set_num_threads(work.threads)
        torch.manual_seed(0)
        return work

    def tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random (tokens, targets), each [batch, length]."""
        words = torch.randint(0, self.vocabulary, (self.batch, self.length + 1))
        return words[:, :-1].contiguous(), words[:, 1:].contiguous()


class Pace:
    """Lets a loop run so many steps at a time. What the process prints goes to standard error from now on."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._left, self._began = 0, 0.0

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, handed out as they are asked for; fetching them is part of the time. Ends the process with its standard input."""
        source = iter(items)
        self._answers.write(f"ready {torch.__version__}\n")
        self._wait()
        while True:
            if self._left == 0:
                self._answers.write(f"seconds {time.perf_counter() - self._began}\n")
                self._wait()
            self._left -= 1
            yield next(source)

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # at once: a trainer that ends properly would save, validate and draw first
        self._left, self._began = int(line), time.perf_counter()


def train(
    model: torch.nn.Module, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], work: Work, *, compiled: bool
) -> None:
    """The plain loop: one batch again and again, gradients clipped, torch's fused AdamW, the loss read at log steps only.

    loss_of: tokens, targets (both [batch, length]) -> mean loss.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    loss_of = torch.compile(loss_of) if compiled else loss_of
    for step, (tokens, targets) in enumerate(Pace().over(itertools.repeat(work.tokens())), 1):
        loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % work.log_every == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
