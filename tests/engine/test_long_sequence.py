"""A hybrid on one long sequence that four ranks divide: a step fits in memory, and the beginning is computed as if it stood alone.

python -m tests.engine.test_long_sequence 131072        # by hand: minutes on two cores
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.distributed import run_ranks
from tests.engine import harness
from tests.engine.harness import Case

RANKS, BEGINNING, WORDS = 4, 8192, 16
HYBRID = {
    "num_layers": None, "pattern": "M*", "hidden_size": 128, "mamba.heads": 8, "mamba.head_dim": 32, "mamba.groups": 2,
    "mamba.state": 32, "attention.head_dim": 32, "rope.fraction": 0.0, "norm": "rmsnorm",
}  # fmt: skip


def look(rank: int, world_size: int, length: int) -> dict[str, Any]:
    """A forward and a step on a sequence of random tokens, which begins alike at every length.

    logits: (T / cp, WORDS), before the step. peak: bytes of this process at most. seconds: of the step.
    """
    case = Case({"cp": world_size, "recompute": "full"}, model=HYBRID | {"max_seq_len": length})
    engine, _, _ = harness.open_engine(case, world_size)
    tokens = torch.randint(1, harness.WORDS, (1, length + 1), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": torch.ones(1, length, dtype=torch.bool)}
    part, decoder, states = engine.mesh.place(batch), engine.objective.decoder, []
    handle = decoder.final_norm.register_forward_hook(lambda module, arguments, y: states.append(y.detach()))
    engine.evaluate(part)
    handle.remove()
    head = decoder.head_weight.detach()
    logits = states[0][0] @ (head.full_tensor() if isinstance(head, DTensor) else head)[:WORDS].T
    begun = time.monotonic()
    loss = engine.train_step([part], lr=harness.PEAK).loss.item()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"loss": loss, "logits": logits, "peak": peak, "seconds": time.monotonic() - begun}


def check(ranks: list[dict[str, Any]]) -> None:
    """The ranks' first slices are the sequence's first half."""
    alone = look(0, 1, BEGINNING)["logits"]
    divided = torch.cat([seen["logits"].chunk(2)[0] for seen in ranks])[:BEGINNING]
    # fp32: partial sums of attention and scan in another order
    torch.testing.assert_close(divided, alone, rtol=0, atol=1e-5 * alone.abs().max().item())
    assert len({seen["loss"] for seen in ranks}) == 1


@pytest.mark.slow
def test_the_beginning_does_not_see_the_rest() -> None:
    ranks = run_ranks(RANKS, look, 2 * BEGINNING)
    check(ranks)
    assert sum(seen["peak"] for seen in ranks) < 4e9, "most of it is torch, four times"


if __name__ == "__main__":
    found = run_ranks(RANKS, look, int(sys.argv[1]))
    for seen in found:
        print(f"loss {seen['loss']:.6f}, {seen['peak'] / 1e9:.2f} GB, {seen['seconds']:.0f} s")
    check(found)
