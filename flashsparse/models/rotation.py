"""Rotary embedding frequencies of a normalized configuration, in float64: what the native layers turn by.

Pairs are (i, i + head_dim / 2). Formulas as transformers computes them (its rope utilities: linear, llama3, yarn), from
the fields that `models/rope.py` normalizes; checked against transformers' own numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def frequencies(config: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Radians per position [head_dim / 2], and the factor on cosines and sines (1 but for yarn)."""
    size, theta, scaling = config["head_dim"], float(config["rope_theta"]), config["rope_scaling"]
    plain = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if scaling is None:
        return plain, 1.0
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, theta, scaling), _magnitude(scaling, "mscale") / _magnitude(scaling, "mscale_all_dim")


def _llama3(plain: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Slow dimensions are slowed down by the factor, fast ones kept, those between interpolated."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (kept + (1 - kept) / scaling["factor"])


def _yarn(plain: np.ndarray, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """Dimensions below the corrected range are kept, those above it slowed down, a ramp lies between."""
    size = 2 * len(plain)

    def dimension(rotations: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling["beta_fast"])), 0)
    high = min(math.ceil(dimension(scaling["beta_slow"])), size - 1)
    width = high - low if high != low else 0.001
    slowed = np.clip((np.arange(len(plain)) - low) / width, 0.0, 1.0)
    return plain * (1 - slowed + slowed / scaling["factor"])


def _magnitude(scaling: dict[str, Any], name: str) -> float:
    factor = scaling["factor"]
    return 1.0 if factor <= 1 else 0.1 * float(scaling[name]) * math.log(factor) + 1.0
