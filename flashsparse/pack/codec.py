"""Compressed records: how a record of 16-bit floats is stored with zstd, and how it is brought back, in place.

Low bytes are noise and stored as they are; high bytes (sign and exponent) are one zstd frame. A record begins where it
would begin without a codec, and the rest of its stride is zero: what is saved is reading, not room on the drive.
`docs/format.md` is the specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flashsparse.errors import PackError
from flashsparse.pack.layout import BLOCK_BYTES
from flashsparse.pack.safetensors import read_tensor

if TYPE_CHECKING:
    from flashsparse.pack.manifest import Manifest
    from flashsparse.pack.safetensors import Header

Bytes = npt.NDArray[np.uint8]
Lengths = npt.NDArray[np.uint32]

CODECS = ("zstd",)
LEVEL = 1  # higher ones gain nothing on weights
LENGTHS = "lengths"  # U32 [I] after a layer's records: stored bytes of each; the record's own size: as it is
LENGTH_BYTES = 4
MAGIC = np.frombuffer(b"\x28\xb5\x2f\xfd", np.uint8)  # what a zstd frame begins with
AT_ONCE = 64  # records that are decompressed together: enough for two threads, little memory


def flash_tensors(records: int, stride: int, codec: str | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a layer's file, in the order of the file."""
    plain: dict[str, tuple[str, tuple[int, ...]]] = {"records": ("U8", (records, stride))}
    return plain if codec is None else plain | {LENGTHS: ("U32", (records,))}


def encode(records: Bytes, record_bytes: int) -> tuple[Bytes, Lengths]:
    """records [n, stride], padded with zeros -> the same as stored, and their lengths [n].

    A record that would not become shorter is stored as it is.
    """
    import zstandard

    compressor, half = zstandard.ZstdCompressor(level=LEVEL), record_bytes // 2
    out, lengths = np.zeros_like(records), np.full(len(records), record_bytes, np.uint32)
    for record, stored, at in zip(records, out, range(len(records)), strict=True):
        frame = compressor.compress(np.ascontiguousarray(record[1:record_bytes:2]).data)
        if half + len(frame) >= record_bytes:
            stored[:] = record
            continue
        stored[:half] = record[:record_bytes:2]
        stored[half : half + len(frame)] = np.frombuffer(frame, np.uint8)
        lengths[at] = half + len(frame)
    return out, lengths


