"""The sparse FFN over a list of records, in plain MLX operators: the reference that faster kernels are compared with.

Gated, h = act(gate · x) * (up · x + b_up); non-gated, h = act(up · x + b_up); y += sum over records of h * down.
Float32 throughout. Reading records and choosing slots are the caller's.
"""

from __future__ import annotations

import mlx.core as mx


def activate(scores: mx.array, activation: str, param: float | None) -> mx.array:
    """The activation of pre-activations of any shape; for dReLU the gate's relu. ValueError for an unknown name."""
    if activation == "silu":
        return scores * mx.sigmoid(scores)
    if activation in ("relu", "drelu"):
        return mx.maximum(scores, 0)
    if activation == "relu2":
        return mx.square(mx.maximum(scores, 0))
    if activation == "fatrelu" and param is not None:
        # ProSparse's FATReLU: values at the threshold or above pass, NaN passes too.
        return mx.where(scores < param, mx.zeros_like(scores), scores)
    raise ValueError(f"activation {activation!r} is not known")


def gated_hidden(activated: mx.array, up: mx.array, bias: mx.array, x: mx.array, activation: str) -> mx.array:
    """activated [T, n], up [n, d], bias [n], x [T, d] -> h [T, n]; exactly zero where activated is zero."""
    lifted = x @ up.T + bias
    if activation == "drelu":
        lifted = mx.maximum(lifted, 0)
    # A product with an exact zero must stay zero, also when the other factor is infinite.
    return mx.where(activated == 0, mx.zeros_like(lifted), activated * lifted)


def accumulate_down(hidden: mx.array, down: mx.array) -> mx.array:
    """hidden [T, n], down [n, d] -> their product [T, d], columns that are zero for a token left out of its sum."""
    terms = mx.where(hidden[..., None] == 0, mx.zeros_like(down)[None], hidden[..., None] * down[None])
    return terms.sum(axis=1)
