"""The parts of a dense forward pass in numpy float32 on BLAS: norms, linear layers, rotary embedding, attention.

Owns the mathematics of single operations; whose weights they use is in `model`, their order in `walk`. Rows are tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

LAYER_NORM_EPS = 1e-5
QUERY_BLOCK = 256  # queries whose scores are held at once, for one group of heads


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """x [n, cols] through weight [rows, cols] -> [n, rows]."""
    y = x @ weight.T
    if bias is not None:
        y += bias
    return y


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight, by row."""
    mean = np.einsum("nd,nd->n", x, x) / np.float32(x.shape[1])
    y: np.ndarray = x * (1 / np.sqrt(mean + np.float32(eps)))[:, None]
    y *= weight
    return y


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(x - mean(x)) / sqrt(var(x) + 1e-5) * weight + bias, by row."""
    y = rms_norm(x - x.mean(axis=1, keepdims=True), weight, LAYER_NORM_EPS)
    y += bias
    return y


def rope_frequencies(config: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Radians per position, float64 [head_dim / 2], and the factor on rotated vectors (yarn's; else 1).

    `config` is a normalized configuration, whose rope_scaling is None or of a type that `models.rope` writes.
    """
    dim, theta = config["head_dim"], config["rope_theta"]
    base = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = config["rope_scaling"]
    if scaling is None:
        return base, 1.0
    if scaling["rope_type"] == "linear":
        return base / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(base, scaling), 1.0
    return _yarn(base, scaling, theta)


def _llama3(base: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * base / (2 * math.pi)
    kept: np.ndarray = np.clip((turns - low) / (high - low), 0, 1)
    return kept * base + (1 - kept) * base / scaling["factor"]


def _yarn(base: np.ndarray, scaling: Mapping[str, Any], theta: float) -> tuple[np.ndarray, float]:
    factor, dim = scaling["factor"], 2 * len(base)

    def index(turns: float) -> float:
        length = scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(theta))

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1

    low, high = max(math.floor(index(scaling["beta_fast"])), 0), min(math.ceil(index(scaling["beta_slow"])), dim - 1)
    slow = np.clip((np.arange(len(base)) - low) / (high - low or 0.001), 0, 1)
    return base / factor * slow + base * (1 - slow), scale(scaling["mscale"]) / scale(scaling["mscale_all_dim"])


def rotate(x: np.ndarray, frequencies: np.ndarray, factor: float) -> np.ndarray:
    """x [T, heads, head_dim] at positions 0..T-1, rotated; dimension i is paired with i + head_dim / 2."""
    angles = np.arange(len(x))[:, None] * frequencies
    cos, sin = ((factor * turn(angles)).astype(np.float32)[:, None, :] for turn in (np.cos, np.sin))
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None) -> np.ndarray:
    """Causal attention of q [T, H, hd] over k, v [T, KVH, hd] -> [T, H, hd].

    A window of w sees the token itself and the w - 1 before it. Holds scores of one group of heads at a time.
    """
    length, heads, size = q.shape
    shared = heads // k.shape[1]
    out = np.empty_like(q)
    for group in range(k.shape[1]):
        some = slice(group * shared, (group + 1) * shared)
        for begin in range(0, length, QUERY_BLOCK):
            end = min(length, begin + QUERY_BLOCK)
            first = 0 if window is None else max(0, begin - window + 1)
            queries = np.ascontiguousarray(q[begin:end, some].transpose(1, 0, 2)).reshape(-1, size)
            scores = (queries @ k[first:end, group].T).reshape(shared, end - begin, -1)
            shares = _softmax(scores, begin - first, window, size**-0.5).reshape(len(queries), -1)
            out[begin:end, some] = (shares @ v[first:end, group]).reshape(shared, -1, size).transpose(1, 0, 2)
    return out


def _softmax(scores: np.ndarray, offset: int, window: int | None, scale: float) -> np.ndarray:
    """Softmax of scores [heads, queries, keys] in place; query i is key i + offset and sees none after it."""
    distance = np.arange(scores.shape[1])[:, None] + offset - np.arange(scores.shape[2])[None]
    hidden = (distance < 0) | (distance >= (window or distance.size + 1))
    scores *= np.float32(scale)
    np.copyto(scores, -np.inf, where=hidden)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores
