"""The candidate search over compact copies: no active row is missed, and the search depends on row and token only.

Gates are judged by what fs_linear computes from the stored rows and by float64; the copy comes from the converter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.gate_copy import copy_rows
from flashsparse import native
from flashsparse.native.compact import GROUP, Compact, candidates
from flashsparse.pack.layout import COPY_GROUP
from tests import compact_cases
from tests.compact_cases import activated, normal
from tests.native.operands import PLAIN, exact, store, variants

ACTIVATIONS = [("relu", 0.0), ("relu2", 0.0), ("fatrelu", 0.0), ("fatrelu", 0.25), ("drelu", 0.0)]


@pytest.fixture(params=variants(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(best)


def compact(data: np.ndarray, dtype: str, bias: np.ndarray | None = None) -> Compact:
    parts = copy_rows(data, dtype)
    return Compact(parts["high"], parts["low"], parts["scales"], parts["errors"], bias, data.shape[1])


def search(
    copy: Compact, x: np.ndarray, name: str = "relu", param: float = 0.0, threads: int = 2
) -> tuple[np.ndarray, np.ndarray, int]:
    mask, ids = np.full((len(x), copy.rows), 7, np.uint8), np.full(copy.rows, -1, np.int32)
    with native.Workers(threads) as workers:
        count, refined = candidates(workers, copy, x, native.ACTIVATIONS[name], param, mask, ids)
    assert set(np.unique(mask)) <= {0, 1}
    assert np.array_equal(ids[:count], np.flatnonzero(mask.any(axis=0)))
    return mask, ids[:count], refined


def found(data: np.ndarray, dtype: str, x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """bool [T, rows]."""
    return search(compact(data, dtype, bias), x)[0].astype(bool)


def check(
    data: np.ndarray, dtype: str, x: np.ndarray, bias: np.ndarray | None = None, name: str = "relu", param: float = 0.0
) -> float:
    """Asserts that nothing active is missed; returns candidates per active pair."""
    mask, _, _ = search(compact(data, dtype, bias), x, name, param)
    active = activated(data, dtype, bias, x, name, param) != 0
    assert not (active & (mask == 0)).any()
    return mask.sum() / max(active.sum(), 1)


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize(("name", "param"), ACTIVATIONS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (9, 63), (33, 64), (40, 200), (301, 576), (70, 1088)])
@pytest.mark.parametrize("tokens", [1, 19])
def test_misses_nothing(dtype: str, name: str, param: float, rows: int, cols: int, tokens: int) -> None:
    data = store(normal(rows, cols) / np.sqrt(cols).astype(np.float32), dtype).data
    bias = normal(rows, seed=3) - np.float32(1)
    assert check(data, dtype, normal(tokens, cols, seed=2), bias, name, param) < 1.5 or rows < 40
    check(data, dtype, normal(tokens, cols, seed=2), None, name, param)


def test_names_few_more_than_are_active() -> None:
    """What the layout is for, at the density of a ReLU model and the width of a 7B one."""
    data = store(normal(700, 4096) / np.float32(64), "F16").data
    x, bias = normal(8, 4096, seed=2), np.full(700, -1.28, np.float32)
    assert 1 <= check(data, "F16", x, bias) < 1.08
    _, _, refined = search(compact(data, "F16", bias), x)
    assert 0.1 < refined / (8 * 700) < 0.2  # pairs whose low bits were read


def test_the_smallest_weights_have_a_scale() -> None:
    """Weights of a few subnormal steps: 16 / 2039 of them is zero in float32."""
    data, x = (normal(24, 1) * 1e-43).astype(np.float32), np.array([[9e4]], np.float32)
    bias = -np.abs(data[:, 0] * x[0, 0]) * np.float32(1 - 2.0**-20)
    assert (copy_rows(data, "F32")["scales"][data != 0] > 0).all()
    check(data, "F32", x, bias)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_misses_nothing_of_any_magnitude(data: st.DataObject) -> None:
    stored, dtype, x, bias = compact_cases.of_any_magnitude(data, [1, 17, 64, 130, 576])
    check(stored, dtype, x, np.where(np.isfinite(bias), bias, np.float32(0)))
    check(stored, dtype, x)


@pytest.mark.parametrize("dtype", PLAIN)
def test_scores_at_the_edge(dtype: str) -> None:
    data, tokens = compact_cases.at_the_edge(dtype, rows=200, tokens=4)
    for x in tokens:
        check(data, dtype, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_a_candidate(bad: float) -> None:
    compact_cases.check_what_is_not_finite(found, bad)
    x = normal(3, 128, seed=2)
    x[1, 5] = bad
    assert found(np.zeros((40, 128), np.float32), "F32", x, None).tolist() == [[False] * 40, [True] * 40, [False] * 40]


def test_zeros_are_out() -> None:
    compact_cases.check_zeros(found, 70)


def test_sums_that_overflow_are_candidates() -> None:
    compact_cases.check_sums_that_overflow(found)


@pytest.mark.parametrize("cols", [64, 200, 1088])
def test_depends_on_row_and_token_only(cols: int) -> None:
    data, x = normal(301, cols), normal(37, cols, seed=2)
    copy = compact(data, "F32", np.full(301, -4, np.float32))
    together, _, refined = search(copy, x)
    for threads in (1, 3):
        mask, _, count = search(copy, x, threads=threads)
        assert np.array_equal(mask, together) and count == refined
    assert np.array_equal(search(copy, x[5:6])[0][0], together[5])
    assert np.array_equal(search(copy, x[14:20])[0], together[14:20])
    for other in variants():
        native.set_isa(other)
        assert np.array_equal(search(copy, x)[0], together)


def test_errors_bound_what_the_copy_leaves() -> None:
    for dtype in PLAIN:
        data = store(normal(50, 200) * np.float32(3), dtype).data
        values, parts = np.zeros((50, 256)), copy_rows(data, dtype)
        values[:, :200] = exact(data, dtype)
        scales = exact(parts["scales"], "BF16")[..., None]
        low = parts["low"].reshape(50, 4, 32)
        high = parts["high"].reshape(50, 4, 64).astype(np.float64)
        both = high + (np.concatenate([low & 15, low >> 4], axis=2).astype(np.float64) - 8) / 16
        for column, copied in enumerate((high * scales, both * scales)):
            error = np.linalg.norm(values.reshape(50, 4, 64) - copied, axis=2) / scales[..., 0]
            bound = parts["errors"][:, column].astype(np.float64)
            assert (error.max(axis=1) <= bound).all() and (bound <= error.max(axis=1) * 1.001 + 1e-9).all()
        weight = np.linalg.norm(values.reshape(50, 4, 64), axis=2) / scales[..., 0]
        assert (weight.max(axis=1) + 5 <= parts["errors"][:, 2] * (1 + 1e-7)).all()


def test_wrong_operands() -> None:
    copy = compact(normal(4, 64), "F32")
    mask, ids = np.empty((1, 4), np.uint8), np.empty(4, np.int32)
    with native.Workers(1) as workers:
        with pytest.raises(ValueError, match="zeros"):
            candidates(workers, copy, normal(1, 64), native.ACTIVATIONS["silu"], 0.0, mask, ids)
        with pytest.raises(ValueError, match="x: expected"):
            candidates(workers, copy, normal(1, 63), native.ACTIVATIONS["relu"], 0.0, mask, ids)
        with pytest.raises(ValueError, match="mask: expected"):
            candidates(workers, copy, normal(2, 64), native.ACTIVATIONS["relu"], 0.0, mask, ids)
    with pytest.raises(ValueError, match="groups"):
        Compact(*copy.keep, 65)
    assert GROUP == COPY_GROUP
