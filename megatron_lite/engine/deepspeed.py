"""DeepSpeed ZeRO 1, 2 and 3 behind the same interface as FSDP2.

    stage   sharded over the data-parallel ranks            (Rajbhandari et al. 2020, arXiv 1910.02054)
    1       master weights and Adam's moments
    2       and gradients
    3       and the weights themselves, gathered module by module

Notable features:
- Learning rate, loss scaling and skipping are not left to DeepSpeed: the loss is divided by the global token count before
  backward, and all ranks skip a step together if its loss or gradient is not finite.
- DeepSpeed learns of tensor parallelism through an `mpu`; its norm counts what tensor parallelism did not cut once.
- torch's AdamW runs on DeepSpeed's flat fp32 partitions: no C++ compiler is needed at run time.
- DeepSpeed uses one dtype for all weights: a module that must compute in fp32 uses its master weights instead.
- DeepSpeed cuts flat buffers, not rows. `state` gathers parameter by parameter and keeps this rank's rows; `load_state`
  brings the rows back together, one parameter at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_lite.data.packing import Batch
from megatron_lite.engine.base import BatchSums, StepResult, numerics_pieces
from megatron_lite.engine.deepspeed_library import BUCKET, deepspeed_settings, import_deepspeed, start_deepspeed
from megatron_lite.engine.master_weights import compute_with_master_weights
from megatron_lite.engine.replicas import Replicas
from megatron_lite.engine.rows import by_rows, flat_part, own_rows, share_rows
from megatron_lite.objectives.base import Objective
from megatron_lite.optim.optimizer import OptimConfig, torch_adamw
from megatron_lite.optim.spikes import Judge, not_finite
from megatron_lite.parallel.assemble import Distribute, Materialize
from megatron_lite.parallel.global_view import State
from megatron_lite.parallel.layers import ShardInfo
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.precision.dtypes import fp32_modules
from megatron_lite.precision.numerics import numerics_of


@dataclass
class DeepSpeedConfig:
    """zero_stage: 1 | 2 | 3, what is sharded. offload_optimizer: master weights and Adam on the CPU."""

    name: ClassVar[str] = "deepspeed"

    zero_stage: int = 1
    offload_optimizer: bool = False

    @property
    def replicates(self) -> bool:
        """See `EngineConfig`."""
        return False

    def validate(self) -> None:
        """Raise ValueError if `zero_stage` is unknown or deepspeed is not installed."""
        if self.zero_stage not in (1, 2, 3):
            way_out = "; engine=fsdp engine.shard=none shards nothing" if self.zero_stage == 0 else ""
            raise ValueError(f"engine.zero_stage={self.zero_stage} is unknown; choose 1, 2 or 3{way_out}")
        import_deepspeed()

    def distribute(self, mesh: Mesh, dtype: torch.dtype) -> Distribute:
        """See `EngineConfig`: part by part, a data-parallel rank fills its rows and receives the others'; stage 3 then keeps
        what it shards of them, the others keep all weights.

        Computing in bf16, DeepSpeed rounds the weights it is given. Each parameter keeps this rank's fp32 rows in its
        attribute `exact_rows` until the engine has made them the master weights.
        """
        deepspeed, unit = start_deepspeed(mesh)
        read = deepspeed_settings(self.zero_stage, dtype, offload_optimizer=self.offload_optimizer)
        settings = {"config_dict_or_path": read, "dtype": dtype, "mpu": unit}

        def distribute(objective: nn.Module, materialize: Materialize) -> None:
            materialize = replace(materialize, fill=by_rows(materialize, unit))
            decoder = materialize.decoder
            others = [child for child in decoder.children() if child is not decoder.layers]
            for part in [*decoder.layers, *others]:
                materialize(part)
                for parameter in part.parameters():
                    if dtype is not torch.float32:
                        parameter.exact_rows = own_rows(parameter.detach(), unit).clone()
                        parameter.data = parameter.data.to(dtype)  # `zero.Init` would shard and compute in fp32
                if self.zero_stage == 3:
                    deepspeed.zero.Init(module=part, data_parallel_group=unit.get_data_parallel_group(), **settings)

        return distribute

    def build(
        self,
        objective: Objective,
        *,
        optim: OptimConfig,
        dtype: torch.dtype,
        mesh: Mesh,
        shards: dict[str, ShardInfo],
    ) -> DeepSpeedEngine:
        """See `EngineConfig`. Raises ValueError for a mesh with `dp_replicate`."""
        return DeepSpeedEngine(objective, config=self, optim=optim, dtype=dtype, mesh=mesh, shards=shards)


class DeepSpeedEngine:
    """The engine over an objective that `DeepSpeedConfig.distribute` divided; arguments as in `EngineConfig.build`."""

    def __init__(
        self,
        objective: Objective,
        *,
        config: DeepSpeedConfig,
        optim: OptimConfig,
        dtype: torch.dtype,
        mesh: Mesh,
        shards: dict[str, ShardInfo],
    ) -> None:
        deepspeed, self.unit = start_deepspeed(mesh)
        self.objective, self.mesh = objective, mesh
        self.shards, self.stage = shards, config.zero_stage
        self.numerics = numerics_of(objective.decoder)
        self.replicas = Replicas(shards, mesh)
        self.parameters = dict(objective.decoder.named_parameters())
        for name, parameter in self.parameters.items():
            parameter.tensor_model_parallel = shards[name].tp_dim is not None  # type: ignore[attr-defined]
        self.adamw = torch_adamw(self.parameters, optim, {name: info.kind for name, info in shards.items()})
        elements = sum(math.prod(info.global_shape) for info in shards.values())
        settings = deepspeed_settings(
            config.zero_stage,
            dtype,
            offload_optimizer=config.offload_optimizer,
            clip_grad=optim.clip_grad,
            bucket=min(BUCKET, elements + elements % 2),  # DeepSpeed wants an even number
        )
        self.engine = deepspeed.initialize(model=objective, optimizer=self.adamw, config=settings, mpu=self.unit)[0]
        self._sum_gradients()
        self.fragments = deepspeed.utils
        self._start_adam()
        self.optimizer_device = next(iter(self.adamw.state.values()))["exp_avg"].device  # maybe the CPU
        kept = fp32_modules(objective) if dtype is not torch.float32 else []
        self.fp32_modules = [compute_with_master_weights(module) for module in kept]
        for name, parameter in self.parameters.items():
            if hasattr(parameter, "exact_rows"):
                self._write(f"model.{name}", parameter.exact_rows)
                del parameter.exact_rows
        self._show_master_weights()

    def _sum_gradients(self) -> None:
        """The sum of the ranks' gradients, not their mean. Raises ValueError for a DeepSpeed that would silently use the mean."""
        zero_3 = "_gradient_averaging_world_size"
        if self.engine.gradient_average if self.stage < 3 else not hasattr(self.engine.optimizer, zero_3):
            raise ValueError(
                "engine=deepspeed: this release cannot sum gradients; pip install 'deepspeed>=0.19.8', or set engine=fsdp"
            )
        if self.stage == 3:  # it has no `gradient_allreduce_op`: its mean over n ranks is multiplied by n / this
            setattr(self.engine.optimizer, zero_3, lambda *_: 1)

    def train_step(self, micro_batches: list[Batch], *, lr: float, judge: Judge = not_finite) -> StepResult:
        """See `Engine`."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.engine.train()
        sums = BatchSums(micro_batches, self.mesh.loss_groups)
        with self.numerics.step(keep_weights=self.stage < 3):
            for index, batch in enumerate(micro_batches):
                self.engine.set_gradient_accumulation_boundary(index + 1 == len(micro_batches))
                with self.numerics.micro_batch():
                    loss = self.engine(batch)
                    self.engine.backward(loss.total / sums.num_tokens, scale_wrt_gas=False)
                sums.add(loss)
        mean, parts = sums.means()
        verdicts: list[Tensor] = []

        def before_update(*_: Any) -> None:
            """ZeRO knows the norm now; it updates group by group, so this may be called again."""
            if not verdicts:
                verdicts.append(judge(mean, self._grad_norm(mean.device)))
                self.adamw.found_inf = verdicts[0].to(self.optimizer_device)  # type: ignore[attr-defined]

        hook = self.adamw.register_step_pre_hook(before_update)
        self.engine.step()
        hook.remove()
        self._show_master_weights()
        norm = self._grad_norm(mean.device)
        if not verdicts:  # DeepSpeed itself has left the update out: the gradient was not finite
            verdicts.append(torch.ones_like(judge(mean, norm)))
        return StepResult(loss=mean, grad_norm=norm, valid_tokens=sums.tokens, skipped=verdicts[0], parts=parts)

    def _grad_norm(self, device: torch.device) -> Tensor:
        return torch.as_tensor(self.engine.optimizer._global_grad_norm, dtype=torch.float32, device=device)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        self.engine.eval()
        with self.numerics.forward_only():
            loss = self.engine(batch)
        return loss.total, loss.tokens

    def diagnose(self, micro_batches: list[Batch]) -> None:
        """See `Engine`. Forward only: ZeRO adds gradients up where they cannot be dropped."""
        for batch in micro_batches:
            self.evaluate(batch)

    def state(self) -> State:
        """See `Engine`: copies on the CPU, a data-parallel rank's share of the rows of each tensor.

        Raises RuntimeError if copies of a tensor on tensor-parallel ranks differ by more than a last digit; those of the first
        rank are saved.
        """
        pieces = {}
        for kind in ("model", "exp_avg", "exp_avg_sq"):
            copies = {name: self._whole(kind, name) for name in self.replicas.names}
            self.replicas.take_first(copies)
            for name in self.parameters:
                whole = copies[name] if name in copies else self._whole(kind, name)
                rows = own_rows(whole, self.unit).to("cpu", copy=True)
                info = self.shards[name]
                pieces[f"{kind}.{name}"] = self.mesh.layout.piece(rows, info.global_shape, tp_dim=info.tp_dim)
        self.replicas.check()
        steps = next(iter(self.adamw.state.values()))["step"]
        return State(pieces | numerics_pieces(self.numerics, self.mesh.layout), {"adam_step": int(steps.item())})

    def _whole(self, kind: str, name: str) -> Tensor:
        """This tensor-parallel rank's shard of a tensor, all its rows. Collective over the data-parallel ranks."""
        if kind == "model":
            return self.fragments.safe_get_full_fp32_param(self.parameters[name])
        return self.fragments.safe_get_full_optimizer_state(self.parameters[name], kind)

    def load_state(self, state: State) -> None:
        """See `Engine`."""
        kept = self.numerics.tensors()  # live: filled already
        for key, piece in state.tensors.items():
            if key not in kept:
                self._write(key, piece.tensor())
        self._show_master_weights()
        for of_flat in self.adamw.state.values():
            of_flat["step"].fill_(float(state.counters["adam_step"]))

    def _start_adam(self) -> None:
        """Adam's state, which DeepSpeed leaves to the first step, so that there is something to save and to load into."""
        zero = self.engine.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else [g["params"][0] for g in zero.param_groups]
        for flat in flats:
            self.adamw.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _show_master_weights(self) -> None:
        """Give the modules that compute in fp32 the current weights: a collective for each of their parameters."""
        for module in self.fp32_modules:
            for name, parameter in module.named_parameters():
                module.master_weights[name] = self.fragments.safe_get_full_fp32_param(parameter)

    @torch.no_grad()
    def _write(self, key: str, rows: Tensor) -> None:
        """Bring the data-parallel ranks' rows of one tensor together and hand each rank's DeepSpeed what it holds of it."""
        kind, name = key.split(".", 1)
        parameter = self.parameters[name]
        whole = self._gather_rows(name, rows)
        if self.stage == 3:
            part = flat_part(whole, parameter.ds_tensor.numel(), self.unit.get_data_parallel_rank())  # type: ignore[attr-defined]
            if kind == "model":
                self.fragments.safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.copy_(part)  # type: ignore[attr-defined]
            else:
                self.fragments.safe_set_local_optimizer_state(parameter, part, kind)
        elif kind == "model":
            self.fragments.safe_set_full_fp32_param(parameter, whole)
            parameter.copy_(whole)
        else:
            self.fragments.safe_set_full_optimizer_state(parameter, whole, kind)

    def _gather_rows(self, name: str, rows: Tensor) -> Tensor:
        """What this tensor-parallel rank holds of the tensor. Exact: a sum would turn -0.0 into 0.0."""
        info = self.shards[name]
        _, sizes = self.mesh.layout.box(info.global_shape, tp_dim=info.tp_dim, dp_sharded=False)
        whole = torch.empty(sizes, dtype=rows.dtype, device=self.engine.device)
        own_rows(whole, self.unit).copy_(rows)
        share_rows(whole, self.unit)
        return whole
