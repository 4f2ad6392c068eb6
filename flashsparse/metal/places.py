"""A slab or tile that kernels compute on, with the lists that tell them which of its records: all written in place.

One part of the lists is for the records that are there (hits), one for those that arrive later (misses); the sums over
both are taken in one ascending order, so that the result does not depend on which record was where.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from flashsparse.metal.refills import Refills
from flashsparse.metal.shared import Shared
from metal_kernels import sparse_ffn

if TYPE_CHECKING:
    from flashsparse.kernels.metal import MetalKernels
    from flashsparse.metal.choice import MetalChoice
    from flashsparse.weights import Buffer


@dataclass
class Sum:
    """What a step's FFN adds up to so far: partial float32 [segments, T, d], None before anything was added."""

    partial: mx.array | None = None


class Part:
    """Records computed by one launch: their byte offsets, numbers and places in the choice. Each list begins at 0.

    That is why there are two parts and no common list: Metal restricts where a short input may begin in its buffer.
    """

    def __init__(self, room: int) -> None:
        self.offsets, self.ids = Shared(room, "int64"), Shared(room, "int32")
        self.positions, self.count = Shared(room, "int32"), Shared(1, "int32")
        self.n = 0

    def write(self, offsets: np.ndarray, ids: np.ndarray, positions: np.ndarray) -> None:
        """Nothing that reads the lists may be under way."""
        self.n = n = len(ids)
        self.offsets.host[:n], self.ids.host[:n], self.positions.host[:n] = offsets, ids, positions
        self.count.host[0] = n


@dataclass
class Place:
    """`buffer` with room for lists of `room` records. `records`: the layer's; the sums are cut by neuron number."""

    kernels: MetalKernels
    buffer: Buffer
    room: int
    records: int
    refills: Refills
    hits: Part = field(init=False)
    misses: Part = field(init=False)

    def __post_init__(self) -> None:
        self.hits, self.misses = Part(self.room), Part(self.room)
        self._offsets, self._cols = Shared(self.room, "int64"), Shared(self.room, "int32")
        segments = sparse_ffn.SEGMENTS
        self._bounds = Shared(segments + 1, "int32")
        self._edges = np.array([s * self.records // segments for s in range(segments)] + [self.records])

    def hidden(self, part: Part, x: mx.array, choice: MetalChoice) -> mx.array:
        """float32 [T, n]: the intermediate values of the part's records."""
        activated, kept = choice.activated, choice.kept
        if activated is not None:
            activated = mx.take(activated, part.ids.array[: part.n], axis=1)
        if kept is not None:
            kept = mx.take(kept, part.positions.array[: part.n], axis=1)
        offsets = part.offsets.array[: part.n]
        record = self.kernels.record
        return sparse_ffn.hidden(record, self.buffer.array, offsets, part.count.array, x, activated, kept)

    def order(self, offsets: np.ndarray, cols: np.ndarray, ids: np.ndarray) -> None:
        """Write the ascending list that `add` goes by: offsets, columns of the intermediate values, numbers [n]."""
        n = len(ids)
        self._offsets.host[:n], self._cols.host[:n] = offsets, cols
        self._bounds.host[:] = np.searchsorted(ids, self._edges)

    def add(self, hidden: mx.array, total: Sum) -> None:
        """Add the records of `order` to the sum."""
        n = hidden.shape[1]
        lists = self._offsets.array[:n], self._cols.array[:n], self._bounds.array
        total.partial = sparse_ffn.down(self.kernels.record, self.buffer.array, *lists, hidden, total.partial)
