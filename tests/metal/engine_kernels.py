"""The engine's kernels with `metal_kernels` in the FFN's place: for whole models in the harness, slow and complete.

The resident products and attention are MLX's, through the reference kernels. A slab is copied for each call, which a
machine with unified memory must not do: this is for results, not for time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from flashsparse.kernels.reference import ReferenceKernels
from metal_kernels import select, sparse_ffn
from metal_kernels.records import FLOATS, Record

if TYPE_CHECKING:
    from flashsparse.pack.manifest import Manifest
    from flashsparse.weights import Weight


def record_of(manifest: Manifest) -> Record:
    """The layout of a pack's records, for the Metal kernels."""
    fields = {name: field.offset for name, field in manifest.record.fields.items()}
    return Record(
        d=manifest.hidden_size,
        format=f"Q{manifest.quant.bits}" if manifest.quant else manifest.source_dtype,
        source=manifest.source_dtype,
        group=manifest.quant.group_size if manifest.quant else 0,
        activation=manifest.activation.name,
        param=manifest.activation.param or 0.0,
        gated=manifest.gated,
        **fields,
    )


class MetalKernels(ReferenceKernels):
    """Implements flashsparse.kernels.Kernels; `launches` counts the calls that ran Metal kernels."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.record = record_of(manifest)
        self.launches = 0

    def score(self, weight: Weight, bias: np.ndarray | None, x: np.ndarray, out: np.ndarray) -> None:
        assert weight.quant is not None
        parts = [_typed(part, weight.dtype) for part in (weight.scales, weight.biases)]
        rounded = select.round_tokens(mx.array(x), weight.quant.group_size)
        extra = None if bias is None else mx.array(bias)
        made = select.score(rounded, mx.array(weight.data), *parts, 0.0, bits=weight.quant.bits, bias=extra)
        out[:] = np.array(made[0])
        self.launches += 1

    def select(self, scores: np.ndarray, threshold: float, k: int | None, mask: np.ndarray, ids: np.ndarray) -> int:
        neurons = scores.shape[1]
        bits = select.topk(mx.array(scores), k or neurons, threshold)
        mask[:] = np.unpackbits(np.array(bits).view(np.uint8), axis=1, bitorder="little")[:, :neurons]
        return self._list(bits, neurons, ids)

    def active(self, activated: np.ndarray) -> np.ndarray:
        ids = np.empty(activated.shape[1], np.int32)
        bits = select.bits_reference(mx.array(activated != 0))
        return ids[: self._list(bits, activated.shape[1], ids)]

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
        given = None if activated is None else mx.array(np.ascontiguousarray(activated[:, ids]))
        marks = None if mask is None else mx.array(np.ascontiguousarray(mask[:, ids]))
        count = mx.array([len(offsets)], mx.int32)
        made = sparse_ffn.hidden(self.record, mx.array(slab), mx.array(offsets), count, mx.array(x), given, marks)
        hidden[:, cols] = np.array(made)
        self.launches += 1

    def down(self, slab: np.ndarray, offsets: np.ndarray, cols: np.ndarray, hidden: np.ndarray, y: np.ndarray) -> None:
        bounds = mx.array([0, len(cols)], mx.int32)
        carry = mx.array(y)[None]
        lists = mx.array(offsets), mx.array(cols)
        made = sparse_ffn.down(self.record, mx.array(slab), *lists, bounds, mx.array(hidden), carry)
        y[:] = np.array(sparse_ffn.total(made))
        self.launches += 1

    def _list(self, bits: mx.array, neurons: int, ids: np.ndarray) -> int:
        found, count, _ = select.compact(bits, neurons)
        ids[:] = np.array(found)
        self.launches += 1
        return int(count.item())


def _typed(stored: np.ndarray | None, dtype: str) -> mx.array:
    assert stored is not None
    return mx.array(stored).view(FLOATS[dtype])
