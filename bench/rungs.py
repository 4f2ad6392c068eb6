"""What each idea buys: the same run with one or more of them taken away (the rows of LLM in a flash's table, and more).

A rung is made of what the engine has: its tiers, fresh slot tables, a read pool that cuts records in three. The
product itself has no such switches. Results stay the same bits for all rungs that compute the same sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from flashsparse.cache import SlotTable
from flashsparse.choice import Choice
from flashsparse.prefetch import Prefetch

if TYPE_CHECKING:
    from flashsparse.engine import Engine
    from flashsparse.ffn import StreamedFFN
    from flashsparse.flash import Batch, FlashFile, Landed, ReadPool

PIECES = 3  # gate, up and down, each somewhere else
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Rung:
    """How to load and what to do: `start` once before the timed tokens, `each` before every token, timed with it if
    `counted`. `replayed`: the tokens run once beforehand, and what that pass recorded goes to `start`; the slots keep
    what it left in them unless it `forgets`."""

    name: str
    text: str
    load: dict[str, Any] = field(default_factory=dict)
    start: Callable[[Engine, Sets | None], None] | None = None
    each: Callable[[Engine], None] | None = None
    counted: bool = True
    replayed: bool = False
    forgets: bool = False
    tiers: tuple[str, ...] = ("predict", "exact", "dense")


Sets = list[list[np.ndarray]]  # [token][layer] -> ids


def _streamed_ffns(engine: Engine) -> list[StreamedFFN]:
    return engine._ffns


def forget(engine: Engine) -> None:
    """Empty every layer's slots; what was read ahead ends first, since it has places in the old table."""
    for ffn in _streamed_ffns(engine):
        if ffn.table is None:
            continue
        if ffn.lookahead is not None:
            ffn.lookahead.drop()
        ffn.table = SlotTable(ffn.table.records, ffn.table.slots)
        if ffn.native is not None:
            ffn.native.use(ffn.table.native, ffn.table.begin)
        if isinstance(ffn.lookahead, Prefetch):
            ffn.lookahead.table = ffn.table


def unbundle(engine: Engine, sets: Sets | None = None) -> None:
    """Read each record as three pieces."""
    for ffn in _streamed_ffns(engine):
        ffn.pool = SplitPool(ffn.pool, ffn.flash.file.sector)  # type: ignore[assignment]
        ffn.native = None  # its reads are not the pool's to cut


