"""Quantization of rows with `mx.quantize`, always on the CPU device, so that a pack does not depend on the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flashsparse.pack.layout import Quant

if TYPE_CHECKING:
    import mlx.core as mx


def quantize_rows(rows: np.ndarray, dtype: str, quant: Quant) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed words uint32 [n, d * bits / 32], scales and biases [n, d / group_size] of rows [n, d].

    `dtype` is F32, F16 or BF16 (rows as uint16); scales and biases have the same type. Raises ValueError for rows that
    hold NaN or an infinity.
    """
    import mlx.core as mx

    if not _finite(rows, dtype):
        raise ValueError("holds NaN or an infinity, which cannot be quantized")
    values = mx.array(rows)
    if dtype == "BF16":
        values = values.view(mx.bfloat16)
    words, scales, biases = mx.quantize(values, quant.group_size, quant.bits, stream=mx.cpu)
    return np.array(words), _to_numpy(scales, dtype), _to_numpy(biases, dtype)


def quantized_bytes(rows: np.ndarray, dtype: str, quant: Quant) -> np.ndarray:
    """uint8 [n, bytes]: for each row its words, scales and biases back to back."""
    parts = quantize_rows(rows, dtype, quant)
    return np.concatenate([part.view(np.uint8) for part in parts], axis=1)


def _finite(rows: np.ndarray, dtype: str) -> bool:
    if dtype == "BF16":
        return not bool(np.any((rows & 0x7F80) == 0x7F80))
    return bool(np.isfinite(rows).all())


def _to_numpy(values: mx.array, dtype: str) -> np.ndarray:
    import mlx.core as mx

    return np.array(values.view(mx.uint16) if dtype == "BF16" else values)
