"""State-space layers on a divided sequence against the whole sequence in one process: values, all gradients, bytes sent, planted bugs.

Whole models are in `tests/engine/test_context_parallel.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.models.conv import CausalConv
from megatron_lite.models.hymba import SelectiveStateSpace
from megatron_lite.models.mamba import StateSpace
from megatron_lite.models.scan import Operands, Past
from megatron_lite.parallel import context_scan, slice_collectives
from megatron_lite.parallel.context_scan import (
    ContextParallelConv,
    ContextParallelScan,
    ContextParallelSelectiveScan,
    Division,
    Slice,
)
from megatron_lite.parallel.reclass import reclass
from megatron_lite.parallel.recompute import recompute_layer
from megatron_lite.parallel.sequence_slices import ContextParallel, cut, shard_sequence
from tests.distributed import run_ranks

TAPS, SIZES, STRONGEST = 4, (2, 3, 4), 60.0
MIXINS = {"conv": ContextParallelConv, "mamba2": ContextParallelScan, "mamba1": ContextParallelSelectiveScan}


@dataclass(frozen=True)
class Case:
    """length: of a slice. prefix: meta tokens. packed: rows of several documents. dtype: of what a model computes in low precision."""

    kind: str
    length: int = 7
    prefix: int = 0
    packed: bool = True
    dtype: torch.dtype = torch.float64

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


def cases(kind: str, size: int) -> list[Case]:
    fitting = [Case(kind, prefix=prefix, packed=packed) for prefix in (0, 5) for packed in (True, False)]
    short = Case(kind, TAPS - 1, 1)  # slices that are all halo, and a prefix that does not fill one
    return [*fitting, short] + ([Case(kind, 70, 2)] if size == 2 else [])  # 70: more than a chunk of tokens


def documents_of(slices: int, length: int) -> Tensor:
    """A row for each thing that may go wrong with documents, (rows, T)."""
    borders = [number * length for number in range(1, slices)]
    layouts: list[list[int]] = [
        [],
        list(range(1, slices * length)),  # documents of one token
        borders,
        [border + 1 for border in borders],
        [border - 1 for border in borders],  # shorter than the halo
        [border - 2 for border in borders] + borders,  # two of them in the halo
        [1, 2, 3 * length + 2],  # one that lasts over slices
    ]
    begins_BT = torch.zeros(len(layouts), slices * length, dtype=torch.long)
    for row, layout in enumerate(layouts):
        begins_BT[row, layout] = 1
    return 3 + begins_BT.cumsum(1)


def leaves_of(case: Case, rows: int, length: int) -> dict[str, Tensor]:
    """Everything that gets a gradient, with whole sequences (prefix and text). dt A goes down to -STRONGEST, mostly far less."""
    draw, tokens = torch.Generator().manual_seed(0), (rows, case.prefix + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(case.dtype).requires_grad_()

    if case.kind == "conv":
        return {"x": normal(*tokens, 5), "weight": normal(5, 1, TAPS), "bias": normal(5)}
    channels, rates, read = {"mamba2": ((6, 3), (6,), (2, 4)), "mamba1": ((5,), (5, 3), (3,))}[case.kind]
    dt = torch.rand(*tokens, channels[0], generator=draw, dtype=torch.float64) ** 4
    dt[:, length // 2] = 1.0
    A = -2.0 * torch.rand(*rates, generator=draw, dtype=torch.float64)
    A[0] = -STRONGEST
    return {
        "x": normal(*tokens, *channels),
        "dt": dt.to(case.wide).requires_grad_(),
        "A": A.to(case.wide).requires_grad_(),
        "B": normal(*tokens, *read),
        "C": normal(*tokens, *read),
    }


def outputs(
    case: Case, leaves: dict[str, Tensor], documents: Tensor | None, cp: ContextParallel | None = None
) -> Tensor:
    """y of whole sequences, or of a rank's part of them."""
    module: nn.Module = {
        "conv": lambda: CausalConv(5, TAPS),
        "mamba2": lambda: StateSpace(6, None),
        "mamba1": lambda: SelectiveStateSpace(5, 3),
    }[case.kind]()
    here, rows = dict(leaves), len(leaves["x"])
    if cp is not None:
        reclass(module, MIXINS[case.kind], cp=cp)
        of_tokens = {"x", "dt", "B", "C"} & leaves.keys()
        here |= {name: part_of(leaves[name], case.prefix, cp) for name in of_tokens}
        if documents is not None:
            documents = shard_sequence({"tokens": documents, "documents": documents}, cp)["documents"]
    if documents is not None:
        first = documents[:, :1] if cp is None else torch.zeros(rows, 1, dtype=torch.long)
        documents = torch.cat([first.expand(-1, case.prefix), documents], dim=1)
    if case.kind == "conv":
        x = here.pop("x")
        return torch.func.functional_call(module, here, (x, None, documents), {"prefix": case.prefix})[0]
    return module.scan(Operands(**here), Past(None, documents, case.prefix))[0]  # type: ignore[operator]


