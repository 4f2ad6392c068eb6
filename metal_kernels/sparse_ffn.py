"""The sparse FFN over a list of records: Metal kernels, and the reference in plain MLX operators.

Gated, h = act(gate · x) * (up · x + b_up); non-gated, h = act(up · x + b_up); y += sum over records of h * down.
Float32 sums throughout. Reading records and choosing slots are the caller's.

Order: a record's h is one simdgroup's; its bits depend on the record and the token only. The down sum is split into
segments of neuron numbers; within one, records are added in ascending order by one thread, then segments in order. So
results do not change from run to run, nor with slots, arrival, tokens beside it, or the rounds that a list is cut into.

Tolerance: |metal - reference| <= TOLERANCE times the sum of the products' magnitudes; the same for down.

By design (not measured on a Mac): per record and tile of tokens the gate row is read once, the up row once unless every
gate is zero, the down vector once: `hidden_bytes` and `down_bytes`. x and hidden stay in the caches. A lane loads 16
bytes at a time where fields allow, a simdgroup 512 in a row; no threadgroup memory; 4 simdgroups a threadgroup. Down: 4
to 16 bytes a lane, segments x d / 8 threads (8192 at d 4096, 16 segments). At 16 bits nothing but the memory bandwidth
should limit either from some 500 records on; at 4 bits one multiply-add and three integer operations a weight take
about half of the arithmetic of an M1's 8 cores at its bandwidth.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from metal_kernels.launch import SIMD, kernel
from metal_kernels.records import ACTIVATIONS, Record, scalars, vectors

TOLERANCE = 2e-6
SEGMENTS = 16  # parts of the down sum, by neuron number
SIMDGROUPS = 4  # records of a threadgroup


def activate(scores: mx.array, activation: str, param: float | None) -> mx.array:
    """The activation of pre-activations of any shape; for dReLU the gate's relu. ValueError for an unknown name."""
    if activation == "silu":
        return scores * mx.sigmoid(scores)
    if activation in ("relu", "drelu"):
        return mx.maximum(scores, 0)
    if activation == "relu2":
        return mx.square(mx.maximum(scores, 0))
    if activation == "fatrelu" and param is not None:
        # ProSparse's FATReLU: values at the threshold or above pass, NaN passes too.
        return mx.where(scores < param, mx.zeros_like(scores), scores)
    raise ValueError(f"activation {activation!r} is not known")


def gated_hidden(activated: mx.array, up: mx.array, bias: mx.array, x: mx.array, activation: str) -> mx.array:
    """activated [T, n], up [n, d], bias [n], x [T, d] -> h [T, n]; exactly zero where activated is zero."""
    lifted = x @ up.T + bias
    if activation == "drelu":
        lifted = mx.maximum(lifted, 0)
    # A product with an exact zero must stay zero, also when the other factor is infinite.
    return mx.where(activated == 0, mx.zeros_like(lifted), activated * lifted)


def accumulate_down(hidden: mx.array, down: mx.array) -> mx.array:
    """hidden [T, n], down [n, d] -> their product [T, d], columns that are zero for a token left out of its sum."""
    terms = mx.where(hidden[..., None] == 0, mx.zeros_like(down)[None], hidden[..., None] * down[None])
    return terms.sum(axis=1)


