"""Where a layer's records live, and the buffers that they are read into and computed with.

Owns the geometry of a flash file's records and the scratch that all layers share; leaves out what is done with them
(`ffn.py`) and how requests are planned (`flash/`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from flashsparse.compressed import Compressed
from flashsparse.flash import TYPICAL, Costs, FlashFile, Landed, Merging

if TYPE_CHECKING:
    from flashsparse.headstart import HeadStart
    from flashsparse.weights import Buffer


@dataclass
class Tiles:
    """Two buffers that take turns: one is read into while the other is computed with."""

    buffers: tuple[Buffer, Buffer]
    nbytes: int


@dataclass
class Scratch:
    """Buffers shared by every layer: one layer computes at a time.

    `hidden` (flat, reshaped per use; bounds the records computed at once), `out` [chunk, d].
    """

    hidden: np.ndarray
    out: np.ndarray
    tiles: Tiles
    head: HeadStart | None = None  # in one of the tiles, for the next layer that streams

    def hidden_for(self, tokens: int, width: int) -> np.ndarray:
        return self.hidden[: tokens * width].reshape(tokens, width)


@dataclass
class Flash:
    """Where a layer's records live: its file and the geometry they share."""

    file: FlashFile
    data_offset: int
    records: int
    record_bytes: int
    stride: int
    merging: Merging = field(default_factory=Merging)
    costs: Costs = TYPICAL  # of the requests that fill tiles
    compressed: Compressed | None = None

    def position(self, ids: np.ndarray) -> np.ndarray:
        return self.data_offset + ids.astype(np.int64) * self.stride

    def stored_bytes(self, ids: np.ndarray) -> int | np.ndarray:
        """Bytes to read of each record: [n], or of every one."""
        return self.record_bytes if self.compressed is None else self.compressed.lengths[ids].astype(np.int64)

    def landing(
        self, ids: np.ndarray, slots: np.ndarray, slot_bytes: int, slab: np.ndarray, begins: np.ndarray
    ) -> tuple[np.ndarray, Landed | None]:
        """Where in their slots the records begin that were read to `begins`, and what makes them whole on arrival."""
        if self.compressed is None:
            return begins, None
        places = slots.astype(np.int64) * slot_bytes
        return np.zeros_like(begins), partial(self.compressed.restore, slab, ids, places + begins, places)

    def restore(self, tile: np.ndarray, offsets: np.ndarray, ids: np.ndarray) -> None:
        """Make the records that were read to `offsets` of a tile whole, where they are."""
        if self.compressed is not None:
            self.compressed.restore(tile, ids, offsets, offsets, np.arange(len(ids)))
