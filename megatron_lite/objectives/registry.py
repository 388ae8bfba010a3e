"""Which objectives there are. A new one is one file beside this one and one entry here.

An objective is an `nn.Module` around the decoder (its attribute `decoder`); `forward(batch)` gives (summed loss in fp32, number of
counted tokens). The engine divides by the count of the whole global batch, so nothing here ever takes a mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import nn

from megatron_lite.models.decoder import Decoder
from megatron_lite.objectives.next_token import NextToken

OBJECTIVES: dict[str, Callable[..., nn.Module]] = {"next_token": NextToken}

_OURS = ("decoder", "vocab_start", "group")  # what every objective is given; the rest of its arguments are options


@dataclass
class ObjectiveConfig:
    """What is minimized. kind: one of OBJECTIVES. options: that objective's own numbers, by the names of its arguments."""

    kind: str = "next_token"
    options: dict[str, float] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise ValueError naming the key whose value cannot be."""
        if self.kind not in OBJECTIVES:
            raise ValueError(f"objective.kind={self.kind} is unknown; choose one of {', '.join(OBJECTIVES)}")
        parameters = inspect.signature(OBJECTIVES[self.kind]).parameters
        known = [name for name, p in parameters.items() if name not in _OURS and p.kind is not p.VAR_KEYWORD]
        for name, value in self.options.items():
            if name not in known:
                raise ValueError(
                    f"objective.options.{name}={value} is not among the options of {self.kind} "
                    f"({', '.join(known) or 'it has none'}); remove it"
                )
        for name in known:
            if name not in self.options and parameters[name].default is inspect.Parameter.empty:
                raise ValueError(f"objective.options.{name} is not given; {self.kind} needs it")


def build_objective(
    config: ObjectiveConfig, decoder: Decoder, *, vocab_start: int = 0, group: dist.ProcessGroup | None = None
) -> nn.Module:
    """The objective around `decoder`. vocab_start, group: where this rank's rows of the head begin, and who holds the others."""
    return OBJECTIVES[config.kind](decoder, vocab_start=vocab_start, group=group, **config.options)
