"""Local shard <-> global tensor: which box of a named global tensor a rank holds.

A checkpoint knows only global names and global shapes. Every rank describes what it holds as `Piece`s: a
plain local tensor, the shape of the global tensor, and where in it the local one begins. Saving writes each
box once (replicas are dropped), loading fills each box from whatever boxes the files hold: that is all of
resharding.

Notable features
- No mesh, no DTensor, no process group: two pairs of numbers (`Layout`) say where a rank stands, so one
  process is the case (1, 1), and a piece may lie on any device (CPU staging and CPU offload beside a mesh
  of GPUs).
- Tensor parallelism cuts first, data parallelism cuts the rows of what is left: what FSDP2 does to the
  local parameters of a tensor-parallel module. DTensor writes it [_StridedShard(0, split_factor=tp),
  Shard(0)], [Shard(0), Shard(1)] or [Shard(0), Replicate()]; the tests hold this file against it.

A dimension of n rows cut c ways is cut as `torch.chunk` does: part i is rows
[min(i s, n), min((i + 1) s, n)) with s = ceil(n / c). The last parts may be shorter or empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh


def chunk_bounds(length: int, parts: int, index: int) -> tuple[int, int]:
    """[start, end) of part `index` of `length` rows cut into `parts`, as `torch.chunk` and FSDP2 cut."""
    size = -(-length // parts)
    return min(index * size, length), min((index + 1) * size, length)


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor, held by this rank.

    local: the plain tensor with the values; any device, any strides. Loading writes into it.
    global_shape: the shape of the whole tensor.
    offsets: where the box begins, one number a dimension.
    replica: other tensor-parallel ranks hold the same box and must hold the same bytes (checked when saving).
    """

    local: torch.Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    replica: bool = False

    def __post_init__(self) -> None:
        if type(self.local) not in (torch.Tensor, torch.nn.Parameter):
            kind = type(self.local).__name__
            raise TypeError(f"a Piece takes a plain local tensor, not a {kind}; use .to_local()")
        sizes, whole = tuple(self.local.shape), self.global_shape
        inside = len(sizes) == len(whole) == len(self.offsets) and all(
            start >= 0 and start + size <= length for start, size, length in zip(self.offsets, sizes, whole)
        )
        if not inside:
            raise ValueError(f"a box of shape {sizes} at {self.offsets} does not lie inside {whole}")

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Piece:
        """The whole tensor on this rank."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.dim())

    def with_local(self, local: torch.Tensor) -> Piece:
        """The same box with another tensor (a staging buffer)."""
        return Piece(local, self.global_shape, self.offsets, self.replica)


@dataclass(frozen=True)
class Layout:
    """Where this rank stands: its place among the tensor-parallel ranks and among the ranks that shard the
    data axis.

    HSDP replicas share a place; they are not named here, because replicas hold the same boxes.
    """

    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        for axis, rank, size in (("dp", self.dp_rank, self.dp_size), ("tp", self.tp_rank, self.tp_size)):
            if not 0 <= rank < size:
                raise ValueError(f"{axis}_rank={rank} is not one of {axis}_size={size} ranks")

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh | None, *, dp: str = "dp_shard", tp: str = "tp") -> Layout:
        """The place of this rank in a mesh whose axes are named `dp` and `tp`; an axis that is absent has
        size 1.

        Further axes (`dp_replicate`) hold replicas. No mesh: one process.
        """
        if mesh is None:
            return cls()
        place: dict[str, tuple[int, int]] = {}
        for index, name in enumerate(mesh.mesh_dim_names or ()):
            place[name] = (mesh.get_local_rank(index), mesh.size(index))
        dp_rank, dp_size = place.get(dp, (0, 1))
        tp_rank, tp_size = place.get(tp, (0, 1))
        return cls(dp_rank, dp_size, tp_rank, tp_size)

    def box(
        self, global_shape: Sequence[int], *, tp_dim: int | None = None, dp_sharded: bool = True
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(offsets, sizes) of this rank's box: cut along `tp_dim` over tp, then along dimension 0 over dp."""
        shape = tuple(global_shape)
        offsets, sizes = [0] * len(shape), list(shape)
        cuts = [] if tp_dim is None else [(tp_dim, self.tp_size, self.tp_rank)]
        if dp_sharded and shape:
            cuts.append((0, self.dp_size, self.dp_rank))
        for dim, parts, index in cuts:
            if not 0 <= dim < len(shape):
                raise ValueError(f"tp_dim={dim} is no dimension of a tensor of shape {shape}")
            start, end = chunk_bounds(sizes[dim], parts, index)
            offsets[dim] += start
            sizes[dim] = end - start
        return tuple(offsets), tuple(sizes)

    def piece(
        self,
        local: torch.Tensor,
        global_shape: Sequence[int],
        *,
        tp_dim: int | None = None,
        dp_sharded: bool = True,
    ) -> Piece:
        """Describe `local`, this rank's part of a tensor of `global_shape`.

        tp_dim: the dimension tensor parallelism cut, None when every tp rank holds all of it.
        dp_sharded: FSDP2 or ZeRO cut the rows that tensor parallelism left; False when every dp rank holds
            all of them.
        Raises ValueError when `local` has not the shape this layout gives it.
        """
        offsets, sizes = self.box(global_shape, tp_dim=tp_dim, dp_sharded=dp_sharded)
        if tuple(local.shape) != sizes:
            raise ValueError(
                f"a local tensor of shape {tuple(local.shape)} is not this rank's part {sizes} of "
                f"{tuple(global_shape)} (tp_dim={tp_dim}, dp_sharded={dp_sharded}, {self})"
            )
        return Piece(local, tuple(global_shape), offsets, replica=tp_dim is None and self.tp_size > 1)
