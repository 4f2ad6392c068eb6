"""The attention half of a layer in one call: values against float64, bits that neither tokens nor threads change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashsparse import native
from flashsparse.models.config import normalize_config
from flashsparse.models.rotation import frequencies
from flashsparse.native.layers import Addresses, Heads, Layer, Norm, compute_seconds, turns
from tests.native.operands import store, variants

ROPE: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "unit" / "golden" / "rope.json").read_text())[
    "cases"
]
D, CAPACITY = 96, 40


@pytest.fixture(params=variants(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(best)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def exact_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, eps: float, centred: bool) -> np.ndarray:
    x = x.astype(np.float64)
    if centred:
        x = x - x.mean(-1, keepdims=True)
    scaled = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * weight
    return scaled if bias is None else scaled + bias


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [1, 7, 8, 96, 257])
def test_norms(size: int, centred: bool) -> None:
    x, weight, bias = normal(5, size, scale=30), normal(size, seed=1), normal(size, seed=2)
    x[2] = 0
    for extra in (bias, None):
        norm, out = Norm(weight, extra, 1e-5, centred), np.empty_like(x)
        with native.Workers(2) as workers:
            norm(workers, x, out)
            one = x[3:4].copy()
            norm(workers, one, one)  # in place
        expected = exact_norm(x, weight, extra, 1e-5, centred)
        # A centred value may be far smaller than what it was computed from.
        assert np.abs(out - expected).max() <= 2e-6 * max(np.abs(expected).max(), np.abs(x).max() if centred else 0)
        np.testing.assert_array_equal(one[0], out[3])


def test_norms_report_what_is_not_finite() -> None:
    x, weight = normal(3, 20), normal(20, seed=1)
    x[1, 4], x[2, 19] = np.nan, np.inf
    with native.Workers(1) as workers:
        Norm(weight, None, 1e-5, False)(workers, x, x)
    assert np.isfinite(x[0]).all() and np.isnan(x[1]).all() and np.isnan(x[2, 19])


@pytest.mark.parametrize("case", ROPE, ids=range(len(ROPE)))
def test_turns_equal_transformers(case: dict[str, Any]) -> None:
    radians, factor = frequencies(normalize_config(case["config"]).config)
    np.testing.assert_allclose(radians, case["inv_freq"], rtol=3e-6)
    assert factor == pytest.approx(case["attention_scaling"], rel=1e-6)
    out = np.empty((3, 2, len(radians)), np.float32)
    turns(radians, factor, 198, 3, out)
    angles = np.arange(198, 201)[:, None] * radians
    np.testing.assert_allclose(out, factor * np.stack([np.cos(angles), np.sin(angles)], 1), rtol=0, atol=2e-7)


class Case:
    """A layer of random weights with its float64 meaning."""

    def __init__(
        self, workers: native.Workers, kind: str, *, heads: Heads, post: bool, bias: bool, window: int, residual: float
    ) -> None:
        wide, narrow = heads.query * heads.size, heads.kv * heads.size
        shapes = [(wide, D), (narrow, D), (narrow, D), (D, wide)]
        self.stored = [store(normal(*shape, seed=i, scale=0.1), kind, 32) for i, shape in enumerate(shapes)]
        self.biases = [normal(shape[0], seed=9 + i) if bias else None for i, shape in enumerate(shapes)]
        self.norms = [(normal(D, seed=20 + i), normal(D, seed=30 + i) if bias else None) for i in range(2)]
        self.heads, self.post, self.window, self.residual, self.bias = heads, post, window, residual, bias
        first, second = (Norm(weight, extra, 1e-5, bias) for weight, extra in self.norms)
        products = [(s.matrix(), b) for s, b in zip(self.stored, self.biases, strict=True)]
        self.layer = Layer(
            workers, products, None if post else first, second, heads,
            window=window, post_norm=post, residual=residual,
        )  # fmt: skip

    def run(self, h: np.ndarray, sizes: list[int], rotated: bool) -> np.ndarray:
        """h [T, D], fed in calls of `sizes` tokens -> the residual stream and the FFN's input, [2, T, D]."""
        caches = np.zeros((2, self.heads.kv, CAPACITY, self.heads.size), np.float32)
        radians, results, offset = 1e4 ** -np.linspace(0, 1, self.heads.size // 2), [], 0
        for count in sizes:
            part, x = h[offset : offset + count].copy(), np.zeros((count, D), np.float32)
            buffers = Addresses(part, x, np.empty(count * self.layer.scratch_floats, np.float32))
            table = np.empty((count, 2, len(radians)), np.float32)
            turns(radians, 1.5, offset, count, table)
            at = table.ctypes.data if rotated else None
            self.layer.attend(caches[0].ctypes.data, caches[1].ctypes.data, CAPACITY, offset, at, count, buffers)
            results.append([part, part if self.post else x])
            offset += count
        return np.concatenate(results, axis=1)

    def expected(self, h: np.ndarray, rotated: bool) -> np.ndarray:
        tokens, heads = len(h), self.heads
        (first, second), h = self.norms, h.astype(np.float64)
        x = h if self.post else exact_norm(h, *first, 1e-5, self.bias)
        q, k, v = (self._linear(i, x).reshape(tokens, -1, heads.size) for i in range(3))
        if rotated:
            angles = np.arange(tokens)[:, None] * 1e4 ** -np.linspace(0, 1, heads.size // 2)
            q, k = (self._turned(part, angles) for part in (q, k))
        seen = np.empty_like(q)
        for t in range(tokens):
            low = max(0, t - self.window + 1) if self.window else 0
            for head in range(heads.query):
                group = head * heads.kv // heads.query
                scores = k[low : t + 1, group] @ q[t, head] * heads.size**-0.5
                shares = np.exp(scores - scores.max())
                seen[t, head] = shares @ v[low : t + 1, group] / shares.sum()
        total = h + self.residual * self._linear(3, seen.reshape(tokens, -1))
        normed = exact_norm(total, *second, 1e-5, self.bias)
        return np.stack([normed if self.post else total, normed])

    def _linear(self, i: int, x: np.ndarray) -> np.ndarray:
        product, bias = x @ self.stored[i].values.T, self.biases[i]
        return product if bias is None else product + bias

    def _turned(self, x: np.ndarray, angles: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        cos, sin = 1.5 * np.cos(angles)[:, None], 1.5 * np.sin(angles)[:, None]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4-F16", "Q8-BF16"])
@pytest.mark.parametrize("heads", [Heads(4, 2, 24, "F32"), Heads(3, 3, 32, "F32"), Heads(6, 1, 10, "F32")], ids=str)
@pytest.mark.parametrize(
    ("post", "bias", "window", "residual", "rotated"),
    [(False, False, 0, 1.0, True), (False, True, 7, 0.3, True), (True, True, 0, 1.0, False)],
)
def test_equals_float64_whatever_the_calls(
    kind: str, heads: Heads, post: bool, bias: bool, window: int, residual: float, rotated: bool
) -> None:
    if kind.startswith("Q") and heads.query * heads.size % 32:
        heads = Heads(4, 2, 24, "F32")  # a quantized row is a whole number of groups
    h = normal(23, D, seed=5)
    found = []
    for threads, sizes in ((1, [1] * 23), (2, [23]), (3, [5, 1, 17])):
        with native.Workers(threads) as workers:
            options = {"heads": heads, "post": post, "bias": bias, "window": window, "residual": residual}
            case = Case(workers, kind, **options)
            found.append(case.run(h, sizes, rotated))
    expected = case.expected(h, rotated)
    assert np.abs(found[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_misfits_are_refused() -> None:
    heads, weight = Heads(4, 2, 24, "F32"), normal(D)
    with native.Workers(1) as workers:
        square = store(normal(D, D), "F32").matrix()
        with pytest.raises(ValueError, match="expected"):
            Layer(workers, [(square, None)] * 4, None, Norm(weight, None, 1e-5, False), heads)
        with pytest.raises(ValueError, match="bias"):
            Norm(weight, weight[:5], 1e-5, False)
        with pytest.raises(ValueError, match="norm of 96"):
            Norm(weight, None, 1e-5, False)(workers, normal(2, D + 1), normal(2, D + 1))
    with pytest.raises(ValueError, match="frequencies"):
        turns(np.ones(4), 1.0, 0, 2, np.empty((2, 2, 5), np.float32))


def test_seconds_inside_are_counted() -> None:
    before, x = compute_seconds(), normal(64, D)
    with native.Workers(1) as workers:
        Norm(normal(D), None, 1e-5, False)(workers, x, x)
    assert before < compute_seconds()
