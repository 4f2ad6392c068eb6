"""Rows of an embedding that stays on flash: a token needs one of them, so memory is better spent on slots.

Owns a table of the rows used last, and the reads that fill it; a prompt's chunk always fits. Which packs do so is the
memory plan's decision (`sizes.py`); computing with a row is the kernels' business, which see the table as any weight.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashsparse.flash import read_range
from flashsparse.models.tensors import embedding_name, embedding_tensors
from flashsparse.pack.safetensors import numpy_dtype, shape_bytes
from flashsparse.weights import ALIGNMENT, Buffer, Weight

if TYPE_CHECKING:
    from flashsparse.flash import FlashFile, ReadPool
    from flashsparse.opening import OpenPack
    from flashsparse.pack.manifest import Manifest
    from flashsparse.pack.safetensors import TensorInfo
    from flashsparse.stats import Counters

STAGED = 32  # rows that are read at once
COLUMNS = ("data", "scales", "biases")


def embedding_bytes(manifest: Manifest) -> int:
    """Of the embedding in the resident file; 0 where the head is tied to it, which every token needs whole."""
    if manifest.config["tie_word_embeddings"]:
        return 0
    return sum(shape_bytes(*stored) for stored in embedding_tensors(manifest).values())


def buffer_bytes(manifest: Manifest, sector: int) -> int:
    """What EmbeddingRows takes: the table, and rows as they are read, rounded out to `sector`."""
    rows = [shape_bytes(dtype, shape[1:]) for dtype, shape in embedding_tensors(manifest).values()]
    staged = STAGED * sum(-(-row // sector) * sector + sector for row in rows)
    return manifest.prefill_chunk * sum(rows) + staged + 2 * ALIGNMENT


@dataclass(frozen=True)
class _Column:
    """One stored tensor of the embedding: where it is on flash, its rows in the table, and as they were read."""

    info: TensorInfo
    row_bytes: int
    table: np.ndarray  # uint8 [capacity, row_bytes]
    staged: np.ndarray  # uint8 [STAGED, stride]

    def requests(self, file: FlashFile, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(file offset of the row, where its sectors begin, their length) for each of `ids`, int64 [n]."""
        offsets = self.info.begin + ids * self.row_bytes
        starts, lengths = read_range(file, offsets, np.full(len(ids), self.row_bytes))
        return offsets, starts, lengths


