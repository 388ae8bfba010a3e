"""Do we keep the heads, neurons, channels and layers that NVIDIA's ModelOpt 0.47 keeps, and is our distillation loss its loss?

    pip install --no-deps --target /tmp/modelopt nvidia-modelopt==0.47.0
    python -m benchmarks.modelopt_agreement /tmp/modelopt

Tiny models with random weights (Nemotron-4, grouped queries, Llama with tied embeddings, Mistral, Nemotron-H) read the same tokens twice:
transformers' module with ModelOpt's hooks, and ours with ours. For every size of every axis the kept sets are compared, and the order
in which layers go. Ends with 1 if one of them differs, or a loss or gradient by more than 1e-5 of its largest number.

What of ModelOpt runs: the five functions of `mcore_minitron.py` that register its hooks and compute its scores, as they are, and
`distill/losses.py`. The module of the former cannot be imported without Transformer Engine and a GPU, so the functions are compiled from
its source, with stand-ins for Megatron's classes. What was not compared: Megatron's forward pass, the sorting and slicing of its
parameters (the rules of its `active_slice` are three lines below), its data, and its search.
"""

from __future__ import annotations
import __future__

import argparse
import ast
import importlib.util
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, NemotronConfig, NemotronHConfig

import megatron_lite
from benchmarks.summary import markdown
from megatron_lite.compress.importance import Meter
from megatron_lite.compress.scores import ImportanceConfig, Scores
from megatron_lite.compress.sizes import sizes_of, unit_of
from megatron_lite.models.config import ModelConfig
from megatron_lite.parallel.chunked_loss import VocabularyShard
from megatron_lite.parallel.distillation_loss import DistillationWeights, Projection, distillation_sum
from megatron_lite.parallel.mesh import Mesh

FUNCTIONS = ("hidden_size", "depth_cosine", "self_attention", "mlp", "mamba_mixer")  # _register_<name>_importance
SAMPLES, LENGTH, VOCABULARY = 16, 24, 384
BOUND = 1e-5

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "Nemotron-4": NemotronConfig(**_SIZES),
    "Nemotron-4, 8 heads of 2 groups": NemotronConfig(**_SIZES | {"num_attention_heads": 8}),
    "Llama, tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "Mistral, 12 heads of 3 groups": MistralConfig(**_SIZES | {"num_attention_heads": 12, "num_key_value_heads": 3}, sliding_window=None),
    "Nemotron-H": NemotronHConfig(
        **{key: value for key, value in _SIZES.items() if key != "num_hidden_layers"},
        hybrid_override_pattern="M-M*-", mamba_num_heads=8, mamba_head_dim=6, n_groups=2, ssm_state_size=7,
    ),
}  # fmt: skip


class Stand(nn.Module):
    """Stands in for a class of Megatron: carries what the functions ask of it, and returns what it is called with."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def _register_temp_attribute(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def get_hparam(self, name: str) -> Any:
        """ModelOpt's: has the size before pruning."""
        return types.SimpleNamespace(max=self.sizes[name])

    def forward(self, *values: Any, **kwargs: Any) -> Any:
        """The hooks see `values` as input and as output."""
        return values if len(values) > 1 else values[0]


class Layer(Stand):
    """Gets what goes in and what comes out, and returns the latter as a layer of Megatron does."""

    def forward(self, x: Tensor, output: Any) -> Any:
        """See the class."""
        return output


def _kind(name: str, base: type[Stand] = Stand) -> type[Stand]:
    return type(f"_Dynamic{name}", (base,), {})


KINDS = {name: _kind(name) for name in ("Attention", "MLP", "MoELayer", "MCoreLanguageModel", "MambaMixer")}
KINDS |= {name: _kind(name, Layer) for name in ("TransformerLayer", "MambaLayer")}
KINDS["SelfAttention"] = _kind("SelfAttention", KINDS["Attention"])


