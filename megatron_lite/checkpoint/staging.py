"""CPU copies of the pieces of a background save, in buffers that are used again by the next one."""

from __future__ import annotations

import torch

from megatron_lite.parallel.global_view import Piece


class Staging:
    """Buffers by tensor name; pinned for tensors that lie on a GPU, so that the copies overlap each other."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, pieces: dict[str, Piece]) -> dict[str, Piece]:
        """The pieces with their values copied; done when this returns, so training may write on."""
        on_gpu = False
        staged = {}
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if name in pieces}
        for name, piece in pieces.items():
            source = piece.local.detach()
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(source, non_blocking=source.is_cuda)
            on_gpu |= source.is_cuda
            staged[name] = piece.with_local(buffer)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return staged
