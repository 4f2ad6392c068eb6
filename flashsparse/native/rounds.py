"""A layer's rounds as Python calls: look up, read, compute in one; src/rounds.h says what happens in which order.

Nothing is left open when a call returns or raises, and no interrupt of the caller strikes inside one. Owns what the
library needs to live as long as it works: the pool, the workers, the arrays of the table, the memory of the slots.
"""

from __future__ import annotations

import ctypes
import errno
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashsparse.errors import FlashReadError, NativeLibraryError
from flashsparse.flash.reader import read_error
from flashsparse.native.kernels import Record, Workers, _address, data_address
from flashsparse.native.library import CHome, CInput, lib, process

if TYPE_CHECKING:
    from flashsparse.flash import ReadPool
    from flashsparse.native.slots import Slots

FIGURES = 12  # of fs_tally: ten counts, then nanoseconds of waiting for reads, and of computing hits meanwhile
_FAILURE = 4  # offset, need, got and error of the read that failed
_READ_FAILED, _POOL_STOPPED, _NO_MEMORY = -1, -2, -3


class Rounds:
    """What the layers of an engine share. Belongs to the process that made it: SessionError in a fork."""

    def __init__(self, pool: ReadPool, workers: Workers) -> None:
        self._pool, self._workers, self._process = pool, workers, process()
        self._handle = lib().fs_rounds_create(pool.handle, workers.handle)
        if not self._handle:
            raise NativeLibraryError("no memory to prepare reads in")
        self.tally = array("q", bytes(8 * (FIGURES + _FAILURE)))
        self.tally_at = self.tally.buffer_info()[0]

    @property
    def handle(self) -> int:
        """What the library knows it by. Raises SessionError in a fork, ValueError when pool or workers are closed."""
        if self._pool.closed:
            raise ValueError("this read pool is closed")
        _ = self._pool.handle, self._workers.handle
        return self._handle

    def tell(self) -> list[int]:
        """The the figures since the last time."""
        found = self.tally.tolist()
        ctypes.memset(self.tally_at, 0, 8 * len(found))
        return found

    def __del__(self) -> None:
        if getattr(self, "_handle", None) and self._process == process():
            # Collected in a cycle, this may be finalized after its pool.
            lib().fs_rounds_destroy(self._handle, self._pool._handle is not None)
            self._handle = None


@dataclass(frozen=True)
class Home:
    """Where a layer's records lie: record i is at data_offset + i · stride of `fd`, whose path errors name.

    sector: what reads are rounded out to. gap, longest: of the read plan. All but the path in bytes.
    """

    path: str
    fd: int
    data_offset: int
    record_bytes: int
    stride: int
    sector: int
    gap: int
    longest: int


class LayerRounds:
    """One layer's: `slab` (uint8) holds a record in each `slot_bytes`; `begin` int64 [slots] is the table's."""

    def __init__(
        self,
        shared: Rounds,
        home: Home,
        record: Record,
        slots: Slots,
        begin: np.ndarray,
        slab: np.ndarray,
        slot_bytes: int,
    ) -> None:
        if len(slab) < len(begin) * slot_bytes or record.bytes > home.record_bytes > slot_bytes:
            raise ValueError(f"{len(begin)} slots of {slot_bytes} bytes, {home.record_bytes} each, in {len(slab)}")
        self._shared, self._home, self._d, self._keep = shared, home, record.d, (record, slots, begin, slab)
        self._records = slots.records
        self._c = CHome(
            slots.address, _address(begin, np.int64, begin.shape, "begin"), data_address(slab), slot_bytes,
            home.record_bytes, home.stride, home.data_offset, home.sector, home.gap, home.longest, home.fd, 0,
        )  # fmt: skip
        self._at = ctypes.addressof(self._c)
        self._input = CInput(ctypes.addressof(record.c))
        self._input_at = ctypes.addressof(self._input)
        self._run, self._ahead, self._drop = lib().fs_rounds_run, lib().fs_rounds_ahead, lib().fs_rounds_drop

    def run(
        self,
        ids: np.ndarray,
        x: np.ndarray,
        activated: np.ndarray | None,
        mask: np.ndarray | None,
        hidden: np.ndarray,
        y: np.ndarray,
        fired: bool,
    ) -> list[int]:
        """Add the FFN of the ascending records `ids` (int32) for x [T, d] to y [T, d]; the figures.

        activated, mask [T, records]: as in ffn_hidden. hidden (flat, scratch) bounds the records of a round. `fired`:
        count values that are not zero. Raises ValueError for ids not ascending or out of range, FlashReadError.
        """
        tokens, given = len(x), self._input
        given.x = _address(x, np.float32, (tokens, self._d), "x")
        given.y = _address(y, np.float32, (tokens, self._d), "y")
        given.T, given.I = tokens, self._records
        shape = (tokens, self._records)
        given.activated = None if activated is None else _address(activated, np.float32, shape, "activated")
        given.mask = None if mask is None else _address(mask, np.uint8, shape, "mask")
        given.hidden, given.width = _address(hidden, np.float32, hidden.shape, "hidden"), len(hidden)
        given.count_fired = fired
        if tokens > len(hidden):
            raise ValueError(f"hidden has room for {len(hidden)} values, {tokens} tokens need at least one each")
        at = _address(ids, np.int32, ids.shape, "ids")
        return self._told(self._run(self._shared.handle, self._at, at, len(ids), self._input_at, self._shared.tally_at))

    def ahead(self, scores: np.ndarray, least: float) -> list[int]:
        """Start reading what is absent of the records whose score [records] is at least `least`; the figures.

        At most a quarter of the slots, the likeliest first. Raises FlashReadError without memory for bookkeeping.
        """
        at = _address(scores, np.float32, (self._records,), "scores")
        return self._told(self._ahead(self._shared.handle, self._at, at, least, self._shared.tally_at))

    def drop(self) -> list[int]:
        """End the reads ahead, of whichever layer; the figures."""
        self._drop(self._shared.handle, self._shared.tally_at)
        return self._told(0)

    def _told(self, status: int) -> list[int]:
        found = self._shared.tell()
        if status == _READ_FAILED:
            raise read_error(self._home.path, *found[FIGURES:])
        if status == _NO_MEMORY:
            raise FlashReadError("cannot submit reads: no memory", self._home.path, 0, 0, errno.ENOMEM)
        if status == _POOL_STOPPED:
            raise ValueError("this read pool is closed")
        if status:
            raise ValueError(f"ids must be ascending, unique and below {self._records}")
        return found[:FIGURES]
