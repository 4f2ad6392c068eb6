"""Predictor objects for tests: every score with made-up but valid numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flashsparse.sparsity.spec import LayerSpec, PredictorSpec

TEXT = "ab" * 32
COPY = LayerSpec(bits=2, group_size=32, threshold=-0.25, density=0.125, value_recall=0.98, recall=0.75)
LOW_RANK = LayerSpec(rank=3, relu=True, threshold=0.5, density=0.25)


def spec(score: str = "gate_copy", count: int = 2, **changes: Any) -> PredictorSpec:
    """A calibrated predictor of `count` equal layers."""
    layer = {"low_rank": LOW_RANK, "gate": replace(COPY, bits=None, group_size=None)}.get(score, COPY)
    made = PredictorSpec(score, "threshold", "value_recall", 0.98, (TEXT,), 4096, (layer,) * count)
    return replace(made, **changes)