def part_of(whole: Tensor, prefix: int, cp: ContextParallel) -> Tensor:
    return torch.cat([whole[:, :prefix], cut(whole[:, prefix:], cp)], dim=1)


def errors(case: Case, cp: ContextParallel) -> dict[str, float]:
    """How far this rank's y and the sum of the ranks' gradients are from the whole sequence's, of their largest entries."""
    documents = documents_of(2 * cp.size, case.length)
    rows, length = documents.shape
    whole, divided = leaves_of(case, rows, length), leaves_of(case, rows, length)
    if not case.packed:
        documents = None
    y = outputs(case, whole, documents)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * weights).sum().backward()
    part = outputs(case, divided, documents, cp)
    share = part_of(weights, case.prefix, cp)
    share[:, : case.prefix] *= 2 * (cp.rank + 1) / (cp.size * (cp.size + 1))  # the ranks' shares of the prefix sum to 1
    (part * share).sum().backward()
    found = {"y": off(part, part_of(y, case.prefix, cp), of=y)}
    for name, leaf in divided.items():
        total = leaf.grad.to(case.wide)
        dist.all_reduce(total, group=cp.group)
        found[name] = off(total, whole[name].grad, of=whole[name].grad)
    return found


def off(got: Tensor, wanted: Tensor, *, of: Tensor) -> float:
    error = ((got.double() - wanted.double()).abs().max() / of.abs().max()).item()
    return error if error < float("inf") else float("inf")  # also of NaN


def place(rank: int, size: int) -> ContextParallel | None:
    """This rank's place in a group of the first `size` ranks; every rank has to ask."""
    group = dist.new_group(list(range(size)))
    return ContextParallel(rank, size, group) if rank < size else None


# ------------------------------------------------------------------ what the ranks do


def all_cases(rank: int, world_size: int) -> dict[str, float]:
    """The largest error of each case."""
    found = {}
    with mock.patch("megatron_lite.models.ssd.SEGMENT", 32):
        for size in SIZES:
            cp = place(rank, size)
            for case in [case for kind in MIXINS for case in cases(kind, size)] if cp else ():
                found[f"{case} on {size} ranks"] = max(errors(case, cp).values())
    return found