def read_lengths(header: Header, record_bytes: int) -> Lengths:
    """A layer's lengths [I]. Raises PackError for one that no record can have."""
    lengths: Lengths = read_tensor(header, LENGTHS)
    wrong = np.flatnonzero((lengths <= record_bytes // 2) | (lengths > record_bytes))
    if len(wrong):
        raise PackError(
            f"{header.path}: record {wrong[0]}: found a length of {lengths[wrong[0]]} bytes, expected "
            f"{record_bytes // 2 + 1} to {record_bytes}; run flashsparse verify"
        )
    return lengths


def compression(manifest: Manifest) -> float:
    """Bytes of the records over their stored bytes, of all layers."""
    found = [read_lengths(manifest.flash_header(n), manifest.record.bytes).sum() for n in range(manifest.layers)]
    return manifest.record.bytes * manifest.intermediate_size * manifest.layers / float(sum(found))


class Damaged(ValueError):
    """`position`: of the record, among those asked for."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


class Decoder:
    """Brings records of `record_bytes` back, on up to `threads` threads."""

    def __init__(self, record_bytes: int, threads: int = 1) -> None:
        import zstandard

        self._bytes, self._half, self._threads = record_bytes, record_bytes // 2, threads
        self._zstd, self._frames = zstandard.ZstdDecompressor(), zstandard.BufferWithSegments
        self._parallel = hasattr(self._zstd, "multi_decompress_to_buffer")  # in zstandard's C backend

    def decode(self, memory: Bytes, stored: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> None:
        """Records [n] stored in `memory` (uint8 [m], writable) at `stored`, of `lengths`, become whole at `places`.

        A record's two stretches may overlap; those of different records do not. Raises Damaged.
        """
        for at in range(0, len(stored), AT_ONCE):
            self._decode(memory, stored[at : at + AT_ONCE], lengths[at : at + AT_ONCE], places[at : at + AT_ONCE], at)

    def _decode(self, memory: Bytes, stored: np.ndarray, lengths: np.ndarray, places: np.ndarray, first: int) -> None:
        packed = np.flatnonzero(lengths < self._bytes)
        self._check_whole(memory, stored, np.flatnonzero(lengths == self._bytes), first)
        for raw in np.flatnonzero((lengths == self._bytes) & (stored != places)):
            memory[places[raw] : places[raw] + self._bytes] = memory[stored[raw] : stored[raw] + self._bytes].copy()
        if not len(packed):
            return
        frames = np.stack([stored[packed] + self._half, lengths[packed] - self._half], axis=1).astype("<u8")
        values = np.empty((len(packed), self._half), "<u2")
        for at, (high, plane) in enumerate(zip(self._high(memory, frames, first, packed), values, strict=True)):
            plane[:] = high
            plane <<= 8
            plane |= memory[stored[packed[at]] : stored[packed[at]] + self._half]
        for place, plane in zip(places[packed], values, strict=True):
            memory[place : place + self._bytes] = plane.view(np.uint8)

    def _check_whole(self, memory: Bytes, stored: np.ndarray, whole: np.ndarray, first: int) -> None:
        """Records whose length says that they are stored as they are, but that are not: read so, they are noise."""
        begins = stored[whole] + self._half
        framed = (memory[begins[:, None] + np.arange(len(MAGIC))] == MAGIC).all(axis=1)
        for at, begin in zip(whole[framed], begins[framed], strict=True):
            position = first + int(at)
            try:
                found = self._alone(memory, np.array([begin, self._bytes - self._half]), position)
            except Damaged:
                continue  # a record's own bytes
            if len(found) == self._half:
                raise Damaged(position, f"found a length of {self._bytes} bytes, but it is stored compressed")

    def _high(self, memory: Bytes, frames: np.ndarray, first: int, packed: np.ndarray) -> list[Bytes]:
        """The high bytes [half] of each frame (offset, length)."""
        try:
            found = [np.frombuffer(part, np.uint8) for part in self._decompressed(memory, frames)]
        except Exception as problem:  # zstandard's own, or memory: one by one tells which record it is
            found = [self._alone(memory, frame, first + int(at)) for frame, at in zip(frames, packed, strict=True)]
            if isinstance(problem, MemoryError):
                raise
        for high, at in zip(found, packed, strict=True):
            if len(high) != self._half:
                raise Damaged(first + int(at), f"{len(high)} bytes, expected {self._half}")
        return found

    def _decompressed(self, memory: Bytes, frames: np.ndarray) -> Any:
        if not self._parallel:
            return [self._zstd.decompress(memory[a : a + n].data, max_output_size=self._half) for a, n in frames]
        sizes = np.full(len(frames), self._half, "<u8").tobytes()
        threads = self._threads if len(frames) >= 16 else 1
        return self._zstd.multi_decompress_to_buffer(
            self._frames(memory.data, frames.tobytes()), decompressed_sizes=sizes, threads=threads
        )

    def _alone(self, memory: Bytes, frame: np.ndarray, position: int) -> Bytes:
        import zstandard

        stored = memory[frame[0] : frame[0] + frame[1]].data
        try:
            promised = zstandard.frame_content_size(stored)  # allocated before anything is checked
            if promised not in (-1, self._half):
                raise Damaged(position, f"{promised} bytes, expected {self._half}")
            whole = self._zstd.decompress(stored, max_output_size=self._half)
        except zstandard.ZstdError as problem:
            raise Damaged(position, str(problem)) from None
        return np.frombuffer(whole, np.uint8)


def whole_records(
    manifest: Manifest, layer: int, begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, Bytes]]:
    """(first record, records uint8 [n, stride]) of a layer, block by block, as they are without a codec.

    Raises PackError for a length that no record has, and for a record that cannot be decompressed.
    """
    header, record = manifest.flash_header(layer), manifest.record
    end = manifest.intermediate_size if end is None else end
    lengths = None if manifest.codec is None else read_lengths(header, record.bytes)
    step = max(1, BLOCK_BYTES // record.stride)
    for first in range(begin, end, step):
        block = read_tensor(header, "records", first, min(step, end - first))
        if lengths is not None:
            _restore(header, block, first, lengths[first : first + len(block)], record.bytes)
        yield first, block


def _restore(header: Header, block: Bytes, first: int, lengths: Lengths, record_bytes: int) -> None:
    at = np.arange(len(block), dtype=np.int64) * block.shape[1]
    try:
        Decoder(record_bytes).decode(block.reshape(-1), at, lengths, at)
    except Damaged as problem:
        raise PackError(
            f"{header.path}: record {first + problem.position}: cannot be decompressed: {problem}; convert again"
        ) from None
    block[:, record_bytes:] = 0
