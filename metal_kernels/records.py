"""What the kernels need to know of a record, and its vectors decoded in plain MLX operators."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

FORMATS = {"F32": 0, "F16": 1, "BF16": 2, "Q8": 3, "Q4": 4}
ACTIVATIONS = {"silu": 0, "relu": 1, "relu2": 2, "fatrelu": 3, "drelu": 4}
FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q8": 8, "Q4": 4}


@dataclass(frozen=True)
class Record:
    """Byte offsets of a record's fields (-1: absent), d values a vector, a multiple of 32.

    `format`: of FORMATS. `source`: F32, F16 or BF16, the type of biases, and of the scales of Q8 and Q4, whose groups
    of `group` (32, 64, 128) values have one each. `param`: FATReLU's threshold.
    """

    d: int
    format: str
    source: str
    down: int
    up: int = -1
    gate: int = -1
    gate_bias: int = -1
    up_bias: int = -1
    group: int = 0
    activation: str = "relu"
    param: float = 0.0
    gated: bool = True

    def __post_init__(self) -> None:
        if self.d % 32 or self.format not in FORMATS or self.source not in FLOATS:
            raise ValueError(f"records of {self.d} values, {self.format}: expected a multiple of 32 of {list(FORMATS)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not known")
        if self.quantized and (self.group not in (32, 64, 128) or self.d % self.group):
            raise ValueError(
                f"group size {self.group} for vectors of {self.d} values: expected 32, 64 or 128, dividing it"
            )

    @property
    def quantized(self) -> bool:
        return self.format in ("Q8", "Q4")

    @property
    def wide(self) -> bool:
        """Whether every vector begins at a multiple of 16 bytes, in records that begin at one of 64."""
        return all(at % 16 == 0 for at in (self.gate, self.up, self.down) if at >= 0)

    @property
    def vector_bytes(self) -> int:
        scales = 2 * (self.d // self.group) * FLOATS[self.source].size if self.quantized else 0
        return self.d * BITS[self.format] // 8 + scales

    def template(self, tokens: int) -> list[tuple[str, Any]]:
        return [
            ("FORMAT", FORMATS[self.format]),
            ("S", FLOATS[self.source]),
            ("GROUP", self.group or 32),
            ("WIDE", self.wide),
            ("TOKENS", tokens),
        ]

    def layout(self) -> mx.array:
        return _layout(self)

    def limit(self) -> mx.array:
        return _limit(self.param)


@cache
def _layout(record: Record) -> mx.array:
    return mx.array([record.gate, record.gate_bias, record.up, record.up_bias, record.down, record.d], mx.int32)


@cache
def _limit(param: float) -> mx.array:
    return mx.array([param], mx.float32)


def vectors(record: Record, slab: mx.array, offsets: mx.array, at: int) -> mx.array:
    """float32 [n, d]: the vectors at byte `at` of the records that begin at `offsets` of the slab (below 2^31)."""
    raw = _bytes(slab, offsets, at, record.vector_bytes)
    if not record.quantized:
        return raw.view(FLOATS[record.source]).astype(mx.float32)
    words, size = record.d * BITS[record.format] // 8, FLOATS[record.source].size * record.d // record.group
    scales = mx.contiguous(raw[:, words : words + size]).view(FLOATS[record.source]).astype(mx.float32)
    biases = mx.contiguous(raw[:, words + size :]).view(FLOATS[record.source]).astype(mx.float32)
    packed = mx.contiguous(raw[:, :words]).view(mx.uint32)
    return mx.dequantize(packed, scales, biases, group_size=record.group, bits=BITS[record.format])


def scalars(record: Record, slab: mx.array, offsets: mx.array, at: int) -> mx.array:
    """float32 [n]: the bias at byte `at` of each record, zero where there is none."""
    if at < 0:
        return mx.zeros(offsets.shape)
    return _bytes(slab, offsets, at, FLOATS[record.source].size).view(FLOATS[record.source]).astype(mx.float32)[:, 0]


def _bytes(slab: mx.array, offsets: mx.array, at: int, count: int) -> mx.array:
    return mx.contiguous(slab.reshape(-1)[(offsets + at)[:, None] + mx.arange(count)])
