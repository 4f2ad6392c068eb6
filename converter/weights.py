"""Weights as float32, by name, from a checkpoint or from a pack. Owns decoding and dequantization, in blocks of rows.

Which tensors a model has is in `flashsparse.models.tensors`; what they are for is the model's business. Nothing is
mapped into memory, and no matrix is held twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from converter.source import Checkpoint, SourceTensor
from flashsparse.pack.codec import whole_records
from flashsparse.pack.layout import Field, Quant
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.safetensors import Header, read_tensor

BLOCK_BYTES = 16 << 20  # of stored weights, read and converted at once


class Weights(Protocol):
    """The tensors of a model by canonical name. Matrices are [rows, cols]; everything returned is new and float32."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The unquantized shape, None when there is no such tensor outside the records."""

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Rows [begin, end) of a tensor."""

    def ffn(self, layer: int, names: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Tensors of a layer's FFN by field of a record (`gate`, `up_bias`, ...); `down` is [d, I]."""


def whole(weights: Weights, name: str) -> np.ndarray:
    """A whole tensor as float32, read in blocks."""
    shape = weights.shape(name)
    assert shape is not None, name
    out = np.empty(shape, np.float32)
    step = max(1, BLOCK_BYTES // max(1, 4 * out[:1].size))
    for begin in range(0, shape[0], step):
        end = min(shape[0], begin + step)
        out[begin:end] = weights.rows(name, begin, end)
    return out


def optional(weights: Weights, name: str) -> np.ndarray | None:
    """A whole tensor, or None when there is none of that name."""
    return None if weights.shape(name) is None else whole(weights, name)


def to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values of type F32, F16 or BF16 (as uint16) as float32."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words [n, w] as their w * 32 / bits values each, uint8: value j is in bits [j * bits, (j + 1) * bits).

    The bits of a row are numbered from the lowest of its first word, which is MLX's layout.
    """
    raw = np.ascontiguousarray(words, "<u4").view(np.uint8)
    if bits == 8:
        return raw
    if bits == 4:
        return np.stack([raw & 15, raw >> 4], -1).reshape(len(raw), -1)
    single = np.unpackbits(raw, axis=1, bitorder="little").reshape(len(raw), -1, bits)
    return np.packbits(single, axis=2, bitorder="little")[..., 0]


def dequantize(words: np.ndarray, scales: np.ndarray, biases: np.ndarray, quant: Quant) -> np.ndarray:
    """scale * q + bias as float32 [n, d]: words uint32 [n, d * bits / 32], scales and biases [n, d / group_size]."""
    values = unpack(words, quant.bits).astype(np.float32)
    groups = values.reshape(*scales.shape, quant.group_size)
    groups *= scales[..., None].astype(np.float32)
    groups += biases[..., None].astype(np.float32)
    return values


@dataclass(frozen=True)
class CheckpointWeights:
    """A checkpoint's tensors under their canonical names, already checked against the configuration."""

    checkpoint: Checkpoint
    sources: Mapping[str, SourceTensor]

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.sources[name].shape if name in self.sources else None

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        source = self.sources[name]
        return to_float32(self.checkpoint.rows(source, begin, end), source.dtype)

    def ffn(self, layer: int, names: Mapping[str, str]) -> dict[str, np.ndarray]:
        return {field: whole(self, name) for field, name in names.items() if name in self.sources}


@dataclass(frozen=True)
class PackWeights:
    """A pack's resident tensors and the records of its layers, dequantized."""

    manifest: Manifest
    header: Header  # of the resident file
    shapes: Mapping[str, tuple[int, ...]]  # of the resident tensors, unquantized

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.shapes.get(name)

    def rows(self, name: str, begin: int, end: int) -> np.ndarray:
        base = name.removesuffix(".weight")
        quant = self.manifest.resident_quant.get(base) if name.endswith(".weight") else None
        if quant is None:
            return self._plain(name, begin, end)
        words = read_tensor(self.header, name, begin, end - begin)
        return dequantize(
            words, self._plain(f"{base}.scales", begin, end), self._plain(f"{base}.biases", begin, end), quant
        )

    def _plain(self, name: str, begin: int, end: int) -> np.ndarray:
        values = read_tensor(self.header, name, begin, end - begin)
        return to_float32(values, self.header.tensors[name].dtype)

    def ffn(self, layer: int, names: Mapping[str, str]) -> dict[str, np.ndarray]:
        found = {field: whole(self, name) for field, name in names.items() if name in self.shapes}
        m = self.manifest
        vectors = {field.name: field.kind == "vector" for field in m.record.fields.values()}
        for name, vector in vectors.items():
            size = (m.intermediate_size, m.hidden_size) if vector else (m.intermediate_size,)
            found[name] = np.empty(size, np.float32)
        for begin, records in whole_records(m, layer):
            for field in m.record.fields.values():
                found[field.name][begin : begin + len(records)] = self._field(records, field)
        found["down"] = found["down"].T
        return found

    def _field(self, records: np.ndarray, field: Field) -> np.ndarray:
        """A field of records uint8 [n, stride]: [n, d], or [n] for a scalar."""
        m = self.manifest
        raw = np.ascontiguousarray(records[:, field.offset : field.offset + field.bytes])
        stored = "<f4" if m.source_dtype == "F32" else "<f2" if m.source_dtype == "F16" else "<u2"

        def floats(part: np.ndarray) -> np.ndarray:
            return to_float32(np.ascontiguousarray(part).view(stored), m.source_dtype)

        if field.kind == "scalar":
            return floats(raw)[:, 0]
        if m.quant is None:
            return floats(raw)
        words = m.hidden_size * m.quant.bits // 8
        scales, biases = np.split(raw[:, words:], 2, axis=1)
        return dequantize(np.ascontiguousarray(raw[:, :words]).view("<u4"), floats(scales), floats(biases), m.quant)
