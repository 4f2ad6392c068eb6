"""Low-bit scores: values against float64 with the same rounding of x, and bits that depend on row and token only.

The tolerance is operands.TOLERANCE of the sum of the magnitudes: integer sums are exact, and what rounds are a handful
of float32 operations per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsparse import native
from flashsparse.kernels.reference import ReferenceKernels
from flashsparse.pack.layout import Quant
from flashsparse.weights import Weight
from tests.native.low_bits import LowBits, before_a_guard, low_bits, pack, rounded, score
from tests.native.operands import close, variants

BITS, GROUPS, SCALES = (1, 2, 3, 4), (32, 64, 128), ("F16", "F32", "BF16")


@pytest.fixture(params=variants(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(best)


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check(weight: LowBits, x: np.ndarray, found: np.ndarray, bias: np.ndarray | None = None) -> None:
    """The magnitude is what the float operations see: each group's scale times its sum and bias times its sum."""
    near, (scaled, biases) = rounded(x, weight.group), weight.terms()
    magnitude = np.abs(near) @ (np.abs(scaled) + np.abs(biases)).T
    extra = np.zeros(len(biases)) if bias is None else bias.astype(np.float64)
    assert close(found, near @ weight.values().T + extra, magnitude + np.abs(extra))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scale_type", SCALES)
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (7, 8), (13, 19)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_equals_float64(bits: int, group: int, scale_type: str, rows: int, groups: int, tokens: int) -> None:
    weight = low_bits(rows, group * groups, bits, group, scale_type)
    x, bias = normal(tokens, group * groups), normal(rows, seed=2)
    check(weight, x, score(weight, x, bias), bias)
    check(weight, x, score(weight, x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("groups", [1, 5, 16, 37])
def test_variants_agree_bit_for_bit(bits: int, group: int, groups: int) -> None:
    weight, x = low_bits(9, group * groups, bits, group), normal(5, group * groups)
    results = []
    for name in variants():
        native.set_isa(name)
        results.append(score(weight, x))
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group", "groups"), [(32, 11), (64, 8), (128, 3)])
def test_bits_depend_on_row_and_token_only(bits: int, group: int, groups: int) -> None:
    weight, x = low_bits(301, group * groups, bits, group), normal(37, group * groups)
    together = score(weight, x)
    for threads in (1, 2, 3):
        assert np.array_equal(score(weight, x, threads=threads), together)
        assert np.array_equal(score(weight, x[5:6], threads=threads)[0], together[5])
    assert np.array_equal(score(weight, x[14:20]), together[14:20])
    for first, last in ((0, 1), (17, 30), (296, 301)):
        assert np.array_equal(score(weight.part(first, last), x), together[:, first:last])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("groups", [3, 8])
@pytest.mark.parametrize("number", ["zeros", "ones", "alternating"])
def test_extremes_do_not_saturate(bits: int, group: int, groups: int, number: str) -> None:
    """Scale 1 and bias 0 or 1: scores are whole numbers below 2^24, so they must be exact."""
    cols, top = group * groups, 2**bits - 1
    numbers = {"zeros": np.zeros(cols), "ones": np.full(cols, top), "alternating": np.arange(cols) % 2 * top}[number]
    numbers = np.tile(numbers.astype(np.int64), (5, 1))
    scales, biases = np.ones((5, groups), np.float16), np.tile(np.float16([0, 1, 1] * groups)[:groups], (5, 1))
    weight = LowBits(numbers, pack(numbers, bits), scales, biases, bits, group, "F16")
    signs = np.stack([np.ones(cols), -np.ones(cols), 1 - 2 * (np.arange(cols) % 2)])
    x = (127 * signs).astype(np.float32)
    assert np.array_equal(score(weight, x), x.astype(np.float64) @ weight.values().T)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_is_half_to_even_per_group(bits: int) -> None:
    """A one-hot weight reads back a token's rounded values; each group has a step of its own."""
    group, cols = 32, 64
    numbers = np.eye(cols, dtype=np.int64)
    weight = LowBits(
        numbers,
        pack(numbers, bits),
        np.ones((cols, 2), np.float32),
        np.zeros((cols, 2), np.float32),
        bits,
        group,
        "F32",
    )
    x = np.zeros((1, cols), np.float32)
    x[0, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.49]
    x[0, 32:36] = [-254, 3, 1, 2.9]
    expected = np.zeros(cols)
    expected[:8], expected[32:36] = [127, 0, 2, 2, 0, -2, -2, 63], [-254, 4, 0, 2]
    assert score(weight, x)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 100, 607])
