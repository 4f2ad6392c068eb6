"""Record assembly: one layer's FFN from the checkpoint's matrices to the bytes of its flash file, block by block.

The layout of a record is the pack's (`flashsparse.pack.layout`); this file turns rows and columns into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from converter.disk import OutputFile
from converter.plan import Plan
from converter.quantize import quantized_bytes
from converter.source import Checkpoint, SourceTensor
from flashsparse.errors import CheckpointError
from flashsparse.pack.codec import encode
from flashsparse.pack.layout import Field, block_records
from flashsparse.pack.safetensors import header_bytes

# The down projection is read by columns, so that many of them are held at once: whole at 7B, in parts at 70B.
COLUMN_BYTES = 128 << 20
TILE_ROWS = 512  # rows per step of a transposition: both sides stay in the CPU's caches


def write_records(
    checkpoint: Checkpoint, plan: Plan, layer: int, file: OutputFile, advance: Callable[[int], None]
) -> None:
    """Writes header and records of one layer; `advance` is told the bytes written."""
    header, lengths = header_bytes(plan.flash_tensors), []
    file.write(header)
    advance(len(header))
    sources = plan.record_sources(layer)
    for begin, columns in _column_blocks(checkpoint, plan, sources["down"]):
        step = block_records(plan.record.stride)
        for first in range(0, columns.shape[1], step):
            part = columns[:, first : first + step]
            block = records(checkpoint, plan, sources, begin + first, part)
            if plan.codec is not None:
                block, stored = encode(block, plan.record.bytes)
                lengths.append(stored.astype("<u4"))
            file.write(block.data)
            advance(block.nbytes)
    for stored in lengths:
        file.write(stored.data)
        advance(stored.nbytes)


def _column_blocks(checkpoint: Checkpoint, plan: Plan, down: SourceTensor) -> Iterator[tuple[int, np.ndarray]]:
    """(first neuron, columns [d, n]) of the down projection."""
    column_bytes = down.info.nbytes // plan.records
    step = block_records(plan.record.stride)
    count = max(1, COLUMN_BYTES // (column_bytes * step)) * step
    for begin in range(0, plan.records, count):
        yield begin, checkpoint.columns(down, begin, min(plan.records, begin + count))


def records(
    checkpoint: Checkpoint, plan: Plan, sources: dict[str, SourceTensor], begin: int, columns: np.ndarray
) -> np.ndarray:
    """The records uint8 [n, stride] of neurons from `begin` on; `columns` [d, n] are theirs of the down projection."""
    count = columns.shape[1]
    out = np.zeros((count, plan.record.stride), np.uint8)
    for field in plan.record.fields.values():
        tensor = sources[field.name]
        down = field.name == "down"
        rows = transposed(columns) if down else checkpoint.rows(tensor, begin, begin + count)
        out[:, field.offset : field.offset + field.bytes] = _field_bytes(plan, field, tensor, rows)
    return out


def _field_bytes(plan: Plan, field: Field, tensor: SourceTensor, rows: np.ndarray) -> np.ndarray:
    """uint8 [n, field.bytes] of rows [n, d], or of scalars [n]."""
    rows = rows.reshape(len(rows), -1)
    if plan.quant is None or field.kind == "scalar":
        return rows.view(np.uint8)
    try:
        return quantized_bytes(rows, tensor.dtype, plan.quant)
    except ValueError as problem:
        raise CheckpointError(f"{tensor.path}: tensor {tensor.info.name!r}: {problem}; use --bits 16") from problem


def transposed(columns: np.ndarray) -> np.ndarray:
    """[d, n] -> contiguous [n, d], tile by tile."""
    out = np.empty(columns.shape[::-1], columns.dtype)
    for row in range(0, columns.shape[0], TILE_ROWS):
        out[:, row : row + TILE_ROWS] = columns[row : row + TILE_ROWS].T
    return out
