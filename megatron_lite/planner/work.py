"""The work of one rank: for each unit of sharding what its passes run, and how many numbers it holds.

A unit is what FSDP2 gathers and reduces together: the embedding, each layer, and the head with the final norm and the loss (tied: the
embedding is the head). Layers that are alike are traced once. Shapes, kernels and collectives are those of training: see `meta` and
`operators`.

Shapes: B batch, T sequence (on the residual stream T/tp under sequence parallelism), D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.models.cache import KeyValue
from megatron_lite.models.context import LayerContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.pattern import LayerSpec
from megatron_lite.planner.fp8 import fp8_numbers, use_fp8
from megatron_lite.planner.job import Job
from megatron_lite.planner.loss import loss_of
from megatron_lite.planner.meta import META, meta_decoder, meta_tensor
from megatron_lite.planner.operators import Passes, Recorder, Step, record
from megatron_lite.precision.recipes import DelayedScalingConfig, Fp8Config


@dataclass(frozen=True)
class Unit:
    """What is gathered, computed and reduced together.

    numbers: parameters of the tensor-parallel shard. gathered: their bytes in the dtype of the passes. passes: of a micro-batch.
    kept_fp8: numbers of weights that are cast to FP8 once a step. codes: numbers of those that are gathered in FP8. frozen: of a teacher,
    which only runs forward.
    """

    name: str
    numbers: int
    gathered: int
    passes: Passes
    kept_fp8: int = 0
    codes: int = 0
    frozen: bool = False

    @property
    def sent(self) -> int:
        """Bytes of a gather."""
        return self.gathered - self.codes * (torch.bfloat16.itemsize - 1)

    @property
    def steps(self) -> list[Step]:
        """Of both passes."""
        return [*self.passes.forward, *self.passes.backward]


def units_of(job: Job) -> list[Unit]:
    """The units in the order of the forward pass, those of a teacher first. Raises ValueError when a model does not divide by the
    layout."""
    if job.frozen is None:
        return _units(job, frozen=False)
    with torch.no_grad():
        teacher = _units(job.frozen, frozen=True)
    return [*teacher, *_units(job, frozen=False)]


def _units(job: Job, *, frozen: bool) -> list[Unit]:
    decoder = meta_decoder(job)
    if isinstance(job.precision, Fp8Config):
        use_fp8(decoder, job.precision, keeps_weights=job.keeps_weights)
    stream = _Stream(job, decoder)
    units = [_unit("embedding", [decoder.embedding], stream.embed())]
    traced: dict[Any, tuple[Passes, KeyValue | None]] = {}
    shared: dict[int, KeyValue] = {}
    for index, (spec, layer) in enumerate(zip(decoder.specs, decoder.layers)):
        fp8 = fp8_numbers(layer)
        key = (replace(spec, kv_from=None if spec.kv_from is None else 0), fp8)
        if key not in traced:
            traced[key] = stream.layer(layer, spec, shared)
        passes, kv = traced[key]
        if kv is not None:
            shared[index] = kv
        kept, codes = (fp8 if there else 0 for there in (job.keeps_weights, job.gathers_codes))
        units.append(replace(_unit(f"layers.{index}", [layer], passes), kept_fp8=kept, codes=codes))
    tail: list[nn.Module] = [decoder.final_norm] if decoder.head is None else [decoder.final_norm, decoder.head]
    # a teacher's logits are computed with the student's
    units.append(_unit("head", tail, stream.norm() if frozen else stream.head()))
    return [replace(unit, frozen=frozen) for unit in units]


def fp8_bytes(job: Job) -> float:
    """What casting an operand to FP8 moves, for each of its numbers: read for the largest number, read to cast, written in rows and in
    columns; delayed scaling knows the scale before."""
    return 4.0 if isinstance(job.precision, DelayedScalingConfig) else 6.0


def seen_fraction(spec: LayerSpec, tokens: int, always_visible: int) -> float:
    """The part of tokens x tokens pairs of query and key that a layer's attention looks at: causal, within its window."""
    if spec.window is None:
        return (tokens + 1) / (2 * tokens)
    most = min(tokens, always_visible + spec.window + 1)
    return (most * (most + 1) / 2 + (tokens - most) * most) / tokens**2


class _Stream:
    """Runs the parts of a decoder on micro-batches without memory."""

    def __init__(self, job: Job, decoder: Decoder) -> None:
        self.job, self.decoder = job, decoder
        self.text = job.seq_len // job.degrees.cp
        self.tokens = job.model.meta_tokens + self.text
        cut = job.degrees.tp if job.parallel.sequence_parallel else 1
        self.shape = (job.micro_batch, self.tokens // cut, job.model.hidden_size)
        positions = torch.arange(self.tokens, device=META)[None]
        self.context = LayerContext(positions, prefix=job.model.meta_tokens)

    def recorder(self, **settings: Any) -> Recorder:
        return Recorder(axes={"tp": self.job.degrees.tp, "cp": self.job.degrees.cp}, **settings)

    def embed(self) -> Passes:
        words_BT = torch.empty(self.job.micro_batch, self.text, dtype=torch.int64, device=META)
        return record(self.recorder(), lambda: self.decoder.embedding(words_BT))[0]

    def layer(self, layer: nn.Module, spec: LayerSpec, shared: dict[int, KeyValue]) -> tuple[Passes, KeyValue | None]:
        """(its passes, its keys and values if other layers use them). shared: keys and values of earlier layers."""
        recorder = self.recorder(
            seen=seen_fraction(
                spec, self.job.model.meta_tokens + self.job.seq_len, self.job.model.attention.always_visible
            ),
            fuse=self.job.parallel.compile,
            fp8_bytes=fp8_bytes(self.job),
        )
        context = replace(self.context, kv=None if spec.kv_from is None else shared[spec.kv_from])
        x_BTD = self._x()
        passes, (_, kv) = record(recorder, lambda: layer(x_BTD, context))
        return passes, None if kv is None else _like(kv)

    def head(self) -> Passes:
        """Final norm, products with the head's weight and loss."""
        x_BTD, decoder, prefix = self._x(), self.decoder, self.job.model.meta_tokens
        targets_N = torch.empty(self.job.micro_batch * self.text, dtype=torch.int64, device=META)
        loss = loss_of(self.job, decoder, targets_N)

        def forward() -> Tensor:
            hidden_BTD = decoder.final_norm(x_BTD)[:, prefix:]
            return decoder.with_head_weight(loss, hidden_BTD.flatten(0, 1))

        return record(self.recorder(), forward)[0]

    def norm(self) -> Passes:
        """Final norm alone."""
        return record(self.recorder(), lambda: self.decoder.final_norm(self._x()))[0]

    def _x(self) -> Tensor:
        return meta_tensor(*self.shape, dtype=self.job.precision.dtype, grad=True)


def _unit(name: str, modules: list[nn.Module], passes: Passes) -> Unit:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    numbers = sum(parameter.numel() for parameter in parameters)
    gathered = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return Unit(name, numbers, gathered, passes)


def _like(kv: KeyValue) -> KeyValue:
    """Keys and values that another layer's backward reaches."""
    key, value = (meta_tensor(*x.shape, dtype=x.dtype, grad=True) for x in (kv.key_BGSK, kv.value_BGSV))
    return KeyValue(key, value)
