"""Vectors of records as float32: every type, and both quantizations against MLX's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashsparse.pack.decode import vectors
from flashsparse.pack.layout import Quant, record_layout
from flashsparse.pack.manifest import Manifest
from tests.checkpoints import encode
from tests.unit.tiny_pack import write_pack


def manifest(path: Path, dtype: str, quant: Quant | None) -> Manifest:
    record = record_layout(True, "dense", 64, dtype, quant)
    return replace(write_pack(path / "pack"), hidden_size=64, source_dtype=dtype, quant=quant, record=record)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_plain_vectors(tmp_path: Path, dtype: str) -> None:
    values = np.arange(-96, 96, dtype=np.float32).reshape(3, 64) / 4  # exact in every type
    stored = manifest(tmp_path, dtype, None)
    raw = encode(values, dtype).view(np.uint8)
    assert np.array_equal(vectors(stored, stored.record.fields["down"], raw), values)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_vectors(tmp_path: Path, dtype: str, bits: int) -> None:
    from converter.quantize import quantized_bytes

    mx = pytest.importorskip("mlx.core")
    quant = Quant(bits, 32)
    rows = encode(np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32), dtype)
    stored = manifest(tmp_path, dtype, quant)
    raw = quantized_bytes(rows, dtype, quant)
    assert raw.shape[1] == stored.record.fields["down"].bytes
    source = mx.array(rows).view(mx.bfloat16) if dtype == "BF16" else mx.array(rows)
    words, scales, biases = mx.quantize(source, 32, bits)
    floats = scales.astype(mx.float32), biases.astype(mx.float32)
    expected = np.array(mx.dequantize(words, *floats, group_size=32, bits=bits))
    assert np.allclose(vectors(stored, stored.record.fields["down"], raw), expected, rtol=1e-6, atol=1e-6)
