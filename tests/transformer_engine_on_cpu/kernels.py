"""What the compiled part of Transformer Engine computes for a linear layer, in torch.

Quantize and multiply, after the descriptions in TE's Python (`recipe`, `reference_current_scaling`, the scale shapes of the
quantizers) and written apart from `megatron_lite.precision`, which the tests compare with it. What has no function here cannot be
called: its name gives a class without methods.

Shapes: M rows (tokens, or output features), K columns.
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DType = enum.IntEnum(
    "DType",
    {
        "kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6, "kFloat8E4M3": 7, "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
)  # fmt: skip
FP8 = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}
PLAIN = {DType.kFloat32: torch.float32, DType.kFloat16: torch.float16, DType.kBFloat16: torch.bfloat16}
# three slots for each matrix product forward, two backward
FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors", [f"GEMM{n}_{kind}" for n in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"{kind}{n}" for n in (1, 2, 3) for kind in ("GRAD_OUTPUT", "GRAD_INPUT")], start=0
)
BLOCK, MX_BLOCK = 128, 32


class _Enumeration(type):
    """An enumeration of whatever members are asked for, numbered in that order."""

    def __init__(cls, *args: Any) -> None:
        cls.__members__: dict[str, int] = {}

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls.__members__.setdefault(name, len(cls.__members__))


class Kernels(ModuleType):
    """The module `transformer_engine_torch`."""

    DType, FP8FwdTensors, FP8BwdTensors = DType, FP8FwdTensors, FP8BwdTensors

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Enumeration(name, (), {}))
        return self.__dict__[name]

    @staticmethod
    def get_cublasLt_version() -> int:
        return 130_000

    @staticmethod
    def quantize(x: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
        """Codes and scales of x (..., K), as the quantizer's tensor; written into `output` if there is one."""
        assert noop is None
        made = quantize(x.detach(), quantizer)
        if output is not None:
            for name, _ in type(made)._INNER_TENSORS:
                setattr(output, name, getattr(made, name))
            return output
        return made

    @staticmethod
    def fp8_transpose(data: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
        """(..., K) -> (K, ...)."""
        return data.movedim(-1, 0).contiguous()

    @staticmethod
    def dequantize(tensor: Any, dtype: Any) -> Tensor:
        """What the codes stand for."""
        return values(tensor, columnwise=tensor._rowwise_data is None).to(PLAIN[DType(int(dtype))])

    @staticmethod
    def fused_amax_and_scale_update_after_reduction(
        amax: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: int
    ) -> None:
        """Delayed scaling's step: the reduced maxima are those of row 0; new scales; histories move on."""
        largest = torch.tensor(
            torch.finfo(FP8[DType(int(dtype))]).max / 2**margin
        )  # a tensor: divided with one rounding
        for newest, history, scale in zip(amax.split([scale.numel() for scale in scales]), histories, scales):
            history[0] = newest
            found = history.amax(0) if algorithm == "max" else newest
            usable = (found > 0) & found.isfinite()
            scale.copy_(torch.where(usable, (largest / found).clamp(max=torch.finfo(torch.float32).max), scale))
            history.copy_(history.roll(-1, 0))
            history[0] = 0

    @staticmethod
    def generic_gemm(a: Any, transa: bool, b: Any, transb: bool, out: Any, output_quantizer: Any, out_dtype: Any,
                     bias: Any, *args: Any, **kwargs: Any) -> tuple[Any, None, None, None]:  # fmt: skip
        """op(b) op(a) in column-major terms: a is what is called W in y = x W^T. Accumulates in fp32."""
        assert out is None
        assert output_quantizer is None
        assert bias is None
        a_MK, scale_a = factors(a, columnwise=not transa)
        b_MK, scale_b = factors(b, columnwise=transb)
        leading = b_MK.shape[:-1]
        a_MK, b_MK = a_MK.flatten(0, -2), b_MK.flatten(0, -2)
        contracted = a_MK.shape[1] if transa else a_MK.shape[0]
        if _quantized(a) and contracted % 16:
            # the alignment that cuBLAS demands of the leading dimension of one-byte operands
            raise RuntimeError(f"FP8 matrix product over {contracted} elements, which is not a multiple of 16")
        y = (b_MK.T if transb else b_MK) @ (a_MK.T if transa else a_MK)
        y = (y * (scale_a * scale_b)).to(PLAIN[DType(int(out_dtype))])
        return (y if transb else y.unflatten(0, leading)), None, None, None


def _quantized(tensor: Any) -> bool:
    return hasattr(tensor, "_fp8_dtype")


def factors(tensor: Any, *, columnwise: bool) -> tuple[Tensor, Tensor]:
    """(what is multiplied, what the product is multiplied by) for an operand: of one with one scale, its codes and that scale."""
    if hasattr(tensor, "_transpose"):  # an H100 multiplies rows only, so the columns are a transposed copy
        codes = tensor._transpose.movedim(0, -1) if columnwise else tensor._data
        return codes.view(FP8[DType(int(tensor._fp8_dtype))]).float(), tensor._scale_inv
    return values(tensor, columnwise=columnwise), torch.ones(())


def values(tensor: Any, *, columnwise: bool) -> Tensor:
    """fp32 values of a plain or block-scaled tensor in its logical shape, out of the codes for its rows or for its columns."""
    if not _quantized(tensor):
        return tensor.float()
    fp8 = FP8[DType(int(tensor._fp8_dtype))]
    codes = tensor._columnwise_data if columnwise else tensor._rowwise_data
    scales = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
    assert codes is not None, "the codes for this product were not made, or were dropped"
    if scales.dtype is torch.uint8:  # MX: exponents; both copies lie as x does
        per_element = torch.exp2(scales.float() - 127)
        rows, columns = codes.flatten(0, -2).shape
        per_element = per_element.repeat_interleave(MX_BLOCK, dim=0 if columnwise else 1)[:rows, :columns]
        return codes.view(fp8).float() * per_element.reshape(codes.shape)
    flat = codes.flatten(1, -1) if columnwise else codes.flatten(0, -2)
    rows, columns = flat.shape
    if tensor._is_2D_scaled:
        per_element = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    else:
        per_element = scales.T.repeat_interleave(BLOCK, dim=1)[:rows, :columns]
    result = flat.view(fp8).float() * per_element
    return result.T.reshape(*codes.shape[1:], codes.shape[0]) if columnwise else result.reshape(codes.shape)


def quantize(x: Tensor, quantizer: Any) -> Any:
    """x (..., K) as the tensor class that the quantizer stands for."""
    fp8 = FP8[DType(int(quantizer.dtype))]
    kind = type(quantizer).__name__
    if kind in ("Float8Quantizer", "Float8CurrentScalingQuantizer"):
        return _per_tensor(x, quantizer, fp8)
    blocks = _mx if kind == "MXFP8Quantizer" else _blocks
    parts = {}
    if quantizer.rowwise_usage:
        parts["_rowwise_data"], parts["_rowwise_scale_inv"] = blocks(x, quantizer, fp8, columnwise=False)
    if quantizer.columnwise_usage:
        parts["_columnwise_data"], parts["_columnwise_scale_inv"] = blocks(x, quantizer, fp8, columnwise=True)
    context = quantizer.create_metadata(x.shape, dtype=x.dtype)
    return context["cls"].__tensor_unflatten__(parts, context, x.shape, x.stride())


def _cast(x: Tensor, fp8: torch.dtype) -> Tensor:
    """Round to nearest even; what is beyond the largest number becomes it."""
    largest = torch.finfo(fp8).max
    return x.clamp(-largest, largest).to(fp8).view(torch.uint8)


def _scale(amax: Tensor, fp8: torch.dtype, dtype: torch.dtype, *, power_of_two: bool) -> Tensor:
    """The factor before the cast, fp32, one for each amax."""
    largest = torch.full_like(amax, torch.finfo(fp8).max, dtype=torch.float32)  # a tensor: divided with one rounding
    scale = largest / amax.float()
    scale = torch.where(scale.isinf(), torch.finfo(dtype).max, scale)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(mantissa), exponent - 1)
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale).float()


