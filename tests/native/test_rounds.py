"""A layer's rounds in one call: the same bits as its records computed at once, and a table that is whole afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from flashsparse import FlashReadError, native
from flashsparse.cache import SlotTable
from flashsparse.flash import FlashFile, ReadPool, slot_stride
from flashsparse.native.layers import Norm
from flashsparse.native.rounds import Hint, Home, LayerRounds, Rounds
from flashsparse.stats import Counters
from flashsparse.weights import Buffer

RECORDS, D, OFFSET, BYTES, STRIDE = 300, 24, 4096, 3 * 24 * 4, 304
RECORD = native.Record(gate=0, up=4 * D, down=8 * D, d=D, dtype=native.DTYPES["F32"], activation=1, gated=True)


@pytest.fixture(scope="module")
def records() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((RECORDS, 3 * D)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path, records: np.ndarray) -> Path:
    stored = np.zeros((RECORDS, STRIDE), np.uint8)
    stored[:, :BYTES] = records.view(np.uint8)
    path = tmp_path / "flash-000.safetensors"
    path.write_bytes(bytes(OFFSET) + stored.tobytes())
    return path


@dataclass
class Layer:
    """`slots` of the file's records, and everything that computing with them needs."""

    path: Path
    slots: int
    gap: int = 2000
    threads: int = 4
    mode: str = "auto"

    def __enter__(self) -> Layer:
        self.file, self.pool, self.workers = FlashFile(self.path, self.mode), ReadPool(self.threads), native.Workers(2)
        self.each = slot_stride(STRIDE, OFFSET, self.file.sector, self.file.direct)
        self.table, self.slab = SlotTable(RECORDS, self.slots), Buffer(self.slots * self.each)
        home = Home(str(self.path), self.file.fd, OFFSET, BYTES, STRIDE, self.file.sector, self.gap, 1 << 16)
        self.shared = Rounds(self.pool, self.workers)
        self.rounds = LayerRounds(
            self.shared, home, RECORD, self.table.native, self.table.begin, self.slab.bytes, self.each
        )
        self.counters = Counters()
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()
        self.workers.close()
        self.file.close()

    def run(
        self,
        ids: np.ndarray,
        x: np.ndarray,
        mask: np.ndarray | None = None,
        room: int = 1 << 14,
        hint: Hint | None = None,
    ) -> np.ndarray:
        y, hidden = np.zeros_like(x), np.full(room, np.nan, np.float32)
        self.counters.tally(self.rounds.run(ids, x, None, mask, hidden, y, True, hint))
        return y

    def share(self, other: Layer) -> None:
        """Work as two layers of one engine."""
        self.shared = self.rounds._shared = other.shared

    def hint(self, scoring: np.ndarray, least: float) -> Hint:
        """By magnitudes of scoring [RECORDS, D] times the normalized state, rectified."""
        norm = Norm(np.ones(D, np.float32), None, 1e-5, centred=False)
        matrix = native.Matrix(scoring.ctypes.data, *scoring.shape, native.DTYPES["F32"], keep=scoring)
        return Hint(self.rounds, norm, matrix, None, least, (native.ACTIVATIONS["relu"], 0.0))

    def ahead(self, scores: np.ndarray, least: float) -> None:
        self.counters.tally(self.rounds.ahead(scores, least))

    def check(self, records: np.ndarray) -> None:
        """Every record that the table knows is in its slot."""
        self.table.check()
        assert self.table.native.reservation == 0
        for record in self.table.resident():
            slot = int(self.table.native.slot_of[record])
            at = slot * self.each + int(self.table.begin[slot])
            assert np.array_equal(self.slab.bytes[at : at + BYTES], records[record].view(np.uint8))


