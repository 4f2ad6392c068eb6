"""The read plan: which requests bring a set of records into their slots.

Knows bytes, offsets and addresses; which records are read, and where to, is the caller's decision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashsparse.flash.file import FlashFile, read_range
from flashsparse.flash.reader import Batch, ReadPool


@dataclass(frozen=True)
class Reads:
    """Requests for records of one file. `begins` [n]: the byte of its destination at which each record begins."""

    file: FlashFile
    offsets: np.ndarray
    lengths: np.ndarray
    needs: np.ndarray
    dests: np.ndarray
    begins: np.ndarray

    @property
    def requests(self) -> int:
        return len(self.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes that the requests move, rounding included."""
        return int(self.lengths.sum())

    def submit(self, pool: ReadPool) -> Batch:
        """Start them; the batch's indices are positions in the records asked for. Raises what ReadPool.submit does."""
        return pool.submit(self.file, self.offsets, self.lengths, self.needs, self.dests)


def reads(file: FlashFile, positions: np.ndarray, record_bytes: int, dests: np.ndarray) -> Reads:
    """The requests that read `record_bytes` at each of the file `positions` (int64 [n]) to addresses `dests` [n]."""
    starts, lengths = read_range(file, positions, record_bytes)
    begins = positions - starts
    return Reads(file, starts, lengths, begins + record_bytes, dests, begins)
