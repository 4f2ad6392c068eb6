"""A plain float64 forward pass of the supported families in numpy: the oracle for what has no transformers reference.

Reads a checkpoint directory and its config.json by itself, sharing no code with FlashSparse. Slow, whole-sequence, no
cache. `kv_dtype` rounds keys and values the way a 16-bit KV cache does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def read_safetensors(path: Path) -> dict[str, Array]:
    """Every tensor of one file as float64 (or its own integer type)."""
    blob = path.read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header.pop("__metadata__", None)
    return {name: _tensor(blob[8 + size :], info) for name, info in header.items()}


def _tensor(data: bytes, info: dict[str, Any]) -> Array:
    begin, end = info["data_offsets"]
    values = np.frombuffer(data[begin:end], dtype=_TYPES[info["dtype"]]).reshape(info["shape"])
    if info["dtype"] == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """config.json and all tensors of a checkpoint directory."""
    weights: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= read_safetensors(path)
    return json.loads((folder / "config.json").read_text()), weights


def round_to(values: Array, dtype: str | None) -> Array:
    """`values` rounded to nearest even in F16 or BF16, as float64; unchanged for F32 and None."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float64)
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
    return values


def logits(
    config: dict[str, Any],
    weights: dict[str, Array],
    tokens: Array,
    activation: str,
    param: float | None = None,
    kv_dtype: str | None = None,
    active: list[Array] | None = None,
) -> Array:
    """Logits [T, vocab] of `tokens`. `active`, when given, receives one bool array [T, I] per layer: the true sets."""
    run = _opt if config["model_type"] == "opt" else _llama
    act = _activation(activation, param)
    return run(config, weights, np.asarray(tokens), act, activation == "drelu", kv_dtype, active)


