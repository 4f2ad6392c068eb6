"""Files, geometry and the read pool: every byte arrives or an error names the file and the offset."""

from __future__ import annotations

import gc
import mmap
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from flashsparse import FlashReadError, UsageError
from flashsparse.flash import Batch, FlashFile, ReadPool, read_range, slot_stride

GROUPED = 16  # threads from which on direct reads are begun several at a time, where the system can
SIZE = 1_000_003  # odd, so that the last sector is a part


@pytest.fixture(scope="module")
def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SIZE).astype(np.uint8)


@pytest.fixture
def path(tmp_path: Path, content: np.ndarray) -> Path:
    (tmp_path / "flash-000.safetensors").write_bytes(content.tobytes())
    return tmp_path / "flash-000.safetensors"


class Memory:
    """Page-aligned memory, filled with 0xAA."""

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size + 4096)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.bytes[:] = 0xAA
        self.address = self.bytes.ctypes.data


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def read_some(
    pool: ReadPool, file: FlashFile, wanted: np.ndarray, size: int, memory: Memory, stride: int
) -> tuple[Batch, np.ndarray]:
    """Submit reads of `size` bytes at `wanted`, one for each `stride` of memory; also where in memory they begin."""
    starts, lengths = read_range(file, wanted, size)
    begins = wanted - starts
    places = np.arange(len(wanted)) * stride
    return pool.submit(file, starts, lengths, begins + size, memory.address + places), places + begins


def check(memory: Memory, at: np.ndarray, content: np.ndarray, wanted: np.ndarray, size: int) -> None:
    for place, offset in zip(at, wanted, strict=True):
        assert np.array_equal(memory.bytes[place : place + size], content[offset : offset + size])


@pytest.mark.parametrize("mode", ["direct", "buffered"])
@pytest.mark.parametrize("size", [1, 700, 4096, 5001])
@pytest.mark.parametrize("threads", [1, 8])
def test_every_byte_arrives(path: Path, content: np.ndarray, mode: str, size: int, threads: int) -> None:
    wanted = np.random.default_rng(1).integers(0, SIZE - size, 300)
    wanted[:2] = SIZE - size, 0  # up to the very end, and from the very beginning
    memory = Memory(300 * 16384)
    with FlashFile(path, mode) as file, ReadPool(threads) as pool:
        batch, at = read_some(pool, file, wanted, size, memory, 16384)
        with batch:
            taken = []
            while len(done := batch.take()):
                check(memory, at[done], content, wanted[done], size)
                taken.extend(done.tolist())
        assert sorted(taken) == list(range(300))
        counters = pool.counters
        assert counters.reads == 300
        assert counters.needed_bytes >= 300 * size
        assert counters.read_bytes >= counters.needed_bytes
        assert 0 < counters.active_s <= counters.busy_s


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux begins several reads with one call")
def test_a_quarter_as_many_threads_begin_several_at_a_time(path: Path) -> None:
    """Without them every test of GROUPED threads would be one of reads one by one."""
    before = len(os.listdir("/proc/self/task"))
    with ReadPool(GROUPED):
        more = len(os.listdir("/proc/self/task")) - before
    with ReadPool(4):
        assert len(os.listdir("/proc/self/task")) - before == 4
    if more == GROUPED:
        pytest.skip("this system refuses io_setup")
    assert more == GROUPED + GROUPED // 4


def test_modes(path: Path) -> None:
    with FlashFile(path, "buffered") as file:
        assert (file.direct, file.sector, file.size) == (False, 1, SIZE)
    with FlashFile(path) as file:
        assert file.sector in ((512, 4096) if file.direct else (1,))
    with pytest.raises(UsageError, match="'mapped' is not one of auto, direct, buffered"):
        FlashFile(path, "mapped")


def test_refused_direct_reads_become_buffered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    with FlashFile(path, "direct") as file:
        assert not file.direct or os.uname().sysname == "Darwin"
    monkeypatch.undo()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FlashReadError, match=r"nowhere\.bin: cannot be opened: No such file") as failed:
        FlashFile(tmp_path / "nowhere.bin")
    assert failed.value.errno == 2


@pytest.mark.parametrize("mode", ["direct", "buffered"])
@pytest.mark.parametrize("cut", [0, 700, 4096, 50_000, 50_100])
@pytest.mark.parametrize("threads", [2, GROUPED])
def test_a_truncated_file_is_an_error_and_never_zeros(path: Path, mode: str, cut: int, threads: int) -> None:
    memory = Memory(8192)
    with FlashFile(path, mode) as file, ReadPool(threads) as pool:
        os.truncate(path, cut)
        batch, _ = read_some(pool, file, numbers(50_000), 3000, memory, 8192)
        with batch, pytest.raises(FlashReadError, match="the file ends") as failed:
            batch.wait()
        error = failed.value
        assert error.path == str(path)
        assert error.offset <= 50_000 < error.offset + error.length
        assert error.errno == 0
        assert (memory.bytes[4096:] == 0xAA).all()


