"""The candidate search on the GPU: no active neuron is missed, and few more are named than by the native search."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter.gate_copy import copy_rows
from flashsparse import native
from flashsparse.native.compact import Compact
from flashsparse.native.compact import candidates as native_candidates
from metal_kernels import select
from metal_kernels.candidates import MARGIN, CompactCopy, candidates, candidates_reference
from tests import compact_cases
from tests.compact_cases import activated, normal
from tests.metal.test_select import kept_of
from tests.native.operands import PLAIN, exact, store

pytestmark = pytest.mark.usefixtures("metal")
PROPERTY = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def metal_copy(data: np.ndarray, dtype: str, bias: np.ndarray | None) -> CompactCopy:
    parts = copy_rows(data, dtype)
    arrays = (mx.array(parts[name]) for name in ("high", "low", "scales", "errors"))
    return CompactCopy(*arrays, None if bias is None else mx.array(bias))


def search(
    data: np.ndarray, dtype: str, x: np.ndarray, bias: np.ndarray | None, param: float | None = None
) -> np.ndarray:
    return kept_of(candidates(metal_copy(data, dtype, bias), mx.array(x), param), len(data))


def native_search(
    data: np.ndarray, dtype: str, x: np.ndarray, bias: np.ndarray | None, param: float | None
) -> np.ndarray:
    parts = copy_rows(data, dtype)
    copy = Compact(parts["high"], parts["low"], parts["scales"], parts["errors"], bias, data.shape[1])
    mask, ids = np.empty((len(x), copy.rows), np.uint8), np.empty(copy.rows, np.int32)
    name = "relu" if param is None else "fatrelu"
    with native.Workers(1) as workers:
        native_candidates(workers, copy, x, native.ACTIVATIONS[name], param or 0.0, mask, ids)
    return mask.astype(bool)


def check(
    data: np.ndarray, dtype: str, x: np.ndarray, bias: np.ndarray | None = None, param: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Asserts that nothing that is active by the GPU's sums, the CPU's or float64's is missed."""
    found = search(data, dtype, x, bias, param)
    name, value = ("relu", 0.0) if param is None else ("fatrelu", param)
    active = activated(data, dtype, bias, x, name, value) != 0
    with np.errstate(all="ignore"):
        real = x.astype(np.float64) @ exact(data, dtype).T + (0 if bias is None else bias)
    active |= (real > 0) if param is None else (real >= param)
    weight = mx.array(data).view(mx.bfloat16) if dtype == "BF16" else mx.array(data)
    if data.shape[1] % 32 == 0:
        extra = None if bias is None else mx.array(bias)
        _, bits = select.gate(weight, mx.array(x), name, value, bias=extra)
        active |= kept_of(bits, len(data))
    assert not (active & ~found).any()
    return found, active


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (9, 64), (40, 224), (101, 576), (70, 1088)])
@pytest.mark.parametrize("param", [None, 0.25])
def test_misses_nothing(dtype: str, rows: int, cols: int, param: float | None) -> None:
    data = store(normal(rows, cols) / np.sqrt(cols).astype(np.float32), dtype).data
    bias, x = normal(rows, seed=3) - np.float32(1), normal(3, cols, seed=2)
    check(data, dtype, x, bias, param)
    check(data, dtype, x, None, param)


def test_names_little_more_than_the_native_search() -> None:
    data = store(normal(500, 2048) / np.float32(45), "F16").data
    x, bias = normal(2, 2048, seed=2), np.full(500, -1.28, np.float32)
    found, active = check(data, "F16", x, bias)
    other = native_search(data, "F16", x, bias, None)
    assert not (other & ~found).any()
    assert active.sum() > 50 and found.sum() - other.sum() <= MARGIN * active.sum() + 1
    loose = np.array(candidates_reference(metal_copy(data, "F16", bias), mx.array(x)))
    assert (loose & ~found).sum() == 0 and found.sum() - loose.sum() <= MARGIN * active.sum() + 1


@PROPERTY
@given(st.data())
def test_misses_nothing_of_any_magnitude(data: st.DataObject) -> None:
    stored, dtype, x, bias = compact_cases.of_any_magnitude(data, [32, 64, 160, 576])
    check(stored, dtype, x, np.where(np.isfinite(bias), bias, np.float32(0)))


@pytest.mark.parametrize("dtype", PLAIN)
def test_scores_at_the_edge(dtype: str) -> None:
    data, tokens = compact_cases.at_the_edge(dtype, rows=64, tokens=2)
    for x in tokens:
        check(data, dtype, x)


def test_the_copys_error_is_needed_whole() -> None:
    """Inputs along the error of a row's copy, and a bias that leaves its gate barely open."""
    data = normal(24, 64)
    parts = copy_rows(data, "F32")
    scales = exact(parts["scales"], "BF16")
    low = np.concatenate([parts["low"] & 15, parts["low"] >> 4], axis=1).astype(np.float64) - 8
    x = (exact(data, "F32") - (parts["high"] + low / 16) * scales).astype(np.float32)
    real = np.einsum("rc,rc->r", x.astype(np.float64), exact(data, "F32"))
    bias = (-real + 0.02 * np.linalg.norm(x, axis=1) * scales[:, 0] * parts["errors"][:, 1]).astype(np.float32)
    for row in range(24):
        check(data, "F32", x[row : row + 1], bias)


def test_the_rounding_of_the_exact_gate_is_needed() -> None:
    """Weights and inputs that the copy holds exactly: only float32's rounding of the sum opens these gates."""
    rng = np.random.default_rng(1)
    numbers, whole = rng.integers(-2031, 2032, (96, 1024)), rng.integers(-32767, 32768, (1, 1024))
    numbers[:, ::64], whole[:, ::64] = 2038, 32767
    data, x = (numbers / 16).astype(np.float32), whole.astype(np.float32)
    sums = (numbers @ whole[0]) / 16
    bias = np.nextafter(-sums.astype(np.float32), np.float32(-np.inf))
    _, active = check(data, "F32", x, bias)
    assert (active[0] & (sums + bias <= 0)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_a_candidate(bad: float) -> None:
    compact_cases.check_what_is_not_finite(search, bad)


def test_zeros_are_out_and_sums_that_overflow_are_in() -> None:
    compact_cases.check_zeros(search, 96)
    compact_cases.check_sums_that_overflow(search)


def test_weights_that_a_gpu_may_flush_to_zero_are_candidates() -> None:
    """Their products are not what float32 with subnormal numbers would give, so no bound holds."""
    data = np.full((2, 64), 1e-33, np.float32)
    data[1] = 1e-3
    found = search(data, "F32", np.full((1, 64), -1e3, np.float32), None, None)
    assert found[0].tolist() == [True, False]


def test_a_token_is_searched_alone() -> None:
    data, x = normal(77, 320), normal(5, 320, seed=2)
    together = search(data, "F32", x, None, None)
    assert np.array_equal(search(data, "F32", x[3:4], None, None)[0], together[3])


def test_groups_must_fit() -> None:
    copy = metal_copy(normal(4, 64), "F32", None)
    with pytest.raises(ValueError, match="expected 2 for 65 columns"):
        candidates(copy, mx.zeros((1, 65)))
