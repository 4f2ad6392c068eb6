"""Low-bit copies: the words against a bit-by-bit rule and MLX's layout, the scales against an exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsparse.errors import UsageError
from flashsparse.sparsity.low_bit import (
    BITS,
    LowBit,
    check_layout,
    fitting_group,
    pack,
    quantize_rows,
    round_input,
    unpack,
)


def packed_slowly(row: np.ndarray, bits: int) -> list[int]:
    stream = sum(int(value) << (position * bits) for position, value in enumerate(row))
    return [stream >> (32 * word) & 0xFFFFFFFF for word in range(len(row) * bits // 32)]


def weighted_error(weight: np.ndarray, copy: LowBit, importance: np.ndarray) -> np.ndarray:
    """float64 [n, groups]."""
    error = importance * (weight.astype(np.float64) - copy.dequantize()) ** 2
    return np.asarray(error.reshape(len(weight), -1, copy.group).sum(axis=2))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_words_are_a_little_endian_bit_stream(bits: int, rows: int, units: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * units), dtype=np.uint8)
    words = pack(values, bits)
    assert words.tolist() == [packed_slowly(row, bits) for row in values]
    assert np.array_equal(unpack(words, bits), values)


def test_words_that_would_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="whole words"):
        pack(np.zeros((1, 24), np.uint8), 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_layout_is_mlxs(bits: int, group: int) -> None:
    import mlx.core as mx

    weight = np.random.default_rng(bits).standard_normal((8, 256)).astype(np.float32)
    words, scales, biases = mx.quantize(mx.array(weight), group, bits, stream=mx.cpu)
    theirs = LowBit(np.array(words), np.array(scales), np.array(biases), bits, group)
    expected = np.array(mx.dequantize(words, scales, biases, group, bits, stream=mx.cpu))
    np.testing.assert_allclose(theirs.dequantize(), expected, rtol=0, atol=1e-6)

    ours = quantize_rows(weight, bits, group)
    wide = [mx.array(part.astype(np.float32)) for part in (ours.scales, ours.biases)]
    read = np.array(mx.dequantize(mx.array(ours.words), *wide, group, bits, stream=mx.cpu))
    np.testing.assert_allclose(ours.dequantize(), read, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_the_grid_is_symmetric_and_values_go_to_the_nearest_level(bits: int) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    copy = quantize_rows(weight, bits, 64)
    assert copy.scales.dtype == copy.biases.dtype == np.float16 and copy.words.dtype == np.uint32
    scale = copy.scales.astype(np.float32)
    np.testing.assert_array_equal(copy.biases, (scale * -(2**bits - 1) / 2).astype(np.float16))
    levels = (np.arange(2**bits) - (2**bits - 1) / 2) * np.repeat(scale, 64, axis=1)[:, :, None]
    nearest = np.abs(levels - weight[:, :, None]).min(axis=2)
    np.testing.assert_allclose(np.abs(weight - copy.dequantize()), nearest, atol=2e-3 * scale.max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_scale_is_nearly_the_best_of_an_exhaustive_search(bits: int, weighted: bool) -> None:
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal((12, 128)).astype(np.float32)
    weight[:4, 5] *= 30  # an outlier in some groups
    importance = rng.gamma(0.5, size=128) if weighted else np.ones(128)
    copy = quantize_rows(weight, bits, 32, importance if weighted else None)
    found = weighted_error(weight, copy, importance)
    top = (2**bits - 1) / 2
    best = np.full(found.shape, np.inf)
    grouped = weight.reshape(12, 4, 32).astype(np.float64)
    for factor in np.geomspace(0.005, 2.2, 3000):
        scale = factor * np.abs(grouped).max(axis=2, keepdims=True) / top
        level = (np.clip(np.floor(np.abs(grouped) / scale), 0, top - 0.5) + 0.5) * scale
        error = (importance.reshape(4, 32) * (np.abs(grouped) - level) ** 2).sum(axis=2)
        best = np.minimum(best, error)
    assert found.sum() <= best.sum() * 1.01
    assert np.quantile(found / best, 0.9) < 1.1  # more levels: more local minima in a group of 32
    assert bits > 2 or (found <= best * 1.02).all()


def test_one_bit_is_the_weighted_mean_of_the_magnitudes() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((5, 64)).astype(np.float32)
    importance = rng.random(64)
    copy = quantize_rows(weight, 1, 64, importance)
    mean = (np.abs(weight) * importance).sum(axis=1) / importance.sum()
    np.testing.assert_allclose(copy.scales[:, 0] / 2, mean, rtol=1e-3)
    assert np.array_equal(copy.dequantize() > 0, weight >= 0)


def test_searching_beats_the_plain_scale_and_importance_counts() -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((32, 128)).astype(np.float32)
    importance = rng.gamma(0.3, size=128)
    plain, searched = quantize_rows(weight, 2, 64, search=False), quantize_rows(weight, 2, 64)
    fitted = quantize_rows(weight, 2, 64, importance)
    ones = np.ones(128)
    assert weighted_error(weight, searched, ones).sum() < 0.5 * weighted_error(weight, plain, ones).sum()
    assert weighted_error(weight, fitted, importance).sum() < weighted_error(weight, searched, importance).sum()
    assert np.abs(plain.dequantize()).max() == pytest.approx(np.abs(weight).max(), rel=1e-3)


def test_empty_tiny_and_silent_groups_are_kept_finite() -> None:
    weight = np.zeros((3, 64), np.float32)
    weight[1] = 1e-9
    weight[2] = np.linspace(-1, 1, 64)
    importance = np.zeros(64)
    importance[32:] = 1
    for bits in BITS:
        values = quantize_rows(weight, bits, 32, importance).dequantize()
        assert np.isfinite(values).all()
        assert np.abs(values[:2]).max() < 1e-7
        assert np.abs(values[2, :32]).min() > 0.01  # its inputs are silent, its weights are not
    assert np.isfinite(quantize_rows(weight, 2, 32, np.zeros(64)).dequantize()).all()


def test_blocks_of_rows_do_not_change_the_result() -> None:
    weight = np.random.default_rng(5).standard_normal((700, 512)).astype(np.float16)
    whole = quantize_rows(weight, 2, 64)
    alone = quantize_rows(weight[690:], 2, 64)
    assert np.array_equal(whole.words[690:], alone.words) and np.array_equal(whole.scales[690:], alone.scales)
    assert np.array_equal(whole.dequantize(690), alone.dequantize())


def test_the_product_is_that_of_the_rounded_input() -> None:
    rng = np.random.default_rng(6)
    copy = quantize_rows(rng.standard_normal((40, 128)).astype(np.float32), 2, 64)
    x = rng.standard_normal((3, 128)).astype(np.float32)
    x[1, :64] = 0
    x[2, :64] *= 1e-39
    x[2, 5] = 1e-37  # the step is subnormal
    rounded = round_input(x, 64)
    for token in range(3):
        for group in range(2):
            part = x[token, 64 * group : 64 * group + 64]
            step = np.abs(part).max() / 127
            expected = np.round(part / step) * step if step >= 2.0**-126 else np.zeros(64)
            np.testing.assert_allclose(rounded[token, 64 * group : 64 * group + 64], expected, rtol=1e-6)
    np.testing.assert_allclose(copy.product(x), rounded @ copy.dequantize().T, atol=1e-4)
    x[0, 3], x[1, 70] = np.inf, np.nan
    bad = np.isnan(round_input(x, 64)).reshape(3, 2, 64)
    assert bad.all(axis=2).tolist() == bad.any(axis=2).tolist() == [[True, False], [False, True], [False, False]]


def test_a_group_that_does_not_fit_is_named() -> None:
    assert [fitting_group(columns) for columns in (4096, 96, 128)] == [64, 32, 64]
    with pytest.raises(UsageError, match="multiple of 32"):
        fitting_group(100)
    with pytest.raises(UsageError, match=r"group size 64 for rows of 96 weights: expected one of 32"):
        check_layout(96, 2, 64)
    with pytest.raises(UsageError, match="bits 5"):
        check_layout(128, 5, 64)


@pytest.mark.parametrize("value", [np.nan, np.inf, 60000.0])
def test_weights_that_cannot_be_copied_are_named(value: float) -> None:
    weight = np.zeros((3, 64), np.float32)
    weight[2, 7] = value
    with pytest.raises(UsageError, match="row 2"):
        quantize_rows(weight, 2, 64)


@pytest.mark.parametrize("importance", [np.ones(63), -np.ones(64), np.full(64, np.nan)])
def test_an_importance_that_is_none_is_refused(importance: np.ndarray) -> None:
    with pytest.raises(UsageError, match="importance"):
        quantize_rows(np.ones((1, 64), np.float32), 2, 64, importance)
