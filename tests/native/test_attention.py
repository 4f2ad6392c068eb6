"""Attention over a stored cache, and storing into it: values against float64, bits that no other token changes."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from flashsparse import native
from tests.native.operands import PLAIN, bf16, exact, raw, variants

STORED = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@pytest.fixture(params=variants(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(best)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    return bf16(values) if dtype == "BF16" else values.astype(STORED[dtype])


def run(q: np.ndarray, keys: np.ndarray, values: np.ndarray, dtype: str, offset: int, window: int, threads: int = 2):
    out = np.full_like(q, np.nan)
    with native.Workers(threads) as workers:
        native.attention(workers, q, keys, values, dtype, offset, window, q.shape[-1] ** -0.5, out)
    return out


def reference(q: np.ndarray, keys: np.ndarray, values: np.ndarray, offset: int, window: int) -> np.ndarray:
    """float64: q [T, H, hd], keys and values [KVH, capacity, hd]."""
    tokens, heads, size = q.shape
    out = np.empty(q.shape)
    for t in range(tokens):
        low, high = max(0, offset + t - window + 1) if window else 0, offset + t + 1
        for h in range(heads):
            group = h * len(keys) // heads
            scores = keys[group, low:high] @ q[t, h].astype(np.float64) * size**-0.5
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ values[group, low:high] / weights.sum()
    return out


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 32), (6, 2, 64), (24, 2, 20), (3, 1, 7), (9, 1, 16)])
@pytest.mark.parametrize("window", [0, 5, 100])
@pytest.mark.parametrize(("offset", "tokens"), [(0, 1), (0, 33), (29, 1), (17, 13)])
def test_equals_float64(
    dtype: str, heads: int, kv_heads: int, size: int, window: int, offset: int, tokens: int
) -> None:
    q = normal(tokens, heads, size)
    keys, values = (stored(normal(kv_heads, 50, size, seed=s), dtype) for s in (1, 2))
    keys[:, offset + tokens :] = values[:, offset + tokens :] = 0x7FFF if dtype == "BF16" else np.nan
    found = run(q, keys, values, dtype, offset, window)
    expected = reference(q, exact(keys, dtype), exact(values, dtype), offset, window)
    assert np.abs(found - expected).max() <= 4e-6 * np.abs(expected).max()


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("heads", [4, 8, 20])
def test_a_token_has_the_same_bits_alone_and_among_others(window: int, heads: int) -> None:
    q = normal(37, heads, 48)
    keys, values = (stored(normal(4, 60, 48, seed=s), "F16") for s in (1, 2))
    together = run(q, keys, values, "F16", 11, window)
    for t in range(len(q)):
        assert np.array_equal(run(q[t : t + 1], keys, values, "F16", 11 + t, window)[0], together[t])
    for first in (5, 30):
        assert np.array_equal(run(q[first:], keys, values, "F16", 11 + first, window), together[first:])


def test_threads_do_not_change_bits() -> None:
    q, keys, values = normal(9, 8, 64), normal(2, 40, 64, seed=1), normal(2, 40, 64, seed=2)
    results = [run(q, keys, values, "F32", 20, 0, threads) for threads in (1, 2, 3, 4)]
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_large_scores_do_not_overflow() -> None:
    q, keys, values = 300 * normal(3, 2, 16), 300 * normal(2, 30, 16, seed=1), normal(2, 30, 16, seed=2)
    expected = reference(q, keys, values, 10, 0)
    assert np.abs(run(q, keys, values, "F32", 10, 0) - expected).max() <= 1e-2
    assert np.isfinite(run(q, keys, values, "F32", 10, 0)).all()


def test_nan_keys_give_nan() -> None:
    q, keys, values = normal(2, 2, 16), normal(2, 8, 16, seed=1), normal(2, 8, 16, seed=2)
    keys[1, 3, 0] = np.nan
    out = run(q, keys, values, "F32", 4, 0)
    assert np.isnan(out[:, 1]).all()
    assert np.isfinite(out[:, 0]).all()


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("size", [3, 16, 30])
def test_append_rounds_to_nearest_even(dtype: str, size: int) -> None:
    new = normal(5, 2, size) * np.float32(10) ** np.random.default_rng(3).integers(-9, 6, (5, 2, size))
    new = new.astype(np.float32)
    cache = np.full((2, 12, size), 7, STORED[dtype])
    native.kv_append(new, cache, dtype, 4)
    types = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    assert np.array_equal(cache[:, 4:9], raw(mx.array(new).astype(types[dtype])).transpose(1, 0, 2))
    assert (cache[:, :4] == 7).all()
    assert (cache[:, 9:] == 7).all()


@pytest.mark.parametrize("size", [1, 8])
def test_append_halves_ties_limits_and_special_values(size: int) -> None:
    values = [0.0, -0.0, 1 + 2**-11, 1 + 3 * 2**-11, 65519.996, 65520.0, 2**-24, 2**-25, 1.5 * 2**-25, 3e-8, -1e-10]
    values += [np.inf, -np.inf, np.nan, 6.1e-5, 6.103515625e-5, 2047.5, 2048.5]
    new = np.repeat(np.array(values, np.float32)[:, None, None], size, axis=2)
    cache = np.zeros((1, len(values), size), np.float16)
    native.kv_append(new, cache, "F16", 0)
    with np.errstate(over="ignore"):
        expected = new[:, 0].astype(np.float16)[None]
    assert np.array_equal(cache, expected, equal_nan=True)
    assert np.array_equal(np.signbit(cache), np.signbit(expected))