def test_nan_and_infinity_in_a_token_surface_in_all_its_scores(bits: int, bad: float, place: int) -> None:
    weight, x = low_bits(11, 19 * 32, bits, 32), normal(3, 19 * 32)
    weight.scales[4], weight.biases[4] = 0, 0
    expected = score(weight, x)
    x[1, place] = bad
    found = score(weight, x)
    assert np.isnan(found[1]).all()
    assert np.array_equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", [3, 8, 11])
def test_a_rows_nan_stays_in_its_row(bits: int, groups: int) -> None:
    """Rows end within eight groups: what is read of the next row must not count, not even NaN."""
    weight, x = low_bits(10, groups * 64, bits, 64), normal(2, groups * 64)
    expected = score(weight, x)
    for row in (1, 5, 9):
        weight.scales[row, 0], weight.biases[row, -1] = np.inf, np.nan
    found = score(weight, x)
    assert np.isnan(found[:, [1, 5, 9]]).all()
    rest = [0, 2, 3, 4, 6, 7, 8]
    assert np.array_equal(found[:, rest], expected[:, rest])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("groups", [1, 8, 11])
@pytest.mark.parametrize("rows", [1, 2, 4, 9])
def test_nothing_is_read_beyond_the_matrix(bits: int, group: int, groups: int, rows: int) -> None:
    weight, x = low_bits(rows, group * groups, bits, group), normal(1, group * groups)
    assert np.array_equal(score(weight.placed(before_a_guard), x), score(weight, x))


def test_zero_and_tiny_groups_count_as_zero() -> None:
    weight, bias = low_bits(6, 256, 2, 64), normal(6)
    x = np.zeros((3, 256), np.float32)
    x[1] = 1e-37  # its step is subnormal
    x[2, 64:128] = normal(64)
    found = score(weight, x, bias)
    assert np.array_equal(found[:2], np.tile(bias, (2, 1)))
    check(weight, x[2:], found[2:], bias)


def test_large_tokens_reach_infinity_not_garbage() -> None:
    weight = low_bits(6, 64, 2, 64)
    x = np.full((1, 64), 3e38, np.float32)
    found = score(weight, x)[0].astype(np.float64)
    exact = (rounded(x, 64) @ weight.values().T)[0]
    assert np.array_equal(np.sign(found), np.sign(exact))
    assert (np.isinf(found) | (np.abs(found - exact) <= 1e-5 * np.abs(exact).max())).all()


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from(GROUPS),
    groups=st.integers(1, 20),
    rows=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    spread=st.integers(-12, 12),
)
def test_any_shape_and_range(bits: int, group: int, groups: int, rows: int, seed: int, spread: int) -> None:
    weight = low_bits(rows, group * groups, bits, group, "F32", seed)
    x = normal(2, group * groups, seed=seed) * np.exp(normal(2, group * groups, seed=seed + 1) * np.float32(spread) / 4)
    check(weight, x, score(weight, x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scale_type", SCALES)
def test_reference_kernels_agree(bits: int, group: int, scale_type: str) -> None:
    """The same rounding of x, in plain float32 operators."""
    low, x, bias = low_bits(12, group * 5, bits, group, scale_type), normal(4, group * 5), normal(12, seed=3)
    x[1, :group] = 0
    x[3, 7] = np.nan
    weight = Weight("layers.0.gate.weight", scale_type, low.words, low.scales, low.biases, Quant(bits, group))
    reference = ReferenceKernels(SimpleNamespace(activation=SimpleNamespace(name="relu", param=None)))
    out = np.empty((4, 12), np.float32)
    reference.score(weight, bias, x, out)
    check(low, x[:3], out[:3], bias)
    assert np.isnan(out[3]).all()


def test_no_tokens() -> None:
    assert score(low_bits(3, 64, 2, 64), np.empty((0, 64), np.float32)).shape == (0, 3)
