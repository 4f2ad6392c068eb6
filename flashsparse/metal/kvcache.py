"""The KV cache of one conversation in memory that host and GPU share, written in place by MLX.

The same memory and types as `flashsparse.kvcache`, which the memory plan counts; `keys` and `values` are its numpy
aliases, for saved sessions.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from flashsparse.kvcache import STORED, KVCache
from flashsparse.metal.shared import TYPES


class MetalKVCache(KVCache):
    """`offset` positions of keys and values [1, kv_heads, capacity, head_dim] on the GPU."""

    def __init__(self, kv_heads: int, head_dim: int, capacity: int, dtype: str) -> None:
        shape = (1, kv_heads, capacity, head_dim)
        self._keys, self._values = mx.zeros(shape, TYPES[dtype]), mx.zeros(shape, TYPES[dtype])
        mx.eval(self._keys, self._values)
        self.dtype, self.capacity, self.offset = dtype, capacity, 0

    @property
    def keys(self) -> np.ndarray:  # type: ignore[override]
        """[kv_heads, capacity, head_dim], an alias; evaluates what was appended."""
        return _alias(self._keys, self.dtype)

    @property
    def values(self) -> np.ndarray:  # type: ignore[override]
        return _alias(self._values, self.dtype)

    def extend(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store keys and values [1, kv_heads, T, head_dim] behind what is held; all of both [1, kv_heads, offset, ...].

        Raises ContextLengthError when they do not fit; nothing is stored then.
        """
        count = keys.shape[2]
        self.check_room(count)
        start, end = self.offset, self.offset + count
        # MLX writes in place: nothing else refers to the arrays.
        self._keys[:, :, start:end] = keys.astype(self._keys.dtype)
        self._values[:, :, start:end] = values.astype(self._values.dtype)
        self.offset = end
        return self._keys[:, :, :end], self._values[:, :, :end]


def _alias(array: mx.array, dtype: str) -> np.ndarray:
    mx.eval(array)
    raw = array.view(mx.uint16) if STORED[dtype] is np.uint16 else array
    return np.array(raw, copy=False)[0]