def _per_tensor(x: Tensor, quantizer: Any, fp8: torch.dtype) -> Any:
    amax = x.abs().amax().float()
    if hasattr(quantizer, "scale"):  # delayed: the scale is there, the amax is for later
        scale = quantizer.scale.reshape(1).clone()
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    else:
        assert not quantizer.with_amax_reduction
        scale = _scale(amax, fp8, x.dtype, power_of_two=quantizer.force_pow_2_scales).reshape(1)
    codes = _cast(x.float() * scale, fp8)
    tensors = sys.modules["transformer_engine.pytorch.tensor"]
    arguments = {
        "data": codes if quantizer.rowwise_usage else None,
        "data_transpose": codes.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None,
        "fp8_scale_inv": scale.reciprocal(),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return tensors.Float8TensorStorage(fake_dtype=x.dtype, **arguments)
    return tensors.Float8Tensor(shape=x.shape, dtype=x.dtype, device=x.device, **arguments)


def _blocks(x: Tensor, quantizer: Any, fp8: torch.dtype, *, columnwise: bool) -> tuple[Tensor, Tensor]:
    """Codes and inverse scales for 1 x 128 or 128 x 128, out of x itself for rows and for columns."""
    flat_MK = x.flatten(0, -2).float()
    shape = x.shape
    if columnwise:
        flat_MK, shape = flat_MK.T, torch.Size([x.shape[-1], *x.shape[:-1]])
    rows, columns = flat_MK.shape
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    amax = _block_amax(flat_MK, height, BLOCK)
    scale = _scale(amax, fp8, x.dtype, power_of_two=quantizer.force_pow_2_scales)
    per_element = scale.repeat_interleave(height, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    inverse = scale.reciprocal()
    if height == 1:
        inverse = inverse.T
    padding = -inverse.shape[1] % 4
    return _cast(flat_MK * per_element, fp8).reshape(shape), torch.nn.functional.pad(inverse, (0, padding))


def _mx(x: Tensor, quantizer: Any, fp8: torch.dtype, *, columnwise: bool) -> tuple[Tensor, Tensor]:
    """Codes and exponents for 1 x 32 along the rows or along the columns; both lie as x does.

    OCP MX with the exponent rounded up: the smallest power of two 2^e with amax / 2^e <= the largest number.
    """
    flat_MK = x.flatten(0, -2).float()
    height, width = (MX_BLOCK, 1) if columnwise else (1, MX_BLOCK)
    rows, columns = flat_MK.shape
    if rows % height or columns % width:
        raise RuntimeError(f"MXFP8 needs multiples of 32, not {rows} x {columns}")
    mantissa, exponent = torch.frexp(_block_amax(flat_MK, height, width) / torch.finfo(fp8).max)
    power = (exponent - (mantissa == 0.5).int()).clamp(-127, 127)
    power = torch.where(mantissa == 0, -127, power)
    per_element = torch.exp2(-power.float()).repeat_interleave(height, 0).repeat_interleave(width, 1)
    return _cast(flat_MK * per_element, fp8).reshape(x.shape), (power + 127).to(torch.uint8)


def _block_amax(x_MK: Tensor, height: int, width: int) -> Tensor:
    """The largest magnitude in each block; the last blocks may be smaller."""
    rows, columns = x_MK.shape
    padded = torch.nn.functional.pad(x_MK.abs(), (0, -columns % width, 0, -rows % height))
    return padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).amax(dim=(1, 3))
