"""On a CPU MLX computes no products, and where layers are native it computes nothing at all.

MLX's products are slow there (a reference BLAS on one thread), and 16-bit or quantized ones slower still, so one that
slips in would go unnoticed by every test of values. Native path: every MLX function is replaced by one that refuses.
Path of modules: the graph behind every array that leaves MLX is listed before it is evaluated.
"""

from __future__ import annotations

import io
import re
import types
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import flashsparse
from tests.model.packs import make_pack

PRODUCT = re.compile(r"Matmul|MM|Quant|Attention|Conv|Einsum", re.IGNORECASE)
PROMPT = list(range(3, 60))
PACKS: list[dict[str, Any]] = [
    {"dtype": "F16"},
    {"dtype": "BF16", "bits": 4},
    {"dtype": "F16", "bits": 8, "tier": "dense", "activation": "silu"},
]


def refuse_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("MLX was called")

    for module in (mx, mx.fast, mx.linalg, mx.random, mx.metal, nn):
        for name, value in vars(module).items():
            if callable(value) and not name.startswith("_"):
                monkeypatch.setattr(module, name, refuse)


def decode(engine: flashsparse.Engine) -> list[int]:
    with engine.session() as session:
        return [piece.token for piece in session.generate(PROMPT, max_tokens=12)]


@pytest.mark.parametrize("options", PACKS, ids=str)
def test_native_layers_never_touch_mlx(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flashsparse.load(make_pack(tmp_path, **options), slots=64) as engine:
        expected = decode(engine)
        refuse_mlx(monkeypatch)
        assert decode(engine) == expected


def test_the_refusal_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flashsparse.load(make_pack(tmp_path), slots=64, layers="modules") as engine:
        refuse_mlx(monkeypatch)
        with pytest.raises(AssertionError, match="MLX was called"):
            decode(engine)


def primitives(x: mx.array) -> set[str]:
    """The operations that evaluating x would run."""
    graph = io.StringIO()
    mx.export_to_dot(graph, x)
    return set(re.findall(r'label ="(\w+)", shape=rectangle', graph.getvalue()))


def watched_numpy(found: set[str]) -> types.SimpleNamespace:
    """numpy as modules.py sees it, which notes what each array that leaves MLX is made of."""

    def array(x: Any, *args: Any, **options: Any) -> np.ndarray:
        if isinstance(x, mx.array):
            found.update(primitives(x))
        return np.array(x, *args, **options)

    return types.SimpleNamespace(**{**vars(np), "array": array})


@pytest.mark.parametrize("options", PACKS, ids=str)
def test_modules_compute_no_product_in_mlx(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashsparse.models import modules

    found: set[str] = set()
    with flashsparse.load(make_pack(tmp_path, **options), slots=64, layers="modules") as engine:
        monkeypatch.setattr(modules, "np", watched_numpy(found))
        decode(engine)
    assert {"Rsqrt", "Cos", "Add"} <= found  # norms, rotations and residuals are MLX's
    assert not {name for name in found if PRODUCT.search(name)}


def test_products_would_be_seen() -> None:
    x = mx.ones((2, 64), mx.float16)
    assert any(PRODUCT.search(name) for name in primitives(x @ mx.ones((64, 8), mx.float16)))
    assert any(PRODUCT.search(name) for name in primitives(mx.quantized_matmul(x, *mx.quantize(mx.ones((64, 64))))))
    heads = mx.ones((1, 1, 2, 64))
    attended = mx.fast.scaled_dot_product_attention(heads, heads, heads, scale=1.0)
    assert any(PRODUCT.search(name) for name in primitives(attended))
