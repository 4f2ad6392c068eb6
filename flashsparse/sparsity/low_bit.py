"""Low-bit copies of a weight matrix: packed words of 1 to 4 bits in MLX's affine layout, and how they are fitted.

The grid is the symmetric half-step one: 2**bits levels (q - (2**bits - 1) / 2) * scale, so the bias is
-(2**bits - 1) / 2 * scale and no level is zero. Fast products on the words belong to the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flashsparse.errors import UsageError

BITS = (1, 2, 3, 4)
GROUPS = (32, 64, 128)
MAX_WEIGHT = 65504.0 / 2  # a plain scale and its bias must fit in float16
_BLOCK_ELEMENTS = 1 << 18  # about what a core's second-level cache holds of the few arrays in use
# Scales tried, times the one that reaches the group's largest weight. Outliers make small ones the best; each try is
# followed by a least-squares step, so the grid may be coarse.
_CANDIDATES = np.geomspace(1.05, 0.1, 32)


@dataclass(frozen=True)
class LowBit:
    """A matrix [n, d]: words U32 [n, d * bits / 32]; scales and biases F16 [n, d / group]; w = scale * q + bias."""

    words: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int
    group: int

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + self.biases.nbytes

    def dequantize(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """float32 [stop - start, d]: the rows' values, all of them by default."""
        codes = unpack(self.words[start:stop], self.bits).astype(np.float32)
        grouped = codes.reshape(codes.shape[0], -1, self.group)
        grouped *= self.scales[start:stop, :, None].astype(np.float32)
        grouped += self.biases[start:stop, :, None].astype(np.float32)
        return codes

    def product(self, x: np.ndarray, matmul: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.matmul) -> np.ndarray:
        """float32 [T, n]: x [T, d] rounded as the kernels round it, times the transposed matrix."""
        x = round_input(x, self.group)
        out = np.empty((x.shape[0], self.words.shape[0]), np.float32)
        rows = max(1, (16 << 20) // (4 * x.shape[1]))
        for start in range(0, out.shape[1], rows):
            out[:, start : start + rows] = matmul(x, self.dequantize(start, start + rows).T)
        return out


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [n, d * bits / 32] from integers [n, d] below 2**bits, as one little-endian bit stream per row.

    Value j of a row is in bits [j * bits, (j + 1) * bits) of its words. Raises ValueError unless d is a multiple of 8
    and d * bits one of 32.
    """
    rows, columns = values.shape
    if columns % 8 or columns * bits % 32:
        raise ValueError(f"rows of {columns} values of {bits} bits: expected whole words")
    eights = values.reshape(rows, columns // 8, 8)
    joined = np.zeros(eights.shape[:2], "<u4")  # eight values fill exactly `bits` bytes
    for position in range(8):
        joined |= eights[:, :, position].astype("<u4") << np.uint32(position * bits)
    tight = joined.view(np.uint8).reshape(rows, columns // 8, 4)[:, :, :bits]
    return np.ascontiguousarray(tight).reshape(rows, -1).view("<u4")


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, d] from packed words [n, d * bits / 32]."""
    rows = words.shape[0]
    tight = np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(rows, -1, bits)
    joined = np.zeros((*tight.shape[:2], 4), np.uint8)
    joined[:, :, :bits] = tight
    eights = joined.view("<u4")
    shifts = np.arange(8, dtype=np.uint32) * np.uint32(bits)
    return ((eights >> shifts) & np.uint32(2**bits - 1)).astype(np.uint8).reshape(rows, -1)


def fitting_group(columns: int) -> int:
    """The group size for rows of `columns` weights: 64 where it divides, else 32. Raises UsageError where none does."""
    for group in (64, 32):
        if columns % group == 0:
            return group
    raise UsageError(f"rows of {columns} weights: no group size fits, expected a multiple of 32 or 64")


def check_layout(columns: int, bits: int, group: int) -> None:
    """Raises UsageError for bits other than 1 to 4, and for a group size that does not divide the rows."""
    if bits not in BITS:
        raise UsageError(f"bits {bits}: expected one of {', '.join(map(str, BITS))}")
    fitting = [size for size in GROUPS if columns % size == 0]
    if group not in fitting:
        fits = f"one of {', '.join(map(str, fitting))}" if fitting else "a hidden size that is a multiple of 32"
        raise UsageError(f"group size {group} for rows of {columns} weights: expected {fits}")


def quantize_rows(
    weight: np.ndarray, bits: int, group: int, importance: np.ndarray | None = None, search: bool = True
) -> LowBit:
    """The half-step copy of `weight` [n, d] with one float16 scale per row and group.

    The scale minimises sum_j importance_j * (w_j - copy_j)^2 over a grid of candidates, each followed by a
    least-squares step; `importance` [d] is E[x_j^2] (all equal by default). Without `search` the scale is the one whose
    outermost level is the group's largest |w|. With one bit scale / 2 is the weighted mean of |w|, which is optimal.
    Works in blocks of rows. Raises UsageError for a layout that does not fit, weights that are not finite or beyond
    float16's reach, and an importance that is not finite and >= 0.
    """
    rows, columns = weight.shape
    check_layout(columns, bits, group)
    weights = _importance(importance, columns).reshape(-1, group)
    words = np.empty((rows, columns * bits // 32), "<u4")
    scales = np.empty((rows, columns // group), np.float16)
    step = max(1, _BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        block = np.asarray(weight[start : start + step], np.float32).reshape(-1, columns // group, group)
        check_weights(block, start)
        scale = best_scales(block, weights, bits) if search else _plain(block, bits)
        scales[start : start + step] = scale
        words[start : start + step] = pack(codes_of(block, scale[:, :, None], bits).reshape(-1, columns), bits)
    return LowBit(words, scales, bias_of(scales, bits), bits, group)


def best_scales(block: np.ndarray, importance: np.ndarray, bits: int) -> np.ndarray:
    """float16 [n, groups]: the searched scales of weights [n, groups, group]; importance [groups, group], mean 1."""
    return _Search(block, importance, bits).best()


def codes_of(weights: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes of the levels nearest to the weights; the float16 scales are of a shape that broadcasts."""
    levels = np.floor(weights * _inverse(scale.astype(np.float32))) + np.float32(2 ** (bits - 1))
    return np.clip(levels, 0, 2**bits - 1).astype(np.uint8)


def bias_of(scales: np.ndarray, bits: int) -> np.ndarray:
    """float16: the value of code 0, with which the levels are symmetric about 0."""
    return (scales.astype(np.float32) * np.float32(-(2**bits - 1) / 2)).astype(np.float16)


def check_weights(block: np.ndarray, start: int = 0) -> None:
    """Raises UsageError naming the first row (counted from `start`) with a weight that is not finite or too large."""
    largest = np.abs(block).reshape(len(block), -1).max(axis=1)
    if not (largest <= MAX_WEIGHT).all():  # NaN fails too
        row = int(np.argmin(largest <= MAX_WEIGHT))
        raise UsageError(f"row {start + row}: found a weight of {largest[row]}, expected at most {MAX_WEIGHT:.0f}")


def round_input(x: np.ndarray, group: int) -> np.ndarray:
    """x [T, d] rounded to int8 in groups (step absmax / 127, ties to even) and back to float32, as the kernels do.

    A group whose step is subnormal becomes 0, one that holds NaN or an infinity NaN.
    """
    grouped = np.asarray(x, np.float32).reshape(x.shape[0], -1, group)
    step = np.abs(grouped).max(axis=2, keepdims=True) / np.float32(127)
    counts = step >= np.finfo(np.float32).tiny
    with np.errstate(invalid="ignore"):
        values = np.rint(np.divide(grouped, step, out=np.zeros_like(grouped), where=counts))
        values *= step
    return np.where(np.isfinite(step), values, np.float32(np.nan)).reshape(x.shape)


def _importance(importance: np.ndarray | None, columns: int) -> np.ndarray:
    """float32 [d] of mean 1, with a floor so that a group of silent inputs is fitted too."""
    if importance is None:
        return np.ones(columns, np.float32)
    given = np.asarray(importance, np.float64)
    if given.shape != (columns,) or not np.isfinite(given).all() or (given < 0).any():
        raise UsageError(f"importance of shape {given.shape}: expected {columns} finite values >= 0")
    mean = given.mean()
    return np.maximum(given / mean, 1e-6).astype(np.float32) if mean > 0 else np.ones(columns, np.float32)


def _plain(block: np.ndarray, bits: int) -> np.ndarray:
    largest = np.abs(block).max(axis=2)
    return (largest / np.float32((2**bits - 1) / 2)).astype(np.float16)


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale; 0 for what float16 rounds to 0."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale > 1e-8)


class _Search:
    """The best scale per row and group of one block [rows, groups, group].

    With magnitudes m (half steps) of the codes, the error is const - 2 s A + s^2 B, where A = sum imp |w| m and
    B = sum imp m^2; the best scale for given codes is A / B.
    """

    def __init__(self, block: np.ndarray, importance: np.ndarray, bits: int) -> None:
        self.magnitude = np.abs(block)
        self.importance = importance
        self.weighted = self.magnitude * importance
        self.top = np.float32(2 ** (bits - 1) - 1)
        self.plain = self.magnitude.max(axis=2) / np.float32((2**bits - 1) / 2)
        self.scale = np.zeros(block.shape[:2], np.float16)
        self.error = np.zeros(block.shape[:2], np.float32)  # less the constant: that of scale 0
        self.steps = np.empty_like(self.magnitude)

    def best(self) -> np.ndarray:
        """float16 [rows, groups]."""
        if self.top == 0:  # one bit: every scale gives the same codes
            self._consider(self.plain)
            return self.scale
        for factor in _CANDIDATES:
            self._consider(self.plain * np.float32(factor))
        for _ in range(2):
            self._consider(self.scale.astype(np.float32))
        return self.scale

    def _consider(self, scale: np.ndarray) -> None:
        """Keeps the rounded least-squares scale for the codes that `scale` gives, where it is the best so far."""
        np.multiply(self.magnitude, _inverse(scale)[:, :, None], out=self.steps)
        np.floor(self.steps, out=self.steps)
        np.minimum(self.steps, self.top, out=self.steps)
        self.steps += np.float32(0.5)
        first = np.einsum("rgk,rgk->rg", self.weighted, self.steps)
        np.multiply(self.steps, self.steps, out=self.steps)
        second = np.einsum("rgk,gk->rg", self.steps, self.importance)
        rounded = (first / second).astype(np.float16)
        wide = rounded.astype(np.float32)
        error = wide * (wide * second - 2 * first)
        better = error < self.error
        self.scale = np.where(better, rounded, self.scale)
        self.error = np.where(better, error, self.error)