def test_a_failing_device_is_an_error_with_its_reason(path: Path, tmp_path: Path) -> None:
    memory = Memory(4096)
    with FlashFile(path, "buffered") as file, ReadPool(2) as pool:
        os.close(file.fd)
        file.fd = os.open(tmp_path, os.O_RDONLY)  # reading a directory fails as a device would, with its own errno
        with pool.submit(file, numbers(512), numbers(64), numbers(64), numbers(memory.address)) as batch:
            with pytest.raises(FlashReadError, match="64 bytes at offset 512 failed: Is a directory") as failed:
                batch.wait()
            assert failed.value.errno == 21
            with pytest.raises(FlashReadError):
                batch.take()


def test_a_closed_file_is_refused(path: Path) -> None:
    memory = Memory(4096)
    with ReadPool(1) as pool:
        file = FlashFile(path, "buffered")
        file.close()
        file.close()
        batch = pool.submit(file, numbers(0), numbers(9), numbers(9), numbers(memory.address))
        with batch, pytest.raises(FlashReadError, match="Bad file descriptor"):
            batch.wait()


def test_one_failure_among_many_reads(path: Path, content: np.ndarray) -> None:
    """Others arrive or are dropped; after the error nothing is in flight, and the pool serves the next batch."""
    memory = Memory(1000 * 64)
    wanted = np.arange(1000) * 64
    wanted[500] = SIZE
    with FlashFile(path, "buffered") as file, ReadPool(4) as pool:
        batch, at = read_some(pool, file, wanted, 64, memory, 64)
        with batch, pytest.raises(FlashReadError, match=f"at offset {SIZE} failed: the file ends after 0"):
            while len(done := batch.take()):
                check(memory, at[done], content, wanted[done], 64)
        batch, at = read_some(pool, file, wanted[:50], 64, memory, 64)
        with batch:
            batch.wait()
        check(memory, at, content, wanted[:50], 64)


def test_several_files_in_one_batch(tmp_path: Path) -> None:
    memory = Memory(4096)
    paths = [tmp_path / name for name in ("a", "b")]
    for index, one in enumerate(paths):
        one.write_bytes(bytes([index + 1]) * 100)
    with ReadPool(2) as pool, FlashFile(paths[0], "buffered") as a, FlashFile(paths[1], "buffered") as b:
        dests = memory.address + numbers(0, 100, 200)
        with pool.submit([a, b, a], numbers(0, 0, 50), numbers(100, 100, 50), numbers(100, 100, 50), dests) as batch:
            batch.wait()
        assert memory.bytes[:250].tolist() == [1] * 100 + [2] * 100 + [1] * 50
        batch = pool.submit([a, b], numbers(0, 90), numbers(9, 20), numbers(9, 20), dests[:2])
        with batch, pytest.raises(FlashReadError, match=f"^{paths[1]}: "):
            batch.wait()


def test_impossible_requests_are_refused(path: Path) -> None:
    one = numbers(1)
    with FlashFile(path, "buffered") as file, ReadPool(1) as pool:
        for offset, length, need, dest in ((-1, 4, 4, 64), (0, 4, 5, 64), (0, 4, -1, 64), (0, 4, 4, 0)):
            with pytest.raises(ValueError, match="in range"):
                pool.submit(file, one * offset, one * length, one * need, one * dest)
        with pytest.raises(ValueError, match="2 files"):
            pool.submit([file, file], one, one, one, one)
    with pytest.raises(ValueError, match="closed"):
        pool.submit(file, one, one, one, one)


def test_empty_batch(path: Path) -> None:
    none = numbers()
    with FlashFile(path) as file, ReadPool(2) as pool, pool.submit(file, none, none, none, none) as batch:
        assert len(batch) == 0
        assert len(batch.take()) == 0


@pytest.mark.parametrize("mode", ["direct", "buffered"])
@pytest.mark.parametrize("threads", [6, GROUPED])
def test_many_batches_from_many_threads(path: Path, content: np.ndarray, mode: str, threads: int) -> None:
    failures: list[BaseException] = []

    def client(seed: int) -> None:
        rng, memory = np.random.default_rng(seed), Memory(60 * 8192)
        try:
            for _ in range(25):
                size = int(rng.integers(1, 3000))
                wanted = rng.integers(0, SIZE - size, int(rng.integers(0, 60)))
                batch, at = read_some(pool, file, wanted, size, memory, 8192)
                with batch:
                    if seed % 2:
                        batch.wait()
                        check(memory, at, content, wanted, size)
        except BaseException as error:
            failures.append(error)

    with FlashFile(path, mode) as file, ReadPool(threads) as pool:
        clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
    assert not failures


