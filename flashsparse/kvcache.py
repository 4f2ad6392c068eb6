"""The KV cache of one conversation: fixed memory, the checkpoint's 16-bit type, one cache per layer.

Owns keys and values and their position. mlx-lm's caches grow by concatenation and hold what MLX computes in; this one
is allocated once, so that the memory plan is a promise. It has the part of their interface that mlx-lm's models use.
"""

from __future__ import annotations

import numpy as np

from flashsparse.errors import ContextLengthError

STORED = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class KVCache:
    """Keys and values [kv_heads, capacity, head_dim] in `dtype`; `offset` is the number of positions held."""

    def __init__(self, kv_heads: int, head_dim: int, capacity: int, dtype: str) -> None:
        shape = (kv_heads, capacity, head_dim)
        self.keys = np.zeros(shape, STORED[dtype])
        self.values = np.zeros(shape, STORED[dtype])
        self.addresses = self.keys.ctypes.data, self.values.ctypes.data
        self.dtype, self.capacity, self.offset = dtype, capacity, 0

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def append(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Store float32 keys and values [T, kv_heads, head_dim] behind what is held, rounded to nearest even.

        Raises ContextLengthError when they do not fit; nothing is stored then.
        """
        from flashsparse import native

        count = keys.shape[0]
        self.check_room(count)
        native.kv_append(keys, self.keys, self.dtype, self.offset)
        native.kv_append(values, self.values, self.dtype, self.offset)
        self.offset += count

    def check_room(self, count: int) -> None:
        """Raises ContextLengthError when `count` more positions do not fit."""
        if self.offset + count > self.capacity:
            raise ContextLengthError(
                f"the conversation needs {self.offset + count} positions and --max-kv-size reserved {self.capacity}; "
                "start again with a larger --max-kv-size (and --dram if it does not fit)"
            )
