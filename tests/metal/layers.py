"""Random layers as records in a slab, with their exact values in float64, and the sparse FFN computed from those."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metal_kernels.records import Record
from tests.native.operands import Stored, store

ACTIVATIONS = ("relu", "relu2", "fatrelu", "drelu", "silu")
FORMATS = ("F32", "F16", "BF16", "Q8-F16", "Q4-BF16")  # each format of a record once
PARAM = 0.25


@dataclass
class Layer:
    """n records in slots of a slab, in random order with gaps; `offsets` [n] say where each begins."""

    record: Record
    slab: mx.array
    offsets: np.ndarray
    vectors: dict[str, np.ndarray]  # gate, up, down [n, d]
    biases: dict[str, np.ndarray]  # gate_bias, up_bias [n]


def make_layer(
    rng: np.random.Generator,
    kind: str,
    n: int,
    d: int,
    *,
    activation: str = "relu",
    gated: bool = True,
    biased: bool = False,
    group: int = 32,
    scored: bool = True,
    special: bool = False,
) -> Layer:
    """`kind`: of operands.TYPES. `scored`: whether the record holds the row that scores it. `special`: NaN and Inf."""
    names = (["gate"] if gated and scored else []) + (["up"] if gated or scored else []) + ["down"]
    stored = {name: store(_values(rng, n, d, special and "Q" not in kind), kind, group) for name in names}
    source = kind.rpartition("-")[2]
    scalar = {f"{name}_bias": store(_values(rng, n, 1, False), source) for name in names[:-1] if biased}
    fields, size = _place(names, stored, scalar)
    stride = -(-size // 64) * 64 + 64
    slots = rng.permutation(n + 3)[:n]
    slab = rng.integers(0, 256, (n + 3, stride), np.uint8)
    for i in range(n):
        for name, at in fields.items():
            raw = np.frombuffer((stored.get(name) or scalar[name]).bytes(i), np.uint8)
            slab[slots[i], at : at + len(raw)] = raw
    record = Record(
        d=d,
        format=kind.partition("-")[0],
        source=source,
        group=group if "Q" in kind else 0,
        activation=activation,
        param=PARAM if activation == "fatrelu" else 0.0,
        gated=gated,
        **fields,
    )
    values = {name: each.values for name, each in stored.items()}
    extra = {name: each.values[:, 0] for name, each in scalar.items()}
    return Layer(record, mx.array(slab), slots.astype(np.int64) * stride, values, extra)


def _values(rng: np.random.Generator, n: int, d: int, special: bool) -> np.ndarray:
    values = rng.standard_normal((n, d)).astype(np.float32)
    if special and n:
        for value in (np.nan, np.inf, -np.inf):
            values[rng.integers(n), rng.integers(d)] = value
    return values


def _place(names: list[str], stored: dict[str, Stored], scalar: dict[str, Stored]) -> tuple[dict[str, int], int]:
    fields, position = {}, 0
    for name in [field for vector in names for field in (vector, f"{vector}_bias")]:
        found = stored.get(name) or scalar.get(name)
        if found is not None:
            fields[name] = position
            position += -(-_row_bytes(found) // 4) * 4
    return fields, position


def _row_bytes(stored: Stored) -> int:
    parts = (stored.data, stored.scales, stored.biases)
    return sum(int(np.prod(part.shape[1:])) * part.itemsize for part in parts if part is not None)


def activated(scores: np.ndarray, record: Record) -> np.ndarray:
    """The activation in float64; NaN passes."""
    positive = np.where(np.isnan(scores), scores, np.maximum(scores, 0))
    if record.activation == "silu":
        return scores / (1 + np.exp(-scores))
    if record.activation == "relu2":
        return positive**2
    if record.activation == "fatrelu":
        return np.where(scores < record.param, 0, scores)
    return positive


@dataclass
class Product:
    """Dot products in float64 and, for tolerances, the sums of their terms' magnitudes."""

    value: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, rows: np.ndarray, bias: np.ndarray | float = 0.0) -> Product:
        return cls(x @ rows.T + bias, np.abs(x) @ np.abs(rows).T + np.abs(bias))


def hidden64(layer: Layer, x: np.ndarray, gates: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Intermediate values [T, n] in float64 and how far float32 may be from them, per unit of tolerance."""
    v, b, record = layer.vectors, layer.biases, layer.record
    name = "gate" if record.gated else "up"
    if gates is None:
        score = Product.of(x, v[name], b.get(f"{name}_bias", 0.0))
        gate = activated(score.value, record)
        slope = 2 * np.abs(score.value) + score.size if record.activation == "relu2" else 1.2
        error = score.size * slope
    else:
        gate, error = gates.astype(np.float64), np.zeros(gates.shape)
    if not record.gated:
        return gate, error + np.abs(gate)
    up = Product.of(x, v["up"], b.get("up_bias", 0.0))
    lifted = np.maximum(up.value, 0) if record.activation == "drelu" else up.value
    with np.errstate(invalid="ignore"):
        value = np.where(gate == 0, 0.0, gate * lifted)
    return value, error * up.size + np.abs(gate) * up.size
