"""Rotary position scaling: the forms transformers 4 and 5 write, brought to the one form mlx-lm reads.

Yarn's attention factor is expressed through mlx-lm's `mscale`, since that is what its rope multiplies queries and
keys with; `truncate: false` has no counterpart there and is refused.
"""

from __future__ import annotations

import math
from typing import Any

from flashsparse.models.fields import Fields
from flashsparse.pack.config import LAYER_TYPES

DEFAULT_THETA = 10000.0
TYPES = ("default", "linear", "llama3", "yarn")


def normalize_rope(fields: Fields, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling) of a configuration; rope_scaling is None for plain rotary embeddings.

    Raises UnsupportedModelError for other types, partial rotation, and values that differ between layer types.
    """
    theta = fields.number("rope_theta", DEFAULT_THETA)
    # transformers prefers a (legacy) rope_scaling over rope_parameters when a file has both.
    parameters, legacy = fields.get("rope_parameters"), fields.get("rope_scaling")
    name = "rope_scaling" if legacy else "rope_parameters"
    rope = Fields(_flat(fields, name, legacy or parameters or {}), name)
    theta = rope.number("rope_theta", theta)
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial != 1:
        fields.unsupported("partial_rotary_factor", partial, "1.0")
    stated = fields.get("original_max_position_embeddings") is not None
    original = fields.integer("original_max_position_embeddings", None) if stated else None
    scaling = _scaling(rope, max_positions, original)
    if theta == 1 and scaling is not None and scaling["rope_type"] == "yarn":
        fields.malformed("rope_theta", theta, "a number other than 1 (yarn divides by its logarithm)")
    return theta, scaling


def _flat(fields: Fields, name: str, value: Any) -> dict[str, Any]:
    """The parameters that every layer uses, from a flat object or one per layer type."""
    if not isinstance(value, dict):
        fields.malformed(name, value, "an object")
    nested = [value[key] for key in LAYER_TYPES if key in value]
    if not nested:
        return value
    if len(nested) != len(value) or any(not isinstance(one, dict) or one != nested[0] for one in nested):
        fields.unsupported(name, value, "the same parameters for every layer type")
    return dict(nested[0])


def _scaling(rope: Fields, max_positions: int, original: int | None) -> dict[str, Any] | None:
    kind = rope.text("rope_type", rope.get("type", "default"))
    if kind not in TYPES:
        rope.unsupported("rope_type", kind, ", ".join(TYPES))
    result: dict[str, Any] | None = None
    if kind == "linear":
        result = {"rope_type": kind, "factor": rope.number("factor", None)}
    elif kind == "llama3":
        result = _llama3(rope, max_positions, original)
    elif kind == "yarn":
        result = _yarn(rope, max_positions, original)
    rope.get("type")
    rope.finish(frozenset({"finetuned"}))
    return result


def _original(rope: Fields, max_positions: int, original: int | None) -> int:
    """As in transformers: the top-level field, else the one beside the type, else the model's maximum."""
    inner = rope.integer("original_max_position_embeddings", max_positions)
    return inner if original is None else original


def _llama3(rope: Fields, max_positions: int, original: int | None) -> dict[str, Any]:
    low, high = rope.number("low_freq_factor", None), rope.number("high_freq_factor", None)
    if high <= low:
        rope.malformed("high_freq_factor", high, f"more than low_freq_factor ({low})")
    return {
        "rope_type": "llama3",
        "factor": rope.number("factor", None),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _original(rope, max_positions, original),
    }


def _yarn(rope: Fields, max_positions: int, original: int | None) -> dict[str, Any]:
    length = _original(rope, max_positions, original)
    if "factor" not in rope.raw:
        rope.malformed("factor", None, "a number")
    factor = rope.number("factor", max_positions / length)
    if not rope.boolean("truncate", True):
        rope.unsupported("truncate", False, "true (mlx-lm rounds the range of corrected dimensions)")
    mscale, all_dim = _mscale(rope, factor)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": length,
        "beta_fast": rope.number("beta_fast", 32.0) if rope.get("beta_fast") else 32.0,
        "beta_slow": rope.number("beta_slow", 1.0) if rope.get("beta_slow") else 1.0,
        "mscale": mscale,
        "mscale_all_dim": all_dim,
    }


def _mscale(rope: Fields, factor: float) -> tuple[float, float]:
    """mlx-lm's (mscale, mscale_all_dim) that scale queries and keys as transformers' attention factor does.

    mlx-lm multiplies by m(mscale) / m(mscale_all_dim) with m(s) = 0.1 s ln(factor) + 1, or by 1 when factor <= 1.
    """
    attention = rope.get("attention_factor")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is not None:
        value = rope.number("attention_factor", None)
        if factor <= 1:
            if value != 1:
                rope.unsupported("attention_factor", value, "1.0 when factor <= 1")
            return 1.0, 0.0
        return (value - 1) / (0.1 * math.log(factor)), 0.0
    if mscale and all_dim:
        return rope.number("mscale", None), rope.number("mscale_all_dim", None)
    return 1.0, 0.0
