"""Matrices of 1 to 4 bits, and their scores in float64 with tokens rounded as the kernels state. No assertions here."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flashsparse import native
from tests.native.operands import bf16, exact


@dataclass
class LowBits:
    """A stored matrix [rows, cols]: packed words, scales and biases of `scale_type`, and the numbers in the words."""

    numbers: np.ndarray
    words: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int
    group: int
    scale_type: str

    def matrix(self) -> native.Matrix:
        at = [part.ctypes.data for part in (self.words, self.scales, self.biases)]
        types = native.DTYPES[f"Q{self.bits}"], native.DTYPES[self.scale_type]
        return native.Matrix(at[0], *self.numbers.shape, types[0], at[1], at[2], types[1], self.group, keep=self)

    def terms(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 scale times number, and bias, of each weight."""
        scales, biases = (
            exact(part, self.scale_type).repeat(self.group, axis=1) for part in (self.scales, self.biases)
        )
        return self.numbers * scales, biases

    def values(self) -> np.ndarray:
        """The exact float64 weights."""
        return np.add(*self.terms())

    def placed(self, place: Callable[[np.ndarray], np.ndarray]) -> LowBits:
        """The same matrix with its stored arrays copied by `place`."""
        stored = (place(part) for part in (self.words, self.scales, self.biases))
        return LowBits(self.numbers, *stored, self.bits, self.group, self.scale_type)

    def part(self, first: int, last: int) -> LowBits:
        """Rows [first, last) as a matrix of their own."""
        parts = (self.numbers, self.words, self.scales, self.biases)
        return LowBits(*(part[first:last].copy() for part in parts), self.bits, self.group, self.scale_type)


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """numbers [rows, cols] as rows of a little-endian bit stream in 32-bit words."""
    stream = (numbers[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(len(numbers), -1)
    return np.packbits(stream, axis=1, bitorder="little").view(np.uint32)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    return bf16(values) if dtype == "BF16" else values.astype({"F32": np.float32, "F16": np.float16}[dtype])


def low_bits(rows: int, cols: int, bits: int, group: int, scale_type: str = "F16", seed: int = 0) -> LowBits:
    """Random numbers, scales and biases."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 2**bits, (rows, cols))
    scales, biases = (stored(rng.standard_normal((rows, cols // group)), scale_type) for _ in range(2))
    return LowBits(numbers, pack(numbers, bits), scales, biases, bits, group, scale_type)


def before_a_guard(array: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last that may be read: the page after it is protected."""
    room = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if protect(memory.ctypes.data + room, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = memory[room - array.nbytes : room].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def rounded(x: np.ndarray, group: int) -> np.ndarray:
    """float64 values of x [T, cols] rounded to int8 per group: the step is max |x| / 127 as float32, half to even."""
    groups = x.reshape(len(x), -1, group)
    step = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    numbers = np.rint(groups / np.where(step > 0, step, np.float32(1)))
    return (numbers.astype(np.float64) * step).reshape(x.shape)


def score(weight: LowBits, x: np.ndarray, bias: np.ndarray | None = None, threads: int = 2) -> np.ndarray:
    out = np.full((len(x), len(weight.words)), -1e30, np.float32)
    with native.Workers(threads) as workers:
        native.score(workers, weight.matrix(), bias, x, out)
    return out
