"""Rows and tokens that are hard for a candidate search, whatever computes it, and what is active among them.

Owns the operands; searching is each test file's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st

from flashsparse import native
from tests.native.operands import PLAIN, exact, store

# (rows, dtype, tokens, bias) -> bool [T, rows]: the candidates
Search = Callable[[np.ndarray, str, np.ndarray, np.ndarray | None], np.ndarray]


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def activated(
    data: np.ndarray, dtype: str, bias: np.ndarray | None, x: np.ndarray, name: str, param: float
) -> np.ndarray:
    """What the layout with a resident gate computes."""
    out = np.empty((len(x), len(data)), np.float32)
    matrix = native.Matrix(data.ctypes.data, *data.shape, native.DTYPES[dtype], keep=data)
    with native.Workers(1) as workers:
        native.linear(workers, matrix, bias, x, out)
    native.activate(out, native.ACTIVATIONS[name], param)
    return out


def of_any_magnitude(data: st.DataObject, widths: Sequence[int]) -> tuple[np.ndarray, str, np.ndarray, np.ndarray]:
    """Rows, type, tokens, bias over all of float32's range, denormals included, and scores that nearly cancel."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype, cols = data.draw(st.sampled_from(PLAIN)), data.draw(st.sampled_from(widths))
    weights = rng.standard_normal((24, cols)) * 10.0 ** data.draw(st.integers(-45, 30))
    x = rng.standard_normal((3, cols)) * 10.0 ** data.draw(st.integers(-45, 37))
    if data.draw(st.booleans()):
        x *= 10.0 ** rng.integers(-20, 1, cols)
    with np.errstate(all="ignore"):
        stored, x32 = store(weights.astype(np.float32), dtype).data, x.astype(np.float32)
        bias = -(exact(stored, dtype) @ x32[0].astype(np.float64)).astype(np.float32)  # token 0: rounding decides
        bias *= rng.choice([1, 1 + 2.0**-20, 1 - 2.0**-20, 0], 24).astype(np.float32)
    return stored, dtype, x32, bias


def at_the_edge(dtype: str, rows: int, tokens: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows that are zero in real numbers but for their rounding, for each of two sets of tokens."""
    half, x = store(normal(rows, 288), dtype).data, normal(tokens, 288, seed=2)
    nearly = np.nextafter(-x, np.float32(0))
    return np.concatenate([half, half], axis=1), [np.concatenate([x, y], axis=1) for y in (-x, nearly)]


def check_what_is_not_finite(search: Search, bad: float) -> None:
    """It is a candidate, and nothing beside it is."""
    data, x, bias = normal(40, 128), normal(3, 128, seed=2), np.full(40, -1e6, np.float32)
    x[1, 5] = bad
    found = search(data, "F32", x, bias)
    assert found[1].all() and not found[0].any() and not found[2].any()
    data[7, 100], data[9, 3], bias[11] = bad, np.float32(3e38), np.nan
    assert np.array_equal(np.flatnonzero(search(data, "F32", x[:1], bias)[0]), [7, 9, 11])


def check_zeros(search: Search, cols: int) -> None:
    """Rows and tokens of zeros have no candidates."""
    data, x = normal(10, cols), normal(2, cols, seed=2)
    data[4], x[1] = 0, 0
    found = search(data, "F32", x, None)
    assert not found[0, 4] and not found[1].any()


def check_sums_that_overflow(search: Search) -> None:
    """They are candidates."""
    data, x = np.full((2, 128), 1e28, np.float32), np.full((1, 128), 1e10, np.float32)
    data[1] *= -1
    x[0, ::2] *= -1
    assert search(data, "F32", x, None).all()
