"""Bugs to be planted in an engine: each function takes the engine and returns what takes the bug out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_lite.parallel.layers import TensorParallel


def _doubled_gradient(engine: Any) -> Callable[[], None]:
    if hasattr(engine, "_take_gradients"):
        right = engine._take_gradients
        engine._take_gradients = lambda: {name: 2 * g for name, g in right().items()}
    else:
        right = engine.engine.backward
        engine.engine.backward = lambda loss, **settings: right(2 * loss, **settings)
    return lambda: None


def _norm_once_per_tp_rank(engine: Any) -> Callable[[], None]:
    if hasattr(engine, "_global_norm"):
        right, shards = engine._global_norm, engine.shards

        def wrong(gradients: Any) -> torch.Tensor:
            engine.shards = {name: replace(info, tp_dim=0) for name, info in shards.items()}
            norm = right(gradients)
            engine.shards = shards
            return norm

        engine._global_norm = wrong
    else:
        for parameter in engine.parameters.values():
            parameter.tensor_model_parallel = True
    return lambda: None


def _unreduced_norm_gradients(engine: Any) -> Callable[[], None]:
    right = TensorParallel.on_stream
    TensorParallel.on_stream = lambda self, parameter: parameter  # type: ignore[method-assign]

    def undo() -> None:
        TensorParallel.on_stream = right  # type: ignore[method-assign]

    return undo


def _swapped_decay(engine: Any) -> Callable[[], None]:
    if hasattr(engine, "optimizer"):
        engine.optimizer.groups = [(0.5 - decay, names) for decay, names in engine.optimizer.groups]
    else:
        for group in engine.adamw.param_groups:
            group["weight_decay"] = 0.5 - group["weight_decay"]
    return lambda: None


BUGS: dict[str, Callable[[Any], Callable[[], None]]] = {
    "gradient scale": _doubled_gradient,
    "norm counted once per tensor-parallel rank": _norm_once_per_tp_rank,
    "norm gradients under sequence parallelism not reduced": _unreduced_norm_gradients,
    "decay groups swapped": _swapped_decay,
}
