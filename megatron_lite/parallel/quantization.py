"""Which linear layers of a decoder compute in FP8, and how they become so.

All linear layers of `decoder.layers`, except
- the projections of time steps and states in `ALWAYS_BF16`: small, and errors in them grow with the length of the sequence,
- the first and last layers and the modules that the recipe names.
Embedding, head, norms, convolutions and scans are not linear layers, or not in `decoder.layers`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron_lite.models.config import ModelConfig
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.linear import Linear
from megatron_lite.parallel import collectives
from megatron_lite.parallel.layers import TensorParallel
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.plans import Replace, apply_plan, decoder_plan
from megatron_lite.parallel.reclass import reclass
from megatron_lite.precision.emulated import EmulatedNumerics, Maxima
from megatron_lite.precision.gathered import check_rows
from megatron_lite.precision.numerics import Numerics
from megatron_lite.precision.quantized_linear import QuantizedLinear
from megatron_lite.precision.recipes import Fp8Config
from megatron_lite.precision.transformer_engine import TransformerEngineLinear, TransformerEngineNumerics

ALWAYS_BF16 = ("x_proj", "dt_proj")


def quantize(decoder: Decoder, recipe: Fp8Config, mesh: Mesh) -> None:
    """Make the linear layers that `recipe` means FP8, in place; `decoder.numerics` is then what the engine talks to.

    Raises ValueError for patterns that match nothing, and for what the backend does not have.
    """
    paths = [path for path, is_fp8 in linear_layers(decoder, recipe).items() if is_fp8]
    emulated = EmulatedNumerics(recipe, paths, maxima=_maxima(mesh), device=mesh.device)
    if recipe.backend_on(mesh.device) == "transformer_engine":
        te = TransformerEngineNumerics(recipe, emulated)
        numerics: Numerics = te
        make = partial(_transformer_engine, te)
    else:
        numerics = emulated
        make = partial(_emulated, emulated)
    apply_plan(decoder, dict.fromkeys(paths, (Replace(make),)), None)
    decoder.numerics = numerics  # type: ignore[assignment]


def _emulated(
    numerics: EmulatedNumerics,
    path: str,
    linear: nn.Module,
    mixin: type[QuantizedLinear] = QuantizedLinear,
    **attributes: Any,
) -> nn.Module:
    quantizers = numerics.quantizers(path)
    reclass(linear, mixin, quantizers=quantizers, mode=numerics.mode, path=path, **attributes)
    return linear


def _transformer_engine(numerics: TransformerEngineNumerics, path: str, linear: nn.Module) -> nn.Module:
    multiply = numerics.product(path, *linear.get_parameter("weight").shape)
    return _emulated(numerics.emulation, path, linear, TransformerEngineLinear, multiply=multiply)


def _maxima(mesh: Mesh) -> Maxima:
    """Over tensor-parallel ranks for weights, over all ranks for what depends on the batch."""
    if mesh.device_mesh is None:
        return Maxima()
    tp = partial(collectives.maximum, groups=[mesh.group("tp")]) if mesh.tp_size > 1 else None
    gathered = partial(collectives.maximum, groups=[mesh.group("dp_shard")])
    return Maxima(weights=tp, activations=partial(collectives.maximum, groups=mesh.world), gathered=gathered)


def linear_layers(decoder: Decoder, recipe: Fp8Config) -> dict[str, bool]:
    """Name -> is it FP8, of every linear layer of `decoder.layers`. Raises ValueError for a pattern that matches nothing, and if none
    is."""
    paths = [f"layers.{name}" for name, module in decoder.layers.named_modules() if isinstance(module, Linear)]
    for pattern in recipe.bf16_modules:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(
                f"precision.bf16_modules: {pattern!r} matches no linear layer; they have names like {', '.join(_kinds(paths))}"
            )
    layers = range(recipe.bf16_first_layers, len(decoder.layers) - recipe.bf16_last_layers)
    chosen = {path: _index(path) in layers and not _stays_bf16(path, recipe.bf16_modules) for path in paths}
    if not any(chosen.values()):
        raise ValueError(
            f"precision={recipe.name}: bf16_first_layers={recipe.bf16_first_layers}, bf16_last_layers={recipe.bf16_last_layers} and "
            f"bf16_modules leave none of {len(decoder.layers)} layers in FP8; lower them, or set precision=bf16"
        )
    return chosen


def _stays_bf16(path: str, patterns: list[str]) -> bool:
    return path.rsplit(".", 1)[1] in ALWAYS_BF16 or any(fnmatchcase(path, pattern) for pattern in patterns)


def _index(path: str) -> int:
    return int(path.split(".")[1])


def _kinds(paths: list[str]) -> list[str]:
    """One path of each kind of linear layer: the first."""
    return list({path.split(".", 2)[2]: path for path in reversed(paths)}.values())[::-1]


def formats_table(model: ModelConfig, recipe: Fp8Config) -> list[str]:
    """What is in which format, one line for each kind of linear layer and format; built without memory."""
    with torch.device("meta"):
        decoder = Decoder(model)
    forward, backward = recipe.formats
    fp8 = f"{forward.name}, gradients {backward.name}, {recipe.operand_formats}"
    counts: Counter[tuple[str, bool]] = Counter()
    for path, is_fp8 in linear_layers(decoder, recipe).items():
        mixer = type(decoder.layers[_index(path)].mixer).__name__
        counts[f"{mixer}.{path.split('.', 3)[3]}", is_fp8] += 1
    rows = [(f"{count} x {kind}", fp8 if is_fp8 else "bf16") for (kind, is_fp8), count in counts.items()]
    rows.append(("embedding, head, norms and all else", "bf16, sums in fp32"))
    width = max(len(what) for what, _ in rows)
    return [f"{what:<{width}}  {form}" for what, form in rows]


def check_sizes(model: ModelConfig, recipe: Fp8Config, *, tp: int, tokens: int) -> None:
    """Raise ValueError where Transformer Engine cannot multiply this model's matrices as `tp` ranks hold them.

    Both sides of a weight must be multiples of 16 (32 for MX), and so must the tokens of a micro-batch: each is what one of the three
    products sums over. Blocks of 128 x 128 may be incomplete. The emulation takes any size.
    """
    if recipe.backend == "emulated":
        return
    divisor, way_out = recipe.size_divisor, "or set precision.backend=emulated, which takes any size"
    if tokens % divisor:
        raise ValueError(
            f"the {tokens} tokens of a micro-batch do not divide by {divisor}, which precision={recipe.name} needs: that is "
            "train.micro_batch_size x (data.seq_len / parallel.cp + model.meta_tokens); change one of them, "
            f"{way_out}"
        )
    for path, (rows, columns) in _shapes(model, recipe, tp).items():
        wrong = [size for size in (rows, columns) if size % divisor]
        if wrong:
            raise ValueError(
                f"precision={recipe.name} with parallel.tp={tp}: {path} is {rows} x {columns} on a rank, and {wrong[0]} does not divide by "
                f"{divisor}; {_degrees_that_work(model, recipe, tp)}name it in precision.bf16_modules, {way_out}"
            )


def check_gather(model: ModelConfig, recipe: Fp8Config, *, tp: int, ranks: int) -> None:
    """Raise ValueError where `precision.all_gather=fp8` cannot divide a weight over `ranks` ranks that shard it."""
    if recipe.all_gather == "fp8" and ranks > 1:
        for path, (rows, _) in _shapes(model, recipe, tp).items():
            check_rows(path, rows, ranks=ranks, multiple=recipe.shard_rows)


def _degrees_that_work(model: ModelConfig, recipe: Fp8Config, tp: int) -> str:
    works = [
        str(degree)
        for degree in range(1, tp)
        if tp % degree == 0
        and all(size % recipe.size_divisor == 0 for shape in _shapes(model, recipe, degree).values() for size in shape)
    ]
    return f"parallel.tp={' or '.join(works)} would work; else " if works else ""


def _shapes(model: ModelConfig, recipe: Fp8Config, tp: int) -> Mapping[str, torch.Size]:
    """Name -> shape on a tensor-parallel rank of the weights that are FP8."""
    with torch.device("meta"):
        decoder = Decoder(model)
    paths = [path for path, is_fp8 in linear_layers(decoder, recipe).items() if is_fp8]
    if tp > 1:
        # no group: nothing is computed
        apply_plan(decoder, decoder_plan(decoder), TensorParallel(0, tp, None))  # type: ignore[arg-type]
    return {path: decoder.get_parameter(f"{path}.weight").shape for path in paths}
