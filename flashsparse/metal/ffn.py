"""The streamed FFN on the GPU: hits are launched, misses are read meanwhile and launched when they are there.

Differs from `StreamedFFN` in that outputs are late: what was launched may still run when a call returns, so slots and
lists are written only when `Refills` says that nobody reads them any more. Tiles are computed while the next is read,
and waited for. Results do not depend on slots, rounds or arrival, as on the CPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from flashsparse.ffn import Scratch, StreamedFFN
from flashsparse.metal.places import Place, Sum
from metal_kernels import sparse_ffn

if TYPE_CHECKING:
    from flashsparse.cache import Round
    from flashsparse.flash import Batch
    from flashsparse.keeping import Keeping
    from flashsparse.kernels.metal import MetalKernels
    from flashsparse.metal.choice import MetalChoice


class Values:
    """Where a tile's intermediate values are put until they are added up."""

    def __init__(self) -> None:
        self.values: mx.array | None = None


@dataclass
class MetalScratch(Scratch):
    """Only sizes are needed: MLX allocates what is computed. `tiles_at`: a tile's place by its address."""

    tiles_at: dict[int, Place] = field(default_factory=dict)

    def hidden_for(self, tokens: int, width: int) -> Any:
        return Values()


@dataclass
class MetalFFN(StreamedFFN):
    """One layer; `place` is its slab's. Arrays are MLX's where `StreamedFFN` has numpy's: x [T, d] float32."""

    place: Place | None = None
    bias: mx.array | None = None
    choice: MetalChoice | None = None  # of the step under way

    def __call__(self, x: Any) -> Any:
        """x [T, d] float32 -> the FFN's output [T, d] float32, late."""
        began = time.perf_counter()
        total: Any = Sum()
        chooser = self.chooser
        choice: Any = chooser.whole(x) if self.dense else chooser.choose(x)
        self.choice = choice
        self._compute(choice, x, total)
        y = mx.zeros(x.shape) if total.partial is None else sparse_ffn.total(total.partial)
        self.counters.ffn_s += time.perf_counter() - began
        return y if self.bias is None else y + self.bias

    def _metal(self) -> MetalKernels:
        kernels: Any = self.kernels
        assert kernels is not None
        return kernels

    def _hidden(self, x: Any, choice: Any, slab: Any, offsets: Any, ids: Any, cols: Any, hidden: Any) -> None:
        """A tile's records, all of them at once."""
        place = self._tile(slab)
        place.hits.write(offsets, ids, np.searchsorted(choice.ids, ids))
        place.order(offsets, cols, ids)
        hidden.values = place.hidden(place.hits, x, choice)

    def _down(self, slab: Any, offsets: Any, cols: Any, hidden: Any, y: Any) -> None:
        """Add a tile's records and wait: the tile is read into next."""
        self._tile(slab).add(hidden.values, y)
        self._fired(hidden.values)
        self._metal().timeline.wait(y.partial)

    def _tile(self, slab: np.ndarray) -> Place:
        assert isinstance(self.scratch, MetalScratch)
        return self.scratch.tiles_at[slab.ctypes.data]

    def _fired(self, hidden: mx.array) -> None:
        if self.predicts and not self.dense:
            self._metal().timeline.later((hidden != 0).sum())

    def _keeping(self, choice: Any, tokens: int) -> Keeping | None:
        if self.place is not None:
            self.place.refills.settle()  # what is kept is copied into slots
        return super()._keeping(choice, tokens)

    def _submit(self, round_: Round, missing: np.ndarray) -> Batch:
        assert self.place is not None
        self.place.refills.refilling(round_.slots[missing])
        return super()._submit(round_, missing)

    def _round(self, round_: Round, x: Any, y: Any, compute_hidden: Any, ahead: Any) -> None:
        """Submit the misses, launch the hits, and the misses once all are there; one sum over both, in order."""
        assert self.place is not None
        place = self.place
        place.refills.settle()
        self._count_round(round_, round_.missing)
        hits, misses = np.flatnonzero(~round_.missing), np.flatnonzero(round_.missing)
        parts = []
        if len(misses):
            with self._submit(round_, misses) as batch:
                parts += self._launch(place.hits, round_, hits, x)
                mx.async_eval(*parts)
                while len(self._take(batch)):
                    pass
        else:
            parts += self._launch(place.hits, round_, hits, x)
        parts += self._launch(place.misses, round_, misses, x)
        round_.commit()
        cols = np.empty(len(round_.ids), np.int32)
        cols[np.concatenate([hits, misses])] = np.arange(len(cols))
        place.order(self._offsets(round_), cols, round_.ids)
        hidden = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
        place.add(hidden, y)
        self._fired(hidden)
        place.refills.reading(round_.slots, y.partial)

    def _launch(self, part: Any, round_: Round, which: np.ndarray, x: mx.array) -> list[mx.array]:
        """The intermediate values of the records at positions `which` of the round; none without any."""
        if not len(which):
            return []
        assert self.place is not None and self.choice is not None
        ids = round_.ids[which]
        part.write(self._offsets(round_)[which], ids, np.searchsorted(self.choice.ids, ids))
        return [self.place.hidden(part, x, self.choice)]
