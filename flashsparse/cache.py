"""Which record of a layer sits in which slot: hits, misses, victims, rounds, reservations for reads ahead.

Bookkeeping only: it holds no weights, starts no reads and knows records by their number. The reader fills the slots
that a round names and commits the round; the kernels find a record through `Round.slots` and `SlotTable.begin`. The
table itself is native (`native/slots.py`); here is what it promises to those who use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashsparse.native.slots import AHEAD, HIT, Bytes, Ints, Slots

RECORD_BYTES = 12  # for each record of the layer: its slot and how often it was used
SLOT_BYTES = 29  # for each slot: begin, record, how often that was used, what holds it, and room to choose victims


class Round:
    """Records that are in their slots together, until the iterator that gave this round advances.

    ids: ascending int32 [n]; slots: int32 [n], the slot of each; missing: bool [n], those whose bytes must be read into
    their slots before `commit`; ahead: int [k], positions in `ids` of those among them whose slots the reservation
    holds already, so that they are on their way. A round that is left without commit counts as aborted.
    """

    __slots__ = ("_number", "_states", "_table", "ahead", "ids", "missing", "slots")

    def __init__(self, table: SlotTable, ids: Ints, number: int, slots: Ints, states: Bytes, ahead: bool) -> None:
        self._table, self._number, self._states = table, number, states
        self.ids, self.slots, self.missing = ids, slots, states != HIT
        self.ahead = np.flatnonzero(states == AHEAD) if ahead else np.empty(0, np.intp)

    def commit(self) -> None:
        """All missing records have arrived: they are resident from now on. Raises RuntimeError when not open."""
        if not self._table.native.commit(self._number, self.ids, self.slots, self._states):
            raise RuntimeError("the round is already committed, aborted or over")
        misses = int(np.count_nonzero(self.missing))
        self._table.misses += misses
        self._table.hits += len(self.ids) - misses

    def abort(self) -> None:
        """Make the missing records absent again (a read failed). Does nothing once the round is committed or over."""
        self._table.native.abort(self._number)


@dataclass(frozen=True, eq=False)
class Reservation:
    """Slots for records that are read before a round asks for them. ids: ascending int32 [n]; slots: int32 [n]."""

    ids: Ints
    slots: Ints
    number: int


class SlotTable:
    """The slots of one layer.

    records: how many records the layer has; slots: how many fit in memory. Victims are free slots first, then the
    records used least, where a use counts half after two steps, and a hundredth of it half after 64 (docs/cache.md).
    The choice of victims depends on the sequence of requests alone. Raises ValueError for sizes that make no sense.

    An exception at any point, such as an interrupt by the user, costs at most the records of the round it strikes:
    every change is one native call, and the next request begins by undoing what was left open.
    """

    def __init__(self, records: int, slots: int) -> None:
        if slots < 1 or records < 1:
            raise ValueError(f"records and slots must be positive: {records}, {slots}")
        self.records, self.slots = records, slots
        self.begin = np.zeros(slots, np.int64)
        self.hits = self.misses = 0
        self.native = Slots(records, slots)

    def rounds(self, ids: npt.ArrayLike, reserved: Reservation | None = None) -> Iterator[Round]:
        """Rounds that cover `ids` (ascending, unique) in order: one when they fit in the slots, none without ids.

        What is `reserved` stays so: `ids` and the other reserved records must fit in the slots together (`fits`).
        Another reservation, left behind by an interrupt, is dropped. Raises ValueError for ids that are not ascending,
        out of range, or too many beside a reservation.
        """
        wanted = self.native.checked(ids)
        self.native.recover(0 if reserved is None else reserved.number)
        if not self.fits(wanted):
            raise ValueError(f"{len(wanted)} records and those reserved do not fit in {self.slots} slots")
        return self._rounds(wanted)

    def fits(self, ids: Ints) -> bool:
        """Whether ascending `ids` can be asked for while the present reservation is open; always without one."""
        return self.native.fits(ids)

    def absent(self, ids: Ints) -> npt.NDArray[np.bool_]:
        """Which of `ids` are in no slot."""
        return self.native.slot_of[ids] < 0

    def reserve(self, ids: npt.ArrayLike, keep: Ints) -> Reservation:
        """Slots for records `ids` (ascending, in no slot), to be read before they are asked for; at most one is open.

        Victims are those of a round, but none of `keep`. Raises ValueError when `ids` are in slots or do not fit beside
        `keep`. An earlier reservation that was not settled is dropped: none of its reads may be in flight.
        """
        wanted = self.native.checked(ids)
        number, slots = self.native.reserve(wanted, keep)
        if number < 0:
            held = int(np.count_nonzero(~self.absent(keep)))
            raise ValueError(f"{len(wanted)} records to reserve beside {held} in {self.slots} slots, absent ones")
        return Reservation(wanted, slots, number)

    def settle(self, reservation: Reservation, arrived: npt.NDArray[np.bool_], used: bool = False) -> None:
        """Close a reservation: the records that have `arrived` (bool [n]) are resident from now on.

        None of its reads may be in flight. Does nothing for one that an interrupt has closed already. Records that a
        committed round has taken over are resident whatever `arrived` says. `used`: the others count as used just now.
        """
        self.native.settle(reservation.number, reservation.ids, reservation.slots, arrived, used)

    def hold(self, on: bool) -> None:
        """While on, no slot is filled that never was, but for a request that needs more records than were ever held."""
        self.native.hold(on)

    @property
    def room(self) -> int:
        """Slots that may be filled without need: all, but while held those that were."""
        return self.native.touched if self.native.holding else self.slots

    def end_token(self) -> None:
        """A forward step is over. Call once per step: uses age with it."""
        self.native.end_step()

    def resident(self) -> Ints:
        """Ascending numbers of the records that are in slots."""
        return np.sort(self.native.record_in[self.native.record_in >= 0])

    def set_begin(self, slots: npt.NDArray[np.integer], begins: npt.NDArray[np.integer]) -> None:
        """Note at which byte of its slot each record begins: a direct read starts at a sector, not at the record."""
        self.begin[slots] = begins

    def check(self) -> None:
        """Raise AssertionError unless records in slots and used slots map to each other one to one."""
        native = self.native
        used = np.flatnonzero(native.record_in >= 0)
        resident = np.flatnonzero(native.slot_of >= 0)
        reserved = -2 - native.slot_of[native.slot_of < -1]
        problems = {
            "as many used slots as resident records": len(used) == len(resident),
            "slot of a record holds it": bool(np.all(native.record_in[native.slot_of[resident]] == resident)),
            "used slots are not held": not native.held[used].any(),
            "reserved slots are held": sorted(reserved) == np.flatnonzero(native.held == 2).tolist(),
            "reserved records are counted": len(reserved) == native.waiting,
        }
        failed = [name for name, holds in problems.items() if not holds]
        if failed:
            raise AssertionError(f"slot table is inconsistent: {', '.join(failed)}")

    def _rounds(self, ids: Ints) -> Iterator[Round]:
        for start in range(0, len(ids), self.slots):
            part = ids[start : start + self.slots]
            number, slots, states = self.native.begin(part)
            if number < 0:
                raise RuntimeError("another request of this layer began before this one was over")
            try:
                yield Round(self, part, number, slots, states, ahead=self.native.reservation != 0)
            finally:
                self.native.close(number)
