"""What is planned: a model, a layout and a batch, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_lite.engine.base import EngineConfig
from megatron_lite.models.config import ModelConfig
from megatron_lite.parallel.distillation_loss import DistillationWeights
from megatron_lite.parallel.mesh import Degrees, ParallelConfig
from megatron_lite.precision.dtypes import PrecisionConfig
from megatron_lite.precision.recipes import Precision


@dataclass(frozen=True)
class Teacher:
    """The frozen model of a distillation. dtype: in which it is kept and computes. weights: of the loss."""

    model: ModelConfig
    dtype: torch.dtype
    weights: DistillationWeights


@dataclass(frozen=True)
class Job:
    """A training step on `gpus` processes.

    seq_len: tokens of text in a sample. micro_batch, global_batch: samples of a data-parallel rank's micro-batch, and of all ranks'
    step. masked: attention restarts at documents (`data.reset_attention`). teacher: of a distillation. scan_kernels: state-space scans are
    computed by the libraries that can be installed for it, where these can.
    """

    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    precision: Precision
    gpus: int
    seq_len: int
    micro_batch: int
    global_batch: int
    masked: bool = False
    teacher: Teacher | None = None
    scan_kernels: bool = False

    @property
    def degrees(self) -> Degrees:
        """As training makes them: where the engine shards nothing, all data-parallel ranks are replicas."""
        degrees = self.parallel.degrees(self.gpus)
        if self.engine.replicates:
            return replace(degrees, dp_replicate=degrees.data_parallel, dp_shard=1)
        return degrees

    @property
    def micro_batches(self) -> int:
        """Of a data-parallel rank in a step. Raises ValueError when the ranks cannot share the batch."""
        samples = self.degrees.data_parallel * self.micro_batch
        if self.global_batch % samples:
            raise ValueError(
                f"train.global_batch_size={self.global_batch} does not divide over {self.degrees.data_parallel} data-parallel ranks "
                f"with train.micro_batch_size={self.micro_batch}; {self._way_out(samples)}"
            )
        return self.global_batch // samples

    @property
    def accumulates(self) -> bool:
        """Whether a rank has several micro-batches, also where a batch that grows does not divide yet."""
        return self.global_batch > self.degrees.data_parallel * self.micro_batch

    @property
    def tokens(self) -> int:
        """Of text in a step."""
        return self.global_batch * self.seq_len

    @property
    def shard(self) -> str:
        """What the data-parallel ranks divide: none | optimizer | full, or zero 1 | zero 2 | zero 3."""
        if self.engine.name == "deepspeed":
            return f"zero {self.engine.zero_stage}"  # type: ignore[attr-defined]
        return self.engine.shard  # type: ignore[attr-defined]

    @property
    def keeps_weights(self) -> bool:
        """Whether the weights that a rank computes with stay in memory for a step."""
        return self.gpus == 1 or self.shard not in ("full", "zero 3")

    @property
    def gathers_codes(self) -> bool:
        """Whether weights of FP8 layers are gathered in FP8."""
        sharded = self.engine.name == "fsdp" and self.shard != "none" and self.degrees.dp_shard * self.degrees.cp > 1
        return sharded and getattr(self.precision, "all_gather", "bf16") == "fp8"

    @property
    def frozen(self) -> Job | None:
        """The job of the teacher, whose forward pass is the same layout's: FSDP2 shards it in the mode full under every engine."""
        if self.teacher is None:
            return None
        precision = PrecisionConfig("fp32" if self.teacher.dtype is torch.float32 else "bf16")
        return replace(self, model=self.teacher.model, precision=precision, teacher=None)

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state is on the CPU."""
        return any(getattr(self.engine, key, False) for key in ("cpu_offload", "offload_optimizer"))

    def _way_out(self, samples: int) -> str:
        below = self.global_batch // samples * samples
        near = " or ".join(str(size) for size in (below, below + samples) if size)
        return f"train.global_batch_size={near} would"
