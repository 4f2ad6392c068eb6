"""Which record of a layer sits in which slot: hits, misses, victims, rounds, reservations for reads ahead.

Bookkeeping only, in numpy: it holds no weights, starts no reads and knows records by their number. The reader fills the
slots that a round names and commits the round; the kernels find a record through `Round.slots` and `SlotTable.begin`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]

RECORD_BYTES = 4  # of a table without pins, for each record of the layer: its slot
SLOT_BYTES = 36  # for each slot, at most: begin, record, key, a copy of the keys, and its place in the queue
_PINNED = np.int64(1 << 61)  # added to a pinned record's key, so that pins are victims only when nothing else is left
_LOCKED = np.int64((1 << 63) - 1)  # key of a slot that the open round uses


class Round:
    """Records that are in their slots together, until the iterator that gave this round advances.

    ids: ascending int32 [n]; slots: int32 [n], the slot of each; missing: bool [n], those whose bytes must be read into
    their slots before `commit`; ahead: int [k], positions in `ids` of those among them whose slots the reservation
    holds already, so that they are on their way. A round that is left without commit counts as aborted.
    """

    __slots__ = ("_table", "ahead", "committed", "ids", "missing", "slots")

    def __init__(
        self, table: SlotTable, ids: Ints, slots: Ints, missing: npt.NDArray[np.bool_], ahead: npt.NDArray[np.intp]
    ) -> None:
        self._table = table
        self.ids, self.slots, self.missing, self.ahead = ids, slots, missing, ahead
        self.committed = False

    def commit(self) -> None:
        """All missing records have arrived: they are resident from now on. Raises RuntimeError when not open."""
        self._table._commit(self)

    def abort(self) -> None:
        """Make the missing records absent again (a read failed). Does nothing once the round is committed or over."""
        self._table._abort(self)


@dataclass(frozen=True, eq=False)
class Reservation:
    """Slots for records that are read before a round asks for them. ids: ascending int32 [n]; slots: int [n]."""

    ids: Ints
    slots: npt.NDArray[np.integer]


class SlotTable:
    """The slots of one layer.

    records: how many records the layer has; slots: how many fit in memory; pins: record numbers that are evicted only
    when a round has no other room. Victims are free slots first, then the least recently used, so the sets of the last
    tokens stay as long as they fit; `window` is the number of tokens that `recent` reports.
    The choice of victims depends on the sequence of requests alone. Raises ValueError for sizes that make no sense.

    An exception at any point, such as an interrupt by the user, costs at most the records of the round it strikes:
    what a slot holds is decided by `_record_in` alone, which names a record only while its bytes are there, and the
    rest is made from it again when `_half_done` says that a change was left half done.
    """

    def __init__(self, records: int, slots: int, window: int = 4, pins: npt.ArrayLike | None = None) -> None:
        if slots < 1 or records < 1 or window < 1:
            raise ValueError(f"records, slots and window must be positive: {records}, {slots}, {window}")
        self.records, self.slots, self.window = records, slots, window
        self.begin = np.zeros(slots, np.int64)
        self.hits = self.misses = 0
        self._slot_of = np.full(records, -1, np.int32)  # record -> slot
        self._record_in = np.full(slots, -1, np.int32)  # slot -> record
        # Eviction order, all keys distinct: free slots are negative, used ones are round number * slots + slot.
        self._key = np.arange(-slots, 0, dtype=np.int64)
        self._clock = 0
        self._token_starts: deque[int] = deque([1], maxlen=window)
        self._bonus = self._pin_bonus(pins)
        self._open: Round | None = None
        self._reserved: Reservation | None = None
        self._half_done = False
        self._queue = self._queue_keys = np.empty(0, np.int64)  # next victims in order, and their keys when queued

    def rounds(self, ids: npt.ArrayLike, reserved: Reservation | None = None) -> Iterator[Round]:
        """Rounds that cover `ids` (ascending, unique) in order: one when they fit in the slots, none without ids.

        What is `reserved` stays so: `ids` and the other reserved records must fit in the slots together (`fits`).
        Another reservation, left behind by an interrupt, is dropped. Raises ValueError for ids that are not ascending,
        out of range, or too many beside a reservation.
        """
        wanted = self._validated(ids)
        self._recover()
        if self._reserved is not reserved:
            self._drop_reservation()
        if not self.fits(wanted):
            raise ValueError(f"{len(wanted)} records and those reserved do not fit in {self.slots} slots")
        return self._rounds(wanted)

    def _drop_reservation(self) -> None:
        if self._reserved is not None:
            self.settle(self._reserved, np.zeros(len(self._reserved.ids), bool))

    def _recover(self) -> None:
        """Undo what a caller that failed left behind; its frames may keep a round's iterator alive."""
        if self._half_done:
            self._rebuild()
        if self._open is not None:
            self._abort(self._open)
            self._open = None

    def fits(self, ids: Ints) -> bool:
        """Whether ascending `ids` can be asked for while the present reservation is open; always without one."""
        held = self._reserved
        if held is None:
            return True
        return len(ids) + len(held.ids) - int(np.count_nonzero(np.isin(held.ids, ids))) <= self.slots

    def absent(self, ids: Ints) -> npt.NDArray[np.bool_]:
        """Which of `ids` are in no slot."""
        return self._slot_of[ids] < 0

    def reserve(self, ids: npt.ArrayLike, keep: Ints) -> Reservation:
        """Slots for records `ids` (ascending, in no slot), to be read before they are asked for; at most one is open.

        Victims are those of a round, but none of `keep`, which counts as used now. Raises ValueError when `ids` are in
        slots or do not fit beside `keep`. An earlier reservation that was not settled is dropped: none of its reads may
        be in flight.
        """
        wanted = self._validated(ids)
        self._recover()
        self._drop_reservation()
        held = self._slot_of[keep]
        held = held[held >= 0]
        if len(wanted) + len(held) > self.slots or not self.absent(wanted).all():
            raise ValueError(f"{len(wanted)} records to reserve beside {len(held)} in {self.slots} slots, absent ones")
        self._half_done = True
        self._key[held] = _LOCKED
        victims = self._evict(len(wanted))
        self._stamp(self._record_in[held], held)
        self._reserved = Reservation(wanted, victims)
        self._half_done = False
        return self._reserved

    def settle(self, reservation: Reservation, arrived: npt.NDArray[np.bool_]) -> None:
        """Close a reservation: the records that have `arrived` (bool [n]) are resident from now on, as used just now.

        None of its reads may be in flight. Does nothing for one that an interrupt has closed already. Records that a
        committed round has taken over are resident whatever `arrived` says.
        """
        self._recover()
        if reservation is not self._reserved:
            return
        left = self._slot_of[reservation.ids] < 0
        new, free = left & arrived, left & ~arrived
        self._half_done = True
        self._reserved = None
        self._record_in[reservation.slots[new]] = reservation.ids[new]
        self._slot_of[reservation.ids[new]] = reservation.slots[new]
        self._stamp(reservation.ids[new], reservation.slots[new])
        self._free(reservation.slots[free])
        self._half_done = False

    def end_token(self) -> None:
        """A forward step is over. Call once per step; what `recent` reports moves on."""
        self._token_starts.append(self._clock + 1)

    def resident(self) -> Ints:
        """Ascending numbers of the records that are in slots."""
        return np.sort(self._record_in[self._record_in >= 0])

    def recent(self) -> Ints:
        """Ascending numbers of the resident records used in the last `window` steps, the current one included."""
        used = self._key & ~_PINNED >= self._token_starts[0] * self.slots
        return np.sort(self._record_in[used & (self._key >= 0) & (self._record_in >= 0)])

    def set_begin(self, slots: npt.NDArray[np.integer], begins: npt.NDArray[np.integer]) -> None:
        """Note at which byte of its slot each record begins: a direct read starts at a sector, not at the record."""
        self.begin[slots] = begins

    def check(self) -> None:
        """Raise AssertionError unless records in slots and used slots map to each other one to one."""
        used = np.flatnonzero(self._record_in >= 0)
        resident = np.flatnonzero(self._slot_of >= 0)
        in_flight = 0 if self._open is None or self._open.committed else int(np.count_nonzero(self._open.missing))
        if self._reserved is not None:
            taken = 0 if self._open is None or self._open.committed else len(self._open.ahead)
            in_flight += int(np.count_nonzero(self._slot_of[self._reserved.ids] < 0)) - taken
        problems = {
            "no change is half done": not self._half_done,
            "as many used slots as resident records": len(used) == len(resident),
            "slot of a record holds it": bool(np.all(self._record_in[self._slot_of[resident]] == resident)),
            "free slots come first": int(np.count_nonzero(self._key < 0)) == self.slots - len(used) - in_flight,
            "keys are distinct": in_flight > 0 or self._open is not None or len(np.unique(self._key)) == self.slots,
        }
        failed = [name for name, holds in problems.items() if not holds]
        if failed:
            raise AssertionError(f"slot table is inconsistent: {', '.join(failed)}")

    def _pin_bonus(self, pins: npt.ArrayLike | None) -> npt.NDArray[np.int64] | None:
        if pins is None or np.size(pins) == 0:
            return None
        pinned = np.unique(np.asarray(pins, np.int64))
        if pinned[0] < 0 or pinned[-1] >= self.records or len(pinned) > self.slots:
            raise ValueError(
                f"{len(pinned)} pins from {pinned[0]} to {pinned[-1]}: there are {self.records} records "
                f"and {self.slots} slots"
            )
        bonus = np.zeros(self.records, np.int64)
        bonus[pinned] = _PINNED
        return bonus

    def _validated(self, ids: npt.ArrayLike) -> Ints:
        wanted = np.asarray(ids, dtype=np.int32)
        if wanted.ndim != 1:
            raise ValueError(f"ids must be a vector, not of shape {wanted.shape}")
        if len(wanted) and (wanted[0] < 0 or wanted[-1] >= self.records or not np.all(wanted[1:] > wanted[:-1])):
            raise ValueError(f"ids must be ascending, unique and below {self.records}")
        return wanted

    def _rounds(self, ids: Ints) -> Iterator[Round]:
        for start in range(0, len(ids), self.slots):
            this = self._start(ids[start : start + self.slots])
            try:
                yield this
            finally:
                self._abort(this)
                if self._open is this:
                    self._open = None

    def _start(self, ids: Ints) -> Round:
        if self._open is not None:
            raise RuntimeError("another request of this layer began before this one was over")
        if self._half_done:
            self._rebuild()
        slots = self._slot_of[ids]
        missing = slots < 0
        ahead = self._reserved_among(ids, slots)
        count = int(np.count_nonzero(slots < 0))
        self._half_done = True
        if count:
            if count < len(ids):
                self._key[slots[slots >= 0]] = _LOCKED
            slots[slots < 0] = self._evict(count)
        self._open = Round(self, ids, slots, missing, ahead)
        self._half_done = False
        return self._open

    def _reserved_among(self, ids: Ints, slots: Ints) -> npt.NDArray[np.intp]:
        """Positions in `ids` of the reserved records, whose slots are filled in."""
        if self._reserved is None or not len(self._reserved.ids) or not len(ids):
            return np.empty(0, np.intp)
        at = np.searchsorted(ids, self._reserved.ids)
        found = ids[np.minimum(at, len(ids) - 1)] == self._reserved.ids
        found &= self._slot_of[self._reserved.ids] < 0  # a round may have taken it over
        slots[at[found]] = self._reserved.slots[found]
        return at[found]

    def _evict(self, count: int) -> npt.NDArray[np.int64]:
        """`count` slots that hold nothing any more and are nobody's victims."""
        victims = self._victims(count) if count else np.empty(0, np.int64)
        evicted = self._record_in[victims]
        self._slot_of[evicted[evicted >= 0]] = -1
        self._record_in[victims] = -1
        self._key[victims] = _LOCKED
        return victims

    def _commit(self, this: Round) -> None:
        if this is not self._open or this.committed:
            raise RuntimeError("the round is already committed, aborted or over")
        new = this.ids[this.missing]
        into = this.slots[this.missing]
        self._half_done = True
        self._record_in[into] = new  # first: their bytes are there, whatever happens to the rest
        self._slot_of[new] = into
        self._stamp(this.ids, this.slots)
        self.misses += len(new)
        self.hits += len(this.ids) - len(new)
        this.committed = True
        self._half_done = False

    def _abort(self, this: Round) -> None:
        if this is not self._open or this.committed:
            return
        if self._half_done:
            self._rebuild()
            return
        self._half_done = True
        self._stamp(this.ids, this.slots)
        self._key[this.slots[this.ahead]] = _LOCKED  # the reservation's still
        not_ahead = this.missing.copy()
        not_ahead[this.ahead] = False
        self._free(this.slots[not_ahead])
        self._open = None
        self._half_done = False

    def _rebuild(self) -> None:
        """Make everything agree with `_record_in` again; slots that lost their key count as used just now."""
        self._half_done = True
        used = np.flatnonzero(self._record_in >= 0)
        records = self._record_in[used]
        self._slot_of[:] = -1
        self._slot_of[records] = used
        unused = np.flatnonzero(self._record_in < 0)
        self._key[unused] = unused - np.int64(self.slots)
        lost = (self._key[used] < 0) | (self._key[used] == _LOCKED)
        self._stamp(records[lost], used[lost])
        self._queue = self._queue_keys = np.empty(0, np.int64)
        self._open = self._reserved = None
        self._half_done = False

    def _free(self, slots: npt.NDArray[np.integer]) -> None:
        if len(slots):
            self._key[slots] = slots - np.int64(self.slots)
            self._queue = self._queue_keys = np.empty(0, np.int64)  # free slots go before what was queued

    def _stamp(self, ids: Ints, slots: npt.NDArray[np.integer]) -> None:
        self._clock += 1
        key = slots + np.int64(self._clock * self.slots)
        self._key[slots] = key if self._bonus is None else key + self._bonus[ids]

    def _victims(self, count: int) -> npt.NDArray[np.int64]:
        """The `count` slots with the smallest keys, in order of key.

        A slot that is used again moves behind all queued ones (they hold no pins, and an abort empties the queue), so
        queued slots whose key has not changed are still the smallest.
        """
        valid = np.flatnonzero(self._key[self._queue] == self._queue_keys)
        if len(valid) < count:
            self._fill_queue(count)
            valid = np.arange(count)
        taken = self._queue[valid[:count]]
        rest = int(valid[count - 1]) + 1
        self._queue, self._queue_keys = self._queue[rest:], self._queue_keys[rest:]
        return taken

    def _fill_queue(self, count: int) -> None:
        length = min(self.slots, max(4 * count, self.slots // 8))
        keys = np.partition(self._key, length - 1)[:length] if length < self.slots else self._key.copy()
        keys.sort()  # keys alone: a slot's number is its key modulo the slots, and sorting values is fast
        keys = keys[: max(count, int(np.searchsorted(keys, _PINNED)))]
        self._queue_keys = keys
        self._queue = np.where(keys < _PINNED, keys, keys - _PINNED) % self.slots
