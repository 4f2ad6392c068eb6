"""Memory that the host writes and the GPU reads in place: MLX arrays with their numpy aliases, and views of weights.

Owns the passage from numpy aliases, by which the rest of the engine knows stored bytes, to MLX arrays of the same
bytes. Nothing here copies. When host or GPU may touch them is decided in `refills.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:
    from flashsparse.weights import Buffer

TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_TYPES = {np.dtype(name): getattr(mx, name) for name in ("uint8", "int8", "uint16", "uint32", "float16", "float32")}


class Shared:
    """`array` (MLX) and `host` (numpy) are the same `size` numbers of `dtype`, an integer type's name."""

    def __init__(self, size: int, dtype: str) -> None:
        self.array = mx.zeros((size,), getattr(mx, dtype))
        mx.eval(self.array)
        self.host = np.array(self.array, copy=False)


class Views:
    """MLX arrays of stretches of buffers, found by their address."""

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []

    def add(self, buffer: Buffer) -> None:
        """Raises ValueError for a buffer that is not MLX's."""
        if buffer.array is None:
            raise ValueError("the buffer was not allocated by MLX")
        self._buffers.append(buffer)

    def of(self, stored: np.ndarray, dtype: str | None = None) -> mx.array:
        """The MLX array of the same bytes as a contiguous alias `stored`; `dtype`: F32, F16 or BF16, when it is one."""
        address, size = stored.ctypes.data, stored.nbytes
        for buffer in self._buffers:
            begin = address - buffer.address
            if begin >= 0 and begin + size <= buffer.nbytes:
                raw = buffer.array[begin : begin + size]
                return raw.view(_TYPES[stored.dtype] if dtype is None else TYPES[dtype]).reshape(stored.shape)
        raise ValueError("the array lies in none of the buffers that MLX allocated")

    def clear(self) -> None:
        """Let go of the buffers."""
        self._buffers.clear()