@dataclass
class Registry:
    """ModelOpt's `ImportanceEstimatorRegistry`: what was registered, by module and name."""

    importance: dict[tuple[int, str], Callable[[], Tensor]] = field(default_factory=dict)

    def register_hook(
        self, module: nn.Module, hook: Callable[..., Any], hook_type: str = "forward", with_kwargs: bool = False
    ) -> None:
        """See the class."""
        module.register_forward_hook(hook, with_kwargs=with_kwargs)

    def register_importance(self, module: nn.Module, name: str, estimate: Callable[[], Tensor], **_: Any) -> None:
        """See the class."""
        self.importance[id(module), name] = estimate


def functions_of(folder: Path) -> dict[str, Callable[[nn.Module, Registry], None]]:
    """ModelOpt's functions by name, compiled from the source below `folder`."""
    source = (folder / "modelopt/torch/prune/plugins/mcore_minitron.py").read_text()
    wanted = {f"_register_{name}_importance" for name in FUNCTIONS}
    picked: list[ast.stmt] = [
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    one_process = types.SimpleNamespace(all_reduce=lambda *args, **kwargs: None, ReduceOp=types.SimpleNamespace(SUM=0))
    names: dict[str, Any] = {
        "torch": types.SimpleNamespace(**{**vars(torch), "distributed": one_process}),
        "F": F,
        "partial": partial,
        "gather_from_tensor_model_parallel_region": lambda x: x,
        "reduce_from_tensor_model_parallel_region": lambda x: x,
        "_fused_ln_linears_over_hidden_size": lambda module: (),
        **{kind.__name__: kind for kind in KINDS.values()},
    }
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(picked, type_ignores=[]), "mcore_minitron.py", "exec", flags=flags), names)
    return {name: names[f"_register_{name}_importance"] for name in FUNCTIONS}


@dataclass
class Theirs:
    """ModelOpt's view of a model: for each residual layer of ours (symbol, stand-in of its mixer); the units that depth removes."""

    registry: Registry
    language_model: nn.Module
    mixers: list[tuple[str, Any]] = field(default_factory=list)
    units: list[nn.Module] = field(default_factory=list)

    def order(self, stand: nn.Module, name: str) -> Tensor:
        """What `sort_parameters` sorts by: a ranking as it is, scores from the largest on."""
        found = self.registry.importance[id(stand), name]()
        return found.argsort(descending=True) if found.is_floating_point() else found


def attached(model: Any, symbols: str, functions: dict[str, Callable[[nn.Module, Registry], None]]) -> Theirs:
    """Stand-ins for the modules of a model of transformers, with ModelOpt's hooks, called when `model` runs."""
    registry, config = Registry(), model.config
    found = Theirs(registry, KINDS["MCoreLanguageModel"]())
    for index, block in enumerate(model.model.layers):
        here = symbols[2 * index : 2 * index + 2] if hasattr(block, "self_attn") else symbols[index]
        unit = KINDS["MambaLayer" if here == "M" else "TransformerLayer"]()
        unit.self_attention = unit.mlp = None
        for symbol in here:
            _MAKE[symbol](unit, block, config)
            functions[_FUNCTION[symbol]](_mixer(unit, symbol), registry)
            found.mixers.append((symbol, _mixer(unit, symbol)))
        functions["depth_cosine"](unit, registry)
        is_pair = here != "M"
        block.register_forward_hook(partial(_pass_through, unit, is_pair))
        found.units.append(unit)
    found.language_model.decoder = Stand(layers=found.units)
    functions["hidden_size"](found.language_model, registry)
    return found


def _swap(x: Tensor) -> Tensor:
    """(batch, sequence, ...) <-> Megatron's (sequence, batch, ...)."""
    return x.transpose(0, 1)


def _pass_through(unit: Any, is_pair: bool, block: Any, args: Any, output: Any) -> None:
    y = _swap(output[0] if isinstance(output, tuple) else output)
    unit(_swap(args[0]), (y, None) if is_pair else y)


def _linear_with_norm(norm: nn.Module, linear: nn.Module, stand: Stand) -> None:
    """`stand` is told, as Transformer Engine's fused module returns it, (output of the linear layer, bias, output of the norm)."""
    stand.te_return_bias = True
    normed: list[Tensor] = []
    norm.register_forward_hook(lambda module, args, y: normed.append(_swap(y)))
    linear.register_forward_hook(lambda module, args, y: (stand(_swap(y), None, normed.pop()), None)[1])