def hidden(
    record: Record,
    slab: mx.array,
    offsets: mx.array,
    count: mx.array,
    x: mx.array,
    activated: mx.array | None = None,
    mask: mx.array | None = None,
) -> mx.array:
    """float32 [T, n]: the intermediate values of the records that begin at byte offsets [n] (int64) of the slab.

    slab uint8, any shape; count int32 [1]: only the first so many are computed, the other columns are undefined; x
    [T, d] of any float type. activated float32 [T, n]: activated gates; None: they are computed from the records. Where
    mask uint8 [T, n] is 0 the value is exactly zero. ValueError for a record that lacks what is needed.
    """
    tokens, n = x.shape[0], offsets.shape[0]
    if activated is None and (record.gate if record.gated else record.up) < 0:
        raise ValueError("activated is needed: the record has no row to score with")
    if n == 0:
        return mx.zeros((tokens, 0))
    given = {"activated": activated, "mask": mask}
    extra = {name: array for name, array in given.items() if array is not None}
    built = kernel(
        "sparse_ffn_hidden",
        ("slab", "offsets", "count", "layout", "param", "x", *extra),
        ("hidden",),
        ("rows",),
        tuple(f"HAS_{name.upper()}={int(name in extra)}" for name in given),
    )
    tile = _tile(tokens)
    (made,) = built(
        inputs=[slab, offsets, count, record.layout(), record.limit(), x, *extra.values()],
        output_shapes=[(tokens, n)],
        output_dtypes=[mx.float32],
        grid=(SIMD, n, -(-tokens // tile)),
        threadgroup=(SIMD, SIMDGROUPS, 1),
        template=[*record.template(tile), ("ACTIVATION", ACTIVATIONS[record.activation]), ("GATED", record.gated)],
    )
    return made


def down(
    record: Record,
    slab: mx.array,
    offsets: mx.array,
    cols: mx.array,
    bounds: mx.array,
    hidden: mx.array,
    carry: mx.array | None = None,
) -> mx.array:
    """float32 [segments, T, d]: carry (or zero) plus each segment's sum of hidden[:, cols[p]] * down_p, p ascending.

    offsets int64 [n], cols int32 [n], bounds int32 [segments + 1]: segment s is positions bounds[s] to bounds[s + 1]
    - 1, as `segment_bounds` gives them. A list cut in two is two calls, the second with the first's result as carry.
    """
    tokens, segments = hidden.shape[0], bounds.shape[0] - 1
    shape = (segments, tokens, record.d)
    if offsets.shape[0] == 0:
        return mx.zeros(shape) if carry is None else carry
    extra = [] if carry is None else [carry]
    built = kernel(
        "sparse_ffn_down",
        ("slab", "offsets", "cols", "bounds", "hidden", "layout", *(["carry"] if extra else [])),
        ("partial",),
        ("rows",),
        (f"HAS_CARRY={len(extra)}",),
    )
    tile, threads = min(_tile(tokens), 4), record.d // (4 if record.format == "F32" else 8)
    (made,) = built(
        inputs=[slab, offsets, cols, bounds, hidden, record.layout(), *extra],
        output_shapes=[shape],
        output_dtypes=[mx.float32],
        grid=(-(-threads // SIMD) * SIMD, segments, -(-tokens // tile)),
        threadgroup=(SIMD, 1, 1),
        template=record.template(tile),
    )
    return made


def total(partial: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
    """[T, d] of dtype: the segments' sums [segments, T, d] added in order."""
    built = kernel("sparse_ffn_sum", ("partial",), ("y",))
    tokens, d = partial.shape[1:]
    (made,) = built(
        inputs=[partial],
        output_shapes=[(tokens, d)],
        output_dtypes=[dtype],
        grid=(tokens * d, 1, 1),
        threadgroup=(256, 1, 1),
        template=[("T", dtype)],
    )
    return made


def segment_bounds(ids: mx.array, count: mx.array, records: int, segments: int = SEGMENTS) -> mx.array:
    """int32 [segments + 1]: where each segment of ascending ids [n] begins; s has neurons from s * records / segments.

    Only the first count [1] ids are looked at. Computed where the ids are, so that they need not be read back.
    """
    edges = _edges(records, segments)
    listed = mx.arange(ids.shape[0]) < count
    return ((ids[None] < edges[:, None]) & listed[None]).sum(axis=1).astype(mx.int32)


@cache
def _edges(records: int, segments: int) -> mx.array:
    return mx.array([s * records // segments for s in range(segments)] + [records], mx.int32)


def _tile(tokens: int) -> int:
    """Tokens computed together from one read of a row."""
    return 1 if tokens == 1 else 2 if tokens == 2 else 4


def hidden_bytes(record: Record, n: int, active: int, tokens: int, scored: bool = True) -> int:
    """Bytes of records that `hidden` reads: gate rows of n records (when `scored` here), up rows of the active ones."""
    rows = (n if scored else 0) + (active if record.gated else 0)
    return rows * record.vector_bytes * -(-tokens // _tile(tokens))


def down_bytes(record: Record, active: int, tokens: int, segments: int = SEGMENTS) -> int:
    """Bytes that `down` and `total` move: down vectors of the active records, and the segments' sums twice."""
    sums = 2 * 4 * segments * tokens * record.d
    return active * record.vector_bytes * -(-tokens // min(_tile(tokens), 4)) + sums


def hidden_reference(
    record: Record,
    slab: mx.array,
    offsets: mx.array,
    x: mx.array,
    activated: mx.array | None = None,
    mask: mx.array | None = None,
) -> mx.array:
    """What `hidden` computes for all n records, in plain MLX operators."""
    rows = x.astype(mx.float32)
    if activated is None:
        row, bias = (record.gate, record.gate_bias) if record.gated else (record.up, record.up_bias)
        scores = rows @ vectors(record, slab, offsets, row).T + scalars(record, slab, offsets, bias)
        activated = activate(scores, record.activation, record.param)
    if record.gated:
        up, lift = vectors(record, slab, offsets, record.up), scalars(record, slab, offsets, record.up_bias)
        activated = gated_hidden(activated, up, lift, rows, record.activation)
    return activated if mask is None else mx.where(mask == 0, mx.zeros_like(activated), activated)


def down_reference(record: Record, slab: mx.array, offsets: mx.array, cols: mx.array, hidden: mx.array) -> mx.array:
    """float32 [T, d]: what `total(down(...))` computes, in plain MLX operators."""
    return accumulate_down(hidden[:, cols], vectors(record, slab, offsets, record.down))
