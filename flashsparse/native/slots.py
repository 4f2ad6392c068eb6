"""A layer's slots as Python calls: what they hold, rounds, reservations; src/flashsparse.h says what is decided.

Owns the arrays that the library works on. A call either happens or does not, whatever interrupts the caller. Record
numbers are ascending int32, checked here; wrong ones: ValueError.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from flashsparse.native.kernels import data_address
from flashsparse.native.library import CSlots, lib

HIT, MISSING, AHEAD = range(3)  # states of a round's records

Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


class Slots:
    """`records` of a layer, `slots` places for them."""

    def __init__(self, records: int, slots: int) -> None:
        self.slot_of = np.full(records, -1, np.int32)  # record -> slot; below -1: where it is being read to
        self.record_in = np.full(slots, -1, np.int32)  # slot -> record
        self._uses = np.zeros((2, records), np.float32)
        self._uses_in = np.zeros((2, slots), np.float32)
        self.held = np.zeros(slots, np.uint8)
        self._scratch = np.zeros((2, slots), np.int32)
        arrays = (self.slot_of, self.record_in, *self._uses, *self._uses_in, self.held, *self._scratch)
        self._c = CSlots(*(array.ctypes.data for array in arrays), records, slots)
        self._at = self.address = ctypes.addressof(self._c)
        self.records = records

    @property
    def touched(self) -> int:
        """Slots that were given to records so far; those beyond were never filled."""
        return int(self._c.touched)

    @property
    def holding(self) -> bool:
        return bool(self._c.holding)

    def hold(self, on: bool) -> None:
        self._c.holding = on

    def checked(self, ids: npt.ArrayLike) -> Ints:
        """`ids` as int32. Raises ValueError unless they are ascending, unique and below the number of records."""
        wanted = np.ascontiguousarray(ids, dtype=np.int32)
        if wanted.ndim != 1:
            raise ValueError(f"ids must be a vector, not of shape {wanted.shape}")
        if not lib().fs_slots_valid(self._at, data_address(wanted), len(wanted)):
            raise ValueError(f"ids must be ascending, unique and below {self._c.records}")
        return wanted

    @property
    def reservation(self) -> int:
        """The number of the open reservation; 0 without one."""
        return int(self._c.reservation)

    @property
    def waiting(self) -> int:
        """Records of the reservation that no round has taken over."""
        return int(self._c.waiting)

    def fits(self, ids: Ints) -> bool:
        return bool(lib().fs_slots_fits(self._at, data_address(ids), len(ids)))

    def recover(self, reservation: int) -> None:
        lib().fs_slots_recover(self._at, reservation)

    def begin(self, ids: Ints) -> tuple[int, Ints, Bytes]:
        """A round's number (negative: refused), the slot of each record, and its state."""
        slots, states = np.empty(len(ids), np.int32), np.empty(len(ids), np.uint8)
        number = lib().fs_slots_begin(self._at, data_address(ids), len(ids), data_address(slots), data_address(states))
        return int(number), slots, states

    def commit(self, number: int, ids: Ints, slots: Ints, states: Bytes) -> bool:
        """False when the round is not open, or is committed."""
        addresses = data_address(slots), data_address(states)
        return not lib().fs_slots_commit(self._at, number, data_address(ids), len(ids), *addresses)

    def abort(self, number: int) -> None:
        lib().fs_slots_abort(self._at, number)

    def close(self, number: int) -> None:
        lib().fs_slots_close(self._at, number)

    def reserve(self, ids: Ints, keep: Ints) -> tuple[int, Ints]:
        """A reservation's number (negative: refused) and the slot of each record."""
        slots = np.empty(len(ids), np.int32)
        number = lib().fs_slots_reserve(
            self._at, data_address(ids), len(ids), data_address(keep), len(keep), data_address(slots)
        )
        return int(number), slots

    def settle(self, number: int, ids: Ints, slots: Ints, arrived: npt.NDArray[np.bool_], used: bool) -> None:
        addresses = data_address(slots), data_address(arrived)
        lib().fs_slots_settle(self._at, number, data_address(ids), len(ids), *addresses, used)

    def end_step(self) -> None:
        lib().fs_slots_end_step(self._at)
