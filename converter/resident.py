"""The resident file: every tensor that stays in memory, copied or quantized in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from converter.disk import OutputFile
from converter.gate_copy import copy_rows
from converter.plan import Plan
from converter.quantize import quantize_rows
from converter.source import Checkpoint, SourceTensor
from flashsparse.errors import CheckpointError
from flashsparse.pack.layout import Quant
from flashsparse.pack.safetensors import header_bytes, shape_bytes

BLOCK_BYTES = 16 << 20
COPY_BYTES = 1 << 20  # of a gate that is copied at once: it takes some twenty times as much


def write_resident(checkpoint: Checkpoint, plan: Plan, file: OutputFile, advance: Callable[[int], None]) -> None:
    """Writes the resident file; `advance` is told the bytes written.

    A quantized matrix's words, scales and biases lie far apart in the file, so tensors are written by offset and the
    file is digested in a second pass: holding all scales until their turn would take 2 GB at 70B.
    """
    header = header_bytes(plan.resident_tensors)
    file.write_at(0, header)
    advance(len(header))
    offsets, position = {}, len(header)
    for name, tensor in plan.resident_tensors.items():
        offsets[name] = position
        position += shape_bytes(*tensor)
    for base, source in plan.gate_copies.items():
        _copy_gate(checkpoint, source, base, offsets, file, advance)
    for name, source in sorted(plan.resident_sources.items(), key=lambda item: offsets[item[0]]):
        base = name.removesuffix(".weight")
        quant = plan.resident_quant.get(base) if name.endswith(".weight") else None
        if quant is None:
            _copy(checkpoint, source, offsets[name], file, advance)
        else:
            places = [offsets[name], offsets[f"{base}.scales"], offsets[f"{base}.biases"]]
            _quantize(checkpoint, source, quant, places, file, advance)
    file.digest_all()


def _copy(
    checkpoint: Checkpoint, source: SourceTensor, offset: int, file: OutputFile, advance: Callable[[int], None]
) -> None:
    if source.order is not None:
        _copy_ordered(checkpoint, source, offset, file, advance)
        return
    for begin in range(0, source.info.nbytes, BLOCK_BYTES):
        block = np.empty(min(BLOCK_BYTES, source.info.nbytes - begin), np.uint8)
        checkpoint.read_bytes(source, begin, block.data)
        file.write_at(offset + begin, block.data)
        advance(block.nbytes)


def _copy_ordered(
    checkpoint: Checkpoint, source: SourceTensor, offset: int, file: OutputFile, advance: Callable[[int], None]
) -> None:
    rows, row_bytes = source.shape[0], source.info.nbytes // source.shape[0]
    step = max(1, BLOCK_BYTES // row_bytes)
    for begin in range(0, rows, step):
        block = checkpoint.rows(source, begin, min(rows, begin + step))
        file.write_at(offset + begin * row_bytes, block.reshape(-1).view(np.uint8).data)
        advance(block.nbytes)


def _copy_gate(
    checkpoint: Checkpoint,
    source: SourceTensor,
    base: str,
    offsets: dict[str, int],
    file: OutputFile,
    advance: Callable[[int], None],
) -> None:
    """Writes the parts of a compact gate."""
    rows = source.shape[0]
    step = max(1, rows * COPY_BYTES // source.info.nbytes)
    for begin in range(0, rows, step):
        parts = copy_rows(checkpoint.rows(source, begin, min(rows, begin + step)), source.dtype)
        for name, part in parts.items():
            file.write_at(offsets[f"{base}.{name}"] + begin * part.nbytes // len(part), part.data)
            advance(part.nbytes)


def _quantize(
    checkpoint: Checkpoint,
    source: SourceTensor,
    quant: Quant,
    places: list[int],
    file: OutputFile,
    advance: Callable[[int], None],
) -> None:
    """Quantizes a matrix; `places` are the offsets of its words, scales and biases."""
    rows = source.shape[0]
    step = max(1, rows * BLOCK_BYTES // source.info.nbytes)
    for begin in range(0, rows, step):
        block = checkpoint.rows(source, begin, min(rows, begin + step))
        try:
            parts = quantize_rows(block, source.dtype, quant)
        except ValueError as problem:
            raise CheckpointError(f"{source.path}: tensor {source.info.name!r}: {problem}; use --bits 16") from problem
        for place, part in zip(places, parts, strict=True):
            file.write_at(place + begin * part.nbytes // len(part), part.data)
            advance(part.nbytes)
