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
from flashsparse.native.kernels import Matrix, Record, Workers, _address, data_address
from flashsparse.native.layers import Norm
from flashsparse.native.library import CHint, CHome, CInput, lib, process

if TYPE_CHECKING:
    from flashsparse.flash import ReadPool
    from flashsparse.native.slots import Slots

FIGURES = 13  # of fs_tally: ten counts, then nanoseconds of waiting for reads, of computing hits meanwhile, of hints
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
        self._scratch: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    @property
    def handle(self) -> int:
        """What the library knows it by. Raises SessionError in a fork, ValueError when pool or workers are closed."""
        if self._pool.closed:
            raise ValueError("this read pool is closed")
        _ = self._pool.handle, self._workers.handle
        return self._handle

    def scratch(self, d: int, records: int) -> tuple[np.ndarray, np.ndarray]:
        """A state [d] and scores [records] of hints, float32, the same for all layers."""
        if (d, records) not in self._scratch:
            self._scratch[d, records] = np.empty(d, np.float32), np.empty(records, np.float32)
        return self._scratch[d, records]

    def tell(self) -> list[int]:
        """The figures since the last time, then those of a failure."""
        found = self.tally.tolist()
        ctypes.memset(self.tally_at, 0, 8 * len(found))
        return found

    def check(self, status: int, layer: LayerRounds, told: list[int]) -> None:
        """Raise what a call's status says, as LayerRounds.run does; `told` by `tell` afterwards."""
        if status == _READ_FAILED:
            raise read_error(layer.path, *told[FIGURES:])
        if status == _NO_MEMORY:
            raise FlashReadError("cannot submit reads: no memory", layer.path, 0, 0, errno.ENOMEM)
        if status == _POOL_STOPPED:
            raise ValueError("this read pool is closed")
        if status:
            raise ValueError(f"ids must be ascending, unique and below {layer.records}")

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


class Hint:
    """How a layer's reads are started by the one before: by its own scores for a state near its input.

    scoring, bias: of a low-bit copy's scores, or of the gate itself, whose `activation` (its number and parameter) then
    counts by magnitude. norm: that before the layer's FFN. least: the score from which on a neuron is likely.
    """

    def __init__(
        self,
        rounds: LayerRounds,
        norm: Norm,
        scoring: Matrix,
        bias: np.ndarray | None,
        least: float,
        activation: tuple[int, float] | None = None,
    ) -> None:
        if (scoring.rows, scoring.cols) != (rounds.records, norm.size) or (
            bias is not None and len(bias) != scoring.rows
        ):
            raise ValueError(f"scores of [{scoring.rows}, {scoring.cols}] for {rounds.records} records")
        x, scores = rounds.scratch(norm.size)
        kind, param = (0, 0.0) if activation is None else activation
        self._keep, self._size = (rounds, norm, scoring, bias, x, scores), norm.size
        bias_at = None if bias is None else _address(bias, np.float32, (scoring.rows,), "bias")
        self._c = CHint(
            rounds.address, ctypes.addressof(norm.c), ctypes.addressof(scoring.c), bias_at, 0, data_address(x),
            data_address(scores), least, param, activation is not None, kind,
        )  # fmt: skip
        self.address = ctypes.addressof(self._c)

    def of(self, h: np.ndarray) -> Hint:
        """The hint of the residual stream h [1, d], which must stay as it is while the hint is followed."""
        self._c.h = _address(h, np.float32, (1, self._size), "h")
        return self


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
        if len(slab) < len(begin) * slot_bytes or record.bytes > home.record_bytes or home.record_bytes > slot_bytes:
            raise ValueError(f"{len(begin)} slots of {slot_bytes} bytes, {home.record_bytes} each, in {len(slab)}")
        self._shared, self.path, self._d, self._keep = shared, home.path, record.d, (record, slab)
        self._c = CHome(
            0, 0, data_address(slab), slot_bytes, home.record_bytes, home.stride, home.data_offset, home.sector,
            home.gap, home.longest, home.fd, 0,
        )  # fmt: skip
        self.use(slots, begin)
        self._at = self.address = ctypes.addressof(self._c)
        self._input = CInput(ctypes.addressof(record.c))
        self._input_at = ctypes.addressof(self._input)
        self._run, self._ahead, self._drop = lib().fs_rounds_run, lib().fs_rounds_ahead, lib().fs_rounds_drop

    def use(self, slots: Slots, begin: np.ndarray) -> None:
        """Work on this table from now on; no reads ahead may be in flight."""
        self._c.begin = _address(begin, np.int64, begin.shape, "begin")
        self._c.slots, self._table = slots.address, (slots, begin)
        self._records = self.records = slots.records

    def scratch(self, d: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the layers' hints: a state [d] and scores [records]."""
        return self._shared.scratch(d, self.records)

    def run(
        self,
        ids: np.ndarray,
        x: np.ndarray,
        activated: np.ndarray | None,
        mask: np.ndarray | None,
        hidden: np.ndarray,
        y: np.ndarray,
        fired: bool,
        hint: Hint | None = None,
    ) -> list[int]:
        """Add the FFN of the ascending records `ids` (int32) for x [T, d] to y [T, d]; the figures.

        activated, mask [T, records]: as in ffn_hidden. hidden (flat, scratch) bounds the records of a round. `fired`:
        count values that are not zero. hint: followed when what is in slots is computed. Raises ValueError for ids
        not ascending or out of range, FlashReadError.
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
        after = None if hint is None else hint.address
        return self._told(
            self._run(self._shared.handle, self._at, at, len(ids), self._input_at, after, self._shared.tally_at)
        )

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
        self._shared.check(status, self, found)
        return found[:FIGURES]