def at_once(records: np.ndarray, ids: np.ndarray, x: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The FFN of records that all lie in memory."""
    slab, y = records.reshape(-1).view(np.uint8).copy(), np.zeros_like(x)
    offsets, cols = ids.astype(np.int64) * BYTES, np.arange(len(ids), dtype=np.int32)
    hidden = np.zeros((len(x), len(ids)), np.float32)
    with native.Workers(1) as workers:
        native.ffn_hidden(workers, RECORD, slab, offsets, ids, cols, x, None, mask, hidden)
        native.ffn_down(workers, RECORD, slab, offsets, cols, hidden, y)
    return y


def some(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.sort(rng.permutation(RECORDS)[:count]).astype(np.int32)


def steps(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Sets, inputs and scores that half agree with the sets."""
    for count in (0, 1, 40, 90, 60, 300, 5, 80, 80):
        ids, scores = some(rng, count), rng.random(RECORDS).astype(np.float32)
        scores[ids[::2]] += 1
        yield ids, rng.standard_normal((1, D)).astype(np.float32), scores


@pytest.mark.parametrize("hints", [False, True])
@pytest.mark.parametrize(
    ("slots", "gap", "mode"), [(300, 2000, "auto"), (100, -1, "buffered"), (17, 0, "auto"), (1, 0, "auto")]
)
def test_bits_and_counts(path: Path, records: np.ndarray, slots: int, gap: int, mode: str, hints: bool) -> None:
    rng = np.random.default_rng(slots)
    with Layer(path, slots, gap, mode=mode) as layer:
        needed = 0
        for ids, x, scores in steps(rng):
            if hints:
                layer.ahead(scores, 1.0)
            assert np.array_equal(layer.run(ids, x), at_once(records, ids, x))
            layer.check(records)
            needed += len(ids)
        total, system = layer.counters, layer.pool.counters
        assert total.hits + total.misses == needed
        assert (total.flash_reads, total.needed_bytes) == (system.reads, (total.misses + total.prefetch_used) * BYTES)
        assert total.flash_bytes >= system.read_bytes
        assert (total.prefetched > 0) == (hints and slots > 4)
        assert total.prefetch_wasted_bytes >= (total.prefetched - total.prefetch_used) * BYTES
        assert 0 < total.fired < needed


@pytest.mark.parametrize("room", [7, 64, 1 << 14])
def test_several_tokens_with_masks(path: Path, records: np.ndarray, room: int) -> None:
    rng = np.random.default_rng(1)
    with Layer(path, 90) as layer:
        for count in (50, 90, 200):
            ids, x = some(rng, count), rng.standard_normal((7, D)).astype(np.float32)
            mask = (rng.random((7, RECORDS)) < 0.5).astype(np.uint8)
            assert np.array_equal(layer.run(ids, x, mask, room), at_once(records, ids, x, mask))
            layer.check(records)


def test_numbers_that_are_none_come_through(path: Path, records: np.ndarray) -> None:
    ids, x = some(np.random.default_rng(2), 50), np.ones((1, D), np.float32)
    x[0, 3] = np.nan
    with Layer(path, 60) as layer:
        assert np.isnan(layer.run(ids, x)).all()
        layer.check(records)


def test_the_likeliest_are_read_first_and_a_quarter_of_the_slots_at_most(path: Path) -> None:
    scores = np.random.default_rng(3).random(RECORDS).astype(np.float32)
    scores[5] = np.nan
    with Layer(path, 200, gap=-1, threads=1) as layer:
        layer.ahead(scores, 0.5)
        layer.counters.tally(layer.rounds.drop())
        found = layer.table.resident()
        assert len(found) == layer.counters.prefetched == layer.counters.flash_reads <= 50
        assert found.tolist() == sorted(np.argsort(-np.nan_to_num(scores))[: len(found)].tolist())
        assert layer.counters.prefetch_wasted_bytes == len(found) * BYTES
        layer.table.check()


@pytest.mark.parametrize("least", [-1.0, 0.0, 1.0])
def test_of_equal_scores_the_lower_records_are_read_ahead(path: Path, least: float) -> None:
    """Against sorting them; zeros of both signs are equal, and what is in slots is not read."""
    rng = np.random.default_rng(7)
    scores = rng.choice([-0.0, 0.0, -1.0, 1.0, 2.0, np.nan, np.inf], RECORDS).astype(np.float32)
    with Layer(path, 280, threads=1) as layer:
        there = some(rng, 30)
        layer.run(there, np.ones((1, D), np.float32))
        layer.ahead(scores, least)
        named = [i for i in np.argsort(-scores, kind="stable").tolist() if scores[i] >= least and i not in there]
        assert np.flatnonzero(layer.table.native.slot_of < -1).tolist() == sorted(named[: 280 // 4])
        layer.counters.tally(layer.rounds.drop())
        layer.table.check()


def test_hints_for_more_than_the_slots_hold_read_nothing(path: Path) -> None:
    with Layer(path, 100) as layer:
        layer.ahead(np.ones(RECORDS, np.float32), 0.5)
        assert layer.table.native.reservation == 0 and layer.pool.counters.reads == 0


def test_reads_ahead_of_another_layer_end_when_this_one_runs(path: Path, records: np.ndarray) -> None:
    ids, x = np.arange(30, dtype=np.int32), np.ones((1, D), np.float32)
    with Layer(path, 100) as first, Layer(path, 100) as second:
        second.share(first)
        first.ahead(np.arange(RECORDS, dtype=np.float32), 280.0)
        assert np.array_equal(second.run(ids, x), at_once(records, ids, x))
        first.check(records)
        second.check(records)


def test_a_layer_starts_the_reads_of_the_next(path: Path, records: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    scoring = rng.standard_normal((RECORDS, D)).astype(np.float32)
    with Layer(path, 120) as first, Layer(path, 120) as second:
        second.share(first)
        hint, used = second.hint(scoring, 9.0), 0
        for _ in range(6):
            h, ids = rng.standard_normal((1, D)).astype(np.float32), some(rng, 60)
            likely = np.flatnonzero(scoring @ h[0] / np.sqrt((h**2).mean() + 1e-5) > 9.0).astype(np.int32)
            before = second.table.native.slot_of.copy()
            assert np.array_equal(first.run(ids, h, hint=hint.of(h)), at_once(records, ids, h))
            ahead = np.flatnonzero(second.table.native.slot_of < -1)
            assert ahead.tolist() == [record for record in likely if before[record] < 0]
            wanted = np.union1d(likely[::2], ids[:5]).astype(np.int32)
            assert np.array_equal(second.run(wanted, h), at_once(records, wanted, h))
            first.check(records)
            second.check(records)
            used += len(np.intersect1d(ahead, wanted))
        assert second.counters.prefetch_used == used > 0
        assert first.counters.hint_s > 0


def test_a_layer_that_needs_nothing_starts_the_reads_of_the_next(path: Path, records: np.ndarray) -> None:
    scoring, h = np.ones((RECORDS, D), np.float32), np.ones((1, D), np.float32)
    scoring[:280] = -1
    with Layer(path, 120) as first, Layer(path, 120) as second:
        second.share(first)
        assert not first.run(np.empty(0, np.int32), h, hint=second.hint(scoring, 0.5).of(h)).any()
        assert np.flatnonzero(second.table.native.slot_of < -1).tolist() == list(range(280, RECORDS))
        ids = np.arange(270, 290, dtype=np.int32)
        assert np.array_equal(second.run(ids, h), at_once(records, ids, h))
        assert second.counters.prefetch_used == 10
        second.check(records)


def test_a_hint_that_fails_costs_nothing(path: Path, tmp_path: Path, records: np.ndarray) -> None:
    scoring, h = np.ones((RECORDS, D), np.float32), np.ones((1, D), np.float32)
    scoring[:280] = -1
    ids, broken = np.arange(0, RECORDS, 4, dtype=np.int32), tmp_path / "flash-001.safetensors"
    broken.write_bytes(path.read_bytes()[: OFFSET + 290 * STRIDE])
    with Layer(path, 120, mode="buffered") as first, Layer(broken, 120, mode="buffered") as second:
        second.share(first)
        for _ in range(2):
            assert np.array_equal(first.run(ids, h, hint=second.hint(scoring, 0.5).of(h)), at_once(records, ids, h))
            with pytest.raises(FlashReadError, match="flash-001"):
                second.run(ids, h)
            second.check(records)
        first.run(ids, h, hint=second.hint(scoring, 0.5).of(h))
        broken.write_bytes(path.read_bytes())
        assert np.array_equal(second.run(ids, h), at_once(records, ids, h))
        second.check(records)
        with pytest.raises(ValueError, match="scores of"):
            second.hint(scoring[:, :-1].copy(), 0.5)


@pytest.mark.parametrize("hints", [False, True])
def test_a_read_that_fails_leaves_the_table_whole(path: Path, records: np.ndarray, hints: bool) -> None:
    ids, x, whole = np.arange(0, RECORDS, 3, dtype=np.int32), np.ones((1, D), np.float32), path.read_bytes()
    scores = np.linspace(0, 1, RECORDS, dtype=np.float32)
    with Layer(path, 120, mode="buffered") as layer:
        layer.run(ids[:20], x)
        os.truncate(path, OFFSET + 200 * STRIDE)
        for _ in range(3):
            if hints:
                layer.ahead(scores, 0.8)
            with pytest.raises(FlashReadError, match=r"flash-000.*file ends") as failed:
                layer.run(ids, x)
            assert failed.value.offset + failed.value.length > OFFSET + 200 * STRIDE
            layer.check(records)
        path.write_bytes(whole)
        assert np.array_equal(layer.run(ids, x), at_once(records, ids, x))
        layer.check(records)


@pytest.mark.parametrize("ids", [[3, 2], [4, 4], [-1, 2], [299, 300]])
def test_wrong_ids_are_refused(path: Path, records: np.ndarray, ids: list[int]) -> None:
    with Layer(path, 20) as layer:
        with pytest.raises(ValueError, match="ascending"):
            layer.run(np.array(ids, np.int32), np.ones((1, D), np.float32))
        layer.check(records)


def test_wrong_operands_are_refused(path: Path) -> None:
    ids, x = np.arange(3, dtype=np.int32), np.ones((1, D), np.float32)
    with Layer(path, 20) as layer:
        for wrong in (x[:, :-1], x.astype(np.float64)):
            with pytest.raises(ValueError, match="x: expected"):
                layer.run(ids, wrong)
        with pytest.raises(ValueError, match="mask"):
            layer.run(ids, x, np.ones((1, RECORDS - 1), np.uint8))
        with pytest.raises(ValueError, match="room"):
            layer.run(ids, np.ones((8, D), np.float32), room=7)
        with pytest.raises(ValueError, match="scores"):
            layer.ahead(np.ones(3, np.float32), 0.0)
        with pytest.raises(ValueError, match="slots of"):
            LayerRounds(
                layer.shared, Home("", 3, 0, BYTES, STRIDE, 1, 0, 0), RECORD, layer.table.native, layer.table.begin,
                layer.slab.bytes[:-1], layer.each,
            )  # fmt: skip


def test_a_closed_pool_is_said(path: Path) -> None:
    with Layer(path, 20) as layer:
        layer.pool.close()
        with pytest.raises(ValueError, match="closed"):
            layer.run(np.arange(3, dtype=np.int32), np.ones((1, D), np.float32))
