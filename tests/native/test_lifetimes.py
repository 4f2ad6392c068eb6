"""Threads and reads end when they should: closed during a call, interrupted, or carried into a fork."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from flashsparse import native
from flashsparse.flash import FlashFile, ReadPool, reader

READS = 400

FORKING = """
import os, signal, sys
import numpy as np
from flashsparse import SessionError, native
from flashsparse.flash import FlashFile, ReadPool

pool, workers, file = ReadPool(4), native.Workers(3), FlashFile(sys.argv[1], "buffered")
memory, one = np.zeros(64, np.uint8), np.ones(1, np.int64)
data = np.ones((64, 64), np.float32)
matrix = native.Matrix(data.ctypes.data, 64, 64, native.DTYPES["F32"], keep=data)

def use():
    with pool.submit(file, 0 * one, 64 * one, 64 * one, memory.ctypes.data * one) as batch:
        batch.wait()
    native.linear(workers, matrix, None, data, np.empty_like(data))

def refused(call):
    try:
        call()
    except SessionError as error:
        assert "before fork" in str(error)
        return
    raise AssertionError("not refused")

use()
batch = pool.submit(file, 0 * one, 64 * one, 64 * one, memory.ctypes.data * one)
child = os.fork()
if child == 0:
    signal.alarm(30)
    refused(use)
    refused(lambda: workers.handle)
    refused(batch.take)
    batch.release()
    if sys.argv[2] == "close":
        pool.close()
        workers.close()
    if sys.argv[2] == "_exit":
        os._exit(0)
    if sys.argv[2] == "delete":
        del batch, pool, workers, use
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
batch.wait()
use()
"""


@pytest.mark.parametrize("how", ["exit", "_exit", "close", "delete"])
def test_a_fork_is_refused_and_ends(tmp_path: Path, how: str) -> None:
    (tmp_path / "file").write_bytes(bytes(64))
    subprocess.run([sys.executable, "-c", FORKING, str(tmp_path / "file"), how], check=True, timeout=100)


def test_a_file_that_is_dropped_is_closed_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64))
    file = FlashFile(tmp_path / "file")
    number = file.fd
    with pytest.warns(ResourceWarning, match=f"unclosed FlashFile.*{tmp_path}"):
        del file
    with pytest.raises(OSError):
        os.fstat(number)
    closed = FlashFile(tmp_path / "file")
    closed.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del closed


def test_closing_workers_during_calls() -> None:
    data = np.ones((512, 256), np.float32)
    matrix = native.Matrix(data.ctypes.data, 512, 256, native.DTYPES["F32"], keep=data)
    wrong: list[object] = []

    def compute(workers: native.Workers, begun: threading.Event) -> None:
        out = np.empty((8, 512), np.float32)
        try:
            while True:
                out[:] = 0
                native.linear(workers, matrix, None, data[:8], out)
                begun.set()
                if not (out == 256).all():
                    wrong.append(out.copy())
        except ValueError as error:
            if "closed" not in str(error):
                wrong.append(error)

    for _ in range(10):
        workers, begun = native.Workers(3), threading.Event()
        threads = [threading.Thread(target=compute, args=(workers, begun)) for _ in range(2)]
        for thread in threads:
            thread.start()
        begun.wait()
        workers.close()
        for thread in threads:
            thread.join()
        del workers
    assert not wrong


class Interrupt:
    """Raises KeyboardInterrupt before the n-th bytecode that runs in flashsparse.flash.reader, as a signal would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, frame: FrameType, event: str, _: object) -> Interrupt | None:
        if frame.f_code.co_filename != reader.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


@pytest.fixture
def file(tmp_path: Path) -> FlashFile:
    (tmp_path / "file").write_bytes(np.repeat(np.arange(2, dtype=np.uint8), READS * 64).tobytes())
    with FlashFile(tmp_path / "file", "buffered") as opened:
        yield opened


def places(memory: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets in the file, lengths, and addresses of READS reads of 64 bytes, which fill the memory."""
    at = np.arange(READS, dtype=np.int64) * 64
    return at, np.full(READS, 64), memory.ctypes.data + at


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # interrupts while batches are dropped
def test_an_interrupted_submit_leaves_no_reads(file: FlashFile) -> None:
    memory, other = (np.frombuffer(mmap.mmap(-1, READS * 64), np.uint8) for _ in range(2))
    offsets, sizes, dests = places(memory)
    after, interrupt = 0, Interrupt(0)
    with ReadPool(4) as pool:
        while interrupt.left <= 0:
            after += 1
            interrupt, interrupted = Interrupt(after), False
            try:
                with interrupt:
                    pool.submit(file, offsets, sizes, sizes, dests)
            except KeyboardInterrupt:
                interrupted = True
            if interrupted:
                memory[:] = 0x55
                with pool.submit(file, offsets[:1], sizes[:1], sizes[:1], places(other)[2][:1]) as following:
                    following.wait()
                assert (memory == 0x55).all()
    assert after > 100


def test_reads_wait_for_lost_ones_into_the_same_memory(file: FlashFile) -> None:
    memory = np.frombuffer(mmap.mmap(-1, READS * 64), np.uint8)
    offsets, sizes, dests = places(memory)
    with ReadPool(4) as pool:
        for _ in range(20):
            lost = pool.submit(file, offsets, sizes, sizes, dests)
            with pool.submit(file, offsets + READS * 64, sizes, sizes, dests) as batch:
                batch.wait()
            assert (memory == 1).all()
            lost.release()
            assert (memory == 1).all()


@pytest.mark.parametrize("window", [0, 1030])
def test_attention_while_its_scratch_grows(window: int) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 2, 16)).astype(np.float32)
    keys, values = (rng.standard_normal((1, 2100, 16)).astype(np.float32) for _ in range(2))
    outs = [np.empty_like(q) for _ in range(2)]
    with native.Workers(2) as growing:
        for offset in (0, 1022, 1023, 1024, 1029, 1030, 2047, 2048, 2099):
            native.attention(growing, q, keys, values, "F32", offset, window, 0.25, outs[0])
            with native.Workers(1) as fresh:
                native.attention(fresh, q, keys, values, "F32", offset, window, 0.25, outs[1])
            assert np.array_equal(*outs)
