"""Packs of tier predict for tests: converted in another tier, then given a predictor made from the source's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flashsparse.pack.layout import FileDigest, FileEntry, resident_digest
from flashsparse.pack.manifest import CONFIG, PREDICTOR, Activation, Manifest
from flashsparse.pack.safetensors import header_bytes, read_header, read_tensor, storage_order
from flashsparse.sparsity.low_bit import quantize_rows
from flashsparse.sparsity.spec import LayerSpec, PredictorSpec
from tests.checkpoints import from_bf16
from tests.model.packs import make_pack

Tensors = dict[str, tuple[str, np.ndarray]]
TEXT = "0" * 64
LOWEST = -3.4028234663852886e38


def make_predict_pack(
    root: Path,
    name: str = "predict",
    *,
    score: str = "gate_copy",
    selection: str = "threshold",
    layer: LayerSpec | None = None,
    layers: dict[int, LayerSpec] | None = None,
    **checkpoint: Any,
) -> Path:
    """A predict pack of a random model, whose layers are all `layer` but for `layers`.

    The low-rank factors are random; copies are those of the model's own weights. silu with score gate is a pack whose
    activation is renamed, since tier exact does not convert it.
    """
    renamed = score == "gate" and checkpoint.get("activation") == "silu"
    tier = "exact" if score == "gate" else "dense"
    if renamed:
        checkpoint = checkpoint | {"activation": "relu"}
    path = make_pack(root, name, tier=tier, **checkpoint)
    manifest = Manifest.load(path)
    layer = default_layer(score) if layer is None else layer
    each = tuple((layers or {}).get(index, layer) for index in range(manifest.layers))
    measured = any(one.density is not None for one in each)
    texts, tokens = ((TEXT,), 1000) if measured else ((), 0)
    spec = PredictorSpec(score, selection, "none", None, texts, tokens, each)
    files = dict(manifest.files)
    if renamed:
        files[CONFIG] = rewrite(path / CONFIG, (path / CONFIG).read_bytes().replace(b'"relu"', b'"silu"'), FileDigest())
        manifest = replace(manifest, activation=Activation("silu"))
    if spec.has_tensors:
        files[PREDICTOR] = write_tensors(path / PREDICTOR, predictor_tensors(spec, root / f"{name}-source", manifest))
    replace(manifest, tier="predict", predictor=spec, files=files).write()
    return path


def default_layer(score: str) -> LayerSpec:
    if score == "low_rank":
        return LayerSpec(rank=8, relu=True, threshold=0.2)
    if score in ("gate_copy", "gate_up_copy"):
        return LayerSpec(bits=2, group_size=64, threshold=0.4)
    return LayerSpec(threshold=0.4)


def predictor_tensors(spec: PredictorSpec, source: Path, manifest: Manifest) -> Tensors:
    weights = source_weights(source)
    tensors: Tensors = {}
    for index, layer in enumerate(spec.layers):
        if not layer.every:
            tensors |= layer_tensors(spec.score, f"layers.{index}", layer, ffn(weights, manifest.family, index))
    return tensors


def source_weights(source: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint of one file, as float32."""
    header = read_header(source / "model.safetensors")
    found = {name: read_tensor(header, name) for name in header.tensors}
    return {
        name: from_bf16(values) if header.tensors[name].dtype == "BF16" else values.astype(np.float32)
        for name, values in found.items()
    }


def ffn(weights: dict[str, np.ndarray], family: str, index: int) -> dict[str, np.ndarray]:
    """gate, up (models with a gate) and down of a layer, with the biases it has."""
    if family == "opt":
        base, names = f"model.decoder.layers.{index}", {"gate": "fc1", "down": "fc2"}
    else:
        base, names = f"model.layers.{index}.mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    result = {short: weights[f"{base}.{long}.weight"] for short, long in names.items()}
    biases = {f"{short}.bias": weights.get(f"{base}.{long}.bias") for short, long in names.items()}
    return result | {name: bias for name, bias in biases.items() if bias is not None}


def layer_tensors(score: str, base: str, layer: LayerSpec, weights: dict[str, np.ndarray]) -> Tensors:
    records, d = weights["gate"].shape
    if score == "low_rank":
        assert layer.rank is not None
        rng = np.random.default_rng(len(base) + ord(base[-1]))
        fc1 = (rng.standard_normal((layer.rank, d)) / d**0.5).astype(np.float16)
        fc2 = (rng.standard_normal((records, layer.rank)) / layer.rank**0.5).astype(np.float16)
        bias = np.full(records, -0.25, np.float32)
        return {
            f"{base}.fc1.weight": ("F16", fc1),
            f"{base}.fc2.weight": ("F16", fc2),
            f"{base}.fc2.bias": ("F32", bias),
        }
    tensors = copy(f"{base}.gate", weights["gate"], weights.get("gate.bias"), layer)
    if score == "gate_up_copy":
        if "up" in weights:
            tensors |= copy(f"{base}.up", weights["up"], weights.get("up.bias"), layer)
        tensors[f"{base}.down_norm"] = ("F32", np.linalg.norm(weights["down"], axis=0).astype(np.float32))
    return tensors


def copy(base: str, weight: np.ndarray, bias: np.ndarray | None, layer: LayerSpec) -> Tensors:
    assert layer.bits is not None and layer.group_size is not None
    made = quantize_rows(weight, layer.bits, layer.group_size, search=False)
    tensors: Tensors = {f"{base}.weight": ("U32", made.words)}
    tensors |= {f"{base}.scales": ("F16", made.scales), f"{base}.biases": ("F16", made.biases)}
    return tensors | ({} if bias is None else {f"{base}.bias": ("F32", bias.astype(np.float32))})


def write_tensors(path: Path, tensors: Tensors) -> FileEntry:
    """Writes a predictor file; what its manifest says of it."""
    stored = {name: (dtype, values.shape) for name, (dtype, values) in tensors.items()}
    order = storage_order(stored)
    data = header_bytes({name: stored[name] for name in order})
    return rewrite(path, data + b"".join(tensors[name][1].tobytes() for name in order), resident_digest())


def rewrite(path: Path, data: bytes, digest: FileDigest) -> FileEntry:
    path.write_bytes(data)
    digest.update(data)
    return digest.entry()
