"""The candidate search over a compact copy of a gate as a Python call; what is computed is stated in src/flashsparse.h.

Operands are C-contiguous numpy arrays; wrong ones raise ValueError, as in `flashsparse.native.kernels`.
"""

from __future__ import annotations

import ctypes

import numpy as np

from flashsparse.native.kernels import ACTIVATIONS, Workers, _address
from flashsparse.native.library import CCompact, lib

GROUP = 64  # columns that share a scale


class Compact:
    """The C view of a copy of a matrix [rows, cols] in 8 + 4 bits; it keeps its arrays.

    high int8 [rows, groups * 64], low uint8 [rows, groups * 32], scales bf16 as uint16 [rows, groups], errors float32
    [rows, 3], bias float32 [rows] or None; groups = cols / 64, rounded up.
    """

    def __init__(
        self,
        high: np.ndarray,
        low: np.ndarray,
        scales: np.ndarray,
        errors: np.ndarray,
        bias: np.ndarray | None,
        cols: int,
    ) -> None:
        rows, groups = scales.shape
        if groups != -(-cols // GROUP):
            raise ValueError(f"scales: found {groups} groups, expected {-(-cols // GROUP)} for {cols} columns")
        at = (
            _address(high, np.int8, (rows, groups * GROUP), "high"),
            _address(low, np.uint8, (rows, groups * GROUP // 2), "low"),
            _address(scales, np.uint16, (rows, groups), "scales"),
            _address(errors, np.float32, (rows, 3), "errors"),
            None if bias is None else _address(bias, np.float32, (rows,), "bias"),
        )
        self.rows, self.cols, self.keep = rows, cols, (high, low, scales, errors, bias)
        self.c = CCompact(*at, rows, cols)
        self.reference = ctypes.byref(self.c)


def candidates(
    workers: Workers,
    copy: Compact,
    x: np.ndarray,
    activation: int,
    param: float,
    mask: np.ndarray,
    ids: np.ndarray,
) -> tuple[int, int]:
    """mask [T, rows] (uint8) becomes 1 where a row of the copied matrix may be active for x [T, cols], else 0.

    No row whose exact activation is not zero is left out; a token that holds NaN or Inf has every row. ids [rows]
    (int32) begins with the ascending rows that some token may need. Returns how many, and how many pairs of token and
    row needed the low bits. Not for silu, which has no zeros.
    """
    if activation not in ACTIVATIONS.values() or activation == ACTIVATIONS["silu"]:
        raise ValueError(f"activation {activation}: candidates need an activation with zeros")
    tokens, refined = len(x), ctypes.c_int64()
    at = _address(x, np.float32, (tokens, copy.cols), "x")
    to = _address(mask, np.uint8, (tokens, copy.rows), "mask")
    numbers = _address(ids, np.int32, (copy.rows,), "ids")
    count = lib().fs_candidates(
        workers.handle, copy.reference, at, tokens, activation, param, to, numbers, ctypes.byref(refined)
    )
    return int(count), refined.value
