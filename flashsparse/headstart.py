"""A head start: while a prompt's layers stream through tiles, the next layer's first records are read, all of them in
order, while the drive has nothing else to do: under the last products of this layer and the attention of the next.

When the next layer's set is known, what nobody has begun to read is dropped; what has been begun is used. Results do
not depend on it. Owns the reads in between; which tile they may fill is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from flashsparse.flash import Batch, Load

WORTH = 0.5  # of the bytes between its first and last record that a layer's requests read, for the next layer's to pay


def worth(plan: Sequence[Load], needed: float) -> bool:
    """Whether a layer read by `plan`, a share `needed` of its records, was read nearly whole, as the next one will be.

    Of records here and there most of what is read ahead would be in vain, and drives that count bytes make up for a
    pause. `plan` leaves out what a head start has brought.
    """
    if needed >= WORTH or not plan:
        return needed >= WORTH
    span = plan[-1].starts[-1] + plan[-1].lengths[-1] - plan[0].starts[0]
    return sum(load.nbytes for load in plan) >= WORTH * int(span)


@dataclass(frozen=True)
class Part:
    """Records `first` to `last` - 1 of a set, at `offsets` of a tile; `load` brings them, None: a head start."""

    first: int
    last: int
    tile: int
    offsets: np.ndarray
    load: Load | None = None


@dataclass(eq=False)
class HeadStart:
    """Reads of `load`, the first records of `layer` in one stretch, into tile number `tile`."""

    layer: int
    tile: int
    load: Load
    batch: Batch
    record_bytes: int

    def use(self, layer: int, ids: np.ndarray, most: int) -> tuple[int, int, Part | None]:
        """Drop what nobody has begun. Requests and bytes of the rest, and what it brings of ascending `ids`, if any.

        At most `most` of them. None also for another layer; the batch is released then.
        """
        begun = self.batch.keep(np.zeros(len(self.batch), bool))
        requests = len(begun) if begun.all() else int(np.argmin(begun))  # they are begun in order
        nbytes = int(self.load.lengths[:requests].sum())
        whole = int(np.searchsorted(self.load.offsets + self.record_bytes, nbytes, side="right"))
        found = min(most, int(np.searchsorted(ids, whole))) if layer == self.layer else 0
        if not found:
            self.batch.release()
            return requests, nbytes, None
        return requests, nbytes, Part(0, found, self.tile, self.load.offsets[ids[:found]])
