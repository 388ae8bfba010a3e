"""FP8 written apart from the package, in numpy: formats from their definition, rounding by looking for the nearest number.

A matrix is quantized to (values, scales): float64 values of the codes, and what they are to be divided by. NaN stands for what is not
a number or not finite in E4M3.
"""

from __future__ import annotations

import numpy as np


def finite_numbers(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> np.ndarray:
    """All non-negative numbers of a format up to `largest`, ascending: index parity is that of the last mantissa bit."""
    numbers = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            normal = 2.0 ** (exponent - bias) * (1 + fraction)
            numbers.append(normal if exponent else 2.0 ** (1 - bias) * fraction)
    return np.array([number for number in numbers if number <= largest])


NUMBERS = {"E4M3": finite_numbers(4, 3, 7, 448.0), "E5M2": finite_numbers(5, 2, 15, 57344.0)}


def rounded(x: np.ndarray, form: str) -> np.ndarray:
    """The nearest number of the format, ties to the even one; beyond the largest: the largest. Infinities: NaN in E4M3."""
    numbers = NUMBERS[form]
    size = np.minimum(np.abs(x), numbers[-1])
    above = np.searchsorted(numbers, size).clip(0, len(numbers) - 1)
    below = np.maximum(above - 1, 0)
    to_above, to_below = numbers[above] - size, size - numbers[below]
    take_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    found = np.copysign(np.where(take_above, numbers[above], numbers[below]), x)
    found = np.where(np.isnan(x), np.nan, found)
    return np.where(np.isinf(x), np.nan if form == "E4M3" else x, found)


def scale_of(amax: np.float32, form: str, *, power_of_two: bool, most: float) -> np.float32:
    """largest / amax in fp32, `most` if that overflows; 1 for 0."""
    if amax == 0:
        return np.float32(1)
    with np.errstate(over="ignore", divide="ignore"):
        scale = np.float32(NUMBERS[form][-1]) / np.float32(amax)
    if np.isinf(scale):
        scale = np.float32(most)
    return np.float32(2.0 ** np.floor(np.log2(np.float64(scale)))) if power_of_two else scale


def mx_scale_of(amax: np.float32, form: str) -> np.float32:
    """The inverse of the least power of two that brings amax into range; 1 where E8M0 has none so small."""
    if amax == 0:
        return np.float32(1)
    exponent = np.ceil(np.log2(np.float64(amax / np.float32(NUMBERS[form][-1]))))
    return np.float32(2.0**-exponent) if exponent > -127 else np.float32(1)


def quantized(x: np.ndarray, form: str, block: tuple[int, int] | None, scale_of_amax) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scale of each element), block after block; None: one for all."""
    rows, columns = block or x.shape
    codes, scales = np.empty(x.shape), np.empty(x.shape, np.float32)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            part = np.s_[i : i + rows, j : j + columns]
            scales[part] = scale_of_amax(np.abs(x[part]).max())
            codes[part] = rounded((x[part].astype(np.float32) * scales[part]).astype(np.float64), form)
    return codes, scales


def dequantized(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What the codes stand for, with the inverse scale in fp32."""
    return codes * (np.float32(1) / scales).astype(np.float64)
