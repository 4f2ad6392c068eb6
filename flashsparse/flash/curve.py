"""The device curve: how fast a drive gives random reads, by their size and how many are in flight.

Measured with a bare loop of preads in a few seconds, kept in the user's cache for each device and file system, and used
by the read plan. Owns measuring, the cache and what follows from the figures; it knows no packs and no models.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import math
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashsparse.errors import FlashReadError, FlashSparseError, format_bytes
from flashsparse.flash.file import FlashFile
from flashsparse.flash.plan import SEPARATE, Merging
from flashsparse.flash.reader import STAGING_BYTES
from flashsparse.flash.stream import Costs
from flashsparse.native.library import lib

SIZES = tuple(4096 << power for power in range(9))  # 4 KiB to 1 MiB
DEPTHS = (1, 2, 4, 8, 16, 32)
POINT_S = 0.02  # of one point; direct ones are measured twice, and the better counts: others may use the drive too
FILE_BYTES = 512 << 20  # of the temporary file
LEAST_BYTES = 128 << 20  # of existing files that are measured instead of it
BUFFERED_WINS = 1.25  # by less, the memory that no budget counts is not worth it
LEAST_THREADS = 8  # one too many costs its staging, one too few the speed of the drive's better minutes
VERSION = 1

Rates = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Curve:
    """Bytes per second: `direct[i][j]` and `buffered[i][j]` at SIZES[i] and DEPTHS[j], `sequential` in large pieces.

    `direct` is None where the file system refuses it, `buffered` where the page cache could not be emptied.
    """

    device: str
    direct: Rates | None
    buffered: Rates | None
    sequential: float

    def rates(self) -> Rates:
        """Those of the faster mode."""
        return self._faster()[1]

    @property
    def mode(self) -> str:
        """ "direct" or "buffered"; buffered has to win by BUFFERED_WINS."""
        return self._faster()[0]

    def _faster(self) -> tuple[str, Rates]:
        if self.direct is None:
            assert self.buffered is not None
            return "buffered", self.buffered
        if self.buffered is not None and _area(self.buffered) > BUFFERED_WINS * _area(self.direct):
            return "buffered", self.buffered
        return "direct", self.direct

    def best(self, size: int) -> float:
        """Bytes per second of random reads of `size` bytes at the best depth measured."""
        times = [at / max(row) for at, row in zip(SIZES, self.rates(), strict=True)]
        if size <= SIZES[0]:
            return size / times[0]
        if size >= SIZES[-1]:
            return max(self.rates()[-1])
        return size / float(np.interp(size, SIZES, times))

    def depth(self, size: int) -> int:
        """The fewest reads in flight that reach 95 % of the best rate at the measured size next to `size`."""
        row = self.rates()[min(range(len(SIZES)), key=lambda i: abs(math.log(SIZES[i] / max(size, 1))))]
        return next(depth for depth, rate in zip(DEPTHS, row, strict=True) if rate >= 0.95 * max(row))

    def threads(self, size: int) -> int:
        """Read threads for records of `size` bytes: the depth, but some more where the curve asks for few."""
        return max(LEAST_THREADS, self.depth(size))

    def merging(self, size: int) -> Merging:
        """The gap between records of `size` bytes that costs as much as the request that reading it saves.

        With r(s) the rate at s bytes and R the rate of the longest request, a request costs s / r(s) and one byte more
        1 / R; so the gap is s (R / r(s) - 1).
        """
        longest = max(self.best(at) for at in SIZES if at <= STAGING_BYTES)
        gap = int(size * (longest / self.best(size) - 1))
        return Merging(gap=gap) if gap > 0 else SEPARATE

    def costs(self) -> Costs:
        """Seconds of one request among many, by its size; beyond the largest measured at the rate of reads in order."""
        seconds = np.maximum.accumulate([size / max(row) for size, row in zip(SIZES, self.rates(), strict=True)])
        rate = max(self.sequential, *self.rates()[-1])
        return Costs((*SIZES, 2 * SIZES[-1]), (*map(float, seconds), float(seconds[-1]) + SIZES[-1] / rate))

    def to_dict(self) -> dict[str, Any]:
        return {"version": VERSION, "sizes": SIZES, "depths": DEPTHS, **asdict(self)}


def _area(rates: Rates) -> float:
    """The mean over sizes of the logarithm's exponential: one number for a curve."""
    return math.exp(sum(math.log(max(row)) for row in rates) / len(rates))