def read_resident(engine: Engine) -> None:
    """Read the resident file once more, in order: nothing stays in memory."""
    from flashsparse.flash import FlashFile

    assert engine._pool is not None
    with FlashFile(engine.manifest.resident_path) as file:
        arena = np.empty(32 * _CHUNK + 4096, np.uint8)
        base = -(-arena.ctypes.data // 4096) * 4096
        offsets = np.arange(0, file.size, _CHUNK, dtype=np.int64)
        for start in range(0, len(offsets), 32):
            part = offsets[start : start + 32]
            needs = np.minimum(_CHUNK, file.size - part)
            dests = base + np.arange(len(part), dtype=np.int64) * _CHUNK
            with engine._pool.submit(file, part, np.full(len(part), _CHUNK), needs, dests) as batch:
                batch.wait()
        engine.counters.flash_bytes += file.size
        engine.counters.flash_reads += len(offsets)


class Replayed:
    """A chooser that knows each token's set beforehand: prediction at no cost."""

    def __init__(self, sets: list[np.ndarray], inner: Any) -> None:
        self._sets, self._inner = iter(sets), inner

    def choose(self, x: np.ndarray) -> Choice:
        return Choice(next(self._sets).astype(np.int32))

    def whole(self, x: np.ndarray) -> Choice:
        result: Choice = self._inner.whole(x)
        return result


def replay(engine: Engine, sets: Sets | None) -> None:
    """Let every layer take its sets from what was recorded."""
    assert sets is not None
    for index, ffn in enumerate(_streamed_ffns(engine)):
        ffn.chooser = Replayed([token[index] for token in sets], ffn.chooser)


_PLAIN = {"lookahead": "off"}
RUNGS = {
    rung.name: rung
    for rung in (
        Rung("naive", "the whole model is read for each token", {"tier": "dense"}, each=read_resident,
             tiers=("predict", "dense")),
        Rung("streamed", "attention and embeddings stay, the FFN is read for each token", {"tier": "dense"},
             tiers=("predict", "dense")),
        Rung("sets", "+ active sets: only their records are read, in three pieces, and forgotten", _PLAIN,
             start=unbundle, each=forget, counted=False, tiers=("predict", "exact")),
        Rung("window", "+ window: records stay in their slots", _PLAIN, start=unbundle, tiers=("predict", "exact")),
        Rung("bundles", "+ bundles: a record is one read", _PLAIN, tiers=("predict", "exact")),
        Rung("default", "as users run it: + reads under attention, where they pay"),
        Rung("no-window", "bundles without the window", _PLAIN, each=forget, counted=False, tiers=("predict", "exact")),
        Rung("oracle", "the same sets, known beforehand at no cost", _PLAIN, start=replay, replayed=True, forgets=True,
             tiers=("predict",)),
        Rung("slots", "everything in slots: no reads", {"dram": "100%", **_PLAIN}, replayed=True,
             tiers=("predict", "exact")),
    )
}  # fmt: skip


class SplitPool:
    """A read pool whose reads are made as PIECES reads each, at sector boundaries: first parts, second parts, third."""

    def __init__(self, pool: ReadPool, sector: int) -> None:
        self._pool, self._sector = pool, sector

    def submit(
        self,
        files: FlashFile | Sequence[FlashFile],
        offsets: np.ndarray,
        lengths: np.ndarray,
        needs: np.ndarray,
        dests: np.ndarray,
        order: np.ndarray | None = None,
    ) -> SplitBatch:
        """As ReadPool.submit; `order`: what the batch calls read i, order[i]."""
        lengths, needs = np.asarray(lengths, np.int64), np.asarray(needs, np.int64)
        step = -(-lengths // (PIECES * self._sector)) * self._sector
        starts = [np.minimum(part * step, lengths) for part in range(PIECES + 1)]
        which, parts = [], []
        for first, last in pairwise(starts):
            some = np.flatnonzero(last > first)
            size = (last - first)[some]
            wanted = np.clip(needs[some] - first[some], 0, size)
            which.append(some)
            parts.append((offsets[some] + first[some], size, wanted, dests[some] + first[some].astype(dests.dtype)))
        owner = np.concatenate(which)
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        each = [files[n] for n in owner] if isinstance(files, Sequence) else files
        batch = self._pool.submit(each, *columns)
        return SplitBatch(batch, owner, len(lengths), order)

    def submit_runs(
        self,
        files: Sequence[FlashFile],
        reads: np.ndarray,
        firsts: np.ndarray,
        runs: int,
        order: np.ndarray | None = None,
        landed: Landed | None = None,
    ) -> SplitBatch:
        """As ReadPool.submit_runs, but every read stands alone, in pieces."""
        batch = self.submit(files, reads["offset"], reads["length"], reads["need"], reads["dest"], order)
        batch.landed = landed
        return batch


class SplitBatch:
    """As Batch: a read is finished when all of its pieces are. landed: called with those that are taken."""

    landed: Landed | None = None

    def __init__(self, batch: Batch, owner: np.ndarray, count: int, order: np.ndarray | None) -> None:
        self._batch, self._owner, self._order = batch, owner, order
        self._left = np.bincount(owner, minlength=count)
        self._empty = np.flatnonzero(self._left == 0).astype(np.int32)

    def take(self, least: int = 1) -> np.ndarray:
        """The reads that are finished; one is enough, whatever `least` says."""
        done = self._take()
        taken = done if self._order is None else self._order[done]
        if self.landed is not None and len(taken):
            self.landed(taken)
        return taken

    def _take(self) -> np.ndarray:
        empty, self._empty = self._empty, self._empty[:0]
        if len(empty):
            return empty
        while len(pieces := self._batch.take()):
            owners = self._owner[pieces]
            np.subtract.at(self._left, owners, 1)
            done = np.unique(owners)
            done = done[self._left[done] == 0]
            if len(done):
                return done.astype(np.int32)
        return self._empty

    def wait(self) -> None:
        while len(self.take()):
            pass

    def release(self) -> None:
        self._batch.release()

    def __enter__(self) -> SplitBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
