"""The streamed FFN: what replaces a layer's FFN module, joining cache, flash and kernels.

Owns the order of one evaluation: score, look up, read, compute hits, compute misses as they arrive, accumulate. It
knows records and slots, never files' formats or cache policy.

Results do not depend on budget, slots, arrival order, threads or read mode: a record's intermediate values are
computed from that record alone, and the down projection adds over ascending neuron numbers, whatever the rounds or
tiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashsparse.flash import Batch, FlashFile, ReadPool, read_range
from flashsparse.stats import Counters

if TYPE_CHECKING:
    from flashsparse.cache import Round, SlotTable
    from flashsparse.kernels import Kernels
    from flashsparse.weights import Buffer, Weight

READ_SPLIT = 1 << 20  # one tile read is cut into pieces of this size, so that the pool's threads share it
GAP_BYTES = 128 << 10  # a gap shorter than this is cheaper read than skipped when streaming in order


@dataclass
class Tiles:
    """Two buffers that take turns: one is read into while the other is computed with."""

    buffers: tuple[Buffer, Buffer]
    nbytes: int


@dataclass
class Scratch:
    """Buffers shared by every layer: one layer computes at a time.

    `scores` [chunk, I], `hidden` (flat, reshaped per use; bounds the records computed at once), `out` [chunk, d].
    """

    scores: np.ndarray | None
    hidden: np.ndarray
    out: np.ndarray
    tiles: Tiles

    def hidden_for(self, tokens: int, width: int) -> np.ndarray:
        return self.hidden[: tokens * width].reshape(tokens, width)


@dataclass
class Flash:
    """Where a layer's records live: its file and the geometry they share."""

    file: FlashFile
    data_offset: int
    records: int
    record_bytes: int
    stride: int

    def position(self, ids: np.ndarray) -> np.ndarray:
        return self.data_offset + ids.astype(np.int64) * self.stride


@dataclass
class Run:
    """A stretch of records [first, last) that one tile reads, and the wanted ones among them."""

    first: int
    last: int
    ids: np.ndarray


