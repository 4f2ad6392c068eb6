"""A layer's compressed records at run time: how long each is on flash, and making them whole where they arrived.

Joins the pack's codec and the errors of reading; which records are read, and where to, is the layer's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashsparse.errors import FlashReadError
from flashsparse.pack.codec import Damaged, Decoder, Lengths


@dataclass(frozen=True)
class Compressed:
    """`lengths` [I]: stored bytes of each record of the layer at `path`. `decoder` is shared by the layers."""

    path: str
    lengths: Lengths
    decoder: Decoder

    def restore(
        self, memory: np.ndarray, ids: np.ndarray, stored: np.ndarray, places: np.ndarray, which: np.ndarray
    ) -> None:
        """Records `ids`[which], read to `stored`[which] of `memory` (uint8), become whole at `places`[which].

        Raises FlashReadError for one that cannot be decompressed.
        """
        try:
            self.decoder.decode(memory, stored[which], self.lengths[ids[which]].astype(np.int64), places[which])
        except Damaged as problem:
            record = int(ids[which][problem.position])
            raise FlashReadError(
                f"{self.path}: record {record} cannot be decompressed: {problem}; run flashsparse verify",
                self.path, record, int(self.lengths[record]), 0,
            ) from None  # fmt: skip
