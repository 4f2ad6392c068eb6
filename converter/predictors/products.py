"""The one function behind the dense products of fitting: MLX on a Metal GPU, numpy's BLAS elsewhere.

MLX's own products on a CPU are far slower than OpenBLAS's, so they are never used there.
"""

from __future__ import annotations

from functools import cache

import numpy as np


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """a [n, k] @ b [k, m], into `out` when given. float32 goes to the GPU where there is one; float64 never does."""
    if a.dtype == b.dtype == np.float32 and _metal():
        return _on_gpu(a, b, out)
    return np.matmul(a, b, out=out) if out is not None else np.matmul(a, b)


@cache
def _metal() -> bool:
    import mlx.core as mx

    return bool(mx.metal.is_available())


def _on_gpu(a: np.ndarray, b: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    import mlx.core as mx

    result = np.array(mx.matmul(mx.array(a), mx.array(b)), copy=False)
    if out is None:
        return result
    out[...] = result
    return out