def device_name(folder: Path) -> str:
    """What a curve is kept under: file system, device and the file system's identity, as far as the system says."""
    device = os.stat(folder).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    kind = source = ""
    try:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            if left.split()[2] == name:
                kind, source = right.split()[:2]
    except (OSError, IndexError, ValueError):
        kind = sys.platform
    return f"{kind or sys.platform} {source or name} {os.statvfs(folder).f_fsid:x}"


def cached_path(cache: Path, folder: Path) -> Path:
    """The file in the user's cache that holds the curve of the device under `folder`."""
    return cache / "devices" / f"{hashlib.sha256(device_name(folder).encode()).hexdigest()[:16]}.json"


def load_curve(cache: Path, folder: Path) -> Curve | None:
    """The curve kept for `folder`'s device; None when there is none or it is damaged."""
    try:
        stored = json.loads(cached_path(cache, folder).read_text())
        if (stored["version"], tuple(stored["sizes"]), tuple(stored["depths"])) != (VERSION, SIZES, DEPTHS):
            return None
        curve = Curve(
            str(stored["device"]), _rates(stored["direct"]), _rates(stored["buffered"]), float(stored["sequential"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = curve.device == device_name(folder) and (curve.direct or curve.buffered) and curve.sequential > 0
    return curve if known else None


def _rates(stored: Any) -> Rates | None:
    if stored is None:
        return None
    rates = tuple(tuple(float(rate) for rate in row) for row in stored)
    if len(rates) != len(SIZES) or any(len(row) != len(DEPTHS) for row in rates):
        raise ValueError("a damaged curve")
    if not all(math.isfinite(rate) and rate > 0 for row in rates for rate in row):
        raise ValueError("a damaged curve")
    return rates


def save_curve(curve: Curve, cache: Path, folder: Path) -> None:
    """Keep the curve for `folder`'s device. Raises OSError."""
    path = cached_path(cache, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(curve.to_dict()))
    partial.replace(path)


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
    with Loop(max(SIZES) * max(DEPTHS)) as loop:
        direct, buffered = _tables(loop, paths)
        sequential = 0.0
        with FlashFile(paths[0], "direct") as file:
            for _ in range(2):
                empty_cache(file)
                offsets = np.arange(0, file.size - SIZES[-1], SIZES[-1], dtype=np.int64)
                sequential = max(sequential, loop.rate(file, offsets, SIZES[-1], 8, 0.15))
    if direct is None and buffered is None:
        raise FlashSparseError(f"{paths[0]}: direct reads are refused and the page cache cannot be emptied: no curve")
    return Curve(device, direct, buffered, sequential)


def _tables(loop: Loop, paths: Sequence[Path]) -> tuple[Rates | None, Rates | None]:
    """Direct and buffered rates, point by point in turn: what else uses the drive meanwhile meets both."""
    rng, found = (
        np.random.default_rng(0),
        {mode: np.zeros((len(SIZES), len(DEPTHS))) for mode in ("direct", "buffered")},
    )
    with contextlib.ExitStack() as stack:
        files = {mode: [stack.enter_context(FlashFile(path, mode)) for path in paths] for mode in found}
        if not all(file.direct for file in files["direct"]):
            del found["direct"]
        for (i, size), (j, depth) in itertools.product(enumerate(SIZES), enumerate(DEPTHS)):
            for mode, turn in (("direct", 0), ("buffered", 0), ("direct", 1)):
                if mode not in found:
                    continue
                rate = _point(loop, files[mode][(j + turn) % len(paths)], rng, size, depth)
                if rate is None:
                    del found[mode]
                else:
                    found[mode][i, j] = max(found[mode][i, j], rate)
    tables = {mode: tuple(tuple(map(float, row)) for row in rates) for mode, rates in found.items()}
    return tables.get("direct"), tables.get("buffered")


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
