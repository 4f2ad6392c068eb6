"""Which neurons a token needs, worked out on the GPU: scores, masks, lists and slots; the references beside them.

Neurons are bits (uint32 [T, I / 32 rounded up]) until `compact` makes the ascending list, so that only the list and
its length need to be read back, if anything. What scores mean is the predictor's; what a slot is, the cache's.

`score`, `round_tokens`, `compact`, `topk`, `lookup` are exact: equal bits to the native kernels' or no rounding at all.
`gate`: |metal - reference| <= TOLERANCE times the sum of the products' magnitudes (times the activation's slope).

By design (not measured on a Mac): `score` reads the copy once a token (`score_bytes`), 16 bytes a lane and group of 64
at 2 bits, 128 in a row of lanes; integer multiply-adds, one a weight, limit it, not memory. `gate` reads its matrix
once a token, 512 bytes a simdgroup and row, four rows side by side: memory bound at 16 bits. Both use 128 bytes of
threadgroup memory, 256 threads, I / 32 threadgroups. `compact`, `topk` and `lookup` are one threadgroup of 1024 threads
(`topk`: one a token): they cost their latency, and save a read-back.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from metal_kernels.launch import SIMD, kernel
from metal_kernels.records import ACTIVATIONS, FLOATS, FORMATS
from metal_kernels.sparse_ffn import activate

TOLERANCE = 2e-6
THREADS = 1024  # of the threadgroup that makes a list
ROWS = 32  # neurons of a threadgroup that scores: one word of bits
_NAMES = {dtype: name for name, dtype in FLOATS.items()}


def words_of(neurons: int) -> int:
    """Words of 32 bits that hold a bit for each neuron."""
    return -(-neurons // 32)


@cache
def _ints(*values: int) -> mx.array:
    return mx.array(values, mx.int32)


@cache
def _long(value: int) -> mx.array:
    return mx.array([value], mx.int64)


@cache
def _float(value: float) -> mx.array:
    return mx.array([value], mx.float32)


def round_tokens(x: mx.array, group: int) -> tuple[mx.array, mx.array, mx.array]:
    """x [T, d] as integers: int8 [T, d], and steps and sums of the integers, float32 [T, d / group], for `score`.

    step = max |x| / 127 of the group, half to even. A group of zeros, or with a subnormal step, is zero; one with NaN
    or Inf has step NaN.
    """
    tokens, d = x.shape
    groups = d // group
    built = kernel("score_round", ("x",), ("q", "steps", "totals"))
    made: tuple[mx.array, mx.array, mx.array] = tuple(
        built(
            inputs=[x],
            output_shapes=[(tokens, d), (tokens, groups), (tokens, groups)],
            output_dtypes=[mx.int8, mx.float32, mx.float32],
            grid=(SIMD, groups, tokens),
            threadgroup=(SIMD, 4, 1),
            template=[("GROUP", group)],
        )
    )
    return made


def score(
    rounded: tuple[mx.array, mx.array, mx.array],
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    threshold: float,
    *,
    bits: int = 2,
    bias: mx.array | None = None,
    magnitude: bool = False,
) -> tuple[mx.array, mx.array]:
    """Scores float32 [T, I] by a low-bit copy, and the bits of those not below the threshold (NaN is not below).

    `rounded`: of `round_tokens`, with the copy's group. weight uint32 [I, d * bits / 32], scales and biases
    [I, d / group], bits 1 to 4; bias float32 [I]. `magnitude`: the score is |silu| of the product.
    """
    if not 1 <= bits <= 4:
        raise ValueError(f"copies of {bits} bits: expected 1 to 4")
    tokens, d = rounded[0].shape
    neurons, words = weight.shape[0], words_of(weight.shape[0])
    extra = [] if bias is None else [bias]
    built = kernel(
        "score",
        ("q", "steps", "totals", "weight", "scales", "biases", "limits", "threshold", *(["bias"] if extra else [])),
        ("scores", "bits"),
        ("rows", "low_bits"),
        (f"HAS_BIAS={len(extra)}",),
    )
    scores, kept = built(
        inputs=[*rounded, weight, scales, biases, _ints(neurons, words), _float(threshold), *extra],
        output_shapes=[(tokens, neurons), (tokens, words)],
        output_dtypes=[mx.float32, mx.uint32],
        grid=(words * 256, tokens, 1),
        threadgroup=(256, 1, 1),
        template=[("GROUP", d // scales.shape[1]), ("BITS", bits), ("MAGNITUDE", magnitude)],
    )
    return scores, kept


def score_bytes(neurons: int, d: int, bits: int, group: int, tokens: int) -> int:
    """Bytes that `score` reads of a copy with 16-bit scales."""
    return tokens * neurons * (d * bits // 8 + 4 * d // group)


def gate(
    weight: mx.array,
    x: mx.array,
    activation: str,
    param: float = 0.0,
    *,
    scales: mx.array | None = None,
    biases: mx.array | None = None,
    quant_bits: int = 0,
    bias: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Activated gates float32 [T, I] of x [T, d], and the bits of those that are not zero (NaN is not).

    weight [I, d] of a float type, or uint32 [I, d * quant_bits / 32] with scales and biases [I, d / group].
    """
    tokens, d = x.shape
    neurons, words = weight.shape[0], words_of(weight.shape[0])
    quantized = [] if scales is None or biases is None else [scales, biases]
    source = _NAMES[scales.dtype if scales is not None else weight.dtype]
    stored = f"Q{quant_bits}" if quantized else source
    extra = [] if bias is None else [bias]
    names = (
        "weight",
        "x",
        "limits",
        "param",
        *(["scales", "biases"] if quantized else []),
        *(["bias"] if extra else []),
    )
    flags = (f"QUANTIZED={int(bool(quantized))}", f"HAS_BIAS={len(extra)}")
    built = kernel("gate", names, ("activated", "bits"), ("rows",), flags)
    group = d // scales.shape[1] if scales is not None else 32
    activated, kept = built(
        inputs=[weight.view(mx.uint8), x, _ints(neurons, words), _float(param), *quantized, *extra],
        output_shapes=[(tokens, neurons), (tokens, words)],
        output_dtypes=[mx.float32, mx.uint32],
        grid=(words * 256, tokens, 1),
        threadgroup=(256, 1, 1),
        template=[
            ("FORMAT", FORMATS[stored]),
            ("S", FLOATS[source]),
            ("GROUP", group),
            ("ACTIVATION", ACTIVATIONS[activation]),
        ],
    )
    return activated, kept


