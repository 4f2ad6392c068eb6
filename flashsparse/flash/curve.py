"""The device curve: how fast a drive gives random reads, by their size and how many are in flight.

Kept in the user's cache for each device and file system, and used by the read plan. Owns the figures, their cache, what
follows from them and whether to believe them; `flashsparse.flash.probe` measures them. Knows no packs and no models.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flashsparse.flash.plan import SEPARATE, Merging
from flashsparse.flash.reader import STAGING_BYTES
from flashsparse.flash.stream import Costs

SIZES = tuple(4096 << power for power in range(9))  # 4 KiB to 1 MiB
DEPTHS = (1, 2, 4, 8, 16, 32)
BUFFERED_WINS = 1.25  # by less, the memory that no budget counts is not worth it
LEAST_THREADS = 8  # one too many costs its staging, one too few the speed of the drive's better minutes
SMALL_READ, SMALL_READ_THREADS = 64 << 10, 16  # a curve of a slow minute asks for 8, which halves the speed of others
FEWER_WIN = 1.25  # times as fast: by less, reads below SMALL_READ get SMALL_READ_THREADS
AGREE = 1.3  # how far two passes may be apart, in the median over points; beyond, another is measured
DOUBTFUL = 2.0
DAYS = 30  # a curve is believed
FALLING = 3  # sizes that lose half of their rate with most reads in flight; fewer are noise
VERSION = 2

Rates = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Curve:
    """Bytes per second: `direct[i][j]` and `buffered[i][j]` at SIZES[i] and DEPTHS[j], `sequential` in large pieces.

    `direct` is None where the file system refuses it, `buffered` where the page cache could not be emptied.
    `measured`: when, in seconds since 1970; `spread`: how many times faster or slower a second pass was, in the median.
    """

    device: str
    direct: Rates | None
    buffered: Rates | None
    sequential: float
    measured: float = field(default_factory=time.time)
    spread: float = 1.0

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
        return _between(size, [max(row) for row in self.rates()])

    def at(self, size: float, depth: float, mode: str) -> float | None:
        """Bytes per second of random reads of `size` bytes with `depth` in flight; None where `mode` has no figures."""
        rates = self.direct if mode == "direct" else self.buffered
        if rates is None:
            return None
        return _between(size, [float(np.interp(math.log2(max(depth, 1)), np.log2(DEPTHS), row)) for row in rates])

    def _row(self, size: int) -> tuple[float, ...]:
        """Of the measured size next to `size`."""
        return self.rates()[min(range(len(SIZES)), key=lambda i: abs(math.log(SIZES[i] / max(size, 1))))]

    def depth(self, size: int) -> int:
        """The fewest reads in flight that reach 95 % of the best rate at the measured size next to `size`."""
        row = self._row(size)
        return next(depth for depth, rate in zip(DEPTHS, row, strict=True) if rate >= 0.95 * max(row))

    def threads(self, size: int) -> int:
        """Read threads for records of `size` bytes: the depth, but some more where the curve asks for few.

        Small reads get SMALL_READ_THREADS at least, unless fewer were FEWER_WIN times as fast.
        """
        row, least = self._row(size), LEAST_THREADS
        if size < SMALL_READ:
            at = DEPTHS.index(SMALL_READ_THREADS)
            least = LEAST_THREADS if max(row[:at]) > FEWER_WIN * max(row[at:]) else SMALL_READ_THREADS
        return max(least, self.depth(size))

    def doubts(self, now: float | None = None) -> list[str]:
        """What speaks against these figures being the drive's, `now` in seconds since 1970; empty when nothing does."""
        rates, days = self.rates(), ((time.time() if now is None else now) - self.measured) / 86400
        random, least, longest = max(rates[-1]), max(rates[0]), max(rates[SIZES.index(STAGING_BYTES)])
        falling = [size for size, row in zip(SIZES, rates, strict=True) if row[-1] < 0.5 * max(row)]
        found = [
            (days > DAYS, f"measured {days:.0f} days ago"),
            (self.spread > DOUBTFUL, f"two passes were {self.spread:.1f} times apart"),
            (longest < least, f"reads of {STAGING_BYTES >> 10} KiB moved less than those of {SIZES[0] >> 10} KiB"),
            (self.sequential < 0.5 * random, "reading in order was less than half as fast as at random places"),
            (
                len(falling) >= FALLING,
                f"{len(falling)} sizes lost half of their rate with {DEPTHS[-1]} reads in flight",
            ),
        ]
        return [reason for holds, reason in found if holds]

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


def _between(size: float, rates: Sequence[float]) -> float:
    """The rate at `size` when SIZES have `rates`: a request's time is linear between them."""
    if size <= SIZES[0]:
        return rates[0] * size / SIZES[0]
    if size >= SIZES[-1]:
        return rates[-1]
    return size / float(np.interp(size, SIZES, [at / rate for at, rate in zip(SIZES, rates, strict=True)]))


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
            str(stored["device"]),
            _rates(stored["direct"]),
            _rates(stored["buffered"]),
            *(float(stored[name]) for name in ("sequential", "measured", "spread")),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    whole = all(math.isfinite(value) and value > 0 for value in (curve.sequential, curve.measured, curve.spread))
    known = curve.device == device_name(folder) and (curve.direct or curve.buffered) and whole
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
