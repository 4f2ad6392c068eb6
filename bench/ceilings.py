"""What a step cannot be faster than: the drive's random rate, the memory's read rate, and the two limits they give.

A token's reading time is the bytes it misses over the drive's best rate at the size of a record; its memory time is
the bytes it touches over the rate at which memory is read. With reads under computing the larger of the two is the
limit, without, their sum.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flashsparse.rows import embedding_bytes

if TYPE_CHECKING:
    from flashsparse.pack.manifest import Manifest
    from flashsparse.stats import Counters

DEPTHS = (4, 8, 16, 32)
_PAGE = 4096


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second: `drive` at random reads of `read_bytes` with `depth` of them in flight, `memory` read."""

    drive: float
    read_bytes: int
    depth: int
    memory: float

    def describe(self) -> str:
        return (
            f"drive   {self.drive / 1e9:.2f} GB/s at random reads of {self.read_bytes} bytes, {self.depth} in flight\n"
            f"memory  {self.memory / 1e9:.1f} GB/s read"
        )


@dataclass(frozen=True)
class Limit:
    """Seconds per token that reading and memory traffic take at least, and which of the two shapes holds."""

    reading_s: float
    memory_s: float
    overlapped: bool  # reads run under computing: the larger counts, else the sum

    @property
    def seconds(self) -> float:
        return max(self.reading_s, self.memory_s) if self.overlapped else self.reading_s + self.memory_s

    def describe(self) -> str:
        how = "the larger of the two" if self.overlapped else "their sum"
        rate = 1 / self.seconds if self.seconds else float("inf")
        parts = f"reading {1e3 * self.reading_s:.1f} ms, memory {1e3 * self.memory_s:.1f} ms per token"
        return f"limit   {parts}; {how} gives {rate:.2f} tokens/s"


def measure_ceilings(manifest: Manifest, threads: int, seconds: float = 0.5) -> Ceilings:
    """Both rates, measured for `seconds` for each depth and for memory; needs 256 MiB."""
    size = manifest.record.bytes
    paths = [manifest.flash_path(layer) for layer in range(manifest.layers)]
    rates = {depth: drive_rate(paths, size, depth, seconds) for depth in DEPTHS}
    best = max(rates, key=lambda depth: rates[depth])
    return Ceilings(rates[best], size, best, memory_rate(threads, seconds))


def drive_rate(paths: list[Path], read_bytes: int, depth: int, seconds: float) -> float:
    """Bytes per second of bare direct reads at random places, `depth` in flight: of two of the files, the better."""
    from flashsparse.flash import FlashFile
    from flashsparse.flash.probe import Loop

    rng = np.random.default_rng(0)
    found = []
    for path in (paths[0], paths[len(paths) // 2]):
        with FlashFile(path) as file, Loop(depth * (read_bytes + 2 * _PAGE)) as loop:
            size = -(-read_bytes // file.sector) * file.sector
            places = rng.integers(0, max(1, (file.size - size) // _PAGE), 4096) * _PAGE
            found.append(loop.rate(file, places, size, depth, seconds / 2))
    return max(found)


def memory_rate(threads: int, seconds: float = 0.5) -> float:
    """Bytes per second that `threads` threads read from an array far larger than the caches: the best pass."""
    from flashsparse import native

    buffer = np.ones(1 << 28, np.uint8)
    best, began = 0.0, time.perf_counter()
    with native.Workers(threads) as workers:
        while not best or time.perf_counter() - began < seconds:
            start = time.perf_counter()
            native.memory_read(workers, buffer)
            best = max(best, buffer.nbytes / (time.perf_counter() - start))
    return best


def touched_bytes(manifest: Manifest, cost: Counters, tokens: int, context: float) -> float:
    """Bytes of memory that computing one token reads: resident weights, predictor, its records, keys and values.

    cost: counters of `tokens` decoded tokens; context: positions held on average. An embedding is one row.
    """
    m = manifest
    resident = sum(m.files[p.name].bytes for p in (m.resident_path, m.predictor_path) if p.name in m.files)
    kv = 2 * m.layers * m.kv_heads * m.head_dim * (4 if m.source_dtype == "F32" else 2) * context
    return resident - embedding_bytes(m) + cost.active / tokens * m.record.bytes + kv


def limit_of(manifest: Manifest, ceilings: Ceilings, cost: Counters, tokens: int, context: float) -> Limit:
    """The limits of decoded tokens that cost what the counters say."""
    reading = cost.flash_bytes / tokens / ceilings.drive
    memory = touched_bytes(manifest, cost, tokens, context) / ceilings.memory
    return Limit(reading, memory, overlapped=manifest.tier == "predict")


def product_rate(size: int = 1024, seconds: float = 0.5) -> float:
    """Floating-point operations per second of numpy's float32 matrix product, all threads that it takes."""
    left, right = np.ones((size, size), np.float32), np.ones((size, size), np.float32)
    done, began = 0, time.perf_counter()
    while not done or time.perf_counter() - began < seconds:
        np.matmul(left, right)
        done += 1
    return 2.0 * size**3 * done / (time.perf_counter() - began)


def touch_rate(nbytes: int = 1 << 30) -> float:
    """Bytes per second of memory touched for the first time, as weights and slots are."""
    from flashsparse.weights import Buffer

    began = time.perf_counter()
    buffer = Buffer(nbytes)
    buffer.bytes[::_PAGE] = 1
    return nbytes / (time.perf_counter() - began)
