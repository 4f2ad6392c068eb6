"""Tiny random Hugging Face checkpoints for tests: config.json and safetensors shards, with fixed seeds and no torch.

Owns the tensor names and shapes of the supported families. Tokenizers are left out: a checkpoint converts without one.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits as uint16, rounded to nearest even (finite values only)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as uint16 -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values in the given safetensors type; BF16 comes back as uint16."""
    if dtype == "BF16":
        return to_bf16(values)
    return np.ascontiguousarray(values, np.float32 if dtype == "F32" else np.float16)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """Writes `{name: (dtype, array)}` in the given order; BF16 arrays are uint16 bits."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def _llama_config(family: str, h: int, i: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": h // 4} if family == "minicpm" else {}
    return scales | {
        "architectures": [names.get(family, "LlamaForCausalLM")],
        "model_type": family,
        "hidden_size": h,
        "intermediate_size": i,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _opt_config(h: int, i: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": h,
        "ffn_dim": i,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": h,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }


def _llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, i, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or h // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    attention_bias = config.get("attention_bias", False)
    qkv_bias = attention_bias or config["model_type"] == "qwen2"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}

    def linear(name: str, rows: int, cols: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (rows, cols)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    for n in range(config["num_hidden_layers"]):
        p = f"model.layers.{n}"
        shapes[f"{p}.input_layernorm.weight"] = (h,)
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            linear(f"{p}.self_attn.{name}", rows, h, qkv_bias)
        linear(f"{p}.self_attn.o_proj", h, q, attention_bias)
        shapes[f"{p}.post_attention_layernorm.weight"] = (h,)
        linear(f"{p}.mlp.gate_proj", i, h, config.get("mlp_bias", False))
        linear(f"{p}.mlp.up_proj", i, h, config.get("mlp_bias", False))
        linear(f"{p}.mlp.down_proj", h, i, config.get("mlp_bias", False))
    shapes["model.norm.weight"] = (h,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, h)
    return shapes


def _opt_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, i, v, e = config["hidden_size"], config["ffn_dim"], config["vocab_size"], config["word_embed_proj_dim"]
    bias = config["enable_bias"]
    d = "model.decoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{d}.embed_tokens.weight": (v, e),
        f"{d}.embed_positions.weight": (config["max_position_embeddings"] + 2, h),
    }

    def layer_norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (h,)

    if e != h:
        shapes[f"{d}.project_in.weight"], shapes[f"{d}.project_out.weight"] = (h, e), (e, h)
    for n in range(config["num_hidden_layers"]):
        p = f"{d}.layers.{n}"
        parts = [(f"self_attn.{x}_proj", h, h) for x in ("q", "k", "v", "out")] + [("fc1", i, h), ("fc2", h, i)]
        for name, rows, cols in parts:
            shapes[f"{p}.{name}.weight"] = (rows, cols)
            if bias:
                shapes[f"{p}.{name}.bias"] = (rows,)
        layer_norm(f"{p}.self_attn_layer_norm")
        layer_norm(f"{p}.final_layer_norm")
    if config["do_layer_norm_before"] and not config.get("_remove_final_layer_norm", False):
        layer_norm(f"{d}.final_layer_norm")
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, e)
    return shapes


def is_norm(name: str) -> bool:
    """Whether a tensor belongs to a normalization layer."""
    return "norm" in name


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """Random values of unit gain: weights N(0, 1/fan_in), embeddings N(0, 1), norm weights near 1, biases N(0, 0.1)."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if is_norm(name) and name.endswith(".weight"):
            values = 1 + 0.1 * values
        elif len(shape) == 1:
            values = 0.1 * values
        elif "embed" not in name:
            values = values / np.float32(shape[-1] ** 0.5)
        tensors[name] = (dtype, encode(values, dtype))
    return tensors


def write_shards(path: Path, tensors: dict[str, tuple[str, np.ndarray]], shards: int) -> None:
    """One model.safetensors, or `shards` files of about equally many tensors and their index."""
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
        return
    names = list(tensors)
    weight_map = {}
    for n, part in enumerate(np.array_split(np.arange(len(names)), shards)):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        chosen = {names[k]: tensors[names[k]] for k in part}
        write_safetensors(path / file, chosen)
        weight_map.update(dict.fromkeys(chosen, file))
    total = sum(array.nbytes for _, array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_checkpoint(
    path: Path,
    family: str = "llama",
    *,
    dtype: str = "F32",
    hidden: int = 64,
    intermediate: int = 96,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 128,
    activation: str = "relu",
    tie: bool = False,
    shards: int = 1,
    seed: int = 0,
    norm_dtype: str | None = None,
    **config: Any,
) -> Path:
    """Writes a random checkpoint directory and returns it.

    `family`: llama, mistral, qwen2, sparsellama, bamboo, minicpm or opt; `dtype`: F32, F16 or BF16 (`norm_dtype` for
    the normalization layers); `config`: more fields of config.json, such as head_dim, attention_bias, rope_scaling.
    """
    path.mkdir(parents=True, exist_ok=True)
    if family == "opt":
        fields = _opt_config(hidden, intermediate, layers, heads, vocab) | {"activation_function": activation}
    else:
        fields = _llama_config(family, hidden, intermediate, layers, heads, kv_heads, vocab) | {
            "hidden_act": activation
        }
    torch_dtype = _DTYPE_NAMES[dtype]
    fields |= {"tie_word_embeddings": tie, "torch_dtype": torch_dtype} | config
    shapes = _opt_shapes(fields) if family == "opt" else _llama_shapes(fields)
    tensors = random_tensors(shapes, dtype, seed)
    if norm_dtype is not None:
        norms = {name: shape for name, shape in shapes.items() if is_norm(name)}
        tensors |= random_tensors(norms, norm_dtype, seed)
    (path / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    write_shards(path, tensors, shards)
    return path
