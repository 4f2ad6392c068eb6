"""What stays in a layer's slots, by different rules, replayed on recorded sets. No reads, no weights, no time.

A set that exceeds the slots runs in rounds of ascending numbers, as in the runtime; a round's records are all in slots
together, so none of them is a victim and none is bypassed. LRU is the product's own table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashsparse.cache import SlotTable

Ids = npt.NDArray[np.integer]
WINDOW = 4  # tokens
HALF_LIVES = (4, 32)  # rounds, of a decayed frequency
NEVER = np.int64(1 << 60)


class Policy(Protocol):
    """The slots of one layer."""

    def round(self, ids: Ids) -> int:
        """Make `ids` (ascending, at most as many as slots) present; how many were missing."""

    def end_token(self) -> None:
        """All rounds of a token are over."""


class Product:
    """The runtime's SlotTable."""

    def __init__(self, records: int, slots: int) -> None:
        self.table = SlotTable(records, slots)

    def round(self, ids: Ids) -> int:
        before = self.table.misses
        for part in self.table.rounds(ids):
            part.commit()
        return self.table.misses - before

    def end_token(self) -> None:
        self.table.end_token()


class Keyed:
    """Evicts the records with the smallest keys. A rule is how keys change; `used` sets those of a round."""

    def __init__(self, records: int, slots: int) -> None:
        self.slots, self.held, self.time = slots, 0, 0
        self.present = np.zeros(records, bool)
        self.key = np.zeros(records, np.float64)

    def round(self, ids: Ids) -> int:
        missing = len(ids) - int(np.count_nonzero(self.present[ids]))
        excess = self.held + missing - self.slots
        if excess > 0:
            self.present[ids] = False  # what the round uses is no victim
            others = np.flatnonzero(self.present)
            victims = others[np.argpartition(self.key[others], excess - 1)[:excess]]
            self.present[victims] = False
            self.held -= excess
        self.present[ids] = True
        self.held += missing
        self.used(ids)
        self.time += 1
        return missing

    def used(self, ids: Ids) -> None:
        """Least recently used; other rules replace it."""
        self.key[ids] = self.time

    def end_token(self) -> None:
        """Most rules know rounds only."""


class Pinned(Keyed):
    """Least recently used, `pins` (record numbers) last."""

    def __init__(self, records: int, slots: int, pins: Ids) -> None:
        super().__init__(records, slots)
        self.pins = pins

    def used(self, ids: Ids) -> None:
        self.key[ids] = self.time
        self.key[self.pins] = NEVER


class Window(Keyed):
    """LLM in a flash's rule: what the last WINDOW tokens did not use is freed, needed room or not."""

    def __init__(self, records: int, slots: int) -> None:
        super().__init__(records, slots)
        self._begins = [0] * WINDOW

    def end_token(self) -> None:
        self.present &= self.key >= self._begins[0]
        self.held = int(np.count_nonzero(self.present))
        self._begins = [*self._begins[1:], self.time]


class Lfu(Keyed):
    """Least often used since the beginning, evicted records' counts kept; the older goes first among equals."""

    def used(self, ids: Ids) -> None:
        self.key[ids] = np.floor(self.key[ids]) + 1 + self.time / (1 << 31)


class Decayed(Keyed):
    """Least frequency, where a use counts half after `half_life` rounds (LRFU). Keys are its logarithm plus time."""

    def __init__(self, records: int, slots: int, half_life: int = HALF_LIVES[0]) -> None:
        super().__init__(records, slots)
        self.half_life = half_life
        self.key[:] = -np.inf

    def used(self, ids: Ids) -> None:
        self.key[ids] = np.logaddexp2(self.key[ids], self.time / self.half_life)


