"""The streamed FFN: what replaces a layer's FFN module, joining cache, flash and kernels.

Owns the order of one evaluation: choose, look up, read, compute hits, compute misses as they arrive, accumulate. It
knows records and slots, never files' formats or cache policy; which records a layer needs is its chooser's to say.

Results do not depend on budget, slots, arrival order, threads or read mode: a record's intermediate values are
computed from that record alone, and the down projection adds over ascending neuron numbers, whatever the rounds or
tiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from flashsparse.flash import Batch, Load, ReadPool, loads, reads
from flashsparse.headstart import HeadStart, Part, worth
from flashsparse.keeping import Keeping, likely_next
from flashsparse.layer_files import Flash, Scratch
from flashsparse.prefetch import NativePrefetch, Prefetch
from flashsparse.stats import Counters

if TYPE_CHECKING:
    from flashsparse.cache import Round, SlotTable
    from flashsparse.choice import Choice, Chooser
    from flashsparse.judging import Judging
    from flashsparse.kernels import Kernels
    from flashsparse.native.rounds import LayerRounds
    from flashsparse.prefetch import Ahead
    from flashsparse.weights import Buffer

WORTH = 32  # records that have arrived, before it pays to start computing them


# (slab, offsets, ids, cols, hidden): intermediate values of the records at `offsets` into columns `cols` of hidden.
ComputeHidden = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


@dataclass
class StreamedFFN:
    """One layer. Without a `table` it has no slots and streams what it needs.

    `dense`: stream every record, for the dense model's result. `judging`: compute every record, and tell what each was
    worth; the result stays what it is without. `predicts`: the chooser guesses, and what it names is counted.
    """

    layer: int
    kernels: Kernels
    pool: ReadPool
    flash: Flash
    scratch: Scratch
    counters: Counters
    chooser: Chooser
    predicts: bool = False
    down_bias: np.ndarray | None = None
    table: SlotTable | None = None
    slab: Buffer | None = None
    slot_bytes: int = 0
    native: LayerRounds | None = None
    after: StreamedFFN | None = None  # the next layer, whose reads may begin while this one waits for its own
    stream: np.ndarray | None = None  # [1, d]: the residual stream that x was normalized from, in a step of one token
    observer: Callable[[np.ndarray], None] | None = None
    dense: bool = False
    judging: Judging | None = None
    lookahead: Prefetch | NativePrefetch | None = None
    ahead: bool = False  # whether the next layer's first records may be read before its set is known
    decoded: int = 0  # tokens that were computed one at a time, and how many neurons were predicted for them
    decoded_neurons: int = 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [T, d] float32 -> the FFN's output [T, d], valid until the next call of any layer."""
        began, hinted = time.perf_counter(), self.counters.hint_s
        y = self.scratch.out[: x.shape[0]]
        y[:] = 0
        if self.judging is not None:
            self._judge(self.judging, x, y)
        else:
            self._compute(self.chooser.whole(x) if self.dense else self.chooser.choose(x), x, y)
        if self.down_bias is not None:
            y += self.down_bias
        self.counters.ffn_s += time.perf_counter() - began - (self.counters.hint_s - hinted)
        return y

    @property
    def wants_hint(self) -> bool:
        """Whether the decoder should call `hint` before the layer's attention in a step of one token."""
        return self.lookahead is not None and not self.dense and self.judging is None and self.lookahead.active

    def hint(self, h: np.ndarray) -> None:
        """h [1, d] float32: the residual stream before the layer's attention. Starts reads; results do not change."""
        assert self.lookahead is not None
        self.lookahead.start(h)

    def hold(self, on: bool) -> None:
        """While on, slots that were never filled stay empty; results do not depend on it."""
        if self.table is not None:
            self.table.hold(on)

    def _compute(self, choice: Choice, x: np.ndarray, y: np.ndarray) -> None:
        tokens = x.shape[0]
        self._count_choice(choice, tokens)
        hidden = partial(self._hidden, x, choice)
        if self.table is None or self.dense or (tokens > 1 and len(choice.ids) > self.table.room):
            if self.lookahead is not None:
                self.lookahead.drop()
            self._stream(choice.ids, x, y, hidden, self._keeping(choice, tokens))
            return
        if self.native is not None:
            self._natively(self.native, choice, x, y)
            return
        lookahead = self.lookahead if isinstance(self.lookahead, Prefetch) else None
        ahead = None if lookahead is None else lookahead.claim(choice.ids)
        reserved = None if ahead is None else ahead.reservation
        width = len(self.scratch.hidden) // tokens
        for start in range(0, len(choice.ids), width):
            for round_ in self.table.rounds(choice.ids[start : start + width], reserved):
                self._round(round_, x, y, hidden, ahead)
        if ahead is not None and lookahead is not None:
            lookahead.finish()
        self.table.end_token()

    def _natively(self, rounds: LayerRounds, choice: Choice, x: np.ndarray, y: np.ndarray) -> None:
        """What the rounds above do, in one call."""
        mask = choice.mask if len(x) > 1 else None  # one token needs all of its neurons
        fired = self.predicts and not self.dense
        lookahead, next_one = self.lookahead, None if self.after is None else self.after.lookahead
        hint = None
        if self.stream is not None and isinstance(next_one, NativePrefetch):
            hint = next_one.before(self.stream)
        figures = rounds.run(choice.ids, x, choice.activated, mask, self.scratch.hidden, y, fired, hint)
        self.counters.tally(figures)
        if isinstance(lookahead, NativePrefetch):
            lookahead.begun = False

    def _keeping(self, choice: Choice, tokens: int) -> Keeping | None:
        if self.table is None or self.slab is None or self.dense:
            return None
        ids = likely_next(choice, tokens, self.table.room)
        return Keeping(self.table, self.slab, self.slot_bytes, self.flash.record_bytes, ids)

    def _judge(self, judging: Judging, x: np.ndarray, y: np.ndarray) -> None:
        choice = self.chooser.choose(x)
        self._count_choice(choice, x.shape[0])
        step = judging.begin(choice.selected(x.shape[0], self.flash.records), masked=not self.dense)
        truth = self.chooser.whole(x)  # from here on `choice` is gone
        self._stream(truth.ids, x, y, partial(step.compute, x, truth))
        step.finish(self.layer)

    def _count_choice(self, choice: Choice, tokens: int) -> None:
        pairs = choice.pairs(tokens) if self.predicts and not self.dense else 0
        self.count(choice.ids, pairs, tokens)

    def count(self, ids: np.ndarray, pairs: int, tokens: int) -> None:
        """Records `ids` are needed, for `pairs` of token and neuron where the chooser guesses."""
        self.counters.active += len(ids)
        self.counters.candidates += self.flash.records
        if self.observer is not None:
            self.observer(ids)
        if not self.predicts or self.dense:
            return
        self.counters.predicted += pairs
        self.counters.scored += tokens * self.flash.records
        if tokens == 1:
            self.decoded += 1
            self.decoded_neurons += pairs

    def _hidden(
        self,
        x: np.ndarray,
        choice: Choice,
        slab: np.ndarray,
        offsets: np.ndarray,
        ids: np.ndarray,
        cols: np.ndarray,
        hidden: np.ndarray,
    ) -> None:
        mask = choice.mask if x.shape[0] > 1 else None  # one token needs all of its neurons
        self.kernels.hidden(slab, offsets, ids, cols, x, choice.activated, mask, hidden)

    def _down(self, slab: np.ndarray, offsets: np.ndarray, cols: np.ndarray, hidden: np.ndarray, y: np.ndarray) -> None:
        if self.predicts and not self.dense:
            self.counters.fired += int(np.count_nonzero(hidden))
        self.kernels.down(slab, offsets, cols, hidden, y)

    def _round(
        self, round_: Round, x: np.ndarray, y: np.ndarray, compute_hidden: ComputeHidden, ahead: Ahead | None
    ) -> None:
        """Submit the misses, compute the hits, then what was read ahead and each miss as it arrives, then accumulate.

        The accumulation is in ascending order. Reading into the slots is safe here: every output that read them was
        evaluated a token ago (the kernels are synchronous), and the table never hands out a slot of the current round.
        """
        assert self.table is not None and self.slab is not None
        slab = self.slab.bytes
        hidden = self.scratch.hidden_for(x.shape[0], len(round_.ids))
        cols = np.arange(len(round_.ids), dtype=np.int32)
        missing = round_.missing.copy()
        missing[round_.ahead] = False
        self._count_round(round_, missing)

        def compute(which: np.ndarray) -> None:
            compute_hidden(slab, offsets[which], round_.ids[which], cols[which], hidden)

        if not round_.missing.any():
            offsets = self._offsets(round_)
            compute(cols)
        else:
            with self._submit(round_, np.flatnonzero(missing)) as batch:
                offsets = self._offsets(round_)
                if len(hits := np.flatnonzero(~round_.missing)):
                    began = time.perf_counter()
                    compute(hits)
                    self.counters.overlap_s += time.perf_counter() - began
                late = self._compute_ahead(round_, ahead, compute)
                self._compute_arriving(batch, np.flatnonzero(missing), compute)
            if len(late):
                with self._submit(round_, late) as batch:
                    offsets = self._offsets(round_)
                    self._compute_arriving(batch, late, compute)
        round_.commit()
        self._down(slab, offsets, cols, hidden, y)

    def _compute_ahead(self, round_: Round, ahead: Ahead | None, compute: Callable[[np.ndarray], None]) -> np.ndarray:
        """Compute what was read ahead as it arrives; positions of the records that did not, because a read failed."""
        if ahead is None:
            return round_.ahead
        asked = np.searchsorted(ahead.reservation.ids, round_.ids[round_.ahead])
        position = np.full(len(ahead.reservation.ids), -1)
        position[asked] = round_.ahead
        done = np.flatnonzero(ahead.arrived)  # while another round of this step waited
        while True:
            if len(arrived := np.sort(position[done][position[done] >= 0])):
                compute(arrived)
            if not len(done := self._take(ahead, WORTH)):
                late: np.ndarray = round_.ahead[~ahead.arrived[asked]]
                return late

    def _compute_arriving(self, batch: Batch, records: np.ndarray, compute: Callable[[np.ndarray], None]) -> None:
        while len(done := self._take(batch, WORTH)):
            compute(records[np.sort(done)])

    def _count_round(self, round_: Round, missing: np.ndarray) -> None:
        misses = int(np.count_nonzero(missing))
        self.counters.rounds += 1
        self.counters.hits += len(round_.ids) - misses
        self.counters.misses += misses
        self.counters.prefetch_used += len(round_.ahead)
        self.counters.needed_bytes += len(round_.ahead) * self.flash.record_bytes

    def _offsets(self, round_: Round) -> np.ndarray:
        assert self.table is not None
        return round_.slots.astype(np.int64) * self.slot_bytes + self.table.begin[round_.slots]

    def _submit(self, round_: Round, missing: np.ndarray) -> Batch:
        assert self.table is not None and self.slab is not None
        slots = round_.slots[missing]
        dests = self.slab.address + slots.astype(np.int64) * self.slot_bytes
        positions = self.flash.position(round_.ids[missing])
        ids = round_.ids[missing]
        plan = reads(self.flash.file, positions, self.flash.stored_bytes(ids), dests, self.flash.merging)
        begins, landed = self.flash.landing(ids, slots, self.slot_bytes, self.slab.bytes, plan.begins)
        self.table.set_begin(slots, begins)
        self._count(plan.nbytes, plan.requests, len(missing))
        return plan.submit(self.pool, landed)

    def _count(self, nbytes: int, requests: int, records: int) -> None:
        self.counters.flash_bytes += nbytes
        self.counters.flash_reads += requests
        self.counters.needed_bytes += records * self.flash.record_bytes

    def _take(self, batch: Batch | Ahead, least: int = 1) -> np.ndarray:
        began = time.perf_counter()
        done = batch.take(least)
        self.counters.io_wait_s += time.perf_counter() - began
        return done

    def _stream(
        self, ids: np.ndarray, x: np.ndarray, y: np.ndarray, compute_hidden: ComputeHidden, kept: Keeping | None = None
    ) -> None:
        """Read the records `ids` in file order through two tiles: one is filled while the other is computed."""
        self.counters.misses += len(ids)
        most, flash = len(self.scratch.hidden) // x.shape[0], self.flash
        pending, parts = self._use_head(ids, most)
        rest = ids[parts[0].last if parts else 0 :]
        turn, plan = 1 - parts[0].tile if parts else 0, self._loads(rest, most)
        done = len(ids) - len(rest)
        parts += [
            Part(done + load.first, done + load.last, (turn + at) % 2, load.offsets, load)
            for at, load in enumerate(plan)
        ]
        try:
            for index, part in enumerate(parts):
                if not pending:
                    pending.append(self._fill(part))
                if index + 1 < len(parts):
                    pending.append(self._fill(parts[index + 1]))
                elif self.ahead and worth(plan, len(ids) / flash.records):
                    self._start_head(len(ids), x.shape[0], 1 - part.tile)
                while len(self._take(pending[0], len(pending[0]))):
                    pass
                tile, here = self.scratch.tiles.buffers[part.tile].bytes, ids[part.first : part.last]
                flash.restore(tile, part.offsets, here)
                self._compute_tile(tile, part.offsets, here, x, y, compute_hidden)
                if kept is not None:
                    kept.copy(tile, part.offsets, here)
                pending.pop(0).release()
        finally:
            for batch in pending:
                batch.release()
            if kept is not None:
                kept.close()

    def _loads(self, ids: np.ndarray, most: int) -> list[Load]:
        flash = self.flash
        return loads(flash.file, flash.position(ids), flash.record_bytes, flash.costs, self.scratch.tiles.nbytes, most)

    def _fill(self, part: Part) -> Batch:
        load = part.load
        assert load is not None
        self._count(load.nbytes, len(load.starts), load.last - load.first)
        dests = self.scratch.tiles.buffers[part.tile].address + load.places
        return self.pool.submit(self.flash.file, load.starts, load.lengths, load.needs, dests)

    def _use_head(self, ids: np.ndarray, most: int) -> tuple[list[Batch], list[Part]]:
        """What a head start has begun to read of `ids`, at most `most`, as the first part."""
        head, self.scratch.head = self.scratch.head, None
        if head is None:
            return [], []
        requests, nbytes, part = head.use(self.layer, ids, most)
        self._count(nbytes, requests, part.last if part else 0)
        return ([head.batch], [part]) if part else ([], [])

    def _start_head(self, needed: int, tokens: int, tile: int) -> None:
        """Start reading the next layer's first records, if it will stream; this one needed so many."""
        after = self.after
        if after is None or after.flash.compressed is not None:
            return
        if after.table is not None and not after.dense and (tokens == 1 or needed <= after.table.room):
            return
        most = min(after.flash.records, len(self.scratch.hidden) // tokens)
        load = after._loads(np.arange(most, dtype=np.int32), most)[0]
        dests = self.scratch.tiles.buffers[tile].address + load.places
        batch = self.pool.submit(after.flash.file, load.starts, load.lengths, load.needs, dests)
        self.scratch.head = HeadStart(after.layer, tile, load, batch, after.flash.record_bytes)

    def _compute_tile(
        self,
        tile: np.ndarray,
        offsets: np.ndarray,
        ids: np.ndarray,
        x: np.ndarray,
        y: np.ndarray,
        compute_hidden: ComputeHidden,
    ) -> None:
        cols = np.arange(len(ids), dtype=np.int32)
        hidden = self.scratch.hidden_for(x.shape[0], len(ids))
        compute_hidden(tile, offsets, ids, cols, hidden)
        self._down(tile, offsets, cols, hidden, y)