def low_precision(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    cp = ContextParallel(rank, world_size, dist.group.WORLD)
    found = {kind: errors(Case(kind, prefix=5, dtype=torch.bfloat16), cp) for kind in MIXINS}
    return found | {"conv without a prefix": errors(Case("conv", dtype=torch.bfloat16), cp)}


def bugs() -> dict[str, tuple[str, Any]]:
    """What is planted: name -> (its kind of layer, what to patch and with what)."""
    slices, passing, before = Division.slices, context_scan.entering_states, context_scan.preceding
    inputs = context_scan._inputs_before

    def with_slices(change: Any) -> Any:
        return mock.patch.object(Division, "slices", lambda *a: [change(of) for of in slices(*a)])

    leak = with_slices(lambda of: Slice(of.documents_BT, of.before_B.clamp(min=3), of.passes_B))
    return {
        "a state leaks at a border": ("mamba2", leak),
        "a state leaks through a document": (
            "mamba1",
            with_slices(lambda of: Slice(of.documents_BT, of.before_B, of.passes_B | True)),
        ),
        "documents of the past count": ("mamba2", mock.patch.object(Slice, "in_last_BT", None)),
        "decay applied twice": (
            "mamba2",
            mock.patch.object(context_scan, "entering_states", lambda d, s, cp: passing(d * d, s, cp)),
        ),
        "no gradient through the state": (
            "mamba1",
            mock.patch.object(context_scan, "entering_states", lambda *a: passing(*a).detach()),
        ),
        "halo from the wrong neighbor": (
            "conv",
            mock.patch.object(context_scan, "preceding", lambda ends, cp: before(ends.flip(0), cp)),
        ),
        "halo off by one": (
            "conv",
            mock.patch.object(context_scan, "preceding", lambda ends, cp: before(ends.roll(1, 2), cp)),
        ),
        "documents of the halo ignored": ("conv", leak),
        "the prefix forgotten at a border": (
            "conv",
            mock.patch.object(context_scan, "_inputs_before", lambda of, halo, start: inputs(of, halo, 0 * start)),
        ),
    }


def planted(rank: int, world_size: int) -> dict[str, float]:
    cp = ContextParallel(rank, world_size, dist.group.WORLD)
    found = {}
    for name, (kind, patch) in bugs().items():
        with patch:
            found[name] = max(errors(Case(kind, prefix=5), cp).values())
    return found


def sent(rank: int, world_size: int) -> dict[str, list[list[tuple[str, int]]]]:
    """(collective, bytes given to it) in forward and backward, for two lengths and with recompute."""
    cp = ContextParallel(rank, world_size, dist.group.WORLD)
    found: dict[str, list[list[tuple[str, int]]]] = {}
    for kind in MIXINS:
        for length, recompute in ((7, "none"), (150, "none"), (7, "selective"), (7, "full")):
            case, calls, layer = Case(kind, length, packed=False), [], Layer()
            recompute_layer(layer, recompute, divided=True)
            with mock.patch.object(slice_collectives, "_c10d", Recorder(calls)):
                layer(case, leaves_of(case, 1, 2 * cp.size * length), cp).sum().backward()
            found.setdefault(kind, []).append(calls)
    return found


class Layer(nn.Module):
    def forward(self, case: Case, leaves: dict[str, Tensor], cp: ContextParallel) -> Tensor:
        return outputs(case, leaves, None, cp)


class Recorder:
    """Functional collectives that note what they are given."""

    def __init__(self, calls: list[tuple[str, int]]) -> None:
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        def call(x: Tensor, *arguments: Any) -> Tensor:
            if name != "wait_tensor":
                self.calls.append((name, x.nbytes))
            return getattr(torch.ops._c10d_functional, name)(x, *arguments)

        return call


# ------------------------------------------------------------------ tests


def test_slices_equal_the_whole_sequence_in_float64() -> None:
    for rank, found in enumerate(run_ranks(max(SIZES), all_cases)):
        assert rank > 1 or len(found) > 40
        for case, error in found.items():
            assert error <= 1e-12, f"rank {rank}: {case} is off by {error:.1e}"


def test_slices_in_bf16() -> None:
    """y of a scan is fp32 and of the same bf16 inputs; a bf16 gradient is rounded once, and its halo's share once more. A convolution's y
    is bf16: where a document begins behind meta tokens it is one sum on a border, and two that are rounded elsewhere."""
    for found in run_ranks(2, low_precision):
        assert found["conv without a prefix"]["y"] == 0.0
        for kind, of_kind in found.items():
            for name, error in of_kind.items():
                in_fp32 = name in ("dt", "A") or (name == "y" and "conv" not in kind)
                assert error <= (1e-6 if in_fp32 else 2**-7), found


def test_planted_bugs_are_found() -> None:
    ranks = run_ranks(2, planted)
    for name in bugs():
        assert max(found[name] for found in ranks) > 1e-3, name


def test_what_is_sent_does_not_depend_on_the_length_and_is_not_sent_again() -> None:
    number, state = 8, {"mamba2": (6 * 3 * 4, 6), "mamba1": (5 * 3, 5 * 3)}  # bytes of a number; states and decays
    for rank, found in enumerate(run_ranks(2, sent)):
        for kind, (short, *others) in found.items():
            assert others == [short] * 3, "a longer sequence, selective and full recompute"
            if kind == "conv":
                trades = [("all_to_all_single", (1 if rank == 0 else 2) * (TAPS - 1) * 5 * number)]
                assert short == trades * 2
            else:
                states, decays = state[kind]
                gathers = [2 * (states + decays) * number, 2 * states * number]
                assert short == [("all_gather_into_tensor", size) for size in gathers]


@pytest.mark.parametrize("kind", MIXINS)
def test_shapes_on_the_meta_device(kind: str) -> None:
    """The planner's decoders are there, and communicate with nobody."""
    cp, case = ContextParallel(1, 2, None), Case(kind, prefix=5)
    with torch.device("meta"):
        leaves = {name: leaf.to("meta") for name, leaf in leaves_of(case, 2, 28).items()}
        assert outputs(case, leaves, None, cp).shape == leaves["x"][:, : 5 + 14].shape


def test_every_part_is_scanned_from_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix too, whose last state gets gradients: a scan without a state may be a kernel's that has none of these."""
    monkeypatch.setattr(context_scan, "entering_states", lambda decays, states, cp: torch.zeros_like(states))
    case, pasts = Case("mamba1", prefix=5, packed=False), []
    right = SelectiveStateSpace.scan
    monkeypatch.setattr(SelectiveStateSpace, "scan", lambda self, o, past: pasts.append(past) or right(o, past))
    outputs(case, leaves_of(case, 2, 4 * case.length), None, ContextParallel(0, 2, None))
    assert [past.state is not None for past in pasts] == [True] * 3


def test_a_slice_shorter_than_the_halo_is_refused() -> None:
    case = Case("conv", TAPS - 2)
    with pytest.raises(ValueError, match=r"parallel\.cp=2 .* 2 tokens.*model\.mamba\.conv=4"):
        outputs(case, leaves_of(case, 1, 4 * case.length), None, ContextParallel(0, 2, None))