@dataclass
class StreamedFFN:
    """One layer. `scoring` is None in the dense tier, where every record is needed and carries its own gate row."""

    kernels: Kernels
    pool: ReadPool
    flash: Flash
    scratch: Scratch
    counters: Counters
    scoring: Weight | None = None
    scoring_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None
    table: SlotTable | None = None
    slab: Buffer | None = None
    slot_bytes: int = 0
    observer: Callable[[np.ndarray], None] | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x [T, d] float32 -> the FFN's output [T, d], valid until the next call of any layer."""
        began = time.perf_counter()
        y = self.scratch.out[: x.shape[0]]
        y[:] = 0
        if self.scoring is None:
            self._stream(np.arange(self.flash.records, dtype=np.int32), x, None, y)
        else:
            self._sparse(x, y)
        if self.down_bias is not None:
            y += self.down_bias
        self.counters.ffn_s += time.perf_counter() - began
        return y

    def _sparse(self, x: np.ndarray, y: np.ndarray) -> None:
        assert self.scoring is not None and self.table is not None and self.scratch.scores is not None
        activated = self.scratch.scores[: x.shape[0]]
        self.kernels.linear(self.scoring, self.scoring_bias, x, activated)
        self.kernels.activate(activated)
        ids = self.kernels.active(activated)
        self.counters.active += len(ids)
        self.counters.candidates += self.flash.records
        if self.observer is not None:
            self.observer(ids)
        if x.shape[0] > 1 and len(ids) > self.table.slots:
            self._stream(ids, x, activated, y)
            return
        width = len(self.scratch.hidden) // x.shape[0]
        for start in range(0, len(ids), width):
            for round_ in self.table.rounds(ids[start : start + width]):
                self._round(round_, x, activated, y)
        self.table.end_token()

    def _round(self, round_: Round, x: np.ndarray, activated: np.ndarray, y: np.ndarray) -> None:
        """Submit the misses, compute the hits, then each miss as it arrives, then accumulate in ascending order.

        Reading into the slots is safe here: every output that read them was evaluated a token ago (the kernels are
        synchronous), and the table never hands out a slot of the current round.
        """
        assert self.table is not None and self.slab is not None
        slab = self.slab.bytes
        hidden = self.scratch.hidden_for(x.shape[0], len(round_.ids))
        cols = np.arange(len(round_.ids), dtype=np.int32)
        missing = np.flatnonzero(round_.missing)
        self.counters.rounds += 1
        self.counters.hits += len(cols) - len(missing)
        self.counters.misses += len(missing)

        def compute(which: np.ndarray) -> None:
            self.kernels.hidden(slab, offsets[which], round_.ids[which], cols[which], x, activated, None, hidden)

        if not len(missing):
            offsets = self._offsets(round_)
            compute(cols)
        else:
            with self._submit(round_, missing) as batch:
                offsets = self._offsets(round_)
                hits = np.flatnonzero(~round_.missing)
                if len(hits):
                    compute(hits)
                while len(done := self._take(batch)):
                    compute(missing[np.sort(done)])
        round_.commit()
        self.kernels.down(slab, offsets, cols, hidden, y)

    def _offsets(self, round_: Round) -> np.ndarray:
        assert self.table is not None
        return round_.slots.astype(np.int64) * self.slot_bytes + self.table.begin[round_.slots]

    def _submit(self, round_: Round, missing: np.ndarray) -> Batch:
        assert self.table is not None and self.slab is not None
        slots = round_.slots[missing]
        begin, starts, lengths, needs = self._ranges(round_.ids[missing], 1)
        self.table.set_begin(slots, begin)
        dests = self.slab.address + slots.astype(np.int64) * self.slot_bytes
        self._count(lengths, len(missing))
        return self.pool.submit(self.flash.file, starts, lengths, needs, dests)

    def _ranges(self, firsts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Begin within the destination, file offset, length and needed bytes of `count` records from each first one."""
        wanted = self.flash.position(firsts)
        size = (count - 1) * self.flash.stride + self.flash.record_bytes
        starts, lengths = read_range(self.flash.file, wanted, size)
        begin = wanted - starts
        return begin, starts, lengths, begin + size

    def _count(self, lengths: np.ndarray, records: int) -> None:
        self.counters.flash_bytes += int(lengths.sum())
        self.counters.flash_reads += len(lengths)
        self.counters.needed_bytes += records * self.flash.record_bytes

    def _take(self, batch: Batch) -> np.ndarray:
        began = time.perf_counter()
        done = batch.take()
        self.counters.io_wait_s += time.perf_counter() - began
        return done

    def _stream(self, ids: np.ndarray, x: np.ndarray, activated: np.ndarray | None, y: np.ndarray) -> None:
        """Read the records `ids` in file order through two tiles: one is filled while the other is computed."""
        self.counters.misses += len(ids)
        if activated is None:
            self.counters.active += len(ids)
            self.counters.candidates += self.flash.records
        runs = self._runs(ids, len(self.scratch.hidden) // x.shape[0])
        pending = [self._read_run(run, index) for index, run in enumerate(runs[:1])]
        try:
            for index, run in enumerate(runs):
                if index + 1 < len(runs):
                    pending.append(self._read_run(runs[index + 1], (index + 1) % 2))
                batch, begin = pending[0]
                while len(self._take(batch)):
                    pass
                self._compute_run(run, begin, index % 2, x, activated, y)
                pending.pop(0)[0].release()
        finally:
            for batch, _ in pending:
                batch.release()

    def _runs(self, ids: np.ndarray, width: int) -> list[Run]:
        """Cut ascending ids into stretches that fit a tile and `width`, not reading gaps longer than GAP_BYTES."""
        if not len(ids):
            return []
        # Rounding out to sectors needs up to two more of them; a page covers that.
        room = max((self.scratch.tiles.nbytes - 2 * self.flash.file.sector) // self.flash.stride, 1)
        breaks = np.flatnonzero(np.diff(ids) * self.flash.stride > GAP_BYTES) + 1
        runs = []
        for part in np.split(ids, breaks):
            while len(part):
                inside = min(int(np.searchsorted(part, part[0] + room)), width)
                runs.append(Run(int(part[0]), int(part[inside - 1]) + 1, part[:inside]))
                part = part[inside:]
        return runs

    def _read_run(self, run: Run, tile: int) -> tuple[Batch, int]:
        begin, starts, lengths, needs = self._ranges(np.array([run.first]), run.last - run.first)
        start, length, need = int(starts[0]), int(lengths[0]), int(needs[0])
        cuts = np.arange(0, length, READ_SPLIT, dtype=np.int64)
        sizes = np.minimum(length - cuts, READ_SPLIT)
        wanted = np.clip(need - cuts, 0, sizes)
        self._count(sizes, len(run.ids))
        dests = self.scratch.tiles.buffers[tile].address + cuts
        return self.pool.submit(self.flash.file, start + cuts, sizes, wanted, dests), int(begin[0])

    def _compute_run(
        self, run: Run, begin: int, tile: int, x: np.ndarray, activated: np.ndarray | None, y: np.ndarray
    ) -> None:
        slab = self.scratch.tiles.buffers[tile].bytes
        offsets = begin + (run.ids.astype(np.int64) - run.first) * self.flash.stride
        cols = np.arange(len(run.ids), dtype=np.int32)
        hidden = self.scratch.hidden_for(x.shape[0], len(run.ids))
        self.kernels.hidden(slab, offsets, run.ids, cols, x, activated, None, hidden)
        self.kernels.down(slab, offsets, cols, hidden, y)
