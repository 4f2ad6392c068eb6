"""The Metal kernels' cases: sums against float64, everything else against the native kernels and numpy, exactly.

Where MLX has no Metal these do not run on a GPU; tests run them in the harness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from flashsparse import native
from flashsparse.selftest import on_cpu
from flashsparse.selftest.cases import Case
from flashsparse.selftest.operands import (
    FORMATS,
    GROUP,
    Layer,
    Products,
    compact_copy,
    down_products,
    hidden_products,
    layer,
    normal,
    store,
)
from metal_kernels import candidates, select, sparse_ffn, value
from metal_kernels.records import Record

ROWS, WIDTH, TOKENS = on_cpu.ROWS, on_cpu.WIDTH, on_cpu.TOKENS


def cases(workers: native.Workers) -> Iterator[Case]:
    for form in FORMATS:
        yield Case(f"sparse FFN {form}", "metal", sparse_ffn.TOLERANCE, partial(_ffn, form), partial(_timed_ffn, form))
    for form in FORMATS:
        yield Case(f"gate {form}", "metal", select.TOLERANCE, partial(_gate, form), partial(_timed_gate, form))
    for bits in (1, 2, 3, 4):
        yield Case(f"score Q{bits}", "metal", 0, partial(_score, workers, bits), partial(_timed_score, bits))
    yield Case("value Q2", "metal", 0, partial(_value, workers))
    yield Case("candidates", "metal", 0, _candidates)
    yield Case("compact", "metal", 0, _compact)
    yield Case("top-k", "metal", 0, _topk)
    yield Case("lookup", "metal", 0, _lookup)


def record(made: Layer) -> Record:
    stored = made.vectors["gate"]
    return Record(
        d=stored.values.shape[1],
        format=made.format,
        source=stored.source,
        group=GROUP if made.format[0] == "Q" else 0,
        gate=made.fields["gate"],
        up=made.fields["up"],
        down=made.fields["down"],
    )


def _run_ffn(view: Record, operands: tuple[mx.array, ...], x: mx.array) -> tuple[mx.array, mx.array]:
    slab, offsets, cols, bounds = operands
    hidden = sparse_ffn.hidden(view, slab, offsets, mx.array([len(cols)], mx.int32), x)
    y = sparse_ffn.total(sparse_ffn.down(view, slab, offsets, cols, bounds, hidden))
    mx.eval(hidden, y)
    return hidden, y


def _operands(made: Layer) -> tuple[mx.array, ...]:
    n = len(made.offsets)
    edges = [s * n // sparse_ffn.SEGMENTS for s in range(sparse_ffn.SEGMENTS + 1)]
    lists = mx.array(made.offsets), mx.arange(n).astype(mx.int32), mx.array(edges, mx.int32)
    found = mx.array(made.slab), *lists
    mx.eval(found)
    return found


def _ffn(form: str) -> float:
    made, x = layer(form, ROWS, WIDTH), normal(5, TOKENS, WIDTH)
    hidden, y = (np.array(part) for part in _run_ffn(record(made), _operands(made), mx.array(x)))
    return max(hidden_products(made, x).error(hidden), down_products(made, hidden).error(y))


def _timed_ffn(form: str) -> tuple[Callable[[], object], int]:
    made, x, moved = on_cpu.timed_layer(form)
    return partial(_run_ffn, record(made), _operands(made), mx.array(x)), moved


def _run_gate(parts: tuple[mx.array, ...], form: str, x: mx.array) -> tuple[mx.array, mx.array]:
    if len(parts) > 1:
        quant_bits = int(form[1])
        activated, bits = select.gate(parts[0], x, "relu", scales=parts[1], biases=parts[2], quant_bits=quant_bits)
    else:
        activated, bits = select.gate(parts[0], x, "relu")
    mx.eval(activated, bits)
    return activated, bits


def _gate(form: str) -> float:
    stored, x = store(normal(1, ROWS, WIDTH), form), normal(2, TOKENS, WIDTH)
    activated, bits = _run_gate(stored.parts, form, mx.array(x))
    expected, found = Products.of(x, stored.values), np.array(activated)
    wrong = (unpacked(bits, ROWS) != (found != 0)).sum()
    return Products(np.maximum(expected.value, 0), expected.size).error(found) + float(wrong)


def _timed_gate(form: str) -> tuple[Callable[[], object], int]:
    stored = store(normal(1, on_cpu.TIMED_ROWS, on_cpu.TIMED_WIDTH), form)
    copies = max(1, on_cpu.TIMED_BYTES // stored.rows().nbytes)
    parts = tuple(mx.contiguous(mx.tile(part, (copies, 1))) for part in stored.parts)
    x = mx.array(normal(2, 1, on_cpu.TIMED_WIDTH))
    mx.eval(parts, x)
    return partial(_run_gate, parts, form, x), sum(part.nbytes for part in parts)


def _low_bit_parts(bits: int, rows: int, width: int, copies: int = 1) -> list[mx.array]:
    copy = on_cpu.low_bit(bits, rows, width)
    return [mx.array(np.tile(part, (copies, 1))) for part in (copy.words, copy.scales, copy.biases)]


def _run_score(x: mx.array, parts: list[mx.array], bits: int) -> tuple[mx.array, mx.array]:
    words, scales, biases = parts
    made = select.score(select.round_tokens(x, GROUP), words, scales, biases, 0.0, bits=bits)
    mx.eval(made)
    return made


def _score(workers: native.Workers, bits: int) -> float:
    x = normal(4, TOKENS, WIDTH)
    scores, kept = _run_score(mx.array(x), _low_bit_parts(bits, ROWS, WIDTH), bits)
    expected = on_cpu.native_scores(workers, on_cpu.low_bit(bits, ROWS, WIDTH), x)
    return float((np.array(scores) != expected).sum() + (unpacked(kept, ROWS) != ~(expected < 0)).sum())


def _timed_score(bits: int) -> tuple[Callable[[], object], int]:
    one = on_cpu.TIMED_ROWS * on_cpu.TIMED_WIDTH * bits // 8
    parts = _low_bit_parts(bits, on_cpu.TIMED_ROWS, on_cpu.TIMED_WIDTH, max(1, on_cpu.TIMED_BYTES // one))
    x = mx.array(normal(4, 1, on_cpu.TIMED_WIDTH))
    mx.eval(parts, x)
    return partial(_run_score, x, parts, bits), sum(part.nbytes for part in parts)


def _value(workers: native.Workers) -> float:
    x, norms = normal(4, TOKENS, WIDTH), np.abs(normal(12, ROWS))
    words, scales, biases = _low_bit_parts(2, ROWS, WIDTH)
    gate, up = value.Copy(words, scales, biases, 2), value.Copy(words[::-1], scales[::-1], biases[::-1], 2)
    scores, _ = value.value(select.round_tokens(mx.array(x), GROUP), gate, up, mx.array(norms), 0.5, "relu")
    product = on_cpu.native_scores(workers, on_cpu.low_bit(2, ROWS, WIDTH), x)
    return float((np.array(scores) != np.maximum(product, 0) * np.abs(product[:, ::-1]) * norms).sum())


def _candidates() -> float:
    parts, weights = compact_copy(200, 5)
    x = normal(9, TOKENS, 320)
    high, low, scales, errors = (mx.array(parts[name]) for name in ("high", "low", "scales", "errors"))
    copy = candidates.CompactCopy(high, low, scales, errors)
    return on_cpu.missed(unpacked(candidates.candidates(copy, mx.array(x)), 200), weights, x)


def unpacked(bits: mx.array, neurons: int) -> np.ndarray:
    """bool [T, I] of words of bits."""
    return np.unpackbits(np.array(bits).view(np.uint8), axis=1, bitorder="little")[:, :neurons].astype(bool)


def _compact() -> float:
    kept = normal(10, TOKENS, 3000) > 0.8
    ids, count, mask = select.compact(select.bits_reference(mx.array(kept)), 3000)
    expected, n = np.flatnonzero(kept.any(axis=0)), int(count[0])
    if n != len(expected):
        return float(abs(n - len(expected)))
    return float((np.array(ids)[:n] != expected).sum() + (np.array(mask)[:, :n] != kept[:, expected]).sum())


def _topk() -> float:
    scores = normal(10, TOKENS, 700)
    mask, ids = np.empty(scores.shape, np.uint8), np.empty(700, np.int32)
    native.select(scores, 0.5, 100, mask, ids)
    return float((unpacked(select.topk(mx.array(scores), 100, 0.5), 700) != mask.astype(bool)).sum())


def _lookup() -> float:
    rng = np.random.default_rng(13)
    slot_of, ids = np.full(900, -1, np.int32), np.sort(rng.permutation(900)[:600]).astype(np.int32)
    cached = rng.permutation(900)[:300]
    slot_of[cached] = np.arange(300)
    begin, bytes_of = rng.integers(0, 64, 300).astype(np.int32) * 64, 3 << 30
    made = select.lookup(mx.array(ids), mx.array([600], mx.int32), mx.array(slot_of), mx.array(begin), bytes_of)
    slot = slot_of[ids]
    expected = np.where(slot < 0, -1, slot.astype(np.int64) * bytes_of + begin[slot])
    wrong, misses = (np.array(made[0]) != expected).sum(), int((slot < 0).sum())
    listed = (np.array(made[3])[:misses] != ids[slot < 0]).sum()
    return float(wrong + listed + (np.array(made[5]) != [600 - misses, misses]).sum())