def topk(scores: mx.array, k: int, threshold: float = float("-inf")) -> mx.array:
    """Bits [T, words] of each token's k largest scores [T, I] that are not below the threshold.

    NaN counts as the largest, and of equals the lower neuron comes first.
    """
    tokens, neurons = scores.shape
    words = words_of(neurons)
    built = kernel("topk", ("scores", "limits", "threshold"), ("bits",), ("rank", "scan"))
    (made,) = built(
        inputs=[scores, _ints(min(k, neurons), words), _float(threshold)],
        output_shapes=[(tokens, words)],
        output_dtypes=[mx.uint32],
        grid=(THREADS, tokens, 1),
        threadgroup=(THREADS, 1, 1),
    )
    return made


def compact(bits: mx.array, neurons: int) -> tuple[mx.array, mx.array, mx.array]:
    """Of bits [T, words]: ids int32 [I], their number int32 [1], and mask uint8 [T, I] in the order of the ids.

    The ids are the ascending neurons of which some token has the bit; beyond their number ids and mask are undefined.
    """
    built = kernel("compact", ("bits", "limits"), ("ids", "count", "mask"), ("scan",))
    made: tuple[mx.array, mx.array, mx.array] = tuple(
        built(
            inputs=[bits, _ints(neurons)],
            output_shapes=[(neurons,), (1,), (bits.shape[0], neurons)],
            output_dtypes=[mx.int32, mx.int32, mx.uint8],
            grid=(THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
        )
    )
    return made


def lookup(
    ids: mx.array, count: mx.array, slot_of: mx.array, begin: mx.array, slot_bytes: int
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Where the first `count` [1] records of ids [n] are: offsets, hit_offsets, hit_cols, miss_ids, miss_cols, totals.

    slot_of int32 [records]: each record's slot or -1; begin int32 [slots]: where in its slot the record begins. offsets
    int64 [n]: byte offsets in the slab, -1 for a miss. The hits and the misses are listed in the order of ids with
    their positions (cols); totals int32 [2] says how many of each. Beyond those numbers all are undefined.
    """
    n = ids.shape[0]
    names = ("offsets", "hit_offsets", "hit_cols", "miss_ids", "miss_cols", "totals")
    built = kernel("lookup", ("ids", "count", "slot_of", "begin", "slot_bytes"), names, ("scan",))
    made = built(
        inputs=[ids, count, slot_of, begin, _long(slot_bytes)],
        output_shapes=[(n,)] * 5 + [(2,)],
        output_dtypes=[mx.int64, mx.int64, mx.int32, mx.int32, mx.int32, mx.int32],
        grid=(THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
    )
    offsets, hit_offsets, hit_cols, miss_ids, miss_cols, totals = made
    return offsets, hit_offsets, hit_cols, miss_ids, miss_cols, totals


def rounded_reference(x: mx.array, group: int) -> mx.array:
    """float32 [T, d]: x as `round_tokens` rounds it."""
    groups = x.astype(mx.float32).reshape(x.shape[0], -1, group)
    step = mx.abs(groups).max(axis=2, keepdims=True) / 127
    values = mx.where(
        step < mx.finfo(mx.float32).smallest_normal, mx.zeros_like(groups), mx.round(groups / step) * step
    )
    return mx.where(mx.isfinite(step), values, mx.full(values.shape, float("nan"))).reshape(x.shape)


def score_reference(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """float32 [T, I]: what `score` computes without bias, by MLX's quantized product (2, 3 and 4 bits)."""
    group = x.shape[1] // scales.shape[1]
    wide = scales.astype(mx.float32), biases.astype(mx.float32)
    rows = rounded_reference(x, group)
    return mx.quantized_matmul(rows, weight, wide[0], wide[1], transpose=True, group_size=group, bits=bits)


def gate_reference(weight: mx.array, x: mx.array, activation: str, param: float, bias: mx.array | None) -> mx.array:
    """float32 [T, I]: what `gate` computes, by MLX's product; weight of a float type."""
    product = x.astype(mx.float32) @ weight.astype(mx.float32).T
    return activate(product if bias is None else product + bias, activation, param)


def bits_reference(kept: mx.array) -> mx.array:
    """uint32 [T, words] of kept, bool [T, I]."""
    tokens, neurons = kept.shape
    padded = mx.pad(kept, [(0, 0), (0, words_of(neurons) * 32 - neurons)]).reshape(tokens, -1, 32)
    return (padded.astype(mx.uint32) << mx.arange(32).astype(mx.uint32)).sum(axis=2).astype(mx.uint32)


def kept_reference(bits: mx.array, neurons: int) -> mx.array:
    """bool [T, neurons] of bits [T, words]: the inverse of `bits_reference`."""
    spread = (bits[..., None] >> mx.arange(32).astype(mx.uint32)) & 1
    return spread.reshape(bits.shape[0], -1)[:, :neurons] != 0


def compact_reference(bits: mx.array, neurons: int) -> tuple[mx.array, mx.array, mx.array]:
    """What `compact` makes; beyond their number the ids are `neurons`."""
    kept = kept_reference(bits, neurons)
    listed = kept.any(axis=0)
    ids = mx.sort(mx.where(listed, mx.arange(neurons), mx.full((neurons,), neurons, mx.int32))).astype(mx.int32)
    mask = mx.take(kept, mx.minimum(ids, neurons - 1), axis=1)
    return ids, listed.sum(keepdims=True).astype(mx.int32), mask.astype(mx.uint8)


def lookup_reference(
    ids: mx.array, count: mx.array, slot_of: mx.array, begin: mx.array, slot_bytes: int | mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array, mx.array]:
    """What `lookup` makes; what is undefined there are places that exist."""
    n = ids.shape[0]
    at = mx.arange(n)
    listed = at < count
    slots = mx.where(listed, mx.take(slot_of, mx.where(listed, ids, 0)), -1)
    hit, missed, places = listed & (slots >= 0), listed & (slots < 0), mx.maximum(slots, 0)
    offsets = places.astype(mx.int64) * slot_bytes + mx.take(begin, places)
    hit_cols, miss_cols = (mx.sort(mx.where(kept, at, n)).astype(mx.int32) for kept in (hit, missed))
    totals = mx.stack([hit.sum(), missed.sum()]).astype(mx.int32)
    inside = mx.where(at < totals[0], hit_cols, hit_cols[0] % n)
    miss_ids = mx.take(ids, mx.minimum(miss_cols, n - 1))
    return mx.where(hit, offsets, -1), mx.take(offsets, inside), hit_cols, miss_ids, miss_cols, totals


def topk_reference(scores: mx.array, k: int, threshold: float) -> mx.array:
    """bool [T, I]: the neurons whose bit `topk` sets."""
    key = mx.where(mx.isnan(scores), mx.full(scores.shape, float("inf")), scores)
    # NaN above infinity: first by being NaN, then by the value, then by the number.
    larger = (key[:, None] > key[:, :, None]) | (mx.isnan(scores)[:, None] & ~mx.isnan(scores)[:, :, None])
    equal = (key[:, None] == key[:, :, None]) & (mx.isnan(scores)[:, None] == mx.isnan(scores)[:, :, None])
    number = mx.arange(scores.shape[1])
    rank = (larger | (equal & (number[None, :] < number[:, None])[None])).sum(axis=2)
    return (rank < k) & ~(scores < threshold)
