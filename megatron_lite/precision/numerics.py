"""What an engine knows about the precision of the linear layers: when to say that a step or a micro-batch begins and ends.

`Numerics` does nothing: products in the dtype of their operands. `emulated.py` has the one of the FP8 recipes computed with torch.
It hangs on the decoder that it belongs to, so that whatever runs the decoder finds it (`numerics_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

# What delayed scaling keeps, as `<kind>.<layer>` in a checkpoint, and what it is before the first step.
STATE = {"scale_fwd": 1.0, "amax_history_fwd": 0.0, "scale_bwd": 1.0, "amax_history_bwd": 0.0}

EVENTS = "precision_events"  # the manifest's key for what made a run compute more exactly (see training/ladder.py)


@dataclass(frozen=True)
class Observation:
    """One quantized operand. operand: input | weight | grad_output. amax, overflow, underflow: 0-dim fp32 on the device.

    overflow: share of the elements beyond the largest number, or not finite. underflow: share of those not 0 that became 0.
    """

    module: str
    operand: str
    amax: Tensor
    overflow: Tensor
    underflow: Tensor


class Numerics:
    """Plain products. rungs: what `rung` can be set to, from the fastest on; none here."""

    rungs: tuple[str, ...] = ()
    rung: str = ""

    def step(self, *, keep_weights: bool) -> AbstractContextManager[None]:
        """Around all micro-batches of a step: the weights do not change inside. keep_weights: they stay in memory as a whole, so that
        what is made of them may stay too."""
        return nullcontext()

    def micro_batch(self) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch of training. Collective where histories are kept."""
        return nullcontext()

    def forward_only(self) -> AbstractContextManager[None]:
        """Around an evaluation or a diagnosis, which leave no trace in the state."""
        return nullcontext()

    def collect(self, observe: Callable[[Observation], None]) -> AbstractContextManager[None]:
        """Inside, `observe` is called for every operand that is quantized."""
        return nullcontext()

    @property
    def gathered(self) -> Sequence[str]:
        """The layers whose weights FSDP2 shall gather in FP8, if it shards: `gather` is then called for each."""
        return ()

    def gather(self, path: str, shard: Tensor, *, rows: int, ranks: int) -> None:
        """FSDP2 holds `shard`, fp32, of the weight (rows, K) of the layer `path`: from now on it gathers quantized rows from `ranks`
        ranks. Raises ValueError if they do not share the rows as the recipe needs."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold to continue with the same bits: live fp32 tensors of the kinds of `STATE`, the same on all ranks."""
        return {}


def numerics_of(decoder: nn.Module) -> Numerics:
    """The numerics that were applied to `decoder`, or plain ones."""
    return getattr(decoder, "numerics", None) or Numerics()