@pytest.mark.parametrize(
    ("mode", "threads", "step"), [("buffered", 4, 64), ("direct", 4, 512), ("direct", GROUPED, 512)]
)
def test_released_memory_is_not_written(path: Path, mode: str, threads: int, step: int) -> None:
    """Releasing without waiting drops what has not begun and waits for the rest: no write comes later."""
    memory = Memory(2000 * 4096)
    with FlashFile(path, mode) as file, ReadPool(threads) as pool:
        for _ in range(20):
            batch, _ = read_some(pool, file, np.arange(1900) * step, 64, memory, 4096)
            batch.release()
            memory.bytes[:] = 0x55
            following, _ = read_some(pool, file, numbers(0), 1, memory, 4096)
            with following:
                following.wait()
            assert (memory.bytes[4096:] == 0x55).all()
        with pytest.raises(ValueError, match="released"):
            batch.take()


@pytest.mark.parametrize(("mode", "threads"), [("buffered", 4), ("direct", GROUPED)])
def test_closing_the_pool_with_reads_in_flight(path: Path, mode: str, threads: int) -> None:
    memory = Memory(2000 * 4096)
    with FlashFile(path, mode) as file:
        for _ in range(20):
            pool = ReadPool(threads)
            batch, _ = read_some(pool, file, np.arange(2000) * 64, 64, memory, 4096)
            pool.close()
            with pytest.raises(ValueError, match="closed"):
                batch.take()
            batch.release()
            pool.close()
            del batch
            gc.collect()


def test_closing_the_pool_wakes_a_waiting_thread(path: Path) -> None:
    memory = Memory(2000 * 512)
    with FlashFile(path, "direct") as file:
        for _ in range(10):
            pool, outcome = ReadPool(1), []
            batch, _ = read_some(pool, file, np.arange(1000) * 512, 512, memory, 1024)
            taker = threading.Thread(target=drain, args=(batch, outcome))
            taker.start()
            pool.close()
            taker.join(30)
            assert outcome in (["finished"], ["closed"])


def drain(batch: Batch, outcome: list[str]) -> None:
    try:
        batch.wait()
        outcome.append("finished")
    except ValueError:
        outcome.append("closed")


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("stride", [64, 192, 512, 4096, 6912, 16384, 16448])
@pytest.mark.parametrize("data_offset", [0, 16384, 16448, 100])
def test_slot_stride_is_the_exact_maximum(sector: int, stride: int, data_offset: int) -> None:
    begins = data_offset + np.arange(sector, dtype=np.int64) * stride
    starts, ends = begins // sector * sector, -(-(begins + stride) // sector) * sector
    assert slot_stride(stride, data_offset, sector, direct=True) == int((ends - starts).max())
    assert slot_stride(stride, data_offset, sector, direct=False) == stride


def test_read_range_rounds_out(path: Path) -> None:
    with FlashFile(path, "buffered") as file:
        assert read_range(file, 777, 10) == (777, 10)
        file.sector = 512
        assert read_range(file, 1000, 100) == (512, 1024)
        assert read_range(file, 1024, 512) == (1024, 512)
        starts, lengths = read_range(file, numbers(0, 511), 2)
        assert (starts.tolist(), lengths.tolist()) == ([0, 0], [512, 1024])


def test_reads_nobody_has_begun_can_be_dropped(path: Path, content: np.ndarray) -> None:
    wanted = np.arange(300) * 3000
    memory = Memory(300 * 8192)
    keep = np.random.default_rng(5).random(300) < 0.3
    with FlashFile(path) as file, ReadPool(1) as pool:
        batch, at = read_some(pool, file, wanted, 2000, memory, 8192)
        with batch:
            kept = batch.keep(keep)
            assert np.all(kept[keep])
            again = batch.keep(kept)  # dropped ones stay dropped
            assert np.array_equal(again, kept)
            taken: list[int] = []
            while len(done := batch.take()):
                check(memory, at[done], content, wanted[done], 2000)
                taken.extend(done.tolist())
    assert sorted(taken) == np.flatnonzero(kept).tolist()
    assert not kept.all()  # one thread cannot have begun all of 300 reads
    assert np.all(memory.bytes.reshape(-1)[at[~kept]] == 0xAA)
