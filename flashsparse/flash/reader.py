"""The read pool: batches of positioned reads, done by native threads straight into memory addresses.

Owns batches' life time: a batch keeps its files and its pool, and is released only when no read is in flight, so that
memory it reads into is never written after release. What is read where is the caller's decision.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from flashsparse.errors import FlashReadError, NativeLibraryError, SessionError
from flashsparse.flash.file import FlashFile
from flashsparse.native.library import CReadError, lib, process

READ = np.dtype(
    [("offset", "<i8"), ("length", "<i8"), ("need", "<i8"), ("dest", "<u8"), ("fd", "<i4"), ("reserved", "<i4")]
)
FAILED, UNKNOWN = -1, -2
Landed = Callable[[np.ndarray], None]
STAGING_BYTES = 128 << 10  # of each thread at most, for a request that brings several records


@dataclass(frozen=True)
class Counters:
    """What a pool has done since it was made; `reads` are requests, `busy_s` seconds in them over all threads,
    `active_s` those in which any thread was in one."""

    reads: int
    needed_bytes: int
    read_bytes: int
    busy_s: float
    active_s: float


class ReadPool:
    """`threads` native threads that read. Thread-safe; batches are served in the order they were submitted.

    Those submitted for `later` are served while nothing else waits.
    `staging`: bytes of each thread, a multiple of 4096; records whose request is longer are read one by one.
    Belongs to the process that made it: a fork has none of the threads, and using it there raises SessionError.
    """

    def __init__(self, threads: int = 16, staging: int = STAGING_BYTES) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.threads, self.closed = threads, False
        self._process, self._numbers = process(), itertools.count(1)
        self._handle = lib().fs_pool_create(threads, staging)
        if not self._handle:
            raise NativeLibraryError(f"cannot start {threads} read threads")

    @property
    def forked(self) -> bool:
        """Whether this is another process than the one that made the pool."""
        return self._process != process()

    @property
    def handle(self) -> int:
        """What the library knows the pool by. Raises SessionError in a fork."""
        if self.forked:
            raise SessionError("the read threads were created before fork; load the pack again in this process")
        return self._handle

    def submit(
        self,
        files: FlashFile | Sequence[FlashFile],
        offsets: np.ndarray,
        lengths: np.ndarray,
        needs: np.ndarray,
        dests: np.ndarray,
        *,
        later: bool = False,
    ) -> Batch:
        """Start reading `lengths` bytes at file `offsets` into addresses `dests`, arrays of n integers each.

        files: one for all reads, or one for each. Of every read `needs` bytes must arrive; the rest may lie beyond the
        end of the file. The memory must stay until the batch is released; unfinished batches that read into the same
        stretch of memory are waited for. Raises ValueError for impossible requests, FlashReadError when the memory for
        bookkeeping is lacking.
        """
        if self.closed:
            raise ValueError("this read pool is closed")
        n = len(offsets)
        each = [files] * n if isinstance(files, FlashFile) else list(files)
        reads = np.zeros(n, READ)
        for name, values in (("offset", offsets), ("length", lengths), ("need", needs), ("dest", dests)):
            reads[name] = values
        if len(each) != n or (n and _impossible(reads)):
            raise ValueError(f"{n} reads: {len(each)} files; offsets and needs must be in range, needs <= lengths")
        reads["fd"] = files.fd if isinstance(files, FlashFile) else [file.fd for file in each]
        return self.submit_runs(each, reads, np.arange(n + 1, dtype=np.int32), n, later=later)

    def submit_runs(
        self,
        files: Sequence[FlashFile],
        reads: np.ndarray,
        firsts: np.ndarray,
        runs: int,
        order: np.ndarray | None = None,
        landed: Landed | None = None,
        later: bool = False,
    ) -> Batch:
        """Start `reads` (READ [n], checked by the caller) as `runs` requests, divided as `firsts` says (fs_plan_reads).

        files: one for each read. order: what the batch calls read i, order[i], when that is not i. landed: called with
        the indices of finished reads before they are given out. Raises ValueError when the pool is closed,
        FlashReadError when the memory for bookkeeping is lacking.
        """
        if self.closed:
            raise ValueError("this read pool is closed")
        batch = Batch(self, next(self._numbers), files, reads, order, landed)
        try:  # the batch knows its number before it begins, so that no interrupt leaves reads that nobody can release
            failed = -lib().fs_pool_submit(
                self.handle, batch.number, reads.ctypes.data, len(reads), firsts.ctypes.data, runs, later
            )
            if failed:
                raise FlashReadError(f"cannot submit {len(reads)} reads: {os.strerror(failed)}", "", 0, 0, failed)
            return batch
        except BaseException:
            batch.release()
            raise

    def pause(self) -> int:
        """Begin no read that is for later until `resume`, and wait for those in flight; how many nobody has begun."""
        return int(lib().fs_pool_pause(self.handle))

    def resume(self) -> None:
        """After `pause`; also without one."""
        lib().fs_pool_resume(self.handle)

    @property
    def counters(self) -> Counters:
        values = (ctypes.c_int64 * 5)()
        lib().fs_pool_counters(self.handle, ctypes.byref(values))
        return Counters(values[0], values[1], values[2], values[3] / 1e9, values[4] / 1e9)

    def close(self) -> None:
        """Drop waiting reads, wait for those in flight, stop the threads. Later uses of its batches fail."""
        self.closed = True
        if not self.forked:
            lib().fs_pool_stop(self._handle)

    def __del__(self) -> None:
        # Only here is nobody inside a call: batches keep their pool.
        if getattr(self, "_handle", None) and not self.forked:
            lib().fs_pool_destroy(self._handle)
            self._handle = None  # when both are collected in a cycle, a batch may be finalized after its pool

    def __enter__(self) -> ReadPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _impossible(reads: np.ndarray) -> bool:
    return bool(
        (reads["offset"] < 0).any()
        or (reads["need"] < 0).any()
        or (reads["need"] > reads["length"]).any()
        or (reads["dest"] == 0).any()
    )


def read_error(path: str, offset: int, need: int, got: int, error: int) -> FlashReadError:
    """For `need` bytes at `offset` of which only `got` came, by errno `error` or, with 0, because the file ended."""
    what = os.strerror(error) if error else f"the file ends after {got} of them"
    return FlashReadError(f"{path}: reading {need} bytes at offset {offset} failed: {what}", path, offset, need, error)


class Batch:
    """Reads submitted together; their indices are positions in the submitted arrays. Release it, or use `with`."""

    _open = False  # until it is made, should an interrupt come before

    def __init__(
        self,
        pool: ReadPool,
        number: int,
        files: Sequence[FlashFile],
        reads: np.ndarray,
        order: np.ndarray | None = None,
        landed: Landed | None = None,
    ) -> None:
        self.number, self._pool, self._files, self._reads, self._order = number, pool, files, reads, order
        self._landed = landed
        self._open = True

    def __len__(self) -> int:
        return len(self._reads)

    def take(self, least: int = 1) -> np.ndarray:
        """Wait for finished reads; their indices (int32), each once, in no particular order. Empty: all are taken.

        least: how many to wait for, unless fewer are left. Being woken costs, so take what makes work worth starting.
        Raises FlashReadError naming file, offset and reason when a read failed; no other is in flight then. And what
        `landed` raises.
        """
        if not self._open:
            raise ValueError("this batch is released")
        done = np.empty(len(self._reads), np.int32)
        count = lib().fs_pool_take(self._pool.handle, self.number, done.ctypes.data, len(done), least)
        if count == FAILED:
            raise self._error()
        if count == UNKNOWN:
            raise ValueError("this batch is gone: its read pool is closed")
        taken = done[:count] if self._order is None else self._order[done[:count]]
        if self._landed is not None and count:
            self._landed(taken)
        return taken

    def wait(self) -> None:
        """Wait for all reads. Raises FlashReadError as take() does."""
        while len(self.take(len(self._reads))):
            pass

    def check(self) -> None:
        """Raises FlashReadError when one of its reads has failed; waits for none."""
        if self._open and lib().fs_pool_error(self._pool.handle, self.number, ctypes.byref(CReadError())):
            raise self._error()

    def _error(self) -> FlashReadError:
        error = CReadError()
        lib().fs_pool_error(self._pool.handle, self.number, ctypes.byref(error))
        read, path = self._reads[error.index], self._files[error.index].path
        return read_error(path, int(read["offset"]), int(read["need"]), error.got, error.error)

    def keep(self, wanted: np.ndarray) -> np.ndarray:
        """Drop the reads that nobody has begun and that are not `wanted` (bool [n]); bool [n]: those not dropped.

        The kept ones go on, in their order; a request of several reads is dropped when none of them is wanted. A failed
        batch has no reads left to keep: `take` raises.
        """
        kept = (wanted if self._order is None else wanted[self._order]).astype(np.uint8)
        if self._open:
            lib().fs_pool_keep(self._pool.handle, self.number, kept.ctypes.data)
        if self._order is None:
            return kept.view(bool)
        result = np.empty(len(kept), bool)
        result[self._order] = kept
        return result

    def release(self) -> None:
        """Drop the reads nobody has begun and wait for those in flight; the memory is free afterwards. Idempotent."""
        if self._open:
            if self._pool._handle and not self._pool.forked:
                lib().fs_pool_release(self._pool.handle, self.number)
            self._open = False  # last: after an interrupt the next release does it

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()
