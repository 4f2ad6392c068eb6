"""Scores, bits, lists and slots on the GPU, against the native kernels, numpy and plain MLX operators."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashsparse import native
from flashsparse.sparsity.low_bit import LowBit, quantize_rows
from metal_kernels import launch, select
from tests.metal.harness import metal_on_cpu
from tests.metal.layers import ACTIVATIONS, FORMATS
from tests.native.operands import store

pytestmark = pytest.mark.usefixtures("metal")
PROPERTY = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(PROPERTY, max_examples=150)


def native_scores(copy: LowBit, x: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    parts = [np.ascontiguousarray(part) for part in (copy.words, copy.scales, copy.biases)]
    rows, group = len(parts[0]), copy.group
    kind, scale_type = native.DTYPES[f"Q{copy.bits}"], native.DTYPES["F16"]
    addresses = [part.ctypes.data for part in parts]
    matrix = native.Matrix(
        addresses[0], rows, x.shape[1], kind, addresses[1], addresses[2], scale_type, group, keep=parts
    )
    out = np.empty((len(x), rows), np.float32)
    with native.Workers(1) as workers:
        native.score(workers, matrix, bias, x, out)
    return out


def metal_scores(
    copy: LowBit, x: np.ndarray, threshold: float, bias: np.ndarray | None = None, magnitude: bool = False
) -> tuple[np.ndarray, mx.array]:
    parts = [mx.array(part) for part in (copy.words, copy.scales, copy.biases)]
    rounded = select.round_tokens(mx.array(x), copy.group)
    extra = None if bias is None else mx.array(bias)
    scores, bits = select.score(rounded, *parts, threshold, bits=copy.bits, bias=extra, magnitude=magnitude)
    return np.array(scores), bits


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(((one.view(np.uint32) == other.view(np.uint32)) | (np.isnan(one) & np.isnan(other))).all())


def kept_of(bits: mx.array, neurons: int) -> np.ndarray:
    """bool [T, I] of bits."""
    words = np.array(bits)
    whole = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(bool)
    assert not whole[:, neurons:].any()
    return whole[:, :neurons]


def check_scores(copy: LowBit, x: np.ndarray, bias: np.ndarray | None) -> None:
    expected = native_scores(copy, x, bias)
    finite = expected[np.isfinite(expected)]
    threshold = float(np.median(finite)) if len(finite) else 0.0
    scores, bits = metal_scores(copy, x, threshold, bias)
    assert same(scores, expected)
    assert np.array_equal(kept_of(bits, scores.shape[1]), ~(expected < np.float32(threshold)))


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (2, 32), (2, 128), (1, 64), (3, 32), (3, 64), (3, 128), (4, 64)])
def test_scores_have_the_native_kernels_bits(bits: int, group: int) -> None:
    rng = np.random.default_rng(bits * group)
    copy = quantize_rows(rng.standard_normal((45, 640)).astype(np.float32), bits, group, search=False)
    x = rng.standard_normal((2, 640)).astype(np.float32)
    x[1, :group] = 0
    check_scores(copy, x, rng.standard_normal(45).astype(np.float32) if bits == 2 else None)


@PROPERTY
@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(1, 5), st.sampled_from([64, 192, 576]), st.booleans())
def test_scores_of_any_shape(seed: int, rows: int, tokens: int, d: int, special: bool) -> None:
    rng = np.random.default_rng(seed)
    copy = quantize_rows(rng.standard_normal((rows, d)).astype(np.float32), 2, 64, search=False)
    x = (rng.standard_normal((tokens, d)) * 10.0 ** rng.integers(-30, 30)).astype(np.float32)
    if special:
        x[rng.integers(tokens), rng.integers(d)] = rng.choice([np.nan, np.inf, -np.inf])
        x[rng.integers(tokens), :64] *= np.float32(1e-38)
    check_scores(copy, x, None)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scores_match_mlx_products(bits: int) -> None:
    rng = np.random.default_rng(1)
    copy = quantize_rows(rng.standard_normal((64, 256)).astype(np.float32), bits, 64, search=False)
    x = rng.standard_normal((3, 256)).astype(np.float32)
    parts = [mx.array(part) for part in (copy.words, copy.scales, copy.biases)]
    expected = np.array(select.score_reference(mx.array(x), *parts, bits))
    found, _ = metal_scores(copy, x, 0.0)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_magnitudes_of_silu() -> None:
    rng = np.random.default_rng(2)
    copy = quantize_rows(rng.standard_normal((33, 128)).astype(np.float32), 2, 64, search=False)
    x = rng.standard_normal((1, 128)).astype(np.float32)
    plain, _ = metal_scores(copy, x, 0.0)
    found, bits = metal_scores(copy, x, 0.5, magnitude=True)
    expected = np.abs(plain / (1 + np.exp(-plain.astype(np.float64))))
    assert np.abs(found - expected).max() <= 1e-6 * expected.max()
    assert np.array_equal(kept_of(bits, 33), ~(found < 0.5))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_tokens_of_every_type_are_rounded(dtype: mx.Dtype) -> None:
    x = mx.array(np.random.default_rng(3).standard_normal((2, 128)).astype(np.float32)).astype(dtype)
    q, steps, totals = select.round_tokens(x, 64)
    restored = (q.astype(mx.float32).reshape(2, 2, 64) * steps[:, :, None]).reshape(2, 128)
    assert np.array_equal(np.array(restored), np.array(select.rounded_reference(x, 64)))
    assert np.array_equal(np.array(totals), np.array(q).reshape(2, 2, 64).astype(np.float32).sum(axis=2))


def check_gate(
    rng: np.random.Generator, kind: str, rows: int, d: int, tokens: int, activation: str, biased: bool
) -> None:
    stored = store(rng.standard_normal((rows, d)).astype(np.float32), kind, 32)
    x = rng.standard_normal((tokens, d)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32) if biased else np.zeros(rows, np.float32)
    source = kind.rpartition("-")[2]
    typed = [
        mx.array(p).view(mx.bfloat16) if source == "BF16" else mx.array(p)
        for p in (stored.scales, stored.biases)
        if p is not None
    ]
    weight = mx.array(stored.data)
    if not typed and source == "BF16":
        weight = weight.view(mx.bfloat16)
    more = {"scales": typed[0], "biases": typed[1], "quant_bits": int(kind[1])} if typed else {}
    if biased:
        more["bias"] = mx.array(bias)
    found, bits = select.gate(weight, mx.array(x), activation, 0.25, **more)
    score = x.astype(np.float64) @ stored.values.T + bias
    size = np.abs(x).astype(np.float64) @ np.abs(stored.values).T + np.abs(bias)
    expected = {
        "relu": np.maximum(score, 0),
        "drelu": np.maximum(score, 0),
        "relu2": np.maximum(score, 0) ** 2,
        "silu": score / (1 + np.exp(-score)),
        "fatrelu": np.where(score < 0.25, 0, score),
    }[activation]
    slope = 3 * size if activation == "relu2" else 1.2
    assert (np.abs(np.array(found) - expected) <= select.TOLERANCE * size * slope + 1e-30).all()
    assert np.array_equal(kept_of(bits, rows), np.array(found) != 0)


@pytest.mark.parametrize("kind", FORMATS)
def test_gates_of_every_type(kind: str) -> None:
    check_gate(np.random.default_rng(4), kind, 45, 160, 2, "relu", kind in ("F16", "Q4-BF16"))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_of_every_activation(kind: str, activation: str) -> None:
    check_gate(np.random.default_rng(5), kind, 32, 96, 1, activation, False)


def test_gates_match_mlx_products() -> None:
    rng = np.random.default_rng(6)
    weight, x = (mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in ((40, 64), (2, 64)))
    found, _ = select.gate(weight, x, "silu")
    expected = np.array(select.gate_reference(weight, x, "silu", 0.0, None))
    assert np.abs(np.array(found) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_gate_that_is_no_number_is_active() -> None:
    weight = np.zeros((33, 32), np.float32)
    weight[7, 3] = np.nan
    found, bits = select.gate(mx.array(weight), mx.ones((1, 32)), "relu")
    assert kept_of(bits, 33).nonzero()[1].tolist() == [7]
    assert np.isnan(np.array(found)[0, 7])


def check_compact(kept: np.ndarray) -> None:
    neurons = kept.shape[1]
    bits = select.bits_reference(mx.array(kept))
    ids, count, mask = (np.array(a) for a in select.compact(bits, neurons))
    expected = np.flatnonzero(kept.any(axis=0))
    assert count.tolist() == [len(expected)]
    assert np.array_equal(ids[: len(expected)], expected)
    assert np.array_equal(mask[:, : len(expected)], kept[:, expected])
    reference = [np.array(a) for a in select.compact_reference(bits, neurons)]
    assert np.array_equal(reference[0][: len(expected)], expected) and reference[1].tolist() == count.tolist()
    assert np.array_equal(reference[2][:, : len(expected)], kept[:, expected])


@PROPERTY
@given(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([1, 31, 32, 33, 1000, 40000]), st.floats(0, 1))
def test_lists_of_any_bits(seed: int, tokens: int, neurons: int, density: float) -> None:
    check_compact(np.random.default_rng(seed).random((tokens, neurons)) < density)


def check_topk(scores: np.ndarray, k: int, threshold: float) -> None:
    found = kept_of(select.topk(mx.array(scores), k, threshold), scores.shape[1])
    mask, ids = np.empty(scores.shape, np.uint8), np.empty(scores.shape[1], np.int32)
    native.select(scores, threshold, k, mask, ids)
    assert np.array_equal(found, mask.astype(bool))
    if scores.size < 2000:
        assert np.array_equal(found, np.array(select.topk_reference(mx.array(scores), k, threshold)))


@PROPERTY
@given(st.integers(0, 2**31), st.integers(1, 2), st.sampled_from([1, 33, 700, 2500]), st.floats(0, 1), st.booleans())
def test_the_largest_of_any_scores(seed: int, tokens: int, neurons: int, share: float, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((tokens, neurons)).astype(np.float32)
    if ties:
        scores = np.round(scores, 1)
        scores[rng.random(scores.shape) < 0.1] = -0.0
        scores[rng.random(scores.shape) < 0.02] = rng.choice([np.nan, np.inf, -np.inf])
    check_topk(scores, max(1, int(share * neurons)), float(rng.choice([-np.inf, 0.0, 0.5])))


@PROPERTY
@given(st.integers(0, 2**31), st.sampled_from([1, 8, 1500]), st.floats(0, 1), st.floats(0, 1))
def test_slots_of_any_list(seed: int, capacity: int, held: float, share: float) -> None:
    rng = np.random.default_rng(seed)
    records = capacity + 20
    ids = np.sort(rng.permutation(records)[:capacity]).astype(np.int32)
    count = int(share * capacity)
    slot_of = np.full(records, -1, np.int32)
    cached = np.flatnonzero(rng.random(records) < held)
    slots = rng.permutation(records)
    slot_of[cached] = slots[: len(cached)]
    begin = rng.integers(0, 64, records).astype(np.int32) * 64
    slot_bytes = 3 << 30  # offsets pass 2^31 at the first slot
    operands = mx.array(ids), mx.array([count], mx.int32), mx.array(slot_of), mx.array(begin), slot_bytes
    for make in (select.lookup, select.lookup_reference):
        check_lookup(ids[:count], slot_of, begin, slot_bytes, make(*operands))


def check_lookup(
    ids: np.ndarray, slot_of: np.ndarray, begin: np.ndarray, slot_bytes: int, made: tuple[mx.array, ...]
) -> None:
    """`made` is what `lookup` makes of the ids."""
    offsets, hit_offsets, hit_cols, miss_ids, miss_cols, totals = (np.array(a) for a in made)
    count = len(ids)
    slot = slot_of[ids]
    expected = np.where(slot < 0, -1, slot.astype(np.int64) * slot_bytes + begin[slot])
    hits, misses = np.flatnonzero(slot >= 0), np.flatnonzero(slot < 0)
    assert np.array_equal(offsets[:count], expected)
    assert totals.tolist() == [len(hits), len(misses)]
    assert np.array_equal(hit_cols[: len(hits)], hits)
    assert np.array_equal(hit_offsets[: len(hits)], expected[hits])
    assert np.array_equal(miss_cols[: len(misses)], misses)
    assert np.array_equal(miss_ids[: len(misses)], ids[misses])


def lookup_many() -> object:
    ids = mx.arange(1500).astype(mx.int32)
    return select.lookup(ids, mx.array([1500], mx.int32), ids, mx.zeros_like(ids), 64)


NEEDS = {
    "compact": ("scan", lambda: select.compact(mx.ones((1, 1200), mx.uint32), 1200 * 32)),
    "lookup": ("scan", lookup_many),
    "topk": ("topk", lambda: select.topk(mx.arange(2000.0)[None], 700)),
    "gate": ("gate", lambda: select.gate(mx.ones((32, 32)), mx.ones((1, 32)), "relu")),
}


@pytest.mark.skipif(mx.metal.is_available(), reason="a GPU does not tell")
@pytest.mark.parametrize(
    ("name", "number"),
    [*((n, i) for n in ("compact", "lookup") for i in (0, 1)), ("topk", 0), ("topk", 1), ("topk", 2), ("gate", 0)],
)
def test_every_barrier_is_needed(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file, run = NEEDS[name]
    whole, barrier = launch._text, "threadgroup_barrier(mem_flags::mem_threadgroup);"

    def without(each: str) -> str:
        parts = whole(each).split(barrier)
        if each != file:
            return barrier.join(parts)
        return barrier.join(parts[: number + 1]) + ";" + barrier.join(parts[number + 1 :])

    run()
    launch.kernel.cache_clear()
    monkeypatch.setattr(launch, "_text", without)
    with pytest.raises((metal_on_cpu.Race, metal_on_cpu.Uninitialised, metal_on_cpu.OrderDependent)):
        run()


@pytest.mark.slow
@LONG
@given(
    st.integers(0, 2**31),
    st.sampled_from(["F32", "F16", "BF16", "Q8-F16", "Q8-F32", "Q4-BF16"]),
    st.integers(1, 100),
    st.sampled_from([32, 64, 288, 1056]),
    st.integers(1, 4),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
)
def test_gates_of_any_shape(
    seed: int, kind: str, rows: int, d: int, tokens: int, activation: str, biased: bool
) -> None:
    check_gate(np.random.default_rng(seed), kind, rows, d, tokens, activation, biased)


@pytest.mark.slow
@LONG
@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([32, 64, 128]), st.integers(1, 200))
def test_scores_of_any_copy(seed: int, bits: int, group: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    d = group * int(rng.integers(1, 20))
    copy = quantize_rows(rng.standard_normal((rows, d)).astype(np.float32), bits, group, search=False)
    check_scores(copy, rng.standard_normal((3, d)).astype(np.float32), None)
