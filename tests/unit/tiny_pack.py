"""A pack of chosen shapes with counting bytes, written with the format's own modules and no converter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from flashsparse.models.config import normalize_config
from flashsparse.pack.gate_copy import copy_tensors
from flashsparse.pack.layout import (
    FileDigest,
    FileEntry,
    Quant,
    flash_digest,
    flash_name,
    record_layout,
    resident_digest,
)
from flashsparse.pack.manifest import CONFIG, PREDICTOR, RESIDENT, Manifest, canonical_json
from flashsparse.pack.safetensors import header_bytes, shape_bytes, storage_order
from flashsparse.sparsity.spec import PredictorSpec, Shape, predictor_tensors

RAW: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "hidden_act": "relu",
}
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def counting(size: int, seed: int) -> bytes:
    """Bytes that differ from file to file and from record to record, the same on every machine."""
    return bytes((seed + 7 * i + i // 251) % 256 for i in range(min(size, 4096))).ljust(size, bytes([seed % 251 + 1]))


def llama_tensors(
    d: int, inner: int, layers: int, vocab: int, kv: int, dtype: str = "F16", gate: bool = True
) -> Shapes:
    """The resident tensors of an untied Llama-like model; kv is the width of keys and values."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    shapes["lm_head.weight"] = (vocab, d)
    for i in range(layers):
        base = f"model.layers.{i}"
        for name, width in (("q", d), ("k", kv), ("v", kv)):
            shapes[f"{base}.self_attn.{name}_proj.weight"] = (width, d)
        shapes[f"{base}.self_attn.o_proj.weight"] = (d, d)
        shapes[f"{base}.input_layernorm.weight"] = shapes[f"{base}.post_attention_layernorm.weight"] = (d,)
        if gate:
            shapes[f"{base}.mlp.gate_proj.weight"] = (inner, d)
    return {name: (dtype, shape) for name, shape in shapes.items()}


def write_pack(
    path: Path,
    tensors: Shapes | None = None,
    quant: Quant | None = None,
    predictor: PredictorSpec | None = None,
    compact: bool = False,
    **changes: Any,
) -> Manifest:
    """Writes a pack for RAW with `changes`, of tier exact or, with a `predictor`, of tier predict.

    `tensors` replaces the resident ones. `compact`: the gate layout of tier exact.
    """
    path.mkdir(parents=True, exist_ok=True)
    activation = changes.pop("activation", None)
    tier = "exact" if predictor is None else "predict"
    gate = "compact" if compact else "full" if predictor is None or predictor.score == "gate" else "none"
    model = normalize_config(RAW | changes, activation)
    if tensors is None:
        kv = model.kv_heads * model.head_dim
        shape = (model.hidden_size, model.intermediate_size, model.layers, model.vocab_size, kv)
        tensors = llama_tensors(*shape, gate=gate == "full")
        for layer in range(model.layers if compact else 0):
            base = f"model.layers.{layer}.mlp.gate_proj"
            tensors |= copy_tensors(base, model.intermediate_size, model.hidden_size)
    tensors = {name: tensors[name] for name in storage_order(tensors)}
    record = record_layout(True, tier, model.hidden_size, "F16", quant, layout=gate)
    files = {
        CONFIG: _write(path / CONFIG, canonical_json(model.config).encode(), FileDigest()),
        "tokenizer.json": _write(path / "tokenizer.json", b"{}\n", FileDigest()),
    }
    files[RESIDENT] = _write(path / RESIDENT, _tensor_file(tensors, 0), resident_digest())
    if predictor is not None and predictor.has_tensors:
        shapes = Shape(model.layers, model.hidden_size, model.intermediate_size, model.gated)
        implied = predictor_tensors(predictor, shapes)
        data = _tensor_file({name: implied[name] for name in storage_order(implied)}, 50)
        files[PREDICTOR] = _write(path / PREDICTOR, data, resident_digest())
    for layer in range(model.layers):
        records = counting(model.intermediate_size * record.stride, 100 + layer)
        header = header_bytes({"records": ("U8", (model.intermediate_size, record.stride))})
        name = flash_name(layer)
        files[name] = _write(path / name, header + records, flash_digest(record.stride))
    manifest = Manifest(
        path=path,
        family=model.family,
        tier=tier,
        gate=gate,
        gated=model.gated,
        activation=model.activation,
        layers=model.layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        source_dtype="F16",
        quant=quant,
        resident_quant={},
        record=record,
        prefill_chunk=64,
        files=files,
        predictor=predictor,
    )
    manifest.write()
    return manifest


def _tensor_file(tensors: Shapes, seed: int) -> bytes:
    data = (counting(shape_bytes(*info), seed + index) for index, info in enumerate(tensors.values()))
    return header_bytes(tensors) + b"".join(data)


def _write(path: Path, data: bytes, digest: FileDigest) -> FileEntry:
    path.write_bytes(data)
    for start in range(0, len(data), 100_003):  # pieces that match no block
        digest.update(data[start : start + 100_003])
    return digest.entry()


def elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for _, shape in shapes.values())
