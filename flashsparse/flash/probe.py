"""Measuring a drive's curve: a bare loop of preads, over sizes and depths, in a few seconds.

Owns the passes, the temporary file and the emptying of the page cache; what the figures mean is
`flashsparse.flash.curve`'s business.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import mmap
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashsparse.errors import FlashReadError, FlashSparseError, format_bytes
from flashsparse.flash.curve import AGREE, DEPTHS, SIZES, Curve, device_name
from flashsparse.flash.file import FlashFile
from flashsparse.native.library import lib

POINT_S = 0.02  # of one point
PASSES = 4  # at most, over all points
FILE_BYTES = 512 << 20  # of the temporary file
LEAST_BYTES = 128 << 20  # of existing files that are measured instead of it


def measure(folder: Path, files: Sequence[Path] = (), size: int = FILE_BYTES) -> Curve:
    """Measure the device under `folder`: on `files` that lie there, else on a temporary file of `size` bytes.

    Raises FlashReadError when reading fails, FlashSparseError when there is no room for the temporary file.
    """
    if sum(path.stat().st_size for path in files) >= LEAST_BYTES:
        return _measure(device_name(folder), sorted(files, key=lambda path: -path.stat().st_size)[:4])
    with temporary_file(folder, size) as path:
        return _measure(device_name(folder), [path])


@contextlib.contextmanager
def temporary_file(folder: Path, size: int) -> Iterator[Path]:
    """A file of `size` random bytes in `folder`, gone afterwards. Raises FlashSparseError without room for it."""
    path = _write(folder, size)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write(folder: Path, size: int) -> Path:
    """A file whose bytes are really on the drive; a hole would be read without it."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if free < 2 * size:
        raise FlashSparseError(
            f"{folder}: measuring the drive takes a temporary file of {format_bytes(size)} and twice that free; "
            f"found {format_bytes(free)}; make room, or name a folder on the same drive with --at"
        )
    path = folder / f".flashsparse-{os.getpid()}.tmp"
    block = np.random.default_rng(0).integers(0, 256, 8 << 20, np.uint8).tobytes()
    try:
        with open(path, "xb", buffering=0) as file:
            for _ in range(size // len(block)):
                file.write(block)
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise FlashSparseError(f"{path}: cannot be written: {error.strerror}; name another folder with --at") from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _measure(device: str, paths: Sequence[Path]) -> Curve:
    """Passes over all points until two agree and nothing else speaks against them, PASSES at most."""
    with Loop(max(SIZES) * max(DEPTHS)) as loop, _opened(paths) as files:
        passes: list[_Pass] = []
        while True:
            passes.append(_pass(loop, files, len(passes)))
            if not passes[0].tables:
                raise FlashSparseError(
                    f"{paths[0]}: direct reads are refused and the page cache cannot be emptied: no curve"
                )
            if len(passes) == 1:
                continue
            curve = _curve(device, passes)
            if len(passes) == PASSES or (curve.spread <= AGREE and not curve.doubts()):
                return curve


@dataclass(frozen=True)
class _Pass:
    """Rates [sizes, depths] for each mode that works here, and in order."""

    tables: dict[str, np.ndarray]
    sequential: float


def _curve(device: str, passes: Sequence[_Pass]) -> Curve:
    """The best of every point: others may use the drive too. The spread is that of the fastest pass and its nearest."""
    modes = [mode for mode in ("direct", "buffered") if all(mode in found.tables for found in passes)]
    if not modes:
        raise FlashSparseError("the page cache could be emptied once, but not again: no curve; try on a quiet machine")
    best = {mode: np.max([found.tables[mode] for found in passes], axis=0) for mode in modes}
    logs = [np.log(found.tables[modes[0]]) for found in passes]
    fastest = max(range(len(logs)), key=lambda at: float(logs[at].mean()))
    apart = [float(np.median(np.abs(logs[fastest] - other))) for at, other in enumerate(logs) if at != fastest]
    tables = {mode: tuple(tuple(map(float, row)) for row in rates) for mode, rates in best.items()}
    sequential = max(found.sequential for found in passes)
    return Curve(device, tables.get("direct"), tables.get("buffered"), sequential, time.time(), math.exp(min(apart)))


Files = dict[str, list[FlashFile]]


@contextlib.contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[Files]:
    """The files in each mode; none in "direct" where that is refused."""
    with contextlib.ExitStack() as stack:
        files = {
            mode: [stack.enter_context(FlashFile(path, mode)) for path in paths] for mode in ("direct", "buffered")
        }
        if not all(file.direct for file in files["direct"]):
            del files["direct"]
        yield files


def _pass(loop: Loop, files: Files, number: int) -> _Pass:
    """Once over all points, direct and buffered in turn: what else uses the drive meanwhile meets both."""
    rng, found = np.random.default_rng(number), {mode: np.zeros((len(SIZES), len(DEPTHS))) for mode in files}
    for (i, size), (j, depth) in itertools.product(enumerate(SIZES), enumerate(DEPTHS)):
        for mode in list(found):
            rate = _point(loop, files[mode][(j + number) % len(files[mode])], rng, size, depth)
            if rate is None:
                del found[mode]
            else:
                found[mode][i, j] = rate
    first = next(iter(files.values()))[0]
    empty_cache(first)
    offsets = np.arange(0, first.size - SIZES[-1], SIZES[-1], dtype=np.int64)
    return _Pass(found, loop.rate(first, offsets, SIZES[-1], 8, 0.15) if found else 0.0)


def _point(loop: Loop, file: FlashFile, rng: np.random.Generator, size: int, depth: int) -> float | None:
    if not file.direct and not empty_cache(file):
        return None
    places = rng.integers(0, max(1, (file.size - size) // 4096), 4096)
    return loop.rate(file, places * 4096, size, depth, POINT_S)


class Loop:
    """Memory for bare reads, `nbytes` of it, in huge pages where the system has them."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._bytes[:] = 1

    @property
    def address(self) -> int:
        return self._bytes.ctypes.data

    def rate(self, file: FlashFile, offsets: np.ndarray, size: int, depth: int, seconds: float) -> float:
        """Bytes per second of `depth` threads that read `size` bytes at each of `offsets`, for `seconds` at most.

        Raises FlashReadError.
        """
        if depth * size > len(self._bytes):
            raise ValueError(f"{depth} reads of {size} bytes need more than the {len(self._bytes)} bytes there are")
        places, out = np.ascontiguousarray(offsets, np.int64), (ctypes.c_int64 * 2)()
        failed = -lib().fs_read_rate(
            file.fd, places.ctypes.data, len(places), size, depth, int(seconds * 1e9), self._bytes.ctypes.data, out
        )
        if failed or not out[0]:
            reason = os.strerror(failed) if failed else "nothing was read"
            raise FlashReadError(f"{file.path}: measuring reads failed: {reason}", file.path, 0, size, failed)
        return float(out[0] * size / (out[1] / 1e9))

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._bytes
        self._map.close()


def empty_cache(file: FlashFile) -> bool:
    """Drop the file's pages from the page cache; whether less than a hundredth of them is left."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(file) < 0.01


def cached_share(file: FlashFile) -> float:
    """The share of the file's pages in the page cache, by mincore; 1 where the system does not tell."""
    if not file.size or sys.platform != "linux":
        return 1.0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    with mmap.mmap(file.fd, file.size, prot=mmap.PROT_READ) as view:
        pages = np.empty(-(-file.size // mmap.PAGESIZE), np.uint8)
        array = np.frombuffer(view, np.uint8)
        failed = libc.mincore(array.ctypes.data, file.size, pages.ctypes.data)
        del array
    return 1.0 if failed else float((pages & 1).mean())