class EmbeddingRows:
    """An embedding of which `capacity` rows are in memory, those used last.

    `weight` is the table: row `places(ids)[i]` of it is row ids[i] of the embedding. `writing` is called with the
    places (int64 [n]) that are about to be written. `unified`: the table is in memory of MLX's.
    """

    def __init__(
        self,
        pack: OpenPack,
        pool: ReadPool,
        counters: Counters,
        capacity: int,
        unified: bool = False,
        writing: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        self._file, self._pool, self._counters, self.writing = pack.files[0], pool, counters, writing
        stored = [pack.headers[0].tensors[name] for name in embedding_tensors(pack.manifest)]
        sizes = [shape_bytes(info.dtype, info.shape[1:]) for info in stored]
        sector = self._file.sector
        strides = [-(-size // sector) * sector + sector for size in sizes]
        self.buffer = Buffer(capacity * sum(sizes), unified)
        self._staging = Buffer(STAGED * sum(strides))
        tables, staged = _divided(self.buffer.bytes, capacity, sizes), _divided(self._staging.bytes, STAGED, strides)
        self._columns = [_Column(*parts) for parts in zip(stored, sizes, tables, staged, strict=True)]
        self.rows, self.capacity = stored[0].shape[0], capacity
        self._place: OrderedDict[int, int] = OrderedDict()  # of each row in the table; used last comes last
        self.weight = self._weight(pack.manifest)

    def _weight(self, manifest: Manifest) -> Weight:
        base = embedding_name(manifest.family).removesuffix(".weight")
        views = {
            name: column.table.reshape(-1).view(numpy_dtype(column.info.dtype)).reshape(self.capacity, -1)
            for name, column in zip(COLUMNS, self._columns, strict=False)
        }
        dtype, quant = self._columns[-1].info.dtype, manifest.resident_quant.get(base)
        return Weight(f"{base}.weight, rows in use", dtype, **views, quant=quant)

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Where the rows `ids` (int32 [n]) are in the table (int32 [n]), until the next call; reads what is missing.

        Raises ValueError for numbers that are no rows or more different ones than the table holds, FlashReadError
        when reading fails.
        """
        wanted = sorted(set(ids.tolist()))
        if wanted and not 0 <= wanted[0] <= wanted[-1] < self.rows:
            raise ValueError(f"ids: {wanted[0]}..{wanted[-1]} are not all in 0..{self.rows - 1}")
        if len(wanted) > self.capacity:
            raise ValueError(f"{len(wanted)} different rows at once, expected at most {self.capacity}")
        missing = []
        for row in wanted:
            if row in self._place:
                self._place.move_to_end(row)
            else:
                missing.append(row)
        while self.capacity - len(self._place) < len(missing):
            self._place.popitem(last=False)
        for first in range(0, len(missing), STAGED):
            self._bring(missing[first : first + STAGED])
        return np.array([self._place[row] for row in ids.tolist()], np.int32)

    def _bring(self, rows: list[int]) -> None:
        """Read `rows`, at most STAGED, into free places; they are known there when all have come."""
        used = set(self._place.values())  # asked anew, so that no interrupt loses a place
        free = [place for place in range(self.capacity) if place not in used][: len(rows)]
        self._read(np.array(rows, np.int64), free)
        self._place.update(zip(rows, free, strict=True))

    def _read(self, ids: np.ndarray, places: list[int]) -> None:
        asked = [column.requests(self._file, ids) for column in self._columns]
        offsets, starts, lengths = (np.concatenate(parts) for parts in zip(*asked, strict=True))
        skips = offsets - starts
        sizes = np.repeat([column.row_bytes for column in self._columns], len(ids))
        addresses = [c.staged.ctypes.data + np.arange(len(ids)) * c.staged.shape[1] for c in self._columns]
        began = time.perf_counter()
        with self._pool.submit(self._file, starts, lengths, skips + sizes, np.concatenate(addresses)) as batch:
            batch.wait()
        self._count(lengths, int(sizes.sum()), time.perf_counter() - began)
        if self.writing is not None:
            self.writing(np.array(places))
        for column, begins in zip(self._columns, skips.reshape(len(self._columns), -1).tolist(), strict=True):
            for row, (place, begin) in enumerate(zip(places, begins, strict=True)):
                column.table[place] = column.staged[row, begin : begin + column.row_bytes]

    def _count(self, lengths: np.ndarray, needed: int, seconds: float) -> None:
        counters, nbytes = self._counters, int(lengths.sum())
        counters.flash_reads += len(lengths)
        counters.flash_bytes += nbytes
        counters.needed_bytes += needed
        counters.embedding_reads += len(lengths)
        counters.embedding_bytes += nbytes
        counters.io_wait_s += seconds


def _divided(memory: np.ndarray, rows: int, sizes: list[int]) -> list[np.ndarray]:
    """`memory` (uint8) as one array [rows, size] after another."""
    ends = np.cumsum([rows * size for size in sizes]).tolist()
    begins = [0, *ends]
    return [memory[a:b].reshape(rows, -1) for a, b in zip(begins, ends, strict=False)]


def located(embedding: Weight | EmbeddingRows, ids: np.ndarray) -> tuple[Weight, np.ndarray]:
    """The weight in which the rows `ids` (int32 [n]) of an embedding are, and their numbers there."""
    return (embedding.weight, embedding.places(ids)) if isinstance(embedding, EmbeddingRows) else (embedding, ids)
