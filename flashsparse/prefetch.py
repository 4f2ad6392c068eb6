"""Reading ahead: a layer's reads that start before its own input is known, under the attention before it.

The residual stream before a layer's attention, normalized as the FFN's input will be, is scored by the layer's own
chooser (Deja Vu's lookahead, arXiv:2310.17157, for reads only). A hint decides nothing: which records are computed is
the chooser's to say, later, from the layer's input, so results do not depend on hints. Owns the reads in flight between
the two and the decision whether hints pay.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Protocol

import numpy as np

from flashsparse.errors import FlashReadError
from flashsparse.flash import Batch, reads

if TYPE_CHECKING:
    from flashsparse.cache import Reservation, SlotTable
    from flashsparse.flash import ReadPool, Reads
    from flashsparse.layer_files import Flash
    from flashsparse.native.rounds import Hint, LayerRounds
    from flashsparse.stats import Counters
    from flashsparse.weights import Buffer

MOST = 0.25  # of a layer's slots are reserved for reads ahead
ALWAYS = ("on", "token")  # modes that compare nothing
TRIAL = 8  # tokens at first that take turns, with hints and without; and how many of each are compared later
AGAIN = 16  # every so many tokens one goes the other way, so that the comparison stays true


class Guess(Protocol):
    """What a chooser knows about a layer's set without deciding it."""

    def guess(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        """Scores [I] of x [1, d], and the score from which on a neuron is likely to be needed."""


@dataclass(frozen=True)
class Norm:
    """The norm before a layer's FFN: RMS, or with `layer` LayerNorm. Only for hints: its rounding decides nothing."""

    weight: np.ndarray
    bias: np.ndarray | None
    eps: float
    layer: bool

    def __call__(self, h: np.ndarray) -> np.ndarray:
        centred = h - h.mean() if self.layer else h
        with np.errstate(all="ignore"):  # a hint from a state that is no number names nothing
            x: np.ndarray = centred * (self.weight / np.sqrt(np.mean(np.square(centred)) + np.float32(self.eps)))
        return x if self.bias is None else x + self.bias


class Switch:
    """Whether the engine's layers take hints: `mode` is auto, on, off or (the GPU's) token.

    "auto" compares what a token costs with hints and without, in seconds inside the layers (waiting for reads, hints,
    computing): the medians of the last TRIAL tokens of each. One token in AGAIN goes the other way.
    """

    def __init__(self, mode: str, counters: Counters) -> None:
        self.mode, self._counters = mode, counters
        self._costs: dict[bool, deque[float]] = {True: deque(maxlen=TRIAL), False: deque(maxlen=TRIAL)}
        self._on = mode in ALWAYS
        self._tokens = 0
        self._at = counters.copy()

    @property
    def on(self) -> bool:
        """For the step that is running or about to run."""
        if self.mode == "auto" and self._counters.steps != self._at.steps:
            self._account()
        return self._on

    @property
    def pays(self) -> bool:
        """What the comparison says so far; without one, hints are off unless asked for."""
        with_hints, without = self._typical(True), self._typical(False)
        return self.mode in ALWAYS or (with_hints is not None and without is not None and with_hints < without)

    def _typical(self, on: bool) -> float | None:
        return median(self._costs[on]) if self._costs[on] else None

    def to_dict(self) -> dict[str, object]:
        """The decision and what it rests on, for statistics."""
        return {"mode": self.mode, "on": self.pays, "with_s": self._typical(True), "without_s": self._typical(False)}

    def _account(self) -> None:
        """A step is over: note what it cost when it was one token's, and choose for the next."""
        cost = self._counters - self._at
        self._at = self._counters.copy()
        if cost.steps == cost.tokens == 1:
            self._costs[self._on].append(cost.layers_s)
        self._tokens += 1
        other = self._tokens % AGAIN == 0
        self._on = self._tokens % 2 == 0 if self._tokens < TRIAL else self.pays != other


@dataclass(eq=False)
class Ahead:
    """Reads in flight for a reservation, numbered as its records are; the likeliest came first."""

    reservation: Reservation
    batch: Batch
    plan: Reads
    arrived: np.ndarray = field(init=False)
    over: bool = False

    def __post_init__(self) -> None:
        self.arrived = np.zeros(len(self.reservation.ids), bool)

    def keep(self, wanted: np.ndarray) -> np.ndarray:
        """Drop reads that nobody has begun of records that are not `wanted` (bool, of the reserved); which go on."""
        return self.batch.keep(wanted)

    def take(self, least: int = 1) -> np.ndarray:
        """Wait for reserved records that arrive, `least` at once; none are left, or a read has failed, when empty."""
        if self.over:
            return np.empty(0, np.intp)
        try:
            done = self._done(least)
        except FlashReadError:  # the record may not be needed; where it is, it is read again as a miss
            self.over = True  # first: what arrives yet must not be made whole where it was read again
            self.batch.release()
            return np.empty(0, np.intp)
        self.arrived[done] = True
        return done

    def _done(self, least: int) -> np.ndarray:
        return self.batch.take(least)

    def close(self) -> None:
        """Nothing is in flight afterwards."""
        while len(self.take(len(self.arrived))):
            pass
        self.over = True  # first: after an interrupt the batch is released again, but no more taken from
        self.batch.release()


@dataclass(eq=False)
class Prefetch:
    """One layer's."""

    table: SlotTable
    slab: Buffer
    slot_bytes: int
    flash: Flash
    pool: ReadPool
    chooser: Guess
    norm: Norm
    switch: Switch
    counters: Counters
    pending: Ahead | None = None

    @property
    def active(self) -> bool:
        """Whether a hint is worth computing now."""
        return self.switch.on

    def start(self, h: np.ndarray) -> None:
        """Start reading what the residual stream h [1, d] before the layer's attention suggests."""
        began = time.perf_counter()
        self.begin(*self.chooser.guess(self.norm(h)))
        self.counters.hint_s += time.perf_counter() - began

    def begin(self, scores: np.ndarray, least: float) -> None:
        """Start reading what scores [I] at least `least`, the likeliest first, after whatever is in flight."""
        self.finish()
        named = np.flatnonzero(scores >= least).astype(np.int32)
        absent = self.table.absent(named)
        new, held = named[absent], named[~absent]
        slots = self.table.room
        room = min(int(MOST * slots), slots - len(held)) if len(named) <= slots else 0  # in several rounds: no room
        if len(new) > room > 0:
            new = np.sort(new[np.argsort(scores[new])[-room:]])
        if len(new) and room > 0:
            self._read(self.table.reserve(new, held), np.argsort(-scores[new]))

    def claim(self, ids: np.ndarray) -> Ahead | None:
        """The reads in flight, for a round of `ids`; None when there are none, or none that leave room for it."""
        ahead = self.pending
        if ahead is None or ahead.over or ahead.arrived.any():  # of a step that failed
            self.finish()
            return None
        wanted = among(ahead.reservation.ids, ids)
        if not self.table.fits(ids):
            wanted[:] = False
        kept = ahead.keep(wanted)
        self.counters.prefetched += int(np.count_nonzero(kept))
        requests, nbytes = ahead.plan.moved(kept)
        self.counters.flash_reads += requests
        self.counters.flash_bytes += nbytes
        self.counters.prefetch_wasted_bytes += int(np.count_nonzero(kept & ~wanted)) * self.flash.record_bytes
        if wanted.any():
            return ahead
        self.finish()
        return None

    def finish(self) -> None:
        """Wait for what is in flight; records that arrived stay in their slots."""
        ahead = self.pending
        if ahead is not None:
            ahead.close()
            self.table.settle(ahead.reservation, ahead.arrived)
            self.pending = None

    def drop(self) -> None:
        """The layer goes on without its reads in flight: drop those that nobody has begun, and finish."""
        if self.pending is not None:
            self.claim(np.empty(0, np.int32))

    def _read(self, reservation: Reservation, order: np.ndarray) -> None:
        slots, rank = reservation.slots.astype(np.int64), np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        positions, dests = self.flash.position(reservation.ids), self.slab.address + slots * self.slot_bytes
        ids, flash = reservation.ids, self.flash
        plan = reads(flash.file, positions, flash.stored_bytes(ids), dests, flash.merging).ranked(rank)
        begins, landed = flash.landing(ids, slots, self.slot_bytes, self.slab.bytes, plan.begins)
        self.table.set_begin(slots, begins)
        self.pending = Ahead(reservation, plan.submit(self.pool, landed), plan)


@dataclass(eq=False)
class NativePrefetch:
    """One layer's whose rounds are native: they also start its reads ahead, and know which are in flight.

    norm: a new array from the residual stream [1, d], normalized as the FFN's input will be. `early`: how the layer
    before starts the reads instead, from the state that its own FFN sees, while it waits for reads; None: it cannot.
    """

    rounds: LayerRounds
    chooser: Guess
    norm: Callable[[np.ndarray], np.ndarray]
    switch: Switch
    counters: Counters
    early: Hint | None = None
    begun: bool = False  # by the layer before, in this step

    @property
    def active(self) -> bool:
        """Whether a hint is worth computing now, before the layer's attention."""
        return self.switch.on and not self.begun

    def start(self, h: np.ndarray) -> None:
        """Start reading what the residual stream h [1, d] before the layer's attention suggests."""
        began = time.perf_counter()
        scores, least = self.chooser.guess(self.norm(h))
        self.counters.tally(self.rounds.ahead(scores, least))
        self.counters.hint_s += time.perf_counter() - began

    def before(self, h: np.ndarray) -> Hint | None:
        """For the layer before, whose FFN's input is normalized from h [1, d]: the hint to follow, if any."""
        if self.early is None or not self.switch.on:
            return None
        self.begun = True
        return self.early.of(h)

    def drop(self) -> None:
        """The layer goes on without its reads in flight: drop those that nobody has begun, wait for the others."""
        self.counters.tally(self.rounds.drop())


def among(some: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which of `some` numbers are among `ids`, both ascending."""
    if not len(ids):
        return np.zeros(len(some), bool)
    found: np.ndarray = ids[np.minimum(np.searchsorted(ids, some), len(ids) - 1)] == some
    return found
