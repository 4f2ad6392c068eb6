"""The read plan: every record arrives whole where it was sent, whatever the requests are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from flashsparse import FlashReadError
from flashsparse.flash import FlashFile, Merging, ReadPool, Reads, reads, slot_stride
from flashsparse.flash.plan import SEPARATE
from flashsparse.flash.reader import STAGING_BYTES
from tests.native.test_reader import Memory

RECORDS, OFFSET = 400, 16384


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, OFFSET + RECORDS * 6976).astype(np.uint8)


@pytest.fixture
def path(tmp_path: Path, content: np.ndarray) -> Path:
    (tmp_path / "flash-000.safetensors").write_bytes(content.tobytes())
    return tmp_path / "flash-000.safetensors"


class Layer:
    """Slots for the records of a file, `stride` apart; a record ends three bytes before its stride does."""

    def __init__(self, file: FlashFile, stride: int) -> None:
        self.file, self.stride, self.size = file, stride, stride - 3
        self.slot = slot_stride(stride, OFFSET, file.sector, file.direct)
        self.memory = Memory(RECORDS * self.slot)

    def plan(self, ids: np.ndarray, merging: Merging) -> tuple[Reads, np.ndarray]:
        """The plan, and where in memory each record will begin."""
        slots = np.random.default_rng(3).permutation(RECORDS)[: len(ids)] * self.slot
        plan = reads(self.file, OFFSET + ids * self.stride, self.size, self.memory.address + slots, merging)
        return plan, slots + plan.begins

    def check(self, at: np.ndarray, ids: np.ndarray, content: np.ndarray) -> None:
        for place, position in zip(at, OFFSET + ids * self.stride, strict=True):
            assert np.array_equal(
                self.memory.bytes[place : place + self.size], content[position : position + self.size]
            )


@pytest.mark.parametrize("mode", ["direct", "buffered"])
@pytest.mark.parametrize("stride", [64, 832, 4096, 6976])
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize(
    "merging", [SEPARATE, Merging(0), Merging(9000), Merging(1 << 20, 50_000), Merging(0, 1 << 30)]
)
@pytest.mark.parametrize(  # requests one by one, several at a time, and longer ones than there is memory for
    ("threads", "staging"), [(4, STAGING_BYTES), (16, STAGING_BYTES), (16, 16384)]
)
def test_every_record_arrives(
    path: Path, content: np.ndarray, mode: str, stride: int, share: float, merging: Merging, threads: int, staging: int
) -> None:
    ids = np.flatnonzero(np.random.default_rng(2).random(RECORDS) < share).astype(np.int64)
    with FlashFile(path, mode) as file, ReadPool(threads, staging) as pool:
        layer = Layer(file, stride)
        plan, at = layer.plan(ids, merging)
        with plan.submit(pool) as batch:
            taken = []
            while len(done := batch.take()):
                layer.check(at[done], ids[done], content)
                taken.extend(done.tolist())
        assert sorted(taken) == list(range(len(ids)))
        assert (pool.counters.reads, pool.counters.needed_bytes) == (plan.requests, int(plan.reads["need"].sum()))
        if staging == STAGING_BYTES:
            assert plan.nbytes - 4096 < pool.counters.read_bytes <= plan.nbytes  # the last one may end with the file


def test_records_in_any_order(path: Path, content: np.ndarray) -> None:
    ids = np.random.default_rng(2).permutation(RECORDS)[:250].astype(np.int64)
    with FlashFile(path) as file, ReadPool(4) as pool:
        layer = Layer(file, 6976)
        plan, at = layer.plan(ids, Merging(20_000))
        assert plan.requests < 100
        with plan.submit(pool) as batch:
            while len(done := batch.take(7)):
                layer.check(at[done], ids[done], content)


@pytest.mark.parametrize("sector", [1, 512, 4096])
@pytest.mark.parametrize("gap", [-1, 0, 4096, 20_000])
@pytest.mark.parametrize("longest", [1, 30_000, 1 << 30])
def test_requests_join_what_the_rule_allows(path: Path, sector: int, gap: int, longest: int) -> None:
    """Against the rule, written out: runs as long as gap, longest and 256 records allow, and the bytes they move."""
    ids = np.flatnonzero(np.random.default_rng(4).random(RECORDS) < 0.6)
    with FlashFile(path, "buffered") as file:
        file.sector = sector
        positions = OFFSET + ids.astype(np.int64) * 832
        plan = reads(file, positions, 800, np.full(len(ids), 4096), Merging(gap, longest))
    runs: list[tuple[int, int, int]] = []  # first record, first byte, end
    for index, position in enumerate(positions.tolist()):
        start, end = position // sector * sector, -(-(position + 800) // sector) * sector
        first, begin, before = runs[-1] if runs else (0, 0, -(1 << 60))
        if gap >= 0 and start - before <= gap and end - begin <= min(longest, STAGING_BYTES) and index - first < 256:
            runs[-1] = (first, begin, end)
        else:
            runs.append((index, start, end))
    assert plan.firsts[: plan.requests].tolist() == [first for first, _, _ in runs]
    assert plan.firsts[plan.requests] == len(ids)
    assert plan.nbytes == sum(end - begin for _, begin, end in runs)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("gap", [-1, 0, 20_000])
def test_requests_begin_with_the_lowest_rank(path: Path, content: np.ndarray, shuffled: bool, gap: int) -> None:
    rng = np.random.default_rng(6)
    ids = rng.permutation(RECORDS)[:150].astype(np.int64)
    ids, rank = ids if shuffled else np.sort(ids), rng.permutation(150)
    with FlashFile(path) as file, ReadPool(4) as pool:
        layer = Layer(file, 6976)
        plan, at = layer.plan(ids, Merging(gap))
        ranked = plan.ranked(rank)
        assert (ranked.requests, ranked.firsts[-1 if gap < 0 else ranked.runs]) == (plan.requests, 150)
        order = np.arange(150) if ranked.order is None else ranked.order
        lowest = np.minimum.reduceat(rank[order], ranked.firsts[: ranked.runs])
        assert lowest.tolist() == sorted(lowest)
        with ranked.submit(pool) as batch:
            while len(done := batch.take()):
                layer.check(at[done], ids[done], content)
        assert ranked.moved(np.ones(150, bool)) == (pool.counters.reads, plan.nbytes)


def test_requests_that_bring_nothing_kept_do_not_move(path: Path) -> None:
    ids = np.array([0, 1, 2, 50, 51, 90], np.int64)
    with FlashFile(path, "buffered") as file:
        plan = reads(file, ids * 1000, 1000, np.full(6, 4096), Merging(0))
        rank = np.array([3, 4, 5, 6, 0, 1])
        for one in (plan, plan.ranked(rank)):
            assert one.moved(np.array([0, 1, 0, 0, 0, 1], bool)) == (2, 4000)
            assert one.moved(np.zeros(6, bool)) == (0, 0)
        none = reads(file, ids[:0], 1000, ids[:0])
        assert none.moved(np.zeros(0, bool)) == (0, 0) and none.ranked(ids[:0]) is none


@pytest.mark.parametrize("mode", ["direct", "buffered"])
@pytest.mark.parametrize("threads", [1, 16])
def test_a_merged_request_that_fails_names_the_record(path: Path, content: np.ndarray, mode: str, threads: int) -> None:
    """The file ends within the seventh record: the six before it arrive."""
    ids = np.arange(18, dtype=np.int64)
    with FlashFile(path, mode) as file, ReadPool(threads) as pool:
        layer = Layer(file, 6976)
        plan, at = layer.plan(ids, Merging(64, 1 << 20))
        assert plan.requests == 1
        os.truncate(path, OFFSET + 6 * 6976 + 5000)
        with plan.submit(pool) as batch:
            with pytest.raises(FlashReadError, match=f"^{path}: reading .* the file ends after") as failed:
                while len(done := batch.take()):
                    layer.check(at[done], ids[done], content)
            assert failed.value.offset <= OFFSET + 6 * 6976 < failed.value.offset + failed.value.length


def test_no_records_and_impossible_ones(path: Path) -> None:
    none = np.zeros(0, np.int64)
    with FlashFile(path) as file, ReadPool(1) as pool:
        plan = reads(file, none, 100, none)
        assert (plan.requests, plan.nbytes) == (0, 0)
        with plan.submit(pool) as batch:
            assert len(batch.take()) == 0
        with pytest.raises(ValueError, match="in range"):
            reads(file, np.array([-600]), 100, np.array([4096]))
        with pytest.raises(ValueError, match="in range"):
            reads(file, np.array([600]), 100, np.array([0]))


def test_taking_several_waits_for_them(path: Path) -> None:
    with FlashFile(path, "buffered") as file, ReadPool(3) as pool:
        layer = Layer(file, 64)
        plan, _ = layer.plan(np.arange(0, 100, dtype=np.int64), SEPARATE)
        with plan.submit(pool) as batch:
            sizes = []
            while len(done := batch.take(30)):
                sizes.append(len(done))
            assert sum(sizes) == 100
            assert all(size >= 30 for size in sizes[:-1])
