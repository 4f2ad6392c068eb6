"""The layout of a pack on flash: the fields of a record, the names of files, the blocks that checksums cover.

Pure arithmetic, used by the writer and checked by the reader; the manifest that states it is in `manifest`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from flashsparse.pack.safetensors import ALIGN, ITEM_BYTES

BLOCK_BYTES = 4 << 20
RECORD_ALIGN = 64
COPY_GROUP = 64  # columns of a compact gate that share a scale
FIELD_NAMES = ("gate", "gate_bias", "up", "up_bias", "down")


@dataclass(frozen=True)
class Quant:
    """MLX's affine quantization: `bits` per weight, one scale and bias per `group_size` weights of a row."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class Field:
    """One field of a record: its byte offset and size in it. A vector holds d values, a scalar one."""

    name: str
    offset: int
    bytes: int
    kind: str


@dataclass(frozen=True)
class Record:
    """The layout of a record. `bytes` is what it holds, `stride` the distance from one to the next on flash."""

    bytes: int
    stride: int
    fields: dict[str, Field]


@dataclass(frozen=True)
class FileEntry:
    """One file of a pack: size, SHA-256, and for flash, resident and predictor files the SHA-256 of each block."""

    bytes: int
    sha256: str
    blocks: tuple[str, ...] = ()
    data_offset: int = 0  # flash files: where record 0 begins
    block_records: int = 0  # flash files: records per block
    block_bytes: int = 0  # resident and predictor files: bytes per block, counted from the start of the file

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"bytes": self.bytes, "sha256": self.sha256}
        if self.block_records:
            entry |= {"data_offset": self.data_offset, "block_records": self.block_records, "blocks": [*self.blocks]}
        elif self.block_bytes:
            entry |= {"block_bytes": self.block_bytes, "blocks": [*self.blocks]}
        return entry


def vector_bytes(d: int, source_dtype: str, quant: Quant | None) -> int:
    """Bytes of a record's field of d values: source floats, or packed words, scales and biases back to back."""
    item = ITEM_BYTES[source_dtype]
    if quant is None:
        return d * item
    return d * quant.bits // 8 + 2 * (d // quant.group_size) * item


def record_layout(
    gated: bool,
    tier: str,
    d: int,
    source_dtype: str,
    quant: Quant | None,
    has_gate_bias: bool = False,
    has_up_bias: bool = False,
    layout: str | None = None,
) -> Record:
    """The layout of every record of a pack.

    `layout` is the manifest's `gate`, by default that of the tier: with "full" (tier `exact`, and `predict` when the
    score is the exact gate) the scoring matrix and its bias are resident, so not here; "compact" and "none" have all
    of a neuron. Each field starts at a multiple
    of 4 bytes, the stride is a multiple of 64.
    """
    scored = (layout or ("full" if tier == "exact" else "none")) == "full"
    gate = gated and not scored
    up = gated or not scored
    present = {"gate": gate, "gate_bias": gate and has_gate_bias, "up": up, "up_bias": up and has_up_bias, "down": True}
    fields: dict[str, Field] = {}
    position = 0
    for name in FIELD_NAMES:
        if not present[name]:
            continue
        scalar = name.endswith("_bias")
        size = ITEM_BYTES[source_dtype] if scalar else vector_bytes(d, source_dtype, quant)
        fields[name] = Field(name, position, size, "scalar" if scalar else "vector")
        position += -(-size // 4) * 4
    return Record(position, -(-position // RECORD_ALIGN) * RECORD_ALIGN, fields)


def flash_name(layer: int) -> str:
    """The name of the file that holds a layer's records."""
    return f"flash-{layer:03d}.safetensors"


def block_records(stride: int) -> int:
    """Records per checksummed block of a flash file."""
    return max(1, BLOCK_BYTES // stride)


def default_prefill_chunk(hidden_size: int) -> int:
    """Tokens per prefill chunk: a property of the pack, so that results do not depend on the budget."""
    return 256 if hidden_size >= 1024 else 64


class FileDigest:
    """SHA-256 of a file and of its blocks, fed with the file's bytes once and in order.

    Blocks of `block` bytes are counted from byte `start`; block 0: none.
    """

    def __init__(self, start: int = 0, block: int = 0, block_records: int = 0) -> None:
        self.start, self.block, self.block_records = start, block, block_records
        self.bytes = 0
        self._whole = hashlib.sha256()
        self._part = hashlib.sha256()
        self._blocks: list[str] = []

    def update(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._whole.update(view)
        if self.block:
            self._update_blocks(view)
        self.bytes += len(view)

    def _update_blocks(self, view: memoryview) -> None:
        position = max(0, self.start - self.bytes)
        while position < len(view):
            filled = (self.bytes + position - self.start) % self.block
            step = min(self.block - filled, len(view) - position)
            self._part.update(view[position : position + step])
            position += step
            if filled + step == self.block:
                self._close_block()

    def _close_block(self) -> None:
        self._blocks.append(self._part.hexdigest())
        self._part = hashlib.sha256()

    def entry(self) -> FileEntry:
        """The manifest's entry of the file; call once, after the last byte."""
        if self.block and self.bytes > self.start and (self.bytes - self.start) % self.block:
            self._close_block()
        return FileEntry(
            bytes=self.bytes,
            sha256=self._whole.hexdigest(),
            blocks=tuple(self._blocks),
            data_offset=self.start if self.block_records else 0,
            block_records=self.block_records,
            block_bytes=0 if self.block_records else self.block,
        )


def flash_digest(stride: int) -> FileDigest:
    """The digest of a flash file whose records are `stride` bytes apart."""
    records = block_records(stride)
    return FileDigest(ALIGN, records * stride, records)


def resident_digest() -> FileDigest:
    """The digest of the resident file, or of the predictor file."""
    return FileDigest(0, BLOCK_BYTES)
