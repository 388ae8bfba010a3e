"""Which of several pruned models of equal size is best? Whether the loss right after pruning tells, before a long distillation.

`candidates` lists widths, feed-forward widths and depths that leave the same number of parameters; `spearman` compares two orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.flops import parameter_count


def inner_parameters(config: ModelConfig) -> int:
    """Parameters without embedding and head."""
    return parameter_count(config) - (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size


def candidates(
    config: ModelConfig, number: int, *, share: float = 2 / 3, tolerance: float = 0.02
) -> list[dict[str, int]]:
    """Up to `number` targets of `mlite prune` that keep `share` of the inner parameters, give or take `tolerance` of them.

    Widths fall in steps of a sixteenth of the hidden size, the feed-forward width follows from the budget; a model without a pattern may
    lose one block too.
    """
    budget, step = share * inner_parameters(config), max(1, config.hidden_size // 16)
    depths = [config.num_layers, config.num_layers - 1] if config.pattern is None and config.num_layers else [None]
    found = []
    for depth in depths:
        for hidden in range(config.hidden_size, config.hidden_size // 2, -step):
            least, more = (inner_parameters(_sized(config, hidden, ffn, depth)) for ffn in (step, 2 * step))
            ffn = step * (1 + round((budget - least) / (more - least)))
            if not step <= ffn <= config.mlp.ffn_size:
                continue
            if abs(inner_parameters(_sized(config, hidden, ffn, depth)) / budget - 1) <= tolerance:
                target = {"hidden_size": hidden, "ffn_size": ffn}
                found.append(target if depth in (None, config.num_layers) else target | {"num_layers": depth})
    if len(found) <= number:
        return found
    return [found[i * (len(found) - 1) // (number - 1)] for i in range(number)]


def _sized(config: ModelConfig, hidden: int, ffn: int, depth: int | None) -> ModelConfig:
    mlp = replace(config.mlp, ffn_size=ffn)
    return replace(config, hidden_size=hidden, mlp=mlp, num_layers=config.num_layers if depth is None else depth)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation of values without ties: 1 - 6 sum d^2 / (n (n^2 - 1)), 1 for the same order."""
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    n = len(first)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks)) / (n * (n * n - 1))
