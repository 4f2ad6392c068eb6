"""Random operands in every stored type with their exact values in float64, and slabs of records made of them.

Rounding to a type and quantizing are MLX's. Nothing here is a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

FORMATS = {"F32": "F32", "F16": "F16", "BF16": "BF16", "Q8": "F16", "Q4": "BF16"}  # and the type of their scales
GROUP = 64
FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
VECTORS = ("gate", "up", "down")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def raw(array: mx.array) -> np.ndarray:
    """The stored numbers as numpy; bf16 as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


@dataclass(frozen=True)
class Stored:
    """A matrix [n, d] as stored: `parts` are the numbers, or words, scales and biases. `values`: float64."""

    format: str
    parts: tuple[mx.array, ...]
    values: np.ndarray

    @property
    def source(self) -> str:
        return FORMATS[self.format]

    def rows(self) -> np.ndarray:
        """uint8 [n, bytes]: each row as a vector field of a record holds it."""
        return np.concatenate([np.ascontiguousarray(raw(part)).view(np.uint8) for part in self.parts], axis=1)


def store(values: np.ndarray, form: str) -> Stored:
    """float32 values [n, d] in a format of FORMATS; d is a multiple of GROUP where that is quantized."""
    typed = mx.array(values).astype(FLOATS[FORMATS[form]])
    if form[0] != "Q":
        return Stored(form, (typed,), wide(typed))
    bits = int(form[1])
    words, scales, biases = mx.quantize(typed, group_size=GROUP, bits=bits)
    numbers = raw(words)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32(2**bits - 1)
    groups = numbers.reshape(len(values), -1, GROUP).astype(np.float64)
    exact = groups * wide(scales)[..., None] + wide(biases)[..., None]
    return Stored(form, (words, scales, biases), exact.reshape(values.shape))


@dataclass(frozen=True)
class Layer:
    """n gated records in a slab [slots, stride], in shuffled slots; `fields` are byte offsets of VECTORS."""

    vectors: dict[str, Stored]
    fields: dict[str, int]
    slab: np.ndarray
    offsets: np.ndarray  # int64 [n]

    @property
    def format(self) -> str:
        return self.vectors["gate"].format

    @property
    def vector_bytes(self) -> int:
        return int(self.vectors["gate"].rows().shape[1])


def layer(form: str, n: int, d: int, copies: int = 1) -> Layer:
    """`copies` times the same n records, for slabs that no cache holds."""
    vectors = {name: store(normal(i, n, d), form) for i, name in enumerate(VECTORS)}
    rows = {name: stored.rows() for name, stored in vectors.items()}
    size = -(-rows["gate"].shape[1] // 16) * 16
    fields = {name: i * size for i, name in enumerate(VECTORS)}
    stride = -(-len(VECTORS) * size // 64) * 64
    slots = np.random.default_rng(7).permutation(n + 3)[:n]
    slab = np.zeros((n + 3, stride), np.uint8)
    for name, at in fields.items():
        slab[slots, at : at + rows[name].shape[1]] = rows[name]
    whole = np.tile(slab, (copies, 1))
    begins = (np.arange(copies)[:, None] * (n + 3) + slots[None]).reshape(-1).astype(np.int64) * stride
    return Layer(vectors, fields, whole, begins)


@dataclass(frozen=True)
class Products:
    """x · rows in float64, and the sums of the terms' magnitudes, which errors are measured in."""

    value: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, rows: np.ndarray) -> Products:
        return cls(x.astype(np.float64) @ rows.T, np.abs(x).astype(np.float64) @ np.abs(rows).T)

    def error(self, found: Any) -> float:
        return worst(np.asarray(found), self.value, self.size)


def worst(found: np.ndarray, expected: np.ndarray, size: np.ndarray) -> float:
    """The largest |found - expected| / size; NaN is infinite."""
    share = np.abs(found - expected) / np.maximum(size, 1e-30)
    return float(np.where(np.isnan(share), np.inf, share).max(initial=0.0))


def hidden_products(made: Layer, x: np.ndarray) -> Products:
    """relu(gate · x) (up · x) of each record, in float64."""
    gate, up = (Products.of(x, made.vectors[name].values) for name in ("gate", "up"))
    return Products(np.maximum(gate.value, 0) * up.value, gate.size * up.size)


def down_products(made: Layer, hidden: np.ndarray) -> Products:
    """hidden · down, from the hidden values that were found."""
    return Products.of(hidden, made.vectors["down"].values.T)


def compact_copy(rows: int, groups: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The parts of a compact gate that holds its weights exactly, and these, float32 [rows, groups * 64]."""
    rng = np.random.default_rng(11)
    numbers = rng.integers(-2031, 2032, (rows, groups, GROUP))
    high = (numbers + 8) >> 4
    low = (numbers - (high << 4) + 8).astype(np.uint8)
    norms = np.sqrt(((numbers / 16) ** 2).sum(axis=2)).max(axis=1)
    rough = np.sqrt((((numbers - 16 * high) / 16) ** 2).sum(axis=2)).max(axis=1)
    errors = np.stack([rough * 1.001, np.full(rows, 1e-9), norms * 1.001 + 5], axis=1).astype(np.float32)
    parts = {
        "high": high.astype(np.int8).reshape(rows, -1),
        "low": (low[..., :32] | low[..., 32:] << 4).reshape(rows, -1),
        "scales": np.full((rows, groups), 0x3F80, np.uint16),  # bf16 for one
        "errors": errors,
    }
    return parts, (numbers / 16).astype(np.float32).reshape(rows, -1)
