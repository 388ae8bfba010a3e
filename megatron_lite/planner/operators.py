"""Records what a forward and a backward pass run: every kernel with its FLOPs and bytes, every collective with its bytes.

The passes run on the meta device, so what is recorded holds for every layer type, layout and recompute mode by construction: the
operators are those that training would dispatch, and there is no second list of them.

- A matrix product counts 2 m n k FLOPs and reads and writes its three matrices.
- Attention counts 2 products forward and 5 backward (FlashAttention, arXiv 2205.14135, recomputes the scores), over the pairs of query
  and key that are seen.
- Everything else counts the bytes that it reads and writes. Under compilation, what lies between two products is one kernel: it
  reads what was there before, and writes what outlives it.
- FP8 operands are read, cast and written, transposed too (`fp8`).
- What a state-space scan runs is marked as such; its kernels say themselves how many FLOPs they compute (`scans`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.parallel.context_attention import CONTEXT_ATTENTION
from megatron_lite.planner.divided import SENT
from megatron_lite.planner.fp8 import CAST, PRODUCT
from megatron_lite.planner.scans import LAUNCH, MARK

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.addmm_: 1, _aten.bmm: 0, _aten.baddbmm: 1}  # where the left matrix is
_FORWARD = {_aten._scaled_dot_product_flash_attention, _aten._scaled_dot_product_efficient_attention}
_BACKWARD = {
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
}
_CONTEXT = (CONTEXT_ATTENTION.overloadpacket, torch.ops.mlite.context_attention_backward)
_LOOK_UPS = {_aten.embedding, _aten.index_select, _aten.gather, _aten.index}
_FREE = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.detach, _aten.lift_fresh}
_FREE |= {torch.ops._c10d_functional.wait_tensor}
_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp32"}


@dataclass(frozen=True)
class Kernel:
    """One kernel. kind: matmul | attention | scan | memory. dtype: bf16 | fp32 | fp8, of the units that multiply. of_scan: part of a
    state-space scan."""

    kind: str
    dtype: str
    flops: float
    bytes: float
    of_scan: bool = False


ROUNDS = "rounds"


@dataclass(frozen=True)
class Exchange:
    """One collective within a layer. axis: of the mesh. size: bytes of the whole tensor, which every rank has before or after.

    operation: torch's name of it, or ROUNDS, in which ranks send to each other beside the attention that is recorded before it.
    """

    operation: str
    axis: str
    size: float


Step = Kernel | Exchange


@dataclass(eq=False)
class Recorder(TorchDispatchMode):
    """Inside, what runs is appended to `steps`.

    axes: the size of groups whose collectives count, by name. seen: the part of all pairs of query and key that attention looks at. fuse:
    whether memory-bound kernels between two products are one. fp8_bytes: what casting an operand costs, for each of its numbers.
    """

    axes: Mapping[str, int] = field(default_factory=dict)
    seen: float = 1.0
    fuse: bool = False
    fp8_bytes: float = 0.0
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._read: dict[int, float] = {}  # of the kernel that is being fused
        self._written: dict[int, tuple[StorageWeakRef, float]] = {}
        self._in_scan = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, which costs nothing on meta, and record it."""
        result = operator(*args, **(kwargs or {}))
        self._record(operator, args, result)
        return result

    def take(self) -> list[Step]:
        """What was recorded since the last call."""
        self._flush()
        steps, self.steps = self.steps, []
        return steps

    def _record(self, operator: Any, args: Any, result: Any) -> None:
        packet = operator.overloadpacket
        if packet is MARK:
            self._flush()
            self._in_scan = args[1]
            return
        outputs = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor)]
        if packet in _FREE or not outputs:
            return
        given = list(leaves(args))
        inputs = [leaf for leaf in given if isinstance(leaf, Tensor)]
        axis = next((leaf for leaf in given if isinstance(leaf, str) and leaf in self.axes), None)
        if packet in _CONTEXT:
            self._divided_attention(inputs, outputs, packet is _CONTEXT[1])
            self._sent(ROUNDS, SENT[packet](args, self.axes["cp"]))
        elif packet in SENT:
            self._sent(packet.__name__, SENT[packet](args, self.axes["cp"]))
        elif axis is not None:
            self._exchange(packet.__name__, axis, max(_bytes(x) for x in (*inputs, *outputs)))
        elif packet in _PRODUCTS:
            left = args[_PRODUCTS[packet]]
            self._product(inputs, outputs[0], left, dtype=_DTYPES.get(left.dtype, "bf16"))
        elif packet is CAST:
            self._kernel("memory", "fp8", 0.0, self.fp8_bytes * inputs[0].numel())
        elif packet is PRODUCT:
            self._product(inputs[:2], outputs[0], inputs[0], dtype="fp8")
        elif packet is LAUNCH:
            reads, writes, flops = args
            self._kernel("scan", _DTYPES.get(reads[0].dtype, "bf16"), flops, sum(map(_bytes, (*reads, *writes))))
        elif packet in _FORWARD or packet in _BACKWARD:
            self._attention(inputs, outputs, packet in _BACKWARD)
        elif operator._schema.is_mutable or not {_key(x) for x in outputs} <= {_key(x) for x in inputs}:  # not a view
            self._memory(outputs if packet in _LOOK_UPS else inputs, outputs)

    def _product(self, inputs: list[Tensor], output: Tensor, left: Tensor, *, dtype: str) -> None:
        self._kernel("matmul", dtype, 2.0 * output.numel() * left.shape[-1], sum(map(_bytes, {*inputs, output})))

    def _attention(self, inputs: list[Tensor], outputs: list[Tensor], backward: bool) -> None:
        query, key, value = inputs[1:4] if backward else inputs[:3]
        scores = 2.0 * prod(query.shape[:3]) * key.shape[2] * self.seen
        widths = 3 * query.shape[3] + 2 * value.shape[3] if backward else query.shape[3] + value.shape[3]
        moved = sum(map(_bytes, inputs + outputs))
        self._kernel("attention", _DTYPES.get(query.dtype, "bf16"), scores * widths, moved)

    def _divided_attention(self, inputs: list[Tensor], outputs: list[Tensor], backward: bool) -> None:
        """Attention over a divided sequence, of which a rank computes its share of all pairs."""
        query, kv = inputs[1:3] if backward else inputs[:2]
        ranks, heads = self.axes["cp"], query.shape[3]
        widths = 3 * heads + 2 * (kv.shape[3] - heads) if backward else kv.shape[3]
        flops = 2.0 * prod(query.shape[:3]) * query.shape[2] * ranks * self.seen * widths
        moved = sum(map(_bytes, inputs + outputs))
        self._kernel("attention", _DTYPES.get(query.dtype, "bf16"), flops, moved)

    def _sent(self, operation: str, size: float) -> None:
        """A context-parallel rank sends `size` bytes."""
        ranks = self.axes["cp"]
        if size:
            self._exchange(operation, "cp", size * ranks / (ranks - 1))

    def _kernel(self, kind: str, dtype: str, flops: float, size: float) -> None:
        self._flush()
        self.steps.append(Kernel(kind, dtype, flops, size, self._in_scan))

    def _exchange(self, operation: str, axis: str, size: float) -> None:
        self._flush()
        self.steps.append(Exchange(operation, axis, size))

    def _memory(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if not self.fuse:
            self._kernel("memory", "", 0.0, sum(map(_bytes, inputs + outputs)))
            return
        for tensor in inputs:
            if _key(tensor) not in self._written:
                self._read[_key(tensor)] = _bytes(tensor)
        for tensor in outputs:
            before = (
                self._written[_key(tensor)][1] if _key(tensor) in self._written else 0.0
            )  # a part may be written again
            self._written[_key(tensor)] = StorageWeakRef(tensor.untyped_storage()), max(before, _bytes(tensor))

    def _flush(self) -> None:
        """End the kernel that is being fused: what nobody holds any more was never written."""
        moved = sum(self._read.values()) + sum(size for ref, size in self._written.values() if not ref.expired())
        if moved:
            self.steps.append(Kernel("memory", "", 0.0, moved, self._in_scan))
        self._read, self._written = {}, {}


@dataclass(frozen=True)
class Passes:
    """What a micro-batch runs."""

    forward: list[Step]
    backward: list[Step]


def record(recorder: Recorder, forward: Callable[[], Any]) -> tuple[Passes, Any]:
    """(the passes of `forward`, what it returned). Gradients arrive for every differentiable tensor that it returns; where there is none,
    backward is empty."""
    with recorder:
        result = forward()
    there = recorder.take()
    outputs = [leaf for leaf in leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if outputs:
        gradients = [torch.empty_like(output) for output in outputs]
        with recorder:
            torch.autograd.backward(outputs, gradients)
    return Passes(there, recorder.take()), result


def leaves(value: Any) -> Iterator[Any]:
    """What an operator takes or gives, lists and tuples opened. (torch's own `tree_leaves` would take a fifth of a trace.)"""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> float:
    """What a kernel that reads all of it moves: an expanded tensor is as large as its storage."""
    return float(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))
