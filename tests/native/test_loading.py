"""Reads for later: after all others, held on request, and what they take of memory counted to the page."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np
import pytest

from flashsparse import FlashReadError
from flashsparse.flash import FlashFile, ReadPool
from flashsparse.loading import Loading
from flashsparse.pack.safetensors import read_header
from flashsparse.touching import for_this_system
from flashsparse.weights import READ_BYTES, Buffer, ResidentStore
from tests.native.test_touching import in_memory

PIECE = 4096


@pytest.fixture(params=["buffered", "direct"])
def file(tmp_path: Path, request: pytest.FixtureRequest) -> FlashFile:
    (tmp_path / "file").write_bytes(np.random.default_rng(0).bytes(64 * PIECE))
    return FlashFile(tmp_path / "file", request.param)


def places(buffer: Buffer, pieces: int) -> tuple[np.ndarray, ...]:
    """Reads of the file's pieces, again and again, into one after the other."""
    at = np.arange(pieces, dtype=np.int64)
    sizes = np.full(pieces, PIECE)
    return at % 64 * PIECE, sizes, sizes, buffer.address + at * PIECE


@pytest.mark.parametrize("threads", [2, 16])
def test_nothing_for_later_is_begun_while_paused(file: FlashFile, threads: int) -> None:
    many, few = Buffer(4000 * PIECE), Buffer(8 * PIECE)
    with ReadPool(threads) as pool, file:
        assert pool.pause() == 0
        with pool.submit(file, *places(many, 4000), later=True) as later:
            assert pool.pause() == 4000
            with pool.submit(file, *places(few, 8)) as now:
                now.wait()
            assert pool.counters.reads == 8 and pool.pause() == 4000
            later.check()
            pool.resume()
            later.wait()
            assert pool.counters.reads == 4008 and pool.pause() == 0
            np.testing.assert_array_equal(many.bytes[: 64 * PIECE], np.fromfile(file.path, np.uint8))


@pytest.mark.parametrize("threads", [1, 16])
def test_what_is_needed_now_comes_first(file: FlashFile, threads: int) -> None:
    many, few = Buffer(200_000 * PIECE), Buffer(PIECE)
    with ReadPool(threads) as pool, file, pool.submit(file, *places(many, 200_000), later=True) as later:
        with pool.submit(file, *places(few, 1)) as now:
            now.wait()
        assert pool.pause() > 0  # of 200,000
        pool.resume()
        later.release()


@pytest.mark.parametrize("threads", [2, 16])
def test_dropping_and_closing_while_paused(file: FlashFile, threads: int) -> None:
    buffer, ones = Buffer(500 * PIECE), [Buffer(PIECE), Buffer(PIECE)]
    with ReadPool(threads) as pool, file:
        pool.pause()
        first, second = (pool.submit(file, *places(one, 1), later=True) for one in ones)
        with pool.submit(file, *places(buffer, 500), later=True) as later:
            kept = later.keep(np.arange(500) < 3)
            assert kept.sum() == 3 and pool.pause() == 5
            first.release()
            assert pool.pause() == 4
        assert pool.pause() == 1
    second.release()


@pytest.mark.parametrize("threads", [2, 16])
def test_what_is_for_later_goes_on_after_what_is_needed_now(file: FlashFile, threads: int) -> None:
    """Also where others read what is needed now: whoever begins or drops the last of it wakes them."""
    many, few = Buffer(64 * PIECE), Buffer(64 * PIECE)
    with ReadPool(threads) as pool, file:
        for round_ in range(100):
            with pool.submit(file, *places(few, 64)) as now, pool.submit(file, *places(many, 64), later=True) as later:
                if round_ % 2:
                    now.keep(np.zeros(64, bool))
                later.wait()
                now.wait()
            assert np.array_equal(many.bytes, np.fromfile(file.path, np.uint8))


def test_a_failure_is_told_without_waiting(file: FlashFile) -> None:
    buffer = Buffer(4 * PIECE)
    with ReadPool(1) as pool, file:
        offsets, lengths, needs, dests = places(buffer, 4)
        with pool.submit(file, offsets + 63 * PIECE, lengths, needs, dests, later=True) as batch:
            with pytest.raises(FlashReadError):
                batch.wait()
            with pytest.raises(FlashReadError, match=f"at offset {64 * PIECE}"):
                batch.check()
        batch.check()  # released


@pytest.mark.skipif(not for_this_system(), reason="reads the page table of Linux")
@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_what_reads_take_of_memory_is_counted_to_the_page(tmp_path: Path, mode: str) -> None:
    rows, names = 5 * READ_BYTES // 512 + 3, [f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 10, 2, 1)]
    size = rows * 512
    header = {name: {"dtype": "F16", "shape": [rows, 256], "data_offsets": [at * size, (at + 1) * size]}
              for at, name in enumerate(names)}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 16384)
    path = tmp_path / "resident.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(len(names) * size))
    seen = set()
    with FlashFile(path, mode) as file, ReadPool(1) as pool:
        store = ResidentStore(read_header(path), file, {})
        pool.pause()
        loading = Loading(pool, [store], 11)
        while True:
            with loading.still() as taken:
                assert taken == sum(in_memory(buffer.bytes) for buffer in store.buffers) * mmap.PAGESIZE
                seen.add(taken)
                over = pool.counters.needed_bytes == sum(nbytes for _, nbytes in store.stretches)
            if over:
                break
        loading.wait()
    assert 0 in seen and 0 <= store.nbytes - taken < 16384
