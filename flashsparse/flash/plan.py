"""The read plan: which requests bring a set of records into their slots.

Small requests cost more for what they bring than large ones, so neighbours in the file become one request where reading
what lies between them is cheaper than asking twice; the device curve says where that is. A record that is read alone
arrives in its slot; those of a shared request are copied there by the thread that read them. Knows bytes, offsets and
addresses; which records are read, and where to, is the caller's decision.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flashsparse.flash.file import FlashFile, read_range
from flashsparse.flash.reader import READ, STAGING_BYTES, Batch, Landed, ReadPool
from flashsparse.native.library import lib


@dataclass(frozen=True)
class Merging:
    """When neighbours share a request: bytes between them up to `gap` (-1: never), the request's up to `longest`."""

    gap: int = 16 << 10  # what drives without a measured curve are likely to gain from
    longest: int = STAGING_BYTES


SEPARATE = Merging(gap=-1)


@dataclass(frozen=True)
class Reads:
    """`runs` requests for the records `reads` (READ [n], ascending) of one file, of `nbytes` with rounding and gaps.

    begins [n]: the byte of its destination at which each record asked for begins.
    """

    files: Sequence[FlashFile]
    reads: np.ndarray
    firsts: np.ndarray
    runs: int
    nbytes: int
    begins: np.ndarray
    order: np.ndarray | None

    @property
    def requests(self) -> int:
        return self.runs

    def moved(self, kept: np.ndarray) -> tuple[int, int]:
        """Requests and bytes, when only records that are `kept` (bool, of those asked for) are read: whole requests."""
        if not len(self.reads):
            return 0, 0
        begun = kept if self.order is None else kept[self.order]
        runs = np.maximum.reduceat(begun.astype(np.uint8), self.firsts[: self.runs]).astype(bool)
        ends = (self.reads["offset"] + self.reads["length"])[self.firsts[1 : self.runs + 1] - 1]
        return int(np.count_nonzero(runs)), int((ends - self.reads["offset"][self.firsts[: self.runs]])[runs].sum())

    def ranked(self, rank: np.ndarray) -> Reads:
        """The same requests, begun in the order of the lowest rank (int [n]) among the records that each one brings."""
        if not len(self.reads):
            return self
        order = np.arange(len(self.reads), dtype=np.int32) if self.order is None else self.order
        firsts = self.firsts[: self.runs]
        runs = np.argsort(np.minimum.reduceat(rank[order], firsts), kind="stable")
        counts = np.diff(self.firsts[: self.runs + 1])[runs]
        begins = np.cumsum(counts) - counts
        moved = np.repeat(firsts[runs] - begins, counts) + np.arange(len(self.reads))
        after = np.append(begins, len(self.reads)).astype(np.int32)
        return replace(self, reads=self.reads[moved], firsts=after, order=order[moved])

    def submit(self, pool: ReadPool, landed: Landed | None = None) -> Batch:
        """Start them; the batch's indices are positions in the records asked for. Raises what submit_runs does."""
        return pool.submit_runs(self.files, self.reads, self.firsts, self.runs, self.order, landed)


def reads(
    file: FlashFile,
    positions: np.ndarray,
    record_bytes: int | np.ndarray,
    dests: np.ndarray,
    merging: Merging = SEPARATE,
) -> Reads:
    """The requests that read `record_bytes` (of all, or [n]) at the file `positions` (int64 [n]) to addresses `dests`.

    Raises ValueError for positions before the file's begin and addresses of zero.
    """
    n = len(positions)
    starts, lengths = read_range(file, positions, record_bytes)
    begins = positions - starts
    array = np.zeros(n, READ)
    order = None if (starts[1:] >= starts[:-1]).all() else np.argsort(positions, kind="stable").astype(np.int32)
    for name, values in (("offset", starts), ("length", lengths), ("need", begins + record_bytes), ("dest", dests)):
        array[name] = values if order is None else values[order]
    array["fd"] = file.fd
    if n and (int(array["offset"][0]) < 0 or not np.all(dests)):
        raise ValueError(f"{file.path}: positions and addresses must be in range")
    firsts, moved = np.empty(n + 1, np.int32), ctypes.c_int64()
    runs = lib().fs_plan_reads(
        array.ctypes.data, n, merging.gap, min(merging.longest, STAGING_BYTES), firsts.ctypes.data, ctypes.byref(moved)
    )
    return Reads([file] * n, array, firsts, runs, moved.value, begins, order)
