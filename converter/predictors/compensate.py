"""Low-bit copies whose rounding errors cancel on the inputs that occur, weights not all at their nearest levels.

GPTQ's sweep (arXiv 2210.17323): columns are rounded one after the other, and what a column's rounding did to the output
is taken up by the columns not yet rounded, as far as the inputs' second moments allow. Inputs of FFNs have a large mean
and strong correlations, so at two bits the output's error halves and the copy stays the same size.
"""

from __future__ import annotations

import numpy as np

from flashsparse.sparsity.low_bit import LowBit, best_scales, bias_of, check_layout, check_weights, codes_of, pack

DAMPING = 0.01  # of the mean input power, GPTQ's: keeps corrections small in directions hardly seen
_ROWS = 2048  # at a time


def compensated_rows(weight: np.ndarray, bits: int, group: int, second_moment: np.ndarray) -> LowBit:
    """The half-step copy of `weight` [n, d] for inputs with E[x x'] = `second_moment`, float64 [d, d], damped already.

    Scales are searched per row and group as in `quantize_rows`, on the weights as corrected so far. Raises UsageError
    for a layout that does not fit or weights that cannot be copied.
    """
    rows, columns = weight.shape
    check_layout(columns, bits, group)
    sweep = np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(second_moment)).T, np.float32)
    power = np.diagonal(second_moment)
    importance = (power / power.mean()).astype(np.float32).reshape(-1, group)
    words = np.empty((rows, columns * bits // 32), "<u4")
    scales = np.empty((rows, columns // group), np.float16)
    for start in range(0, rows, _ROWS):
        block = np.array(weight[start : start + _ROWS].T, np.float32, order="C")  # [d, rows]: a column is contiguous
        check_weights(block.T, start)
        codes = np.empty(block.shape, np.uint8)
        for first in range(0, columns, group):
            scale = best_scales(block[first : first + group].T[:, None], importance[None, first // group], bits)[:, 0]
            scales[start : start + _ROWS, first // group] = scale
            error = _round_group(block, codes, first, group, scale, bits, sweep)
            block[first + group :] -= sweep[first : first + group, first + group :].T @ error
        words[start : start + _ROWS] = pack(codes.T, bits)
    return LowBit(words, scales, bias_of(scales, bits), bits, group)


def _round_group(
    block: np.ndarray, codes: np.ndarray, first: int, group: int, scale: np.ndarray, bits: int, sweep: np.ndarray
) -> np.ndarray:
    """Rounds the group's columns in turn, correcting its later ones; the errors [group, rows] in units of the sweep."""
    wide, low = scale.astype(np.float32), bias_of(scale, bits).astype(np.float32)
    errors = np.empty((group, block.shape[1]), np.float32)
    for column in range(first, first + group):
        codes[column] = codes_of(block[column], scale, bits)
        error = errors[column - first]
        np.subtract(block[column], codes[column] * wide + low, out=error)
        error /= sweep[column, column]
        block[column + 1 : first + group] -= np.outer(sweep[column, column + 1 : first + group], error)
    return errors
