"""Pieces <-> safetensors files, through `torch.distributed.checkpoint` (DCP).

Notable features
- DCP plans who writes which box (replicas once, balanced over the ranks) and which boxes fill which on
  loading, and reads them with its safetensors storage. Its default storage would `pickle.load` a
  `.metadata` file and is not used.
- The writer's stream hashes what the program meant to write, not what the disk gives back.
- Only files that the manifest names are opened.
- A rank's tensors go to several files of about `file_bytes`, so that the ranks can share the verifying, and
  one kind (`model`, `exp_avg`, ...) apart from the other, so that whoever reads weights leaves the
  optimizer's files alone.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_lite.checkpoint.safetensors_file import write_safetensors
from megatron_lite.errors import CheckpointError, error_text
from megatron_lite.parallel.global_view import Piece

OpenStream = Callable[[Path], BinaryIO]
FileEntries = dict[str, dict[str, Any]]

_BLOCK = 16 * 2**20


def open_for_writing(path: Path) -> BinaryIO:
    """How a checkpoint's file is opened; the store takes another opener (a test's slow or full disk)."""
    return open(path, "wb")


def write_pieces(
    path: Path,
    pieces: dict[str, Piece],
    *,
    group: dist.ProcessGroup | None,
    file_bytes: int,
    open_stream: OpenStream = open_for_writing,
) -> FileEntries:
    """Write this rank's share of `pieces` below `path`, fsynced. Collective over `group`.

    Returns {file name: {size, sha256}} of the files this rank wrote, hashed from memory.
    Raises CheckpointError on every rank when one of them fails.
    """
    world_size = 1 if group is None else dist.get_world_size(group)
    files = _HashingFileSystem(open_stream)
    writer = _Writer(path, _buckets(pieces, file_bytes * world_size), files)
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _plain_errors("write"):
        dcp.save(pieces, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    return files.written


def read_pieces(path: Path, pieces: dict[str, Piece], *, files: Iterable[str], group: dist.ProcessGroup | None) -> None:
    """Fill the local tensors of `pieces` in place from the named files below `path`. Collective over `group`.

    Raises CheckpointError on every rank when one of them fails or finds rows of a piece in no file.
    """
    reader = _Reader(path, files)
    with _plain_errors("read"):
        dcp.load(
            dict(pieces),
            storage_reader=reader,
            planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )


@contextmanager
def _plain_errors(phase: str) -> Generator[None, None, None]:
    """DCP's exception is a BaseException full of tracebacks; a lost rank is gloo's RuntimeError."""
    # an exact message about the very thing we ask for; catch_warnings would not be safe beside another thread
    warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled, unavailable or uninitialized")
    try:
        yield
    except CheckpointException as error:
        texts = [f"rank {rank}: {error_text(exc)}" for rank, (exc, _) in sorted(error.failures.items())]
        raise CheckpointError("; ".join(texts)) from None
    except RuntimeError as error:
        raise CheckpointError(f"the ranks lost each other in phase '{phase}': {error}") from error


def _buckets(pieces: dict[str, Piece], bucket_bytes: int) -> dict[str, int]:
    """Tensor name -> number of its file, from 1."""
    buckets: dict[str, int] = {}
    number, kind, filled = 0, None, 0
    for name in sorted(pieces):
        size = math.prod(pieces[name].global_shape) * pieces[name].local.element_size()
        if name.split(".")[0] != kind or filled + size > bucket_bytes:
            number, kind, filled = number + 1, name.split(".")[0], 0
        buckets[name] = number
        filled += size
    return buckets


class _HashingStream:
    """A file that hashes what is written to it before it is handed to the disk."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.size = 0
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK):  # small enough for other threads to have their turn
            block = view[start : start + _BLOCK]
            self.hash.update(block)
            self.raw.write(block)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.raw.flush()

    def fileno(self) -> int:
        self.raw.flush()
        return self.raw.fileno()

    def close(self) -> None:
        self.raw.close()


class _HashingFileSystem(FileSystem):
    def __init__(self, open_stream: OpenStream) -> None:
        self.open_stream = open_stream
        self.written: FileEntries = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        with self.open_stream(Path(path)) as raw:
            stream = _HashingStream(raw)
            yield stream
        self.written[Path(path).name] = {"size": stream.size, "sha256": stream.hash.hexdigest()}


class _ManifestFileSystem(FileSystem):
    """Sees the files of the manifest and nothing else in a directory."""

    def __init__(self, files: Iterable[str]) -> None:
        self.files = sorted(files)

    def ls(self, path: Any) -> list[str]:
        return [str(Path(path) / name) for name in self.files]


class _Writer(HuggingFaceStorageWriter):
    def __init__(self, path: Path, buckets: dict[str, int], files: _HashingFileSystem) -> None:
        super().__init__(str(path), fqn_to_index_mapping=buckets, save_distributed=True)
        self.fs = files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        rank = plan.storage_data["shard_index"] - 1
        with _picklable_errors():
            files = self._split_by_storage_plan(self.fqn_to_index_mapping, plan.items)
            for number, items in sorted(files.items()):
                boxes: dict[str, Any] = {
                    item.index.fqn: (planner.resolve_data(item), tuple(item.index.offset or ())) for item in items
                }
                path = Path(self.path) / f"rank-{rank:05d}-{number:05d}.safetensors"
                with self.fs.create_stream(path, "wb") as stream:
                    write_safetensors(stream, boxes, metadata={"format": "pt"})
                    stream.flush()
                    os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result([])  # the headers say where every box lies
        return done


class _Reader(HuggingFaceStorageReader):
    def __init__(self, path: Path, files: Iterable[str]) -> None:
        super().__init__(str(path))
        self.fs = _ManifestFileSystem(files)

    def read_metadata(self) -> Metadata:
        with _picklable_errors():
            return super().read_metadata()

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with _picklable_errors():
            return super().read_data(plan, planner)


@contextmanager
def _picklable_errors() -> Generator[None, None, None]:
    """DCP sends exceptions between ranks by pickle; one that cannot travel would leave the others waiting."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(error_text(error)) from None


class _SavePlanner(DefaultSavePlanner):
    """Plans the boxes of `Piece`s, without the empty ones, which share their offsets with full ones."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, piece in self.state_dict.items():
            if piece.local.numel() == 0 and math.prod(piece.global_shape) > 0:
                continue
            chunk = ChunkStorageMetadata(torch.Size(piece.offsets), piece.local.size())
            data = TensorWriteData(
                chunk, TensorProperties.create_from_tensor(piece.local), torch.Size(piece.global_shape)
            )
            items.append(WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].local.detach()


class _LoadPlanner(DefaultLoadPlanner):
    """Plans which boxes of the files fill this rank's boxes, and sees that they fill them whole."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        requests: list[ReadItem] = []
        for name, piece in self.state_dict.items():
            if piece.local.numel() == 0:
                continue
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise CheckpointError(f"no file of the checkpoint holds the tensor {name!r}")
            chunk = ChunkStorageMetadata(torch.Size(piece.offsets), piece.local.size())
            items = create_read_items_for_chunk_list(name, saved, [chunk])
            found = sum(math.prod(item.lengths) for item in items)
            if found != piece.local.numel():
                raise CheckpointError(
                    f"the files hold {found} of the {piece.local.numel()} numbers of {name!r} that this rank needs"
                )
            requests += items
        return LoadPlan(requests)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].local.detach()
