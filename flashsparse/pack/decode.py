"""Vectors of records as float32, in numpy: for judging and inspecting, not for speed."""

from __future__ import annotations

import numpy as np

from flashsparse.pack.layout import Field
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.safetensors import ITEM_BYTES


def vectors(manifest: Manifest, field: Field, raw: np.ndarray) -> np.ndarray:
    """float32 [n, d] of a vector field, from the field's bytes uint8 [n, field.bytes] of n records."""
    d, dtype, quant = manifest.hidden_size, manifest.source_dtype, manifest.quant
    if quant is None:
        return floats(raw[:, : d * ITEM_BYTES[dtype]], dtype)
    words, group = d * quant.bits // 8, d // quant.group_size * ITEM_BYTES[dtype]
    scales = floats(raw[:, words : words + group], dtype)
    biases = floats(raw[:, words + group : words + 2 * group], dtype)
    packed = raw[:, :words]
    codes = packed if quant.bits == 8 else np.stack([packed & 15, packed >> 4], axis=2)
    grouped = codes.reshape(len(raw), -1, quant.group_size).astype(np.float32)
    grouped *= scales[:, :, None]
    grouped += biases[:, :, None]
    return grouped.reshape(len(raw), d)


def floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """float32 [n, m] of uint8 [n, m * item] that hold F32, F16 or BF16."""
    raw = np.ascontiguousarray(raw)
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f4" if dtype == "F32" else "<f2").astype(np.float32)