class Belady(Keyed):
    """The optimum, which knows the future: evicts what is needed again last. `rounds` are all that will come."""

    def __init__(self, records: int, slots: int, rounds: Sequence[Ids]) -> None:
        super().__init__(records, slots)
        following = np.full(records, NEVER)
        self._next: list[npt.NDArray[np.int64]] = []
        for time in range(len(rounds) - 1, -1, -1):
            self._next.append(following[rounds[time]])
            following[rounds[time]] = time
        self._next.reverse()

    def used(self, ids: Ids) -> None:
        self.key[ids] = -self._next[self.time].astype(np.float64)


class Clock:
    """Second chance: a hand goes round the slots, spares once what was used since it last came, and takes the next."""

    def __init__(self, records: int, slots: int) -> None:
        self.slots, self.hand = slots, 0
        self.slot_of = np.full(records, -1, np.int64)
        self.record_in = np.full(slots, -1, np.int64)
        self.spared = np.zeros(slots, bool)

    def round(self, ids: Ids) -> int:
        slots = self.slot_of[ids]
        missing = ids[slots < 0]
        hits = slots[slots >= 0]
        self.spared[hits] = True
        if len(missing):
            into = self._victims(len(missing), hits)
            old = self.record_in[into]
            self.slot_of[old[old >= 0]] = -1
            self.record_in[into], self.slot_of[missing] = missing, into
            self.spared[into] = True
        return len(missing)

    def _victims(self, count: int, locked: Ids) -> npt.NDArray[np.int64]:
        """Slots in the hand's order: at first those not spared, in a second turn the rest."""
        free = np.ones(self.slots, bool)
        free[locked] = False
        order = (self.hand + np.arange(self.slots)) % self.slots
        order = order[free[order]]
        first = order[~self.spared[order]]
        if len(first) >= count:
            last = first[count - 1]
            self.spared[order[: int(np.flatnonzero(order == last)[0])]] = False
            taken = first[:count]
        else:
            rest = order[self.spared[order]]
            self.spared[order] = False
            taken = np.concatenate([first, rest[: count - len(first)]])
        self.hand = (int(taken[-1]) + 1) % self.slots
        return taken

    def end_token(self) -> None:
        """Nothing depends on tokens."""


def rounds_of(ids: Ids, slots: int) -> list[Ids]:
    """A token's rounds."""
    return [ids[start : start + slots] for start in range(0, len(ids), slots)]


def hottest(sets: Sequence[Ids], records: int, count: int) -> Ids:
    """The `count` records needed most often, ascending (ties: lower number)."""
    uses = np.bincount(np.concatenate(sets) if sets else np.empty(0, np.int64), minlength=records)
    return np.sort(np.argsort(-uses, kind="stable")[:count])


def policies(sets: Sequence[Ids], records: int, slots: int, warm: int) -> dict[str, Callable[[], Policy]]:
    """Name -> how to make it for one layer. What pins know is the frequency in the first `warm` tokens."""

    def pinned(share: float) -> Policy:
        return Pinned(records, slots, hottest(sets[:warm], records, int(slots * share)))

    return {
        f"window {WINDOW}": lambda: Window(records, slots),
        "CLOCK": lambda: Clock(records, slots),
        "LFU": lambda: Lfu(records, slots),
        **{f"LFU, half-life {n}": lambda n=n: Decayed(records, slots, n) for n in HALF_LIVES},  # type: ignore[misc]
        "LRU": lambda: Keyed(records, slots),
        "LRU, 1/4 pinned": lambda: pinned(0.25),
        "LRU, 1/2 pinned": lambda: pinned(0.5),
        "LRU, 3/4 pinned": lambda: pinned(0.75),
        "runtime": lambda: Product(records, slots),
        "Belady": lambda: Belady(records, slots, [part for ids in sets for part in rounds_of(ids, slots)]),
    }


def misses(policy: Policy, sets: Sequence[Ids], slots: int) -> npt.NDArray[np.int64]:
    """Misses of each token [n]."""
    found = np.zeros(len(sets), np.int64)
    for token, ids in enumerate(sets):
        found[token] = sum(policy.round(part) for part in rounds_of(ids, slots))
        policy.end_token()
    return found
