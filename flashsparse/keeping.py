"""What stays of a prompt that streams through tiles: records of its last tokens are copied into the layer's slots.

So the first decoded tokens find the window that the prompt has left behind, without a read. Owns the choice and the
copies; slots are the table's. Results do not depend on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from flashsparse.cache import SlotTable
    from flashsparse.choice import Choice
    from flashsparse.weights import Buffer

LAST = 32  # tokens whose use of a record counts


def likely_next(choice: Choice, tokens: int, most: int) -> np.ndarray:
    """Ascending numbers of the `most` records that the last of `tokens` (> 1) used: the last one's, then by count.

    No records when the choice does not say which token uses what.
    """
    used = choice.activated if choice.mask is None else choice.mask
    if used is None:
        return np.empty(0, np.int32)
    last = used[max(0, tokens - LAST) : tokens] != 0
    counts = last.sum(axis=0, dtype=np.int32) + len(last) * last[-1]
    ids = np.flatnonzero(counts)
    if len(ids) > most:
        ids = np.sort(ids[np.argsort(-counts[ids], kind="stable")[:most]])
    return ids.astype(np.int32)


class Keeping:
    """One layer's pass over its records. `ids`: those to keep, ascending, no more than there are slots."""

    def __init__(self, table: SlotTable, slab: Buffer, slot_bytes: int, record_bytes: int, ids: np.ndarray) -> None:
        absent = table.absent(ids)
        self._table, self._slab, self._slot_bytes, self._record_bytes = table, slab.bytes, slot_bytes, record_bytes
        self._held = table.reserve(ids[absent], ids[~absent])
        self._arrived = np.zeros(len(self._held.ids), bool)
        table.set_begin(self._held.slots, np.zeros(len(self._held.ids), np.int64))

    def copy(self, tile: np.ndarray, offsets: np.ndarray, ids: np.ndarray) -> None:
        """Take what is to be kept of the ascending records `ids`, which begin at `offsets` of the tile."""
        low, high = np.searchsorted(self._held.ids, (ids[0], ids[-1] + 1))
        sources = offsets[np.searchsorted(ids, self._held.ids[low:high])].tolist()
        places = (self._held.slots[low:high].astype(np.int64) * self._slot_bytes).tolist()
        for source, place in zip(sources, places, strict=True):
            self._slab[place : place + self._record_bytes] = tile[source : source + self._record_bytes]
        self._arrived[low:high] = True

    def close(self) -> None:
        """What was copied is resident."""
        self._table.settle(self._held, self._arrived, used=True)
