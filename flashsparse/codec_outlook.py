"""Whether compressed records would pay on a drive: ratio and speed on a pack's own records, and how slow it must be.

Counts decompressing in full, beside reading: on few cores it takes the place of computing, so nothing hides it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashsparse.pack.codec import Decoder, encode, whole_records

if TYPE_CHECKING:
    from flashsparse.flash.curve import Curve
    from flashsparse.pack.manifest import Manifest

SAMPLE_BYTES = 4 << 20  # of the middle layer's records
PASSES = 5


@dataclass(frozen=True)
class CodecSample:
    """`ratio`: bytes over stored bytes; `encode_rate`, `decode_rate`: bytes of whole records per second."""

    record_bytes: int
    ratio: float
    encode_rate: float
    decode_rate: float

    @property
    def pays_below(self) -> float:
        """The drive's rate at random reads of a record, in bytes per second, below which less time is spent."""
        return self.decode_rate * (1 - 1 / self.ratio)

    def gain(self, curve: Curve) -> float:
        """Times as fast as without, a record that is read and decompressed, on the drive of `curve`."""
        stored = round(self.record_bytes / self.ratio)
        plain = self.record_bytes / curve.best(self.record_bytes)
        return plain / (stored / curve.best(stored) + self.record_bytes / self.decode_rate)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "pays_below": self.pays_below}


def sample_codec(manifest: Manifest, threads: int) -> CodecSample | None:
    """Measured on records of the middle layer; None where records are not 16-bit floats. Raises PackError."""
    if manifest.quant is not None or manifest.source_dtype == "F32":
        return None
    record = manifest.record
    count = min(manifest.intermediate_size, max(1, SAMPLE_BYTES // record.stride))
    records = np.concatenate([block for _, block in whole_records(manifest, manifest.layers // 2, 0, count)])
    began = time.perf_counter()
    stored, lengths = encode(records, record.bytes)
    encode_s = time.perf_counter() - began
    nbytes = count * record.bytes
    return CodecSample(
        record.bytes,
        nbytes / int(lengths.sum()),
        nbytes / encode_s,
        nbytes / _decode_s(stored, lengths, record.bytes, threads),
    )


def _decode_s(stored: np.ndarray, lengths: np.ndarray, record_bytes: int, threads: int) -> float:
    decoder, at, times = Decoder(record_bytes, threads), np.arange(len(stored)) * stored.shape[1], []
    for _ in range(PASSES):
        memory = stored.copy().reshape(-1)
        began = time.perf_counter()
        decoder.decode(memory, at, lengths, at)
        times.append(time.perf_counter() - began)
    return min(times)
