"""What a step cannot be faster than: the drive's random rate, the memory's read rate, and the two limits they give.

A token's reading time is the bytes it misses over the drive's best rate at the size of a record; its memory time is
the bytes it touches over the rate at which memory is read. With reads under computing the larger of the two is the
limit, without, their sum.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from flashsparse.pack.manifest import Manifest
    from flashsparse.stats import Counters

DEPTHS = (4, 8, 16, 32)
_ARENA = 1 << 26  # bytes that random reads land in


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
    """Both rates, measured for `seconds` for each depth and for memory; needs 64 MiB and then 256 MiB."""
    size = manifest.record.bytes
    paths = [manifest.flash_path(layer) for layer in range(manifest.layers)]
    rates = {depth: drive_rate(paths, size, depth, seconds) for depth in DEPTHS}
    best = max(rates, key=lambda depth: rates[depth])
    return Ceilings(rates[best], size, best, memory_rate(threads, seconds))


def drive_rate(paths: list[Path], read_bytes: int, depth: int, seconds: float) -> float:
    """Bytes per second of direct reads at random places of the files, `depth` in flight, nothing else done."""
    from flashsparse.flash import FlashFile, ReadPool

    rng = np.random.default_rng(0)
    files = [FlashFile(path) for path in paths]
    sector = max(file.sector for file in files)
    length = -(-read_bytes // sector) * sector
    arena = np.empty(_ARENA + 4096, np.uint8)
    base = -(-arena.ctypes.data // 4096) * 4096
    count = max(depth, min(_ARENA // length, 8 * depth))
    done, began = 0, time.perf_counter()
    try:
        with ReadPool(depth) as pool:
            while time.perf_counter() - began < seconds:
                chosen = [files[n] for n in rng.integers(0, len(files), count)]
                starts = np.array([int(rng.integers(0, max(1, (f.size - length) // sector))) * sector for f in chosen])
                lengths = np.full(count, length)
                needs = np.minimum(lengths, [f.size - s for f, s in zip(chosen, starts, strict=True)])
                dests = base + np.arange(count, dtype=np.uint64) % max(1, _ARENA // length) * length
                with pool.submit(chosen, starts, lengths, needs, dests) as batch:
                    batch.wait()
                done += int(needs.sum())
        return done / (time.perf_counter() - began)
    finally:
        for file in files:
            file.close()


def memory_rate(threads: int, seconds: float = 0.5) -> float:
    """Bytes per second that `threads` threads read from arrays far larger than the caches."""
    floats = (1 << 28) // 4 // threads
    parts = [np.ones(floats, np.float32) for _ in range(threads)]
    ends = time.perf_counter() + seconds

    def read(part: np.ndarray) -> int:
        done = 0
        while True:
            for start in range(0, floats, 1 << 18):  # a dot product with itself reads each value once
                piece = part[start : start + (1 << 18)]
                np.dot(piece, piece)
                done += piece.nbytes
            if time.perf_counter() >= ends:
                return done

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, parts))
    return total / (time.perf_counter() - began)


def touched_bytes(manifest: Manifest, cost: Counters, tokens: int, context: float) -> float:
    """Bytes of memory that computing one token reads: resident weights, predictor, its records, keys and values.

    cost: counters of `tokens` decoded tokens; context: positions held on average. An embedding is one row.
    """
    m = manifest
    resident = sum(m.files[p.name].bytes for p in (m.resident_path, m.predictor_path) if p.name in m.files)
    kv = 2 * m.layers * m.kv_heads * m.head_dim * (4 if m.source_dtype == "F32" else 2) * context
    return resident - _embedding_bytes(m) + cost.active / tokens * m.record.bytes + kv


def _embedding_bytes(manifest: Manifest) -> int:
    """What looking up tokens need not read: the table, unless it serves as the head too."""
    from flashsparse.pack.safetensors import read_header

    if manifest.config.get("tie_word_embeddings"):
        return 0
    header = read_header(manifest.resident_path)
    return sum(t.end - t.begin for name, t in header.tensors.items() if "embed_tokens." in name)


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
