"""AdamW over plain local tensors, with decay groups and a skip that needs no host sync.

    m = b1 m + (1-b1) g,  v = b2 v + (1-b2) g^2,  w = w - lr (m^ / (sqrt(v^) + eps) + decay * w)      (Loshchilov & Hutter 2019)

Notable features:
- It sees local shards only (what FSDP2 or tensor parallelism left on this rank), so that it is the same for every layout:
  sharding the parameters shards the optimizer.
- A step whose loss or gradient is not finite is skipped on the device (`found_inf` of the fused kernel): weights, moments and
  step counter stay as they are, without a host sync.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.profiler import record_function


@dataclass
class OptimConfig:
    """AdamW's numbers. `lr` is the peak; `schedule` shapes it. A decay_* switch says whether those parameters decay too."""

    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    decay_norms: bool = False
    decay_biases: bool = False
    decay_embeddings: bool = False

    def validate(self) -> None:
        """Raise ValueError naming the key if a value is invalid."""
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr} must be above 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optim.betas={self.betas} must be two numbers in [0, 1)")
        if self.eps <= 0:
            raise ValueError(f"optim.eps={self.eps} must be above 0")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay={self.weight_decay} must not be negative")
        if self.clip_grad < 0:
            raise ValueError(f"optim.clip_grad={self.clip_grad} must not be negative; 0 switches clipping off")


def decays(kind: str, config: OptimConfig) -> bool:
    """Whether weight decay applies to parameters of this kind: matrix | bias | norm | embedding | state.

    Matrices always decay; a state (a recurrence's own parameters, meta tokens) never does.
    """
    switches = {"bias": config.decay_biases, "norm": config.decay_norms, "embedding": config.decay_embeddings}
    return {"matrix": True, "state": False, **switches}[kind]


def torch_adamw(parameters: Mapping[str, Tensor], config: OptimConfig, kinds: Mapping[str, str]) -> torch.optim.AdamW:
    """torch's fused AdamW over `parameters` (global name -> tensor), those that decay in its first group.

    kinds: global name -> kind of the parameter (see `decays`).
    """
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, tensor in parameters.items():
        groups[decays(kinds[name], config)].append(tensor)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


class AdamW:
    """AdamW on `parameters`: global name -> local fp32 tensor, updated in place. Empty shards are fine. kinds: see `decays`.

    It calls the function behind `torch.optim.AdamW`: making an object of that class imports all of torch.compile, which is a second of
    every start.
    """

    def __init__(self, parameters: dict[str, Tensor], config: OptimConfig, kinds: Mapping[str, str]) -> None:
        self.parameters, self.config = parameters, config
        self._moments = {
            f"{kind}.{name}": torch.zeros_like(tensor, requires_grad=False)
            for kind in ("exp_avg", "exp_avg_sq")
            for name, tensor in parameters.items()
        }
        self._steps = {name: torch.zeros((), device=tensor.device) for name, tensor in parameters.items()}
        self.groups = [
            (weight_decay, names)
            for weight_decay, does in ((config.weight_decay, True), (0.0, False))
            if (names := [name for name in parameters if decays(kinds[name], config) is does])
        ]

    @torch.no_grad()
    @record_function("AdamW.step")
    def step(self, gradients: dict[str, Tensor], *, lr: float, skip: Tensor) -> None:
        """One update with `gradients` (same names and shapes); none at all where the 0-dim float tensor `skip` is 1."""
        for weight_decay, names in self.groups:
            adamw(
                [self.parameters[name] for name in names],
                [gradients[name] for name in names],
                [self._moments[f"exp_avg.{name}"] for name in names],
                [self._moments[f"exp_avg_sq.{name}"] for name in names],
                [],
                [self._steps[name] for name in names],
                fused=True,
                found_inf=skip,  # the kernel's own way to leave a step out: GradScaler uses it too
                amsgrad=False,
                beta1=self.config.betas[0],
                beta2=self.config.betas[1],
                lr=lr,
                weight_decay=weight_decay,
                eps=self.config.eps,
                maximize=False,
            )

    def moments(self) -> dict[str, Tensor]:
        """`exp_avg.<name>` and `exp_avg_sq.<name>`: the live local tensors, to be saved, or loaded in place."""
        return dict(self._moments)

    @property
    def adam_step(self) -> int:
        """Updates done so far (skipped steps do not count): Adam's bias correction. Reading it waits for the device."""
        return int(next(iter(self._steps.values())).item())

    @adam_step.setter
    def adam_step(self, count: int) -> None:
        for steps in self._steps.values():
            steps.fill_(float(count))
