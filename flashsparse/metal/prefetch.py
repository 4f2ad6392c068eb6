"""Reading ahead on the GPU: hints that come back with a list that is read back anyway.

A layer's hint is its own chooser's, for the residual stream before the FFN of an earlier layer, normalized as its own
input will be. It is named while that layer's list is, and its reads run under what is computed until the layer's turn.
As on the CPU (`flashsparse.prefetch`) a hint decides nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from flashsparse.prefetch import Prefetch, among

if TYPE_CHECKING:
    from flashsparse.cache import Reservation
    from flashsparse.metal.refills import Refills


@dataclass(frozen=True)
class Norm:
    """The norm before a layer's FFN: RMS, or with `layer` LayerNorm."""

    weight: mx.array
    bias: mx.array | None
    eps: float
    layer: bool

    def __call__(self, h: mx.array) -> mx.array:
        if self.layer:
            return mx.fast.layer_norm(h, self.weight, self.bias, self.eps)
        return mx.fast.rms_norm(h, self.weight, self.eps)


@dataclass(eq=False)
class MetalPrefetch(Prefetch):
    """One layer's; `chooser` is a `flashsparse.metal.choice.Reading`, `norm` this file's. `refills` are its slab's."""

    refills: Refills | None = None
    _landed: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def guess(self, state: mx.array) -> mx.array:
        """For the residual stream state [1, d] somewhere before the layer: what `hint` takes, once read back."""
        chooser: Any = self.chooser
        norm: Any = self.norm
        guessed: mx.array = chooser.guess(norm(state))
        return guessed

    def hint(self, guessed: mx.array) -> None:
        """Start reading what an evaluated guess suggests."""
        chooser: Any = self.chooser
        self.begin(*chooser.likely(np.array(guessed, copy=False)))

    def land(self) -> None:
        """Wait for everything in flight: what arrived is resident. For a layer that computes without a list."""
        ahead, self._landed = self.pending, self._landed[:0]
        if ahead is None or ahead.over:
            self.finish()
            return
        ids, arrived = ahead.reservation.ids, ahead.arrived
        requests, nbytes = ahead.plan.moved(np.ones(len(ids), bool))
        self.counters.flash_reads += requests
        self.counters.flash_bytes += nbytes
        self.counters.prefetched += len(ids)
        began = time.perf_counter()
        self.finish()
        self.counters.io_wait_s += time.perf_counter() - began
        self._landed = ids[arrived]  # of a read that failed nothing arrives

    def account(self, needed: np.ndarray) -> None:
        """Count what was made of the records that landed: `needed` are the ascending records of the layer's list."""
        used = int(np.count_nonzero(among(self._landed, needed)))
        wasted, self._landed = len(self._landed) - used, self._landed[:0]
        self.counters.prefetch_used += used
        self.counters.needed_bytes += used * self.flash.record_bytes
        self.counters.prefetch_wasted_bytes += wasted * self.flash.record_bytes

    def _read(self, reservation: Reservation, order: np.ndarray) -> None:
        assert self.refills is not None
        self.refills.settle()
        self.refills.refilling(reservation.slots)
        super()._read(reservation, order)
