"""What the passes of one unit of sharding hold: its forward and backward run without memory, and every live storage is counted.

The units are those that an engine gathers and reduces together: the embedding, each layer, and the head with final norm and loss.
What runs is training's own code, in training's layout and recompute mode, so what is kept for backward is what autograd keeps, and a
peak is that of the operators that training would dispatch: it holds for every layer type by construction. Layers that are alike are
traced once. Memory that a kernel takes and gives back inside of itself is not seen.

Two devices: `cuda` traces on the meta device with the attention kernels that a GPU runs (`meta`); `cpu` traces fake CPU tensors, for
which torch chooses the kernels that it would choose for real ones.

Shapes: B batch, T sequence (on the residual stream T/tp under sequence parallelism), D hidden.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.models.cache import KeyValue
from megatron_lite.models.context import LayerContext, Once
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.pattern import LayerSpec
from megatron_lite.parallel.parallelize import Recipe, parallelize
from megatron_lite.parallel.quantization import quantize
from megatron_lite.planner.fp8 import CODES, fp8_numbers, use_fp8
from megatron_lite.planner.job import Job
from megatron_lite.planner.loss import loss_of
from megatron_lite.planner.meta import META, MetaMesh, cast_parameters, use_gpu_attention
from megatron_lite.planner.operators import leaves
from megatron_lite.planner.scans import plan_scans
from megatron_lite.precision.dtypes import PrecisionConfig, fp32_modules
from megatron_lite.precision.numerics import numerics_of
from megatron_lite.precision.quantized_linear import QuantizedLinear
from megatron_lite.precision.recipes import Fp8Config


@dataclass(frozen=True)
class Passes:
    """Bytes of one unit's forward and backward.

    input, output: what is handed to it, and on. kept: what forward leaves for backward, its input too if that is kept. forward: the
    most that is held in forward, with input and output. backward: the most in backward, with `kept` and the gradients of output, input
    and parameters.
    """

    input: int
    output: int
    kept: int
    forward: int
    backward: int


NOTHING = Passes(0, 0, 0, 0, 0)
_KIND = {"meta": torch.device("cuda"), "cpu": torch.device("cpu")}  # the device that a place stands for


@dataclass(frozen=True)
class Unit:
    """What is gathered, computed and reduced together.

    shapes: of each parameter on a tensor-parallel rank; in_fp32: how many numbers compute in fp32 whatever the precision. codes: bytes of
    FP8 weights from their first forward in a step on, lasting_codes: of those that outlive the step. gathered_codes: numbers of weights
    that are gathered in FP8.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    in_fp32: int
    passes: Passes
    codes: int = 0
    lasting_codes: int = 0
    gathered_codes: int = 0

    @property
    def numbers(self) -> int:
        """Parameters of the tensor-parallel shard."""
        return sum(map(_numbers, self.shapes))

    def shard(self, ranks: int) -> int:
        """Numbers that one of `ranks` ranks holds when each parameter is cut by rows, padded as FSDP2 pads."""
        return sum(-(-shape[0] // ranks) * _numbers(shape[1:]) for shape in self.shapes)


class LiveBytes(TorchDispatchMode):
    """Inside, counts the bytes of the storages that operators make, until they are freed. most: since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what is new: not what was made outside, as parameters were, and is seen as an input first."""
        self._count((args, *(kwargs or {}).values()), counts=False)
        result = operator(*args, **(kwargs or {}))
        self._count(result, counts=True)
        return result

    def restart(self) -> None:
        """Forget the peak so far."""
        self.most = self.now

    def _count(self, values: Any, *, counts: bool) -> None:
        for leaf in leaves(values):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._known:
                self._watch(leaf.untyped_storage(), counts=counts)

    def _watch(self, storage: Any, *, counts: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if counts else 0

        def freed(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def traced_units(job: Job, *, device: str = "cuda", frozen: bool = False) -> list[Unit]:
    """The units in the order of the forward pass. device: cuda or cpu. frozen: of a model that is not trained, which has a unit `norm`
    before its head, and whose head is only read.

    Raises ValueError when the model does not divide by the layout's degrees.
    """
    with _devices(device) as place:
        decoder = _decoder(job, place)
        with numerics_of(decoder).step(keep_weights=job.keeps_weights):
            stream = _Stream(job, decoder, place, frozen=frozen)
            units = [_unit("embedding", [decoder.embedding], stream.embed()), *_layers(job, decoder, stream)]
            tail: list[nn.Module] = [] if decoder.head is None else [decoder.head]
            if frozen:
                return [*units, _unit("norm", [decoder.final_norm], stream.norm()), _unit("head", tail, NOTHING)]
            return [*units, _unit("head", [decoder.final_norm, *tail], stream.head())]


def _layers(job: Job, decoder: Decoder, stream: _Stream) -> list[Unit]:
    units = []
    codes = _kept_codes(decoder) if job.keeps_weights else [0] * len(decoder.layers)
    seen: dict[Any, tuple[Passes, KeyValue | None]] = {}
    shared: dict[int, KeyValue] = {}
    for index, (spec, layer) in enumerate(zip(decoder.specs, decoder.layers)):
        key = (replace(spec, kv_from=None if spec.kv_from is None else 0), _kinds(layer))
        if key not in seen:
            seen[key] = stream.layer(layer, spec, shared)
        passes, kv = seen[key]
        if kv is not None:
            shared[index] = kv
        unit, fp8 = _unit(f"layers.{index}", [layer], passes), fp8_numbers(layer)
        if job.gathers_codes:  # TE transposes those that stay
            unit = replace(unit, gathered_codes=_fp8_numbers(layer), codes=fp8 if job.keeps_weights else 0)
        elif job.keeps_weights:
            unit = replace(unit, codes=codes[index], lasting_codes=CODES * fp8)
        units.append(unit)
    units[0] = _with(units[0], stream.masks)
    return units


def _fp8_numbers(layer: nn.Module) -> int:
    """Numbers of a layer's FP8 weights, whichever backend they are for."""
    return fp8_numbers(layer) + sum(m.weight.numel() for m in layer.modules() if isinstance(m, QuantizedLinear))


def _kept_codes(decoder: Decoder) -> list[int]:
    """Bytes of each layer's FP8 weights that the emulation keeps for a step. Made here, they are not seen in any pass."""
    sizes = []
    for layer in decoder.layers:
        pairs = [m.quantized_weight(m.weight) for m in layer.modules() if isinstance(m, QuantizedLinear)]
        codes = {part.codes.untyped_storage()._cdata: part.codes for pair in pairs for part in pair}
        sizes.append(sum(map(_bytes, codes.values())))
    return sizes


@contextmanager
def _devices(device: str) -> Iterator[torch.device]:
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

    around: AbstractContextManager[Any] = FakeTensorMode() if device == "cpu" else nullcontext()
    place = torch.device("cpu") if device == "cpu" else META
    with around:
        yield place


def _decoder(job: Job, place: torch.device) -> Decoder:
    """The decoder as one rank of `job` computes with it, in the dtype of its forward pass."""
    with place:
        decoder = Decoder(job.model)
    mesh = MetaMesh(job.degrees, device=place)
    emulated = isinstance(job.precision, Fp8Config) and job.precision.backend_on(_KIND[place.type]) == "emulated"
    if isinstance(job.precision, Fp8Config) and emulated:
        quantize(decoder, replace(job.precision, backend="emulated"), mesh)
    if place == META:
        plan_scans(decoder, kernels=job.scan_kernels and not job.masked)
    plain = PrecisionConfig("fp32" if job.precision.dtype is torch.float32 else "bf16")
    parallelize(decoder, mesh, Recipe(replace(job.parallel, compile=False), plain))
    if isinstance(job.precision, Fp8Config) and not emulated:
        use_fp8(decoder, job.precision, keeps_weights=job.keeps_weights)
    if place == META:
        use_gpu_attention(decoder, masked=job.masked)
    cast_parameters(decoder, job.precision.dtype)
    return decoder


class _Stream:
    """Runs the parts of a decoder on a micro-batch without memory."""

    def __init__(self, job: Job, decoder: Decoder, place: torch.device, *, frozen: bool) -> None:
        self.job, self.decoder, self.place, self.frozen = job, decoder, place, frozen
        self.text = job.seq_len // job.degrees.cp
        tokens = job.model.meta_tokens + self.text
        cut = job.degrees.tp if job.parallel.sequence_parallel else 1
        self.shape = (job.micro_batch, tokens // cut, job.model.hidden_size)
        documents = torch.zeros(job.micro_batch, tokens, dtype=torch.int64, device=place) if job.masked else None
        positions = torch.arange(tokens, device=place)[None]
        self.masks = 0  # bytes that the layers share
        self.context = LayerContext(positions, documents, prefix=job.model.meta_tokens, once=Once())

    def embed(self) -> Passes:
        """Has no input with a gradient."""
        words_BT = self._words()
        return self._passes(lambda _: self.decoder.embedding(words_BT), tokens=0)[0]

    def layer(self, layer: nn.Module, spec: LayerSpec, shared: dict[int, KeyValue]) -> tuple[Passes, KeyValue | None]:
        """shared: keys and values of earlier layers. Returns those of this one, if others use them."""
        context = replace(self.context, kv=None if spec.kv_from is None else shared[spec.kv_from])
        if self.job.masked or spec.window is not None:
            self._make_masks(lambda x_BTD: layer(x_BTD, context))
        passes, kv = self._passes(lambda x_BTD: layer(x_BTD, context))
        return passes, kv if spec.shares else None

    def _make_masks(self, run: Callable[[Tensor], Any]) -> None:
        """What the layers of a forward make only once, they find from here on."""
        with LiveBytes() as live, torch.no_grad():
            run(torch.empty(self.shape, dtype=self.job.precision.dtype, device=self.place))
            self.masks += live.now

    def head(self) -> Passes:
        """Final norm, products with the head's weight and loss."""
        prefix, loss = self.job.model.meta_tokens, loss_of(self.job, self.decoder, self._words().flatten())

        def forward(x_BTD: Tensor) -> Tensor:
            hidden_BTD = self.decoder.final_norm(x_BTD)[:, prefix:]
            return self.decoder.with_head_weight(loss, hidden_BTD.flatten(0, 1))

        return self._passes(forward)[0]

    def norm(self) -> Passes:
        """Final norm alone."""
        return self._passes(self.decoder.final_norm)[0]

    def _passes(self, run: Callable[[Tensor], Any], tokens: int | None = None) -> tuple[Passes, KeyValue | None]:
        batch, length, width = self.shape
        shape = (batch, length if tokens is None else tokens, width)
        leaf = torch.empty(shape, dtype=self.job.precision.dtype, device=self.place, requires_grad=True)
        with LiveBytes() as live, torch.set_grad_enabled(not self.frozen):
            result = run(leaf.clone())  # not a leaf: freed unless the unit keeps it
            output, kv = result if isinstance(result, tuple) else (result, None)
            size, forward = _bytes(output), live.most
            if self.frozen:
                return Passes(_bytes(leaf), size, live.now - size, forward, 0), kv
            edge, gradient = get_gradient_edge(output), torch.empty_like(output)
            del result, output
            kept = live.now - size  # the gradient of the output is as large as the output
            live.restart()
            torch.autograd.backward([edge], [gradient])
            backward = live.most
        return Passes(_bytes(leaf), size, kept, forward, backward), None if kv is None else _like(kv)

    def _words(self) -> Tensor:
        return torch.empty(self.job.micro_batch, self.text, dtype=torch.int64, device=self.place)


def _unit(name: str, modules: list[nn.Module], passes: Passes) -> Unit:
    shapes = tuple(tuple(parameter.shape) for module in modules for parameter in module.parameters())
    kept = {id(p): p.numel() for module in modules for part in fp32_modules(module) for p in part.parameters()}
    return Unit(name, shapes, sum(kept.values()), passes)


def _with(unit: Unit, size: int) -> Unit:
    """`unit`, which also makes `size` bytes that live until its backward is done."""
    p = unit.passes
    more = replace(p, kept=p.kept + size, forward=p.forward + size, backward=p.backward + size)
    return replace(unit, passes=more)


def _kinds(layer: nn.Module) -> tuple[str, ...]:
    """FP8 layers are traced apart from those that stay in bf16."""
    return tuple(type(module).__name__ for module in layer.modules())


def _like(kv: KeyValue) -> KeyValue:
    """Keys and values that another layer's backward reaches."""
    key, value = (torch.empty_like(x, requires_grad=True) for x in (kv.key_BGSK, kv.value_BGSV))
    return KeyValue(key, value)


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _numbers(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