def _activation(name: str, param: float | None) -> Callable[[Array], Array]:
    table: dict[str, Callable[[Array], Array]] = {
        "relu": lambda x: np.maximum(x, 0),
        "drelu": lambda x: np.maximum(x, 0),
        "relu2": lambda x: np.maximum(x, 0) ** 2,
        "fatrelu": lambda x: np.where(x >= (param or 0.0), x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
    }
    return table[name]


def _linear(weights: dict[str, Array], name: str, x: Array) -> Array:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _rms(weights: dict[str, Array], name: str, x: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"]


def _layer_norm(weights: dict[str, Array], name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _attend(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Causal attention of q [T, H, hd] over k, v [T, KVH, hd]; a window of w sees the query itself and w - 1 before."""
    heads, kv_heads, length = q.shape[1], k.shape[1], q.shape[0]
    k, v = (np.repeat(a, heads // kv_heads, axis=1) for a in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[2])
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    hidden = (distance < 0) | (distance >= (window or length))
    scores = np.where(hidden, -np.inf, scores)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", shares / shares.sum(-1, keepdims=True), v)


def _rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    if rope := config.get("rope_parameters"):
        return dict(rope)
    rope = dict(config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    return rope | {"rope_theta": config.get("rope_theta", 10000.0)}


def _frequencies(rope: dict[str, Any], dim: int) -> tuple[Array, float]:
    """Inverse frequencies [dim / 2] and the factor that yarn puts on cosines and sines."""
    base = 1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    kind = rope["rope_type"]
    if kind == "default":
        return base, 1.0
    if kind == "linear":
        return base / rope["factor"], 1.0
    return _llama3(rope, base) if kind == "llama3" else _yarn(rope, base, dim)


def _llama3(rope: dict[str, Any], base: Array) -> tuple[Array, float]:
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * base / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * base / rope["factor"] + smooth * base, 1.0


def _yarn(rope: dict[str, Any], base: Array, dim: int) -> tuple[Array, float]:
    length = rope["original_max_position_embeddings"]

    def index(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = max(math.floor(index(rope.get("beta_fast", 32))), 0)
    high = min(math.ceil(index(rope.get("beta_slow", 1))), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return base / rope["factor"] * ramp + base * (1 - ramp), 0.1 * math.log(rope["factor"]) + 1


def _rope(x: Array, frequencies: Array, factor: float) -> Array:
    """Rotates x [T, heads, hd]; halves are paired, as in transformers."""
    angles = np.arange(x.shape[0])[:, None] * frequencies
    cos, sin = (factor * f(angles)[:, None, :] for f in (np.cos, np.sin))
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _window(config: dict[str, Any], layer: int) -> int | None:
    window = config.get("sliding_window")
    if config["model_type"] == "qwen2":
        return window if config.get("use_sliding_window") and layer >= config["max_window_layers"] else None
    return window


def _scales(config: dict[str, Any]) -> tuple[float, float, float]:
    """What multiplies embeddings and each addition to the residual, and what divides the logits: MiniCPM's muP."""
    if config["model_type"] != "minicpm":
        return 1.0, 1.0, 1.0
    residual = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    return config["scale_emb"], residual, config["hidden_size"] / config["dim_model_base"]


def _llama(
    config: dict[str, Any],
    weights: dict[str, Array],
    tokens: Array,
    act: Callable[[Array], Array],
    double: bool,
    kv_dtype: str | None,
    active: list[Array] | None,
) -> Array:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    frequencies, factor = _frequencies(_rope_settings(config), size)
    eps, length = config["rms_norm_eps"], len(tokens)
    embedding, residual, divisor = _scales(config)
    x = embedding * weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        h = _rms(weights, f"{base}.input_layernorm", x, eps)
        q = _linear(weights, f"{base}.self_attn.q_proj", h).reshape(length, heads, size)
        k = _linear(weights, f"{base}.self_attn.k_proj", h).reshape(length, kv_heads, size)
        v = _linear(weights, f"{base}.self_attn.v_proj", h).reshape(length, kv_heads, size)
        q, k = _rope(q, frequencies, factor), _rope(k, frequencies, factor)
        seen = _attend(q, round_to(k, kv_dtype), round_to(v, kv_dtype), _window(config, layer))
        x = x + residual * _linear(weights, f"{base}.self_attn.o_proj", seen.reshape(length, heads * size))
        h = _rms(weights, f"{base}.post_attention_layernorm", x, eps)
        gate = act(_linear(weights, f"{base}.mlp.gate_proj", h))
        up = _linear(weights, f"{base}.mlp.up_proj", h)
        if active is not None:
            active.append(gate != 0)
        hidden = gate * (np.maximum(up, 0) if double else up)
        x = x + residual * _linear(weights, f"{base}.mlp.down_proj", hidden)
    x = _rms(weights, "model.norm", x, eps) / divisor
    return x @ weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


def _opt(
    config: dict[str, Any],
    weights: dict[str, Array],
    tokens: Array,
    act: Callable[[Array], Array],
    double: bool,
    kv_dtype: str | None,
    active: list[Array] | None,
) -> Array:
    heads, first, length = config["num_attention_heads"], config["do_layer_norm_before"], len(tokens)
    root = "model.decoder"
    x = weights[f"{root}.embed_tokens.weight"][tokens]
    if f"{root}.project_in.weight" in weights:
        x = _linear(weights, f"{root}.project_in", x)
    x = x + weights[f"{root}.embed_positions.weight"][np.arange(length) + 2]
    for layer in range(config["num_hidden_layers"]):
        base = f"{root}.layers.{layer}"
        h = _layer_norm(weights, f"{base}.self_attn_layer_norm", x) if first else x
        q, k, v = (_linear(weights, f"{base}.self_attn.{n}_proj", h).reshape(length, heads, -1) for n in "qkv")
        seen = _attend(q, round_to(k, kv_dtype), round_to(v, kv_dtype), None).reshape(length, -1)
        x = x + _linear(weights, f"{base}.self_attn.out_proj", seen)
        x = x if first else _layer_norm(weights, f"{base}.self_attn_layer_norm", x)
        h = _layer_norm(weights, f"{base}.final_layer_norm", x) if first else x
        hidden = act(_linear(weights, f"{base}.fc1", h))
        if active is not None:
            active.append(hidden != 0)
        x = x + _linear(weights, f"{base}.fc2", hidden)
        x = x if first else _layer_norm(weights, f"{base}.final_layer_norm", x)
    if first and not config.get("_remove_final_layer_norm"):
        x = _layer_norm(weights, f"{root}.final_layer_norm", x)
    if f"{root}.project_out.weight" in weights:
        x = _linear(weights, f"{root}.project_out", x)
    tied = config.get("tie_word_embeddings", True)
    return x @ weights[f"{root}.embed_tokens.weight" if tied else "lm_head.weight"].T
