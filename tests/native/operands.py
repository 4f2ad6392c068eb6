"""Stored matrices of every type with their float64 values, and records built from vectors. No assertions here."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flashsparse import native

TYPES = ("F32", "F16", "BF16", "Q8-F16", "Q8-F32", "Q4-BF16", "Q4-F16")
PLAIN = ("F32", "F16", "BF16")
# Of the sum of the products' magnitudes. Stored values are decoded exactly, so only float32 sums round.
TOLERANCE = 1e-6
MLX_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def variants() -> list[str]:
    """The kernel variants that this machine and build can run, the best first."""
    best, found = native.isa(), []
    for name in ("avx512", "avx2", "portable"):
        with contextlib.suppress(ValueError):
            native.set_isa(name)
            found.append(name)
    native.set_isa(best)
    return found


def raw(array: mx.array) -> np.ndarray:
    """The stored bits of an MLX array as numpy; bf16 becomes uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bf16 bits, by MLX."""
    return raw(mx.array(values.astype(np.float32)).astype(mx.bfloat16))


def exact(stored: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values of stored plain numbers."""
    if dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


@dataclass
class Stored:
    """A matrix as stored, `values` its exact float64 values. `bytes[i]` is row i as a record's vector field."""

    values: np.ndarray
    data: np.ndarray
    dtype: int
    scales: np.ndarray | None = None
    biases: np.ndarray | None = None
    scale_dtype: int = 0
    group_size: int = 0

    def matrix(self) -> native.Matrix:
        rows, cols = self.values.shape
        parts = [] if self.scales is None else [self.scales.ctypes.data, self.biases.ctypes.data, self.scale_dtype]
        extra = [*parts, self.group_size] if parts else []
        return native.Matrix(self.data.ctypes.data, rows, cols, self.dtype, *extra, keep=self)

    def bytes(self, row: int) -> bytes:
        parts = (self.data, self.scales, self.biases)
        return b"".join(part[row].tobytes() for part in parts if part is not None)


def store(values: np.ndarray, kind: str, group_size: int = 64) -> Stored:
    """Store float32 values [rows, cols] as one of TYPES."""
    name, _, scale_name = kind.partition("-")
    dtype = native.DTYPES[name]
    if not scale_name:
        data = np.ascontiguousarray(raw(mx.array(values).astype(MLX_TYPES[name])))
        return Stored(exact(data, name), data, dtype)
    bits = int(name[1])
    source = mx.array(values).astype(MLX_TYPES[scale_name])
    words, scales, biases = (raw(a) for a in mx.quantize(source, group_size=group_size, bits=bits))
    numbers = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
    rows, cols = values.shape
    groups = numbers.reshape(rows, cols // group_size, group_size).astype(np.float64)
    exact_values = groups * exact(scales, scale_name)[..., None] + exact(biases, scale_name)[..., None]
    return Stored(exact_values.reshape(rows, cols), words, dtype, scales, biases, native.DTYPES[scale_name], group_size)


def close(found: np.ndarray, expected: np.ndarray, magnitude: np.ndarray) -> bool:
    """Whether float32 results agree with float64 ones within TOLERANCE of the products' magnitudes."""
    return bool((np.abs(found - expected) <= TOLERANCE * magnitude + 1e-30).all())