def _read_input(linear: nn.Module, stand: Stand) -> None:
    linear.register_forward_pre_hook(lambda module, args: (stand(_swap(args[0])), None)[1])


def _attention(unit: Any, block: Any, config: Any) -> None:
    attention = getattr(block, "self_attn", None) or block.mixer
    unit.self_attention = KINDS["SelfAttention"](
        linear_proj=Stand(),
        linear_qkv=Stand(),
        _has_fused_input_layernorm=True,
        _column_proj_name="linear_qkv",
        sizes={"num_attention_heads": config.num_attention_heads},
        num_query_groups_per_partition=config.num_key_value_heads,
        config=types.SimpleNamespace(kv_channels=config.head_dim),
    )
    _linear_with_norm(
        getattr(block, "input_layernorm", None) or block.norm, attention.v_proj, unit.self_attention.linear_qkv
    )
    _read_input(attention.o_proj, unit.self_attention.linear_proj)


def _feed_forward(unit: Any, block: Any, config: Any) -> None:
    mlp = getattr(block, "mlp", None) or block.mixer
    unit.mlp = KINDS["MLP"](linear_fc1=Stand(), linear_fc2=Stand(), hparam_name="ffn_hidden_size")
    _linear_with_norm(getattr(block, "post_attention_layernorm", None) or block.norm, mlp.up_proj, unit.mlp.linear_fc1)
    _read_input(mlp.down_proj, unit.mlp.linear_fc2)


def _mamba(unit: Any, block: Any, config: Any) -> None:
    heads, width = config.mamba_num_heads, config.mamba_head_dim
    sizes = {"mamba_num_heads": heads, "mamba_head_dim": width, "d_inner": heads * width}
    unit.mixer = KINDS["MambaMixer"](in_proj=Stand(), sizes=sizes, headdim=width, ngroups=config.n_groups)
    _linear_with_norm(block.norm, block.mixer.in_proj, unit.mixer.in_proj)


_MAKE = {"*": _attention, "-": _feed_forward, "M": _mamba}
_FUNCTION = {"*": "self_attention", "-": "mlp", "M": "mamba_mixer"}


def _mixer(unit: Any, symbol: str) -> Any:
    return {"*": unit.self_attention, "-": unit.mlp}[symbol] if symbol != "M" else unit.mixer


def ours(folder: Path, tokens: Tensor) -> tuple[Scores, ModelConfig]:
    """Our scores of the same model."""
    decoder, _ = megatron_lite.load(folder)
    meter = Meter(decoder, Mesh(), ImportanceConfig())
    with torch.no_grad(), meter.reading():
        for batch in tokens.split(8):
            meter.begin({"loss_mask": torch.ones_like(batch, dtype=torch.bool)})
            decoder.hidden(batch)
    return Scores({}, len(tokens), meter.take()), decoder.config


