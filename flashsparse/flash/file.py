"""A file of records opened for reading, and the rounding that direct reads need.

Direct reads bypass the page cache (O_DIRECT, F_NOCACHE); their offsets, lengths and addresses are multiples of the
sector, which is probed by really reading. A filesystem that refuses them gets buffered reads, and `.direct` says so.
"""

from __future__ import annotations

import math
import mmap
import os
import warnings
from types import TracebackType
from typing import TypeVar

import numpy as np

from flashsparse.errors import FlashReadError, UsageError
from flashsparse.macos import here, open_direct

MODES = ("auto", "direct", "buffered")
SECTORS = (512, 4096)
Ints = TypeVar("Ints", int, np.ndarray)


class FlashFile:
    """`path` opened read-only. `.fd`, `.size` (bytes), `.direct`, `.sector` (1 when buffered).

    Modes "auto" and "direct" read directly where the filesystem allows it. Raises FlashReadError when it cannot be
    opened, UsageError for an unknown mode.
    """

    def __init__(self, path: str | os.PathLike[str], mode: str = "auto") -> None:
        if mode not in MODES:
            raise UsageError(f"read mode {mode!r} is not one of {', '.join(MODES)}")
        self.path = os.fspath(path)
        self.sector, self.direct = 1, False
        self.fd = -1
        try:
            if mode != "buffered":
                self._open_direct()
            if self.fd < 0:
                self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self.fd).st_size
        except OSError as error:
            raise FlashReadError(
                f"{self.path}: cannot be opened: {error.strerror}", self.path, 0, 0, error.errno or 0
            ) from None
        self.direct = self.sector > 1

    def _open_direct(self) -> None:
        if here():
            self.fd = open_direct(self.path)
            self.sector = SECTORS[-1]  # unaligned reads are allowed, but go through the page cache
            return
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            return
        self.sector = probe_sector(fd)
        if self.sector > 1:
            self.fd = fd
        else:
            os.close(fd)

    def close(self) -> None:
        """Close the descriptor; no reads may be in flight."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            warnings.warn(f"unclosed {self!r}: close it, or the engine that reads from it", ResourceWarning, 2, self)
            self.close()

    def __enter__(self) -> FlashFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FlashFile({self.path!r}, direct={self.direct}, sector={self.sector})"


def probe_sector(fd: int) -> int:
    """The smallest of SECTORS at whose multiples this descriptor reads, into memory aligned no better; 1 if none."""
    with mmap.mmap(-1, 4 * SECTORS[-1]) as memory:
        for sector in SECTORS:
            with memoryview(memory)[sector : 2 * sector] as part:
                try:
                    os.preadv(fd, [part], sector if os.fstat(fd).st_size >= 2 * sector else 0)
                except OSError:
                    continue
            return sector
    return 1


def read_range(file: FlashFile, offset: Ints, length: int | Ints) -> tuple[Ints, Ints]:
    """(start, length) of the sectors that hold `length` bytes at `offset` of the file; both may be int64 arrays."""
    sector = file.sector
    start = offset // sector * sector
    return start, -(-(offset + length) // sector) * sector - start


def slot_stride(stride: int, data_offset: int, sector: int, direct: bool) -> int:
    """Bytes of memory for one record of `stride` bytes, wherever it begins: record i is at data_offset + i · stride.

    Direct: the most sectors any record touches, exactly, in bytes. Buffered: the stride itself.
    """
    if not direct:
        return stride
    # Begins are data_offset + i · stride modulo the sector: every residue congruent to data_offset modulo the gcd.
    step = math.gcd(stride, sector)
    latest = data_offset % step + sector - step
    return -(-(latest + stride) // sector) * sector
