"""DeepSpeed itself: its import, its view of the processes, and the settings that it reads. The only file that imports `deepspeed`."""

from __future__ import annotations

import logging
import warnings
from types import ModuleType
from typing import Any

import torch

from megatron_lite.engine.mpu import ModelParallelUnit
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.runtime import ensure_process_group

# Elements that travel in one collective, at most. DeepSpeed reserves memory for them, 2 GB with its own 5e8.
BUCKET = 50_000_000


def start_deepspeed(mesh: Mesh) -> tuple[ModuleType, ModelParallelUnit]:
    """The library and its view of the processes. Raises ValueError for replicas, which it does not know."""
    if mesh.degrees.dp_replicate > 1:
        raise ValueError(
            f"parallel.dp_replicate={mesh.degrees.dp_replicate} with engine=deepspeed: ZeRO shards over all "
            "data-parallel ranks; set parallel.dp_replicate=1, or engine=fsdp"
        )
    deepspeed = import_deepspeed()
    ensure_process_group()
    deepspeed.init_distributed(verbose=False)
    return deepspeed, ModelParallelUnit(mesh)


def import_deepspeed() -> ModuleType:
    """The library, whose console messages below an error are left out, those of its import too."""
    logging.disable(logging.WARNING)
    try:
        import deepspeed
    except Exception as error:  # not installed, or its import looks for a CUDA compiler and does not find one
        raise ValueError(
            f"engine=deepspeed needs DeepSpeed ({type(error).__name__}: {error}): pip install "
            "'megatron-lite[deepspeed]', or set engine=fsdp"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo's collectives: these ask for a C++ compiler
    return deepspeed


def deepspeed_settings(
    stage: int, dtype: torch.dtype, *, offload_optimizer: bool, clip_grad: float = 0.0, bucket: int = BUCKET
) -> dict[str, Any]:
    """What DeepSpeed reads, for a stage of ZeRO. Batch sizes are placeholders: the engine itself says when a global batch is complete."""
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": torch.cuda.is_available(),  # gradients are reduced beside backward; the CPU has no streams
        "stage3_param_persistence_threshold": 0,  # everything is sharded, small parameters too
        "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear for the whole process
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_grad,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype is torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    # The sum of the ranks' gradients, as in other engines: so gradients are as large in backward, and the histories of FP8's delayed
    # scaling mean the same.
    if stage < 3:
        settings["gradient_allreduce_op"] = "sum"
    return settings
