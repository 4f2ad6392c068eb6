"""Which tensors a family's checkpoint must have, their shapes, and which part of a pack each one belongs to.

Names are the checkpoint's own (Hugging Face's); nothing here reads data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.source import SourceTensor
from flashsparse.errors import CheckpointError

FLOATS = ("F32", "F16", "BF16")
# Buffers that old checkpoints carry; they follow from the configuration.
_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class FFNNames:
    """Base names of one layer's FFN matrices: gate and up [I, d], down [d, I]. `gate` is None for OPT."""

    gate: str | None
    up: str
    down: str


def ffn_names(family: str, layer: int) -> FFNNames:
    """The FFN of a layer; OPT's fc1 is `up`."""
    if family == "opt":
        base = f"model.decoder.layers.{layer}"
        return FFNNames(None, f"{base}.fc1", f"{base}.fc2")
    base = f"model.layers.{layer}.mlp"
    return FFNNames(f"{base}.gate_proj", f"{base}.up_proj", f"{base}.down_proj")


def embedding_name(family: str) -> str:
    return "model.decoder.embed_tokens.weight" if family == "opt" else "model.embed_tokens.weight"


class _Shapes(dict[str, tuple[int, ...]]):
    def linear(self, name: str, rows: int, cols: int, bias: bool) -> None:
        self[f"{name}.weight"] = (rows, cols)
        if bias:
            self[f"{name}.bias"] = (rows,)

    def layer_norm(self, name: str, size: int) -> None:
        self[f"{name}.weight"] = self[f"{name}.bias"] = (size,)


def expected_shapes(family: str, config: Mapping[str, Any], output_bias: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this normalized configuration must have.

    `output_bias`: whether attention biases include the output projection's (Qwen2's do not).
    """
    return _opt_shapes(config) if family == "opt" else _llama_shapes(config, output_bias)


def _llama_shapes(config: Mapping[str, Any], output_bias: bool) -> _Shapes:
    d, rows, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    bias, mlp_bias = config["attention_bias"], config["mlp_bias"]
    shapes = _Shapes({"model.embed_tokens.weight": (vocab, d)})
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
        for name, size in (("q", q), ("k", kv), ("v", kv)):
            shapes.linear(f"{layer}.self_attn.{name}_proj", size, d, bias)
        shapes.linear(f"{layer}.self_attn.o_proj", d, q, bias and output_bias)
        for name in ("gate", "up"):
            shapes.linear(f"{layer}.mlp.{name}_proj", rows, d, mlp_bias)
        shapes.linear(f"{layer}.mlp.down_proj", d, rows, mlp_bias)
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = (vocab, d)
    return shapes


def _opt_shapes(config: Mapping[str, Any]) -> _Shapes:
    d, rows, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    embed, bias = config["word_embed_proj_dim"], config["enable_bias"]
    shapes = _Shapes({embedding_name("opt"): (vocab, embed)})
    shapes["model.decoder.embed_positions.weight"] = (config["max_position_embeddings"] + 2, d)
    if embed != d:
        shapes["model.decoder.project_in.weight"] = (d, embed)
        shapes["model.decoder.project_out.weight"] = (embed, d)
    for n in range(config["num_hidden_layers"]):
        layer = f"model.decoder.layers.{n}"
        for name in ("q", "k", "v", "out"):
            shapes.linear(f"{layer}.self_attn.{name}_proj", d, d, bias)
        shapes.linear(f"{layer}.fc1", rows, d, bias)
        shapes.linear(f"{layer}.fc2", d, rows, bias)
        shapes.layer_norm(f"{layer}.self_attn_layer_norm", d)
        shapes.layer_norm(f"{layer}.final_layer_norm", d)
    if config["do_layer_norm_before"] and not config.get("_remove_final_layer_norm", False):
        shapes.layer_norm("model.decoder.final_layer_norm", d)
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = (vocab, embed)
    return shapes


def canonical(family: str, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The tensors under their canonical names: OPT's `decoder.` becomes `model.decoder.`."""
    if family != "opt":
        return dict(tensors)
    result: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        new = f"model.{name}" if name.startswith("decoder.") else name
        if new in result:
            raise CheckpointError(f"{tensor.path}: tensor {name!r}: also there as {result[new].info.name!r}")
        result[new] = tensor
    return result


def check_tensors(
    tensors: Mapping[str, SourceTensor], shapes: Mapping[str, tuple[int, ...]], tied: bool, where: str
) -> str:
    """Checks names, shapes and types against what is expected; returns the weights' common type.

    Raises CheckpointError for missing and unknown tensors, wrong shapes, and types that differ: every matrix has one
    float type, other tensors have the same or F32.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: tensor {name!r}: missing, expected shape {list(shape)}")
        tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: tensor {name!r}: found shape {list(tensor.shape)}, expected {list(shape)}"
            )
    for name in tensors:
        if name not in shapes and not _IGNORED.fullmatch(name) and not (tied and name == HEAD):
            raise CheckpointError(f"{tensors[name].path}: tensor {name!r}: not part of this architecture")
    return _common_dtype(tensors, shapes)


def _common_dtype(tensors: Mapping[str, SourceTensor], shapes: Mapping[str, tuple[int, ...]]) -> str:
    first = next(name for name, shape in shapes.items() if len(shape) == 2)
    dtype = tensors[first].dtype
    if dtype not in FLOATS:
        raise CheckpointError(
            f"{tensors[first].path}: tensor {first!r}: found type {dtype}, expected one of {', '.join(FLOATS)}"
        )
    for name, shape in shapes.items():
        found = tensors[name].dtype
        if found != dtype and (len(shape) == 2 or found != "F32"):
            raise CheckpointError(
                f"{tensors[name].path}: tensor {name!r}: found type {found}, expected {dtype} as {first!r} has"
            )
    return dtype
