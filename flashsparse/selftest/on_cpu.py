"""The native kernels' cases: errors against float64, rates over operands that no cache holds.

Errors are in units of the sum of the products' magnitudes; those of lists and masks count wrong elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from flashsparse import native
from flashsparse.kernels.reference import rounded
from flashsparse.native.compact import Compact
from flashsparse.native.compact import candidates as search
from flashsparse.selftest.cases import Case
from flashsparse.selftest.operands import (
    FORMATS,
    GROUP,
    Layer,
    Products,
    Stored,
    compact_copy,
    down_products,
    hidden_products,
    layer,
    normal,
    raw,
    store,
)
from flashsparse.sparsity.low_bit import LowBit, quantize_rows, unpack

TOLERANCE = 1e-6
ROWS, WIDTH, TOKENS = 61, 320, 2  # where errors are measured
TIMED_WIDTH, TIMED_ROWS = 4096, 64  # where rates are, repeated to TIMED_BYTES
TIMED_BYTES = 64 << 20


def cases(workers: native.Workers) -> Iterator[Case]:
    for form in FORMATS:
        yield Case(
            f"linear {form}", "native", TOLERANCE, partial(_linear, workers, form), partial(_timed, workers, form)
        )
    for bits in (1, 2, 3, 4):
        yield Case(
            f"score Q{bits}", "native", TOLERANCE, partial(_score, workers, bits), partial(_timed_score, workers, bits)
        )
    for form in FORMATS:
        error, timed = partial(_ffn, workers, form), partial(_timed_ffn, workers, form)
        yield Case(f"sparse FFN {form}", "native", 2 * TOLERANCE, error, timed)
    yield Case("attention F16", "native", 1e-5, partial(_attention, workers))
    yield Case("candidates", "native", 0, partial(_candidates, workers))
    yield Case("select", "native", 0, _select)


def matrix(stored: Stored, keep: list[np.ndarray]) -> native.Matrix:
    """The C view of a stored matrix whose parts, as numpy, are `keep`."""
    at, rows, cols, dtype = keep[0].ctypes.data, len(keep[0]), stored.values.shape[1], native.DTYPES[stored.format]
    if len(keep) == 1:
        return native.Matrix(at, rows, cols, dtype, keep=keep)
    scales, biases = (part.ctypes.data for part in keep[1:])
    return native.Matrix(at, rows, cols, dtype, scales, biases, native.DTYPES[stored.source], GROUP, keep)


def _linear(workers: native.Workers, form: str) -> float:
    stored, x = store(normal(1, ROWS, WIDTH), form), normal(2, TOKENS, WIDTH)
    out = np.empty((TOKENS, ROWS), np.float32)
    native.linear(workers, matrix(stored, [raw(part) for part in stored.parts]), None, x, out)
    return Products.of(x, stored.values).error(out)


def _timed(workers: native.Workers, form: str) -> tuple[Callable[[], object], int]:
    stored, x = store(normal(1, TIMED_ROWS, TIMED_WIDTH), form), normal(2, 1, TIMED_WIDTH)
    copies = max(1, TIMED_BYTES // stored.rows().nbytes)
    keep = [np.tile(raw(part), (copies, 1)) for part in stored.parts]
    out = np.empty((1, len(keep[0])), np.float32)
    return partial(native.linear, workers, matrix(stored, keep), None, x, out), sum(part.nbytes for part in keep)


def low_bit_matrix(copy: LowBit, copies: int = 1) -> native.Matrix:
    """The C view of a low-bit copy, `copies` times below each other."""
    words, scales, biases = keep = [np.tile(part, (copies, 1)) for part in (copy.words, copy.scales, copy.biases)]
    cols = scales.shape[1] * copy.group
    at, dtype, parts = words.ctypes.data, native.DTYPES[f"Q{copy.bits}"], (scales.ctypes.data, biases.ctypes.data)
    return native.Matrix(at, len(words), cols, dtype, *parts, native.DTYPES["F16"], copy.group, keep)


def low_bit(bits: int, rows: int, width: int) -> LowBit:
    return quantize_rows(normal(3, rows, width), bits, GROUP, search=False)


def native_scores(workers: native.Workers, copy: LowBit, x: np.ndarray) -> np.ndarray:
    out = np.empty((len(x), len(copy.words)), np.float32)
    native.score(workers, low_bit_matrix(copy), None, x, out)
    return out


def _score(workers: native.Workers, bits: int) -> float:
    copy, x = low_bit(bits, ROWS, WIDTH), normal(4, TOKENS, WIDTH)
    numbers = unpack(copy.words, bits).reshape(ROWS, -1, GROUP)
    values = numbers * copy.scales[..., None].astype(np.float64) + copy.biases[..., None]
    return Products.of(rounded(x, GROUP), values.reshape(ROWS, -1)).error(native_scores(workers, copy, x))


def _timed_score(workers: native.Workers, bits: int) -> tuple[Callable[[], object], int]:
    copy, x = low_bit(bits, TIMED_ROWS, TIMED_WIDTH), normal(4, 1, TIMED_WIDTH)
    one = sum(part.nbytes for part in (copy.words, copy.scales, copy.biases))
    copies = max(1, TIMED_BYTES // one)
    out = np.empty((1, copies * TIMED_ROWS), np.float32)
    return partial(native.score, workers, low_bit_matrix(copy, copies), None, x, out), copies * one


def record(made: Layer) -> native.Record:
    stored = made.vectors["gate"]
    return native.Record(
        **made.fields,
        d=stored.values.shape[1],
        dtype=native.DTYPES[made.format],
        scale_dtype=native.DTYPES[stored.source],
        group_size=GROUP if made.format[0] == "Q" else 0,
        activation=native.ACTIVATIONS["relu"],
        gated=True,
    )


def _run_ffn(workers: native.Workers, made: Layer, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n, view = len(made.offsets), record(made)
    hidden, y, numbers = np.zeros((len(x), n), np.float32), np.zeros_like(x), np.arange(n, dtype=np.int32)
    native.ffn_hidden(workers, view, made.slab, made.offsets, numbers, numbers, x, None, None, hidden)
    native.ffn_down(workers, view, made.slab, made.offsets, numbers, hidden, y)
    return hidden, y


def _ffn(workers: native.Workers, form: str) -> float:
    made, x = layer(form, ROWS, WIDTH), normal(5, TOKENS, WIDTH)
    hidden, y = _run_ffn(workers, made, x)
    return max(hidden_products(made, x).error(hidden), down_products(made, hidden).error(y))


def _timed_ffn(workers: native.Workers, form: str) -> tuple[Callable[[], object], int]:
    made, x, moved = timed_layer(form)
    return partial(_run_ffn, workers, made, x), moved


def timed_layer(form: str) -> tuple[Layer, np.ndarray, int]:
    """A large layer, a token, and the bytes that its FFN reads: up and down of the neurons whose gate is open."""
    one = layer(form, TIMED_ROWS, TIMED_WIDTH)
    copies, x = max(1, TIMED_BYTES // one.slab.nbytes), normal(5, 1, TIMED_WIDTH)
    active = int((Products.of(x, one.vectors["gate"].values).value > 0).sum())
    moved = copies * (TIMED_ROWS + 2 * active) * one.vector_bytes
    return layer(form, TIMED_ROWS, TIMED_WIDTH, copies), x, moved


def _attention(workers: native.Workers) -> float:
    tokens, heads, size, before = 3, 4, 64, 40
    q = normal(6, tokens, heads, size)
    keys, values = (mx.array(normal(seed, 2, before + tokens, size)).astype(mx.float16) for seed in (7, 8))
    out = np.empty_like(q)
    native.attention(workers, q, raw(keys), raw(values), "F16", before, 0, size**-0.5, out)
    k, v = (np.repeat(np.array(part).astype(np.float64), 2, axis=0) for part in (keys, values))
    scores = np.einsum("thd,hsd->hts", q.astype(np.float64), k) * size**-0.5
    scores[:, np.arange(before + tokens) > before + np.arange(tokens)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    expected = np.einsum("hts,hsd->thd", weights / weights.sum(axis=2, keepdims=True), v)
    return float(np.abs(out - expected).max() / np.abs(expected).max())


def missed(found: np.ndarray, weights: np.ndarray, x: np.ndarray) -> float:
    """Open gates that a search left out, or as many as it named too many: more than a twentieth more than are open."""
    open_gates = x.astype(np.float64) @ weights.T.astype(np.float64) > 0
    excess = found.sum() - 1.05 * open_gates.sum()
    return float((open_gates & ~found).sum() + max(0.0, excess))


def _candidates(workers: native.Workers) -> float:
    parts, weights = compact_copy(200, 5)
    x = normal(9, TOKENS, 320)
    copy = Compact(parts["high"], parts["low"], parts["scales"], parts["errors"], None, 320)
    mask, ids = np.empty((TOKENS, 200), np.uint8), np.empty(200, np.int32)
    search(workers, copy, x, native.ACTIVATIONS["relu"], 0.0, mask, ids)
    return missed(mask.astype(bool), weights, x)


def _select() -> float:
    scores = normal(10, TOKENS, 700)
    mask, ids = np.empty(scores.shape, np.uint8), np.empty(700, np.int32)
    count = native.select(scores, 0.5, 100, mask, ids)
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    expected = (scores >= 0.5) & (rank < 100)
    listed = np.flatnonzero(expected.any(axis=0))
    wrong = abs(count - len(listed)) or int((ids[:count] != listed).sum())
    return float((mask.astype(bool) != expected).sum() + wrong)
