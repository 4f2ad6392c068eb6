"""Whole decoder layers of the native library as Python calls: the attention half of a layer, norms, rotations.

Addresses are resolved once, when a layer is made: a call per token costs a few microseconds. What the calls compute is
stated in src/block.h. Arrays must be C-contiguous; wrong ones: ValueError when the layer is made or called.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np

from flashsparse.native.kernels import DTYPES, Matrix, Workers, data_address
from flashsparse.native.library import CMatrix, lib


class CNorm(ctypes.Structure):
    """fs_norm."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("centred", c_int32)]


class CLayer(ctypes.Structure):
    """fs_layer."""

    _fields_ = [
        *((name, CMatrix) for name in "qkvo"),
        *((f"{name}_bias", c_void_p) for name in "qkvo"),
        ("input", CNorm),
        ("output", CNorm),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("window", c_int64),
        ("kv_dtype", c_int32),
        ("post_norm", c_int32),
        ("scale", c_float),
        ("residual", c_float),
    ]


def _vector(values: np.ndarray | None, size: int, name: str) -> int | None:
    """The address of a float32 [size]."""
    if values is None:
        return None
    if values.dtype != np.float32 or values.shape != (size,) or not values.flags.c_contiguous:
        raise ValueError(f"{name}: expected a contiguous float32 [{size}], found {values.dtype} {values.shape}")
    return values.ctypes.data


class Norm:
    """RMSNorm, or LayerNorm when `centred`, of vectors as long as `weight` (float32)."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None, eps: float, centred: bool) -> None:
        self.size, self._keep = len(weight), (weight, bias)
        addresses = _vector(weight, self.size, "weight"), _vector(bias, self.size, "bias")
        self.c = CNorm(*addresses, eps, int(centred))
        self._address = ctypes.addressof(self.c)

    def __call__(self, workers: Workers, x: np.ndarray, out: np.ndarray) -> None:
        """out [T, d] = norm(x); `out` may be `x`."""
        for array in (x, out):
            if array.dtype != np.float32 or array.shape != (len(x), self.size) or not array.flags.c_contiguous:
                raise ValueError(f"norm of {self.size}: found {array.dtype} {array.shape}")
        lib().fs_normalize(workers.handle, self._address, data_address(x), len(x), self.size, data_address(out))


@dataclass(frozen=True)
class Heads:
    """Query heads, key and value heads, values per head, and the cache's type: "F32", "F16" or "BF16"."""

    query: int
    kv: int
    size: int
    kv_dtype: str


class Layer:
    """The attention half of a decoder layer. `products`: q, k, v and o with their biases (float32) or None.

    `input` None: no norm before the products. `window` 0: none. `residual` multiplies what the attention adds.
    """

    def __init__(
        self,
        workers: Workers,
        products: list[tuple[Matrix, np.ndarray | None]],
        input: Norm | None,
        output: Norm,
        heads: Heads,
        *,
        window: int = 0,
        post_norm: bool = False,
        residual: float = 1.0,
    ) -> None:
        d, wide, narrow = output.size, heads.query * heads.size, heads.kv * heads.size
        shapes = [(wide, d), (narrow, d), (narrow, d), (d, wide)]
        found = [(matrix.rows, matrix.cols) for matrix, _ in products]
        if found != shapes or heads.query % heads.kv or (input is not None and input.size != d):
            raise ValueError(f"q, k, v and o are {found}, expected {shapes}; {heads}")
        self.scratch_floats = 2 * (heads.query + heads.kv) * heads.size  # per token
        self._workers, self._keep = workers, (products, input, output)
        biases = (_vector(bias, shape[0], "bias") for (_, bias), shape in zip(products, shapes, strict=True))
        self._c = CLayer(
            *(matrix.c for matrix, _ in products), *biases, CNorm() if input is None else input.c, output.c,
            heads.query, heads.kv, heads.size, window, DTYPES[heads.kv_dtype], int(post_norm),
            heads.size**-0.5, residual,
        )  # fmt: skip
        self._address = self.address = ctypes.addressof(self._c)
        self._attend = lib().fs_attend

    def attend(
        self, keys: int, values: int, capacity: int, offset: int, turns: int | None, tokens: int, buffers: Addresses
    ) -> None:
        """fs_attend; addresses of the caches [kv_heads, capacity, head_dim], which must have room, and of `turns`."""
        self._attend(
            self._workers.handle, self._address, keys, values, capacity, offset, turns, tokens,
            buffers.h, buffers.x, buffers.scratch,
        )  # fmt: skip


class Addresses:
    """Where h [T, d], x [T, d] and scratch [T * scratch_floats] of every layer are, float32; kept alive by this."""

    def __init__(self, h: np.ndarray, x: np.ndarray, scratch: np.ndarray) -> None:
        self._keep = (h, x, scratch)
        self.h, self.x, self.scratch = (array.ctypes.data for array in self._keep)


def turns(frequencies: np.ndarray, factor: float, offset: int, tokens: int, out: np.ndarray) -> None:
    """out [tokens, 2, n] (float32) = factor times cosines and sines of positions offset.. times frequencies [n]."""
    shape = (tokens, 2, len(frequencies))
    if frequencies.dtype != np.float64 or out.dtype != np.float32 or out.shape != shape or not out.flags.c_contiguous:
        raise ValueError(f"frequencies {frequencies.dtype}, out {out.dtype} {out.shape}, expected float32 {shape}")
    lib().fs_turns(frequencies.ctypes.data, len(frequencies), factor, offset, tokens, out.ctypes.data)


def compute_seconds() -> float:
    """Seconds that this thread has spent inside the library's compute functions."""
    return float(lib().fs_compute_ns()) / 1e9
