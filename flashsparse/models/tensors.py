"""Which tensors a model has, their shapes and types, and which of them stay in memory: shared by converter and engine.

Names are the checkpoint's own (Hugging Face's). Nothing here reads data or imports MLX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashsparse.errors import PackError
from flashsparse.pack.checks import listed
from flashsparse.pack.gate_copy import copy_tensors
from flashsparse.pack.layout import record_layout
from flashsparse.pack.safetensors import check_storage

if TYPE_CHECKING:
    from flashsparse.pack.layout import Quant
    from flashsparse.pack.manifest import Manifest
    from flashsparse.pack.safetensors import Header

HEAD = "lm_head.weight"
Stored = dict[str, tuple[str, tuple[int, ...]]]  # name -> (type, shape)


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


def ffn_norm_name(family: str, config: dict[str, Any], layer: int) -> str | None:
    """The norm that makes a layer's FFN input from the residual stream; None where norms follow the sums."""
    if family != "opt":
        return f"model.layers.{layer}.post_attention_layernorm"
    return f"model.decoder.layers.{layer}.final_layer_norm" if config["do_layer_norm_before"] else None


def scoring_name(family: str, layer: int) -> str:
    """The base name of the matrix that tells which neurons are active: the gate, or without one OPT's fc1."""
    names = ffn_names(family, layer)
    return names.gate or names.up


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


def has_output_bias(source_model_type: str) -> bool:
    """Whether attention biases, where there are any, include the output projection's."""
    return source_model_type != "qwen2"


def record_tensors(family: str, layer: int) -> dict[str, str]:
    """Field of a record -> name of the tensor that it comes from; a model may lack the biases."""
    names = ffn_names(family, layer)
    gate = {"gate": f"{names.gate}.weight", "gate_bias": f"{names.gate}.bias"} if names.gate else {}
    return gate | {"up": f"{names.up}.weight", "up_bias": f"{names.up}.bias", "down": f"{names.down}.weight"}


def can_quantize(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a resident tensor may be quantized: matrices, but not the table of positions."""
    return len(shape) == 2 and not name.endswith("embed_positions.weight")


def stored_as(name: str, dtype: str, shape: tuple[int, ...], quant: Quant | None) -> Stored:
    """The tensors of the resident file that hold a weight: itself, or packed words, scales and biases."""
    if quant is None:
        return {name: (dtype, shape)}
    base, (rows, cols) = name.removesuffix(".weight"), shape
    groups = (dtype, (rows, cols // quant.group_size))
    return {name: ("U32", (rows, cols * quant.bits // 32)), f"{base}.scales": groups, f"{base}.biases": groups}


def resident_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the unquantized weights that are not in the records of a pack."""
    config = manifest.config
    shapes = expected_shapes(manifest.family, config, has_output_bias(config["source_model_type"]))
    for layer in range(manifest.layers):
        names = record_tensors(manifest.family, layer)
        for field in manifest.record.fields:
            shapes.pop(names[field], None)
    return shapes


def embedding_tensors(manifest: Manifest) -> Stored:
    """Name -> (type, shape) of the embedding in the resident file: the weight, and when quantized scales and biases."""
    name = embedding_name(manifest.family)
    cols = manifest.config["word_embed_proj_dim"] if manifest.family == "opt" else manifest.hidden_size
    quant = manifest.resident_quant.get(name.removesuffix(".weight"))
    return stored_as(name, manifest.source_dtype, (manifest.vocab_size, cols), quant)


def copied_gate(manifest: Manifest) -> Stored:
    """Name -> (type, shape) of what is resident of scoring matrices that records hold too: in gate layout compact."""
    tensors: Stored = {}
    for layer in range(manifest.layers if manifest.gate == "compact" else 0):
        base = scoring_name(manifest.family, layer)
        tensors |= copy_tensors(base, manifest.intermediate_size, manifest.hidden_size)
        if manifest.shape.gate_bias:
            tensors[f"{base}.bias"] = (manifest.source_dtype, (manifest.intermediate_size,))
    return tensors


def check_resident(manifest: Manifest, header: Header) -> None:
    """Checks names, types, shapes and order in the resident file, and what records hold, against the configuration.

    Matrices have the pack's float type or are quantized as `resident_quant` says; other tensors may be F32 too.
    Raises PackError naming the file and the tensor. Native code computes on these bytes without looking again.
    """
    _check_record(manifest)
    plain = resident_shapes(manifest)
    _check_quantized(manifest, plain)
    expected: Stored = {}
    for name, shape in plain.items():
        quant = manifest.resident_quant.get(name.removesuffix(".weight")) if can_quantize(name, shape) else None
        expected |= stored_as(name, manifest.source_dtype, shape, quant)
    expected |= copied_gate(manifest)
    found = header.tensors
    for name, (dtype, shape) in expected.items():
        if name not in found:
            raise PackError(f"{header.path}: tensor {name!r}: missing, expected {dtype} {list(shape)}")
        info = found[name]
        floats = len(shape) == 1 and info.dtype == "F32"
        if info.shape != shape or (info.dtype != dtype and not floats):
            raise PackError(
                f"{header.path}: tensor {name!r}: found {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}"
            )
    unknown = sorted(set(found) - set(expected))
    if unknown:
        raise PackError(
            f"{header.path}: tensor {listed(map(repr, unknown))}: found, expected no such tensor in this model"
        )
    check_storage(header)


def _check_record(m: Manifest) -> None:
    """Records hold biases exactly when the configuration says so; the rest of the layout is the manifest's to check."""
    bias = m.config["enable_bias" if m.family == "opt" else "mlp_bias"]
    expected = record_layout(m.gated, m.tier, m.hidden_size, m.source_dtype, m.quant, bias, bias, m.gate)
    if m.record != expected:
        raise PackError(
            f"{m.path / 'pack.json'}: record.fields: found {', '.join(m.record.fields)}, "
            f"expected {', '.join(expected.fields)} as config.json says"
        )


def _check_quantized(manifest: Manifest, plain: Mapping[str, tuple[int, ...]]) -> None:
    """`resident_quant` names matrices of the model, in whole groups, and scoring matrices are as the records are."""
    where = f"{manifest.path / 'pack.json'}: resident_quant"
    for base, quant in manifest.resident_quant.items():
        shape = plain.get(f"{base}.weight")
        if shape is None or not can_quantize(f"{base}.weight", shape):
            raise PackError(f"{where}: found {base!r}, expected only matrices that this model keeps in memory")
        if shape[1] % quant.group_size:
            raise PackError(f"{where}.{base}: found groups of {quant.group_size}, expected a divisor of {shape[1]}")
    for layer in range(manifest.layers if manifest.gate == "full" else 0):
        base = scoring_name(manifest.family, layer)
        if manifest.resident_quant.get(base) != manifest.quant:
            raise PackError(
                f"{where}.{base}: found {manifest.resident_quant.get(base)}, expected {manifest.quant} as records have"
            )
