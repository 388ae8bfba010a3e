"""Weights that FSDP2 gathers as FP8 codes, which are half the bytes of bf16.

Before each gather FSDP2 asks a parameter's shard what to send, and after it what to make of all that arrived
(`fsdp_pre_all_gather`, `fsdp_post_all_gather`). A shard sends the codes of its rows, quantized from bf16 with the scale of the whole
weight. What arrives has the same bits as the bf16 weight, gathered first and quantized then: `QuantizedWeight`.

Notable features:
- The parameter stays the fp32 shard that it was, so optimizer, checkpoints and names do not know about this.
- Where one scale holds for a whole weight, the first gather of a step takes the maxima of all weights in one all-reduce. Blocks of
  128 x 128 need none: they lie inside a shard, and their scales are gathered with the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from megatron_lite.precision.formats import Quantized, largest_magnitude
from megatron_lite.precision.quantizers import Pair, Quantizer

_SAME = (torch.ops.aten.detach.default, torch.ops.aten.as_strided.default)


class QuantizedWeight(Tensor):
    """A weight (N, K) of which only the codes are there. To autograd it is a tensor of `dtype`; quantized layers read `quantized`,
    and any other operation gets the numbers that the codes stand for."""

    quantized: Quantized
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, quantized: Quantized, dtype: torch.dtype) -> QuantizedWeight:
        """`Tensor.__new__` of a tensor without memory of its own."""
        codes = quantized.codes
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, quantized: Quantized, dtype: torch.dtype) -> None:
        self.quantized = quantized

    def pair(self) -> Pair:
        """Both quantized forms."""
        return self.quantized, self.quantized.transposed()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See torch's notes on extending it."""
        if function in _SAME:  # what FSDP2 and `nn.Parameter` do to the whole tensor
            return cls(args[0].quantized, args[0].dtype)
        plain = tree_map_only(cls, lambda weight: weight.quantized.values().to(weight.dtype), (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def check_rows(path: str, rows: int, *, ranks: int, multiple: int) -> None:
    """Raise ValueError unless `ranks` ranks can hold the same number of rows of a weight each, in multiples of `multiple`."""
    if rows % (ranks * multiple):
        parts = "equal parts" if multiple == 1 else f"parts of whole blocks of {multiple} rows"
        raise ValueError(
            f"precision.all_gather=fp8: {path} has {rows} rows (on a tensor-parallel rank), which {ranks} ranks cannot share in {parts}; "
            "set precision.all_gather=bf16, or name it in precision.bf16_modules"
        )


@dataclass
class _Shard:
    """One weight's. rows: (N / shards, K) fp32, the live parameter. amax: of the whole weight, while it is known."""

    rows: Tensor
    quantizer: Quantizer
    amax: Tensor | None = None


class ShardedWeights:
    """The weights of a decoder that are gathered so.

    reduce: maxima (weights,) -> those over all ranks that share the scales; None where the recipe has blocks, which need none.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] | None) -> None:
        self._reduce = reduce
        self._shards: list[_Shard] = []

    def add(self, weight: Tensor, quantizer: Quantizer) -> None:
        """Send the codes of a shard `weight` from now on; FSDP2 looks for these attributes of the tensor before its first gather."""
        shard = _Shard(weight, quantizer)
        self._shards.append(shard)

        def before(mesh: Any, size: Any, stride: Any, module: nn.Module, policy: Any) -> tuple[tuple[Tensor, ...], Any]:
            if self._reduce is not None and shard.amax is None:
                self._find_maxima(self._reduce)
            quantized, _ = quantizer.pair(shard.rows.to(policy.param_dtype), shard.amax)
            codes = quantized.codes.view(torch.uint8)
            if quantized.block is None:
                return (codes,), (quantized.codes.dtype, quantized.scale_inv, None)
            return (codes, quantized.scale_inv), (quantized.codes.dtype, None, quantized.block)

        def after(
            outputs: tuple[Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: QuantizedWeight | None = None
        ) -> tuple[QuantizedWeight, tuple[Tensor, ...]] | None:
            code_dtype, scale_inv, block = metadata
            scale_inv = outputs[1] if scale_inv is None else scale_inv
            quantized = Quantized(outputs[0].view(code_dtype), scale_inv, block)
            if out is None:
                return QuantizedWeight(quantized, dtype), outputs
            out.quantized = quantized
            return None

        weight.fsdp_pre_all_gather, weight.fsdp_post_all_gather = before, after  # type: ignore[attr-defined]

    def changed(self) -> None:
        """The weights may have other values from now on."""
        for shard in self._shards:
            shard.amax = None

    @torch.no_grad()
    def _find_maxima(self, reduce: Callable[[Tensor], Tensor]) -> None:  # of bf16 numbers, which are what is quantized
        amaxes = reduce(torch.stack([largest_magnitude(shard.rows.bfloat16()) for shard in self._shards]))
        for shard, amax in zip(self._shards, amaxes.unbind()):
            shard.amax = amax
