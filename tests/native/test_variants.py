"""The variant for AVX-512 gives the bits of the one for AVX2: a model's output does not depend on which of them ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from flashsparse import native
from tests.native.operands import TYPES, store, variants

pytestmark = pytest.mark.skipif("avx512" not in variants(), reason="this processor or build has no AVX-512 with VNNI")

ROWS = 45
GROUPS = [("Q8-F16", 32), ("Q8-BF16", 64), ("Q8-F16", 128), ("Q4-BF16", 32), ("Q4-F16", 64), ("Q4-F32", 128)]
KINDS = [*((kind, 64) for kind in TYPES), *GROUPS]


@pytest.fixture(autouse=True)
def keep_variant() -> Iterator[None]:
    best = native.isa()
    yield
    native.set_isa(best)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bits_of(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What `call` gives with AVX-512 and with AVX2, as bits."""
    found = []
    for name in ("avx512", "avx2"):
        native.set_isa(name)
        found.append(call().view(np.uint32))
    return found[0], found[1]


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("groups", [1, 5, 9, 16])
def test_products(kind: str, group: int, tokens: int, groups: int) -> None:
    weight, x = store(normal(ROWS, groups * group), kind, group), normal(tokens, groups * group, seed=1)
    x[0, :: max(1, group // 2)] *= 1e4  # values far below their group's largest lose digits

    def call() -> np.ndarray:
        out = np.empty((tokens, ROWS), np.float32)
        with native.Workers(2) as workers:
            native.linear(workers, weight.matrix(), None, x, out)
        return out

    new, old = bits_of(call)
    assert np.array_equal(new, old)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["Q4-F16", "Q8-F16"])
def test_products_that_are_not_finite(kind: str, bad: float) -> None:
    weight, x = store(normal(ROWS, 320), kind), normal(2, 320, seed=1)
    x[1, 200] = bad

    def call() -> np.ndarray:
        out = np.empty((2, ROWS), np.float32)
        with native.Workers(1) as workers:
            native.linear(workers, weight.matrix(), None, x, out)
        return out

    new, old = bits_of(call)
    assert np.array_equal(new, old)
    assert np.isnan(new.view(np.float32)[1]).all() and np.isfinite(new.view(np.float32)[0]).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("window", [0, 11])
def test_attention(dtype: str, tokens: int, heads: int, kv_heads: int, window: int) -> None:
    size, offset = 40, 30
    k, v = (store(normal(kv_heads * 64, size, seed=i), dtype).data.reshape(kv_heads, 64, size) for i in (1, 2))
    q = normal(tokens, heads, size)

    def call() -> np.ndarray:
        out = np.empty((tokens, heads, size), np.float32)
        with native.Workers(2) as workers:
            native.attention(workers, q, k, v, dtype, offset, window, size**-0.5, out)
        return out

    new, old = bits_of(call)
    assert np.array_equal(new, old) and new.any()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 5])
def test_scores(bits: int, tokens: int) -> None:
    columns, random = 320, np.random.default_rng(bits)
    words = random.integers(0, 256, ROWS * columns * bits // 8, np.uint8)
    parts = random.standard_normal((2, ROWS * columns // 64)).astype(np.float16)
    scales, biases = parts[0].ctypes.data, parts[1].ctypes.data
    kinds = native.DTYPES[f"Q{bits}"], scales, biases, native.DTYPES["F16"], 64, (words, parts)
    matrix = native.Matrix(words.ctypes.data, ROWS, columns, *kinds)
    x = normal(tokens, columns)

    def call() -> np.ndarray:
        out = np.empty((tokens, ROWS), np.float32)
        with native.Workers(2) as workers:
            native.score(workers, matrix, None, x, out)
        return out

    new, old = bits_of(call)
    assert np.array_equal(new, old) and new.any()


@pytest.mark.parametrize(("kind", "group"), KINDS)
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("active", [0, 1, 5, ROWS])
@pytest.mark.parametrize("groups", [2, 9])
def test_sparse_ffn(kind: str, group: int, tokens: int, active: int, groups: int) -> None:
    size = groups * group
    slab, record = records(kind, group, size)
    x = normal(tokens, size, seed=7)
    offsets = np.random.default_rng(3).permutation(ROWS)[:active].astype(np.int64) * (len(slab) // ROWS)
    ids = np.arange(active, dtype=np.int32)

    def call() -> np.ndarray:
        hidden, y = np.empty((tokens, active), np.float32), np.zeros((tokens, size), np.float32)
        with native.Workers(2) as workers:
            native.ffn_hidden(workers, record, slab, offsets, ids, ids, x, None, None, hidden)
            native.ffn_down(workers, record, slab, offsets, ids, hidden, y)
        return np.concatenate([hidden.ravel(), y.ravel()])

    new, old = bits_of(call)
    assert np.array_equal(new, old)
    assert new.any() or active < ROWS  # few may all be inactive


def records(kind: str, group: int, size: int) -> tuple[np.ndarray, native.Record]:
    """ROWS records of gate, up and down, one behind the other."""
    stored = [store(normal(ROWS, size, seed=i), kind, group) for i in range(3)]
    vector = len(stored[0].bytes(0))
    slab = np.frombuffer(b"".join(part.bytes(i) for i in range(ROWS) for part in stored), np.uint8).copy()
    down = stored[2]
    record = native.Record(
        gate=0, up=vector, down=2 * vector, d=size, dtype=down.dtype, scale_dtype=down.scale_dtype,
        group_size=down.group_size, activation=native.ACTIVATIONS["fatrelu"], param=-0.5, gated=True,
    )  # fmt: skip
    return slab, record
