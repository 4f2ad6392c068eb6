"""The compact copy of a gate: 8 bits and a residual of 4, and for each row what the copy's errors are at most.

`docs/exact.md` says what the figures mean and why no active neuron is missed. Elementwise arithmetic and sums in one
order only, so that the copy does not depend on the machine.
"""

from __future__ import annotations

import numpy as np

from converter.weights import to_float32
from flashsparse.pack.layout import COPY_GROUP

TOP = 127 * 16 + 7  # the largest magnitude in sixteenths of a step
LARGEST = 2.0**96  # a row with more, or with NaN, has no copy: its neuron is always a candidate
UP = 1 + 2.0**-18  # more than rounding takes of a norm
LEAST = 2.0**-60  # more than underflow takes of a norm


def copy_rows(rows: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The copy of stored rows [n, d] of type `dtype`: high, low, scales (bf16 as uint16) and errors, as in the pack."""
    values = to_float32(rows, dtype)
    n, d = values.shape
    groups = -(-d // COPY_GROUP)
    kept = (np.abs(values) < LARGEST).all(axis=1)
    padded = np.zeros((n, groups * COPY_GROUP), np.float32)
    padded[kept, :d] = values[kept]
    weights = padded.reshape(n, groups, COPY_GROUP)
    scales, steps = _steps(weights)
    numbers = np.rint(weights / np.where(steps == 0, np.float32(1), steps)).astype(np.int16)
    high = (numbers + 8) >> 4
    low = (numbers - (high << 4) + 8).astype(np.uint8)
    errors = _errors(weights, steps, high, numbers)
    errors[~kept] = np.inf
    return {
        "high": high.astype(np.int8).reshape(n, -1),
        "low": (low[..., :32] | low[..., 32:] << 4).reshape(n, -1),
        "scales": scales,
        "errors": errors,
    }


def _steps(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales [n, groups], bf16 rounded up, and a sixteenth of them as float32 [n, groups, 1]: what low counts."""
    largest = np.abs(weights).max(axis=2)
    least = largest * np.float32(16 * (1 + 2.0**-20) / TOP)
    scales = ((least.view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16).astype(np.uint16)
    scales[(scales == 0) & (largest > 0)] = 1  # the product underflowed; a scale of zero would bound nothing
    steps = (scales.astype(np.uint32) << 16).view(np.float32) / np.float32(16)
    return scales, steps[..., None]


def _errors(weights: np.ndarray, steps: np.ndarray, high: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """float32 [n, 3]: the largest of the groups' norms in scales, of the errors of high and of both, and of weights."""
    scale = np.where(steps == 0, np.float32(1), steps) * np.float32(16)
    rough = _norms((weights - high.astype(np.float32) * 16 * steps) / scale)
    fine = _norms((weights - numbers.astype(np.float32) * steps) / scale)
    whole = _norms(weights / scale) + 5  # high alone is at most (1/2 + 1/32) * 8 away, which both and low are within
    result = np.stack([rough, fine, whole], axis=1)
    result[~weights.any(axis=(1, 2))] = 0  # a row of zeros is exact
    up = result.astype(np.float32)
    return np.where(up < result, np.nextafter(up, np.float32(np.inf)), up)


def _norms(parts: np.ndarray) -> np.ndarray:
    """float64 [n]: at least the largest norm of a group of [n, groups, 64]."""
    squares = parts * parts
    width = squares.shape[2]
    while width > 1:
        width //= 2
        squares = squares[..., :width] + squares[..., width:]
    return np.sqrt(squares[..., 0].max(axis=1).astype(np.float64)) * UP + LEAST
