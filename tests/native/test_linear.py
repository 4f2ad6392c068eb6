"""Products with stored matrices: values against float64, and the bits' independence of tokens, rows and threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from flashsparse import native
from tests.native.operands import PLAIN, TYPES, Stored, close, store, variants


@pytest.fixture(params=variants(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(best)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(weight: Stored, x: np.ndarray, threads: int = 2, bias: np.ndarray | None = None) -> np.ndarray:
    out = np.full((len(x), len(weight.values)), np.nan, np.float32)
    with native.Workers(threads) as workers:
        native.linear(workers, weight.matrix(), bias, x, out)
    return out


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (7, 128), (203, 320)])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_equals_float64(kind: str, rows: int, cols: int, tokens: int) -> None:
    weight, x, bias = store(normal(rows, cols), kind), normal(tokens, cols, seed=1), normal(rows, seed=2)
    expected = x.astype(np.float64) @ weight.values.T + bias
    magnitude = np.abs(x).astype(np.float64) @ np.abs(weight.values).T + np.abs(bias)
    assert close(product(weight, x, bias=bias), expected, magnitude)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("cols", [1, 7, 8, 15, 16, 17, 31, 100])
@pytest.mark.parametrize("tokens", [1, 4])
def test_odd_lengths(kind: str, cols: int, tokens: int) -> None:
    weight, x = store(normal(13, cols), kind), normal(tokens, cols, seed=1)
    expected, magnitude = x.astype(np.float64) @ weight.values.T, np.abs(x) @ np.abs(weight.values).T
    assert close(product(weight, x), expected, magnitude)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_sizes(group_size: int) -> None:
    weight, x = store(normal(9, 256), "Q4-F16", group_size), normal(3, 256, seed=1)
    expected, magnitude = x.astype(np.float64) @ weight.values.T, np.abs(x) @ np.abs(weight.values).T
    assert close(product(weight, x), expected, magnitude)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("cols", [64, 448])
def test_a_row_has_the_same_bits_alone_and_among_others(kind: str, cols: int) -> None:
    weight, x = store(normal(150, cols), kind), normal(11, cols, seed=1)
    together = product(weight, x)
    for token in range(len(x)):
        assert np.array_equal(product(weight, x[token : token + 1])[0], together[token])
    assert np.array_equal(product(weight, x[3:8]), together[3:8])
    few = store(normal(150, cols)[40:53], kind)
    assert np.array_equal(product(few, x), together[:, 40:53])


@pytest.mark.parametrize("kind", ("F16", "Q4-F16"))
@pytest.mark.parametrize("tokens", [1, 5])
def test_threads_do_not_change_bits(kind: str, tokens: int) -> None:
    weight, x = store(normal(500, 512), kind), normal(tokens, 512, seed=1)
    results = [product(weight, x, threads) for threads in (1, 2, 3, 4)]
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_workers_serve_many_small_calls_and_idle_between() -> None:
    weight, x = store(normal(300, 256), "F16"), normal(1, 256, seed=1)
    expected, matrix, out = product(weight, x), weight.matrix(), np.empty((1, 300), np.float32)
    for _ in range(20):
        with native.Workers(3) as workers:
            for _ in range(50):
                out[:] = np.nan
                native.linear(workers, matrix, None, x, out)
                assert np.array_equal(out, expected)


@pytest.mark.parametrize("kind", TYPES)
def test_gather(kind: str) -> None:
    weight = store(normal(40, 192), kind)
    ids = np.array([0, 39, 7, 7], np.int32)
    out = np.empty((4, 192), np.float32)
    native.gather(weight.matrix(), ids, out)
    assert np.abs(out - weight.values[ids]).max() <= 1e-6 * np.abs(weight.values).max()


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_every_16_bit_value_is_decoded_exactly(kind: str) -> None:
    bits = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    matrix = native.Matrix(bits.ctypes.data, 256, 256, native.DTYPES[kind], keep=bits)
    out = np.empty((256, 256), np.float32)
    native.gather(matrix, np.arange(256, dtype=np.int32), out)
    if kind == "F16":
        expected = bits.view(np.float16).astype(np.float32)
    else:
        expected = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(out, expected, equal_nan=True)
    assert np.array_equal(np.signbit(out), np.signbit(expected))


def test_infinity_and_nan_reach_the_result() -> None:
    values = normal(3, 20)
    values[0, 19], values[1, 3] = np.inf, np.nan
    out = product(store(values, "F32"), np.ones((1, 20), np.float32))[0]
    assert np.isposinf(out[0])
    assert np.isnan(out[1])
    assert np.isfinite(out[2])


def test_no_tokens() -> None:
    assert product(store(normal(3, 16), "F16"), np.empty((0, 16), np.float32)).shape == (0, 3)