def comparisons(theirs: Theirs, scores: Scores, config: ModelConfig) -> Iterator[tuple[str, bool]]:
    """(axis, whether both keep the same numbers), for every size of every axis, and for the layers."""
    options, full, layers = ImportanceConfig(), sizes_of(config), tuple(range(len(config.symbols)))
    axes = {"heads": "num_attention_heads", "ffn_size": "ffn_hidden_size", "mamba_heads": "mamba_num_heads"}
    hidden = theirs.order(theirs.language_model, "hidden_size")
    for axis, size in full.items():
        for count in range(unit_of(config, axis), size + 1, unit_of(config, axis)):
            found = scores.select(config, {axis: count}, layers, options)
            if axis == "hidden_size":
                yield axis, _same(found.hidden, hidden[:count])
                continue
            for layer, (_, stand) in enumerate(theirs.mixers):
                if axis not in found.inner[layer]:
                    continue
                if axis == "mamba_head_dim":
                    stand.headdim = count
                    kept = theirs.order(stand, axis)[:count]
                    heads = scores.select(config, {axis: count, "mamba_heads": config.mamba.groups}, layers, options)
                    theirs_heads = theirs.order(stand, "mamba_num_heads").view(config.mamba.groups, -1)[:, 0]
                    yield "mamba_heads after head_dim", _same(heads.inner[layer]["mamba_heads"], theirs_heads)
                    stand.headdim = size
                else:
                    groups = unit_of(config, axis)
                    kept = theirs.order(stand, axes[axis]).view(groups, -1)[:, : count // groups]
                yield axis, _same(found.inner[layer][axis], kept)
    depth = sorted(range(len(theirs.units)), key=lambda unit: theirs.units[unit]._scores)
    yield "layers", scores.removal_order(config, options) == depth


def _same(first: Tensor, second: Tensor) -> bool:
    return sorted(first.flatten().tolist()) == sorted(second.flatten().tolist())


def kept_sets(config: Any, functions: dict[str, Callable[[nn.Module, Registry], None]]) -> tuple[int, list[str]]:
    """(kept sets that were compared, axes of those that differ) of a random model."""
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH))
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        model.save_pretrained(folder)
        scores, sizes = ours(Path(folder), tokens)
        theirs = attached(model, sizes.symbols, functions)
        for batch in tokens.split(4):
            model(input_ids=batch, use_cache=False)
    results = list(comparisons(theirs, scores, sizes))
    return len(results), [axis for axis, same in results if not same]


def loss_difference(folder: Path, temperature: float) -> float:
    """The largest difference of our distillation loss and its gradients from ModelOpt's in float64, as a share of the largest number."""
    spec = importlib.util.spec_from_file_location("losses", folder / "modelopt/torch/distill/losses.py")
    assert spec is not None
    assert spec.loader is not None
    losses = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(losses)
    torch.manual_seed(0)
    x, weight, teacher_x, teacher_weight = (torch.randn(*shape) for shape in ((50, 12), (40, 12), (50, 20), (40, 20)))
    valid, targets, counted = 37, torch.randint(0, 37, (50,)), torch.rand(50) > 0.3
    theirs = [tensor.double().requires_grad_() for tensor in (x, weight)]
    mine = [tensor.requires_grad_() for tensor in (x, weight)]
    made = distillation_sum(
        Projection(*mine), Projection(teacher_x, teacher_weight), targets, counted,
        weights=DistillationWeights(temperature), shard=VocabularyShard(valid), chunk_tokens=7,
    )  # fmt: skip
    made.total.backward()
    logits = (theirs[0] @ theirs[1].T)[counted, :valid]
    teacher_logits = (teacher_x.double() @ teacher_weight.double().T)[counted, :valid]
    loss = losses.LogitsDistillationLoss(temperature, reduction="none")(logits, teacher_logits).sum()
    loss.backward()
    pairs = [(made.total.detach(), loss.detach()), *((a.grad, b.grad) for a, b in zip(mine, theirs))]
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where nvidia-modelopt 0.47.0 was installed to, with --no-deps")
    folder = parser.parse_args().folder
    if not (folder / "modelopt").is_dir():
        raise SystemExit(
            f"{folder} has no modelopt in it: pip install --no-deps --target {folder} nvidia-modelopt==0.47.0"
        )
    functions = functions_of(folder)
    rows, failed = [], False
    for name, config in MODELS.items():
        count, different = kept_sets(config, functions)
        failed |= bool(different)
        rows.append((name, f"{count - len(different)} of {count}", ", ".join(sorted(set(different))) or "none"))
    print(markdown(("model", "kept sets that are equal", "axes that differ"), rows))
    rows = [(f"{temperature:g}", loss_difference(folder, temperature)) for temperature in (0.5, 1.0, 2.0)]
    print(markdown(("temperature", "largest difference of loss and gradients"), [(t, f"{d:.1e}") for t, d in rows]))
    return int(failed or any(difference > BOUND for _, difference in rows))


if __name__ == "__main__":
    raise SystemExit(main())
