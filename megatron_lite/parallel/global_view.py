"""Local shard <-> global tensor: which slice of a named global tensor a rank holds.

A checkpoint knows only global names and global shapes. Every rank describes what it holds as `Piece`s: a
plain local tensor, the shape of the global tensor, and how the global tensor was cut. Saving writes each shard once (ranks
with copies share the work), and loading fills each shard from the slices in the files. No other resharding code is needed.

Notable features
- No mesh, no DTensor, no process group: three pairs of numbers (`Layout`) define the rank; in a single process all degrees
  are 1. A piece may be on any device (CPU staging and CPU offload beside
  a mesh of GPUs).
- Tensor parallelism cuts first, data parallelism cuts the rows of what is left: what FSDP2 does to the
  local parameters of a tensor-parallel module. DTensor writes it [_StridedShard(0, split_factor=tp),
  Shard(0)], [Shard(0), Shard(1)] or [Shard(0), Replicate()]; the tests compare this file with it.
- The cuts alone determine the shards (`shards_within`), so no list of shards is stored.

A dimension of n rows cut c ways is cut as `torch.chunk` does: part i is rows
[min(i s, n), min((i + 1) s, n)) with s = ceil(n / c). The last parts may be shorter or empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.device_mesh import DeviceMesh

Region = tuple[tuple[int, ...], tuple[int, ...]]  # (offsets, sizes), one number a dimension


def chunk_bounds(length: int, parts: int, index: int) -> tuple[int, int]:
    """[start, end) of part `index` of `length` rows cut into `parts`, as `torch.chunk` and FSDP2 cut."""
    size = -(-length // parts)
    return min(index * size, length), min((index + 1) * size, length)


@dataclass(frozen=True)
class Cut:
    """Part `index` of the `parts` along dimension `dim`; `axis` names the ranks that hold the parts."""

    dim: int
    parts: int
    index: int
    axis: str


def cut_region(shape: Sequence[int], cuts: Sequence[Cut]) -> Region:
    """The slice of a tensor of `shape` that is left after the cuts, one after the other."""
    offsets, sizes = [0] * len(shape), list(shape)
    for cut in cuts:
        start, end = chunk_bounds(sizes[cut.dim], cut.parts, cut.index)
        offsets[cut.dim] += start
        sizes[cut.dim] = end - start
    return tuple(offsets), tuple(sizes)


def shard_index(cuts: Sequence[Cut]) -> int:
    """The number of a shard among all shards that the same cuts make: the last cut counts fastest."""
    index = 0
    for cut in cuts:
        index = index * cut.parts + cut.index
    return index


def shards_within(shape: Sequence[int], cuts: Sequence[Sequence[int]], within: Region) -> Iterator[tuple[int, Region]]:
    """The shards of a tensor of `shape` that have elements in the slice `within`, as (`shard_index`, region).

    cuts: (dim, parts) in order. The time grows with the number of shards found, not with how many there are.
    """
    return _shards([tuple(cut) for cut in cuts], [0] * len(shape), list(shape), within, 0)


def _shards(
    cuts: list[tuple[int, ...]], offsets: list[int], sizes: list[int], within: Region, index: int
) -> Iterator[tuple[int, Region]]:
    """The shards in the box (offsets, sizes), which the cuts already applied have numbered `index`."""
    if not all(sizes) or not all(within[1]):
        return
    if not cuts:
        starts = map(max, offsets, within[0])
        ends = map(min, map(sum, zip(offsets, sizes)), map(sum, zip(*within)))
        if all(start < end for start, end in zip(starts, ends)):
            yield index, (tuple(offsets), tuple(sizes))
        return
    dim, parts = cuts[0]
    size = -(-sizes[dim] // parts)
    low, high = within[0][dim] - offsets[dim], within[0][dim] + within[1][dim] - offsets[dim]
    for part in range(max(0, low) // size, -(-min(high, sizes[dim]) // size)):
        start, end = chunk_bounds(sizes[dim], parts, part)
        narrowed, begin = sizes.copy(), offsets.copy()
        narrowed[dim], begin[dim] = end - start, offsets[dim] + start
        yield from _shards(cuts[1:], begin, narrowed, within, index * parts + part)


@dataclass(frozen=True)
class Piece:
    """This rank's shard of a global tensor.

    local: the plain tensor with the values, on any device, with any strides; loading writes into it. Or a function that
        makes it when it is written, for tensors that would not fit into memory together: then `dtype` must be given.
    global_shape: the shape of the whole tensor.
    cuts: how the global tensor was cut, in order.
    copy, copies: this rank is number `copy` of the `copies` ranks that hold the same shard; they share the writing.
    replica: other tensor-parallel ranks hold the same shard and must hold the same bytes (checked when saving).
    """

    local: torch.Tensor | Callable[[], torch.Tensor]
    global_shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    dtype: torch.dtype | None = None
    copy: int = 0
    copies: int = 1
    replica: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.local, torch.Tensor):
            self._check(self.local)
            object.__setattr__(self, "dtype", self.local.dtype)
        elif not callable(self.local) or self.dtype is None:
            raise TypeError("a Piece takes a plain local tensor, or a function that makes it and its dtype")

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Piece:
        """The whole tensor on this rank."""
        return cls(tensor, tuple(tensor.shape))

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where in the global tensor the shard begins, one number a dimension."""
        return cut_region(self.global_shape, self.cuts)[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of the shard."""
        return cut_region(self.global_shape, self.cuts)[1]

    def tensor(self) -> torch.Tensor:
        """The local tensor; made now if it is made when needed."""
        if isinstance(self.local, torch.Tensor):
            return self.local
        made = self.local()
        self._check(made)
        if made.dtype != self.dtype:
            raise ValueError(f"a tensor of {made.dtype} was made where {self.dtype} was announced")
        return made

    def with_local(self, local: torch.Tensor) -> Piece:
        """The same shard with another tensor (a staging buffer)."""
        return replace(self, local=local)

    def _check(self, local: torch.Tensor) -> None:
        if type(local) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"a Piece takes a plain local tensor, not a {type(local).__name__}; use .to_local()")
        if tuple(local.shape) != self.sizes:
            raise ValueError(
                f"a local tensor of shape {tuple(local.shape)} is not the shard {self.sizes} of {self.global_shape} "
                f"({self.cuts})"
            )


@dataclass(frozen=True)
class State:
    """All that an engine must keep to continue: this rank's shards by global name, and its counters (`adam_step`)."""

    tensors: dict[str, Piece]
    counters: dict[str, int]


@dataclass(frozen=True)
class Layout:
    """This rank's coordinates: its place among the tensor-parallel ranks and among the ranks that shard the
    data axis; and which of the replicas of that sharded model (HSDP) it belongs to.
    """

    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    replica_rank: int = 0
    replica_size: int = 1

    def __post_init__(self) -> None:
        for axis in ("dp", "tp", "replica"):
            rank, size = getattr(self, f"{axis}_rank"), getattr(self, f"{axis}_size")
            if not 0 <= rank < size:
                raise ValueError(f"{axis}_rank={rank} is not one of {axis}_size={size} ranks")

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh | None) -> Layout:
        """The place of this rank in a mesh with the axes dp_replicate, dp_shard and tp; an absent one has size 1.

        No mesh: one process.
        """
        if mesh is None:
            return cls()
        place = {
            name: (mesh.get_local_rank(index), mesh.size(index)) for index, name in enumerate(mesh.mesh_dim_names or ())
        }
        return cls(*place.get("dp_shard", (0, 1)), *place.get("tp", (0, 1)), *place.get("dp_replicate", (0, 1)))

    def box(self, global_shape: Sequence[int], *, tp_dim: int | None = None, dp_sharded: bool = True) -> Region:
        """(offsets, sizes) of this rank's shard: divided along `tp_dim` over tp, then along dimension 0 over dp."""
        return cut_region(global_shape, self.cuts(global_shape, tp_dim=tp_dim, dp_sharded=dp_sharded))

    def cuts(
        self, global_shape: Sequence[int], *, tp_dim: int | None = None, dp_sharded: bool = True
    ) -> tuple[Cut, ...]:
        """The cuts that make this rank's shard. A scalar is never cut.

        Raises ValueError when the tensor has no dimension `tp_dim`.
        """
        if tp_dim is not None and not 0 <= tp_dim < len(global_shape):
            raise ValueError(f"tp_dim={tp_dim} is not a dimension of a tensor of shape {tuple(global_shape)}")
        cuts = [] if tp_dim is None else [Cut(tp_dim, self.tp_size, self.tp_rank, "tp")]
        if dp_sharded and len(global_shape):
            cuts.append(Cut(0, self.dp_size, self.dp_rank, "dp"))
        return tuple(cut for cut in cuts if cut.parts > 1)

    def piece(
        self,
        local: torch.Tensor | Callable[[], torch.Tensor],
        global_shape: Sequence[int],
        *,
        tp_dim: int | None = None,
        dp_sharded: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Piece:
        """Describe `local`, this rank's part of a tensor of `global_shape`.

        tp_dim: the dimension tensor parallelism cut, None when every tp rank holds all of it.
        dp_sharded: FSDP2 or ZeRO cut the rows that tensor parallelism left; False when every dp rank holds
            all of them.
        dtype: needed when `local` is a function, see `Piece`.
        Raises ValueError when `local` does not have the shape that this layout gives it.
        """
        cuts = self.cuts(global_shape, tp_dim=tp_dim, dp_sharded=dp_sharded)
        cut_axes = {cut.axis for cut in cuts}
        copy, copies = 0, 1
        for axis in ("replica", "dp", "tp"):
            if axis not in cut_axes:
                size = getattr(self, f"{axis}_size")
                copy, copies = copy * size + getattr(self, f"{axis}_rank"), copies * size
        return Piece(
            local,
            tuple(global_shape),
            cuts,
            dtype,
            copy=copy,
            copies=copies,
            replica=tp_dim is None and self.tp_size > 1,
        )
