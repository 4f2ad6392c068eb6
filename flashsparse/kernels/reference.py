"""Plain MLX operators in float32: slow, easy to read, for checking the fast kernels on any machine.

Owns the decoding of stored types into MLX arrays. Products are float32 sums in MLX's order, so results agree with the
native kernels within rounding, not bit for bit, and may depend on how many rows are computed together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from flashsparse.pack.layout import COPY_GROUP
from metal_kernels.sparse_ffn import accumulate_down, activate, gated_hidden

if TYPE_CHECKING:
    from flashsparse.compact import CompactGate
    from flashsparse.kvcache import KVCache
    from flashsparse.pack.manifest import Manifest
    from flashsparse.weights import Weight

TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
BYTES = {"F32": 4, "F16": 2, "BF16": 2}
BLOCK = 256  # records whose down columns are expanded at once


def _float32(stored: np.ndarray, dtype: str) -> mx.array:
    """A float32 MLX copy of a stored numpy array (bf16 appears as uint16)."""
    raw = mx.array(stored)
    return (raw.view(mx.bfloat16) if dtype == "BF16" else raw).astype(mx.float32)


def _dequantized(words: np.ndarray, scales: np.ndarray, biases: np.ndarray, dtype: str, bits: int) -> mx.array:
    group = words.shape[1] * 32 // bits // scales.shape[1]
    parts = _float32(scales, dtype), _float32(biases, dtype)
    if bits == 1:  # MLX begins at two
        numbers = mx.array(np.unpackbits(words.view(np.uint8), axis=1, bitorder="little"))
        scale, bias = (mx.repeat(part, group, axis=1) for part in parts)
        return numbers.astype(mx.float32) * scale + bias
    return mx.dequantize(mx.array(words), *parts, group_size=group, bits=bits)


def rounded(x: np.ndarray, group_size: int) -> np.ndarray:
    """x [T, cols] rounded, half to even, to multiples of max |x| / 127 of its group; where that is subnormal, to zero.

    A group that holds NaN or Inf becomes NaN.
    """
    groups = x.reshape(len(x), -1, group_size)
    with np.errstate(all="ignore"):
        step = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
        values = np.rint(groups / step) * step
    values = np.where(step < np.finfo(np.float32).tiny, np.float32(0), values)
    return np.where(np.isfinite(step), values, np.float32(np.nan)).reshape(x.shape)


def expanded(gate: CompactGate) -> tuple[np.ndarray, np.ndarray]:
    """float64 values [rows, groups * 64] and scales [rows, groups] of a compact gate."""
    scales = (gate.scales.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    low = gate.low.reshape(*scales.shape, COPY_GROUP // 2)
    sixteenths = np.concatenate([low & 15, low >> 4], axis=2).astype(np.float64) - 8
    numbers = gate.high.reshape(*scales.shape, COPY_GROUP) + sixteenths / 16
    return (numbers * scales[..., None]).reshape(len(scales), -1), scales


class ReferenceKernels:
    """Implements flashsparse.kernels.Kernels for one pack."""

    name = "reference"

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._activation = manifest.activation.name
        self._param = manifest.activation.param

    def linear(self, weight: Weight, bias: np.ndarray | None, x: np.ndarray, out: np.ndarray) -> None:
        product = mx.array(x) @ self._matrix(weight).T
        out[:] = np.array(product if bias is None else product + mx.array(bias))

    def score(self, weight: Weight, bias: np.ndarray | None, x: np.ndarray, out: np.ndarray) -> None:
        assert weight.quant is not None
        self.linear(weight, bias, rounded(x, weight.quant.group_size), out)

    def select(self, scores: np.ndarray, threshold: float, k: int | None, mask: np.ndarray, ids: np.ndarray) -> int:
        mask[:] = ~(scores < np.float32(threshold))
        if k is not None:
            order = np.lexsort((-scores, ~np.isnan(scores)), axis=1)  # stable: of equals the lower neuron comes first
            np.put_along_axis(mask, order[:, k:], 0, axis=1)
        found = np.flatnonzero(mask.any(axis=0))
        ids[: len(found)] = found
        return len(found)

    def candidates(self, gate: CompactGate, x: np.ndarray, mask: np.ndarray, ids: np.ndarray) -> int:
        """In float64; the bound covers any order of the float32 sums, since MLX's is not known."""
        values, scales = expanded(gate)
        wide = np.zeros((len(x), values.shape[1]))
        wide[:, : gate.cols] = x
        rounding = 1.01 * (gate.cols + 8) * 2.0**-24
        limit = 0.0 if self._param is None else self._param * (1 - 2.0**-22)
        with np.errstate(all="ignore"):
            norms = np.sqrt((wide.reshape(len(x), -1, COPY_GROUP) ** 2).sum(axis=2)) @ scales.T
            score = wide @ values.T + (0 if gate.bias is None else gate.bias)
            error = (gate.errors[:, 1] + rounding * gate.errors[:, 2].astype(np.float64)) * norms
            overflows = ~(gate.errors[:, 2] * norms < 2.0**126)
            mask[:] = ~(score + error * (1 + 1e-9) + 2.0**-100 * (error != 0) <= limit) | overflows
        mask[~np.isfinite(x).all(axis=1)] = 1
        found = np.flatnonzero(mask.any(axis=0))
        ids[: len(found)] = found
        return len(found)

    def gather(self, weight: Weight, ids: np.ndarray, out: np.ndarray) -> None:
        if weight.quant is None:
            out[:] = np.array(_float32(weight.data[ids], weight.dtype))
            return
        assert weight.scales is not None and weight.biases is not None
        rows = weight.data[ids], weight.scales[ids], weight.biases[ids]
        out[:] = np.array(_dequantized(*rows, weight.dtype, weight.quant.bits))

    def attention(self, q: np.ndarray, cache: KVCache, window: int, scale: float, out: np.ndarray) -> None:
        count, end = q.shape[0], cache.offset
        keys = _float32(cache.keys[:, :end], cache.dtype)[None]
        values = _float32(cache.values[:, :end], cache.dtype)[None]
        at, seen = mx.arange(end - count, end)[:, None], mx.arange(end)[None]
        mask = seen <= at
        if window:
            mask = mask & (at - seen < window)
        queries = mx.array(q).transpose(1, 0, 2)[None]
        result = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        out[:] = np.array(result[0].transpose(1, 0, 2))

    def activate(self, scores: np.ndarray) -> None:
        scores[:] = np.array(activate(mx.array(scores), self._activation, self._param))

    def active(self, activated: np.ndarray) -> np.ndarray:
        return np.flatnonzero((activated != 0).any(axis=0)).astype(np.int32)

    def hidden(
        self,
        slab: np.ndarray,
        offsets: np.ndarray,
        ids: np.ndarray,
        cols: np.ndarray,
        x: np.ndarray,
        activated: np.ndarray | None,
        mask: np.ndarray | None,
        hidden: np.ndarray,
    ) -> None:
        gated, rows = self._manifest.gated, mx.array(x)
        if activated is None:
            field = "gate" if gated else "up"
            scores = rows @ self._vectors(slab, offsets, field).T + self._scalars(slab, offsets, f"{field}_bias")
            chosen = activate(scores, self._activation, self._param)
        else:
            chosen = mx.array(activated[:, ids])
        if gated:
            up, bias = self._vectors(slab, offsets, "up"), self._scalars(slab, offsets, "up_bias")
            chosen = gated_hidden(chosen, up, bias, rows, self._activation)
        hidden[:, cols] = np.array(chosen) if mask is None else np.where(mask[:, ids], np.array(chosen), 0)

    def down(self, slab: np.ndarray, offsets: np.ndarray, cols: np.ndarray, hidden: np.ndarray, y: np.ndarray) -> None:
        for start in range(0, len(cols), BLOCK):
            part = slice(start, start + BLOCK)
            columns = self._vectors(slab, offsets[part], "down")
            y += np.array(accumulate_down(mx.array(hidden[:, cols[part]]), columns))

    def close(self) -> None:
        """Nothing to stop: MLX owns its threads."""

    def _matrix(self, weight: Weight) -> mx.array:
        if weight.quant is None:
            return _float32(weight.data, weight.dtype)
        assert weight.scales is not None and weight.biases is not None
        return _dequantized(weight.data, weight.scales, weight.biases, weight.dtype, weight.quant.bits)

    def _bytes(self, slab: np.ndarray, offsets: np.ndarray, start: int, count: int) -> np.ndarray:
        return slab[(offsets + start)[:, None] + np.arange(count)]

    def _vectors(self, slab: np.ndarray, offsets: np.ndarray, name: str) -> mx.array:
        """The vector field `name` of each record, [n, d] float32."""
        m = self._manifest
        field, dtype = m.record.fields[name], m.source_dtype
        raw = self._bytes(slab, offsets, field.offset, field.bytes)
        kept = np.uint16 if dtype == "BF16" else np.dtype(f"f{BYTES[dtype]}")
        if m.quant is None:
            return _float32(raw[:, : m.hidden_size * BYTES[dtype]].copy().view(kept), dtype)
        words = m.hidden_size * m.quant.bits // 8
        scale = m.hidden_size // m.quant.group_size * BYTES[dtype]
        scales = raw[:, words : words + scale].copy().view(kept)
        biases = raw[:, words + scale : words + 2 * scale].copy().view(kept)
        return _dequantized(raw[:, :words].copy().view(np.uint32), scales, biases, dtype, m.quant.bits)

    def _scalars(self, slab: np.ndarray, offsets: np.ndarray, name: str) -> mx.array:
        """The scalar field `name` of each record, [n] float32; zeros when records have none."""
        m = self._manifest
        if name not in m.record.fields:
            return mx.zeros((len(offsets),))
        kept = np.uint16 if m.source_dtype == "BF16" else np.dtype(f"f{BYTES[m.source_dtype]}")
        raw = self._bytes(slab, offsets, m.record.fields[name].offset, BYTES[m.source_dtype])
        return _float32(raw.copy().view(kept)[:, 0], m.source_dtype)
