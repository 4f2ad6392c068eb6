"""Packs whose checksums all match and whose contents do not fit together: refused by name before anything is read.

Every test changes a good pack and signs it again, as a faulty or hostile writer would.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from flashsparse.errors import PackError
from flashsparse.pack.manifest import canonical_json
from flashsparse.pack.safetensors import ALIGN, header_bytes, read_header, storage_order
from tests.model.packs import make_pack

Tensor = tuple[str, tuple[int, ...], bytes]
Q = "model.layers.0.self_attn.q_proj"
GATE = "model.layers.1.mlp.gate_proj"

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quantized": {"bits": 4},
    "dense": {"tier": "dense", "mlp_bias": True, "attention_bias": True, "norm_dtype": "F32"},
    "tied": {"tie": True, "activation": "fatrelu", "hidden_act_param": 0.01},
    "qwen2": {"family": "qwen2"},
    "mistral": {"family": "mistral", "sliding_window": 8},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}},
    "opt": {"family": "opt"},
    "opt-dense": {"family": "opt", "tier": "dense", "enable_bias": False, "do_layer_norm_before": False},
    "opt-projected": {"family": "opt", "word_embed_proj_dim": 128, "bits": 8},
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A good pack of each kind, converted once."""
    root, made = tmp_path_factory.mktemp("packs"), dict[str, Path]()

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_pack(root, kind, **KINDS[kind])
        return made[kind]

    return get


@pytest.fixture
def copy(packs: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(packs(kind), tmp_path / "copy"))


def sign(pack: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """Changes pack.json and makes its sizes, checksums and digest match the files."""
    body = json.loads((pack / "pack.json").read_text())
    del body["digest"]
    if change:
        change(body)
    for name, entry in body["files"].items():
        data = (pack / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if block := entry.get("block_bytes"):
            parts = [data[start : start + block] for start in range(0, len(data), block)]
            entry["blocks"] = [hashlib.sha256(part).hexdigest() for part in parts]
    body["digest"] = hashlib.sha256(canonical_json(body).encode()).hexdigest()
    (pack / "pack.json").write_text(canonical_json(body))


def edit_tensors(
    pack: Path,
    change: Callable[[dict[str, Tensor]], Any],
    order: Callable[[Mapping[str, tuple[str, tuple[int, ...]]]], list[str]] = storage_order,
    align: int = ALIGN,
) -> None:
    path = pack / "resident.safetensors"
    data = path.read_bytes()
    tensors = {n: (t.dtype, t.shape, data[t.begin : t.end]) for n, t in read_header(path).tensors.items()}
    change(tensors)
    shapes = {name: tensors[name][:2] for name in order({n: t[:2] for n, t in tensors.items()})}
    path.write_bytes(header_bytes(shapes, align) + b"".join(tensors[name][2] for name in shapes))
    sign(pack)


def edit_config(pack: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = pack / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, sort_keys=True, indent=1) + "\n")
    sign(pack)


def refused(pack: Path, *parts: str) -> None:
    with pytest.raises(PackError) as caught:
        flashsparse.load(pack, threads=1, io_threads=1)
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


def without(name: str, values: dict[str, Any], inside: str | None = None) -> None:
    del (values[inside] if inside else values)[name]


@pytest.mark.parametrize("kind", KINDS)
def test_good_packs_load(copy: Callable[[str], Path], kind: str) -> None:
    pack = copy(kind)
    edit_tensors(pack, lambda tensors: None)
    with flashsparse.load(pack, threads=1, io_threads=1) as engine, engine.session() as session:
        assert np.isfinite(session.logits([1, 2, 3])).all()


def cut(*names: str) -> Callable[[dict[str, Tensor]], None]:
    """Leaves the first row of tensors."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            dtype, shape, data = tensors[name]
            tensors[name] = (dtype, (1, *shape[1:]), data[: len(data) // shape[0]])

    return change


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("quantized", [f"{Q}.scales", f"{Q}.biases"]),
        ("quantized", ["model.embed_tokens.scales", "model.embed_tokens.biases"]),
        ("quantized", [f"{GATE}.weight"]),
        ("quantized", ["model.norm.weight"]),
        ("plain", [f"{Q}.weight"]),
        ("plain", [f"{GATE}.weight"]),
        ("plain", ["lm_head.weight"]),
        ("plain", ["model.layers.2.input_layernorm.weight"]),
        ("dense", ["model.layers.0.mlp.down_proj.bias"]),
        ("dense", [f"{Q}.bias"]),
        ("tied", ["model.embed_tokens.weight"]),
        ("opt", ["model.decoder.embed_positions.weight"]),
        ("opt", ["model.decoder.layers.0.fc1.bias"]),
        ("opt", ["model.decoder.layers.0.fc2.bias"]),
        ("opt-projected", ["model.decoder.project_out.weight"]),
    ],
)
def test_wrong_shapes(copy: Callable[[str], Path], kind: str, names: list[str]) -> None:
    pack = copy(kind)
    edit_tensors(pack, cut(*names))
    refused(pack, "resident.safetensors", f"{names[0].rsplit('.', 1)[0]}.", "found", "expected")


@pytest.mark.parametrize("kind", ["plain", "quantized", "opt"])
def test_tensors_out_of_place(copy: Callable[[str], Path], kind: str) -> None:
    pack = copy(kind)
    edit_tensors(pack, lambda tensors: None, lambda shapes: storage_order(shapes)[::-1])
    refused(pack, "resident.safetensors: tensor ", " belongs, expected tensors sorted by item size")
    edit_tensors(pack, lambda tensors: None, align=64)
    refused(pack, "resident.safetensors: found data at byte ", "expected a multiple of 16384")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_needed(copy: Callable[[str], Path], kind: str) -> None:
    pack = copy(kind)
    names = list(read_header(pack / "resident.safetensors").tensors)
    original = (pack / "resident.safetensors").read_bytes()
    for name in names[:: max(1, len(names) // 6)]:
        edit_tensors(pack, partial(without, name))
        refused(pack, f"tensor '{name}': missing, expected")
        (pack / "resident.safetensors").write_bytes(original)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("plain", "foo.weight"),
        ("plain", f"{Q}.bias"),
        ("plain", "model.layers.0.mlp.down_proj.bias"),
        ("plain", "model.layers.0.mlp.up_proj.weight"),
        ("plain", "model.layers.3.input_layernorm.weight"),
        ("dense", f"{GATE}.bias"),
        ("tied", "lm_head.weight"),
        ("qwen2", "model.layers.0.self_attn.o_proj.bias"),
        ("opt-dense", "model.decoder.final_layer_norm.weight"),
    ],
)
def test_unknown_tensors(copy: Callable[[str], Path], kind: str, name: str) -> None:
    pack = copy(kind)
    edit_tensors(pack, lambda tensors: tensors.update({name: ("F16", (64,), bytes(128))}))
    refused(pack, f"tensor '{name}'", "no such tensor")


@pytest.mark.parametrize(
    ("kind", "name", "dtype", "shape"),
    [
        ("quantized", f"{Q}.weight", "U8", (64, 32)),
        ("quantized", f"{Q}.scales", "BF16", (64, 1)),
        ("plain", f"{Q}.weight", "F32", (64, 32)),
        ("plain", f"{Q}.weight", "BF16", (64, 64)),
        ("plain", "model.norm.weight", "BF16", (64,)),
        ("plain", "model.norm.weight", "I16", (64,)),
    ],
)
def test_wrong_types(copy: Callable[[str], Path], kind: str, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    pack = copy(kind)
    edit_tensors(pack, lambda tensors: tensors.update({name: (dtype, shape, tensors[name][2])}))
    refused(pack, name, f"found {dtype} {list(shape)}, expected")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda quant: quant.update(foo={"bits": 4, "group_size": 64}), "found 'foo'"),
        (lambda quant: quant.update({"model.norm": {"bits": 4, "group_size": 64}}), "found 'model.norm'"),
        (lambda quant: quant[Q].update(group_size=128), "a divisor of 64"),
        (lambda quant: quant[Q].update(bits=8), f"tensor '{Q}.weight'"),
        (lambda quant: quant.pop(Q), f"tensor '{Q}.weight'"),
        (lambda quant: quant[GATE].update(bits=8), f"resident_quant.{GATE}"),
        (lambda quant: quant.pop(GATE), f"resident_quant.{GATE}"),
    ],
)
def test_resident_quant(copy: Callable[[str], Path], change: Callable[[dict[str, Any]], Any], message: str) -> None:
    pack = copy("quantized")
    sign(pack, lambda body: change(body["resident_quant"]))
    refused(pack, message)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("plain", "model_type", "opt"),
        ("plain", "head_dim", 8),
        ("plain", "head_dim", 16.0),
        ("plain", "num_key_value_heads", 4),
        ("plain", "num_hidden_layers", True),
        ("plain", "rms_norm_eps", "x"),
        ("plain", "rms_norm_eps", -1e-5),
        ("plain", "rms_norm_eps", float("nan")),
        ("plain", "rope_theta", -1.0),
        ("plain", "rope_theta", 0),
        ("plain", "rope_theta", 10**400),
        ("plain", "rope_theta", None),
        ("plain", "rope_traditional", True),
        ("plain", "rope_scaling", 2.0),
        ("plain", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("plain", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("plain", "rope_scaling", {"rope_type": "linear"}),
        ("plain", "rope_scaling", {"rope_type": "linear", "factor": 2.0, "extra": 1}),
        ("plain", "rope_scaling", {"rope_type": ["linear"], "factor": 2.0}),
        ("plain", "attention_bias", 1),
        ("plain", "attention_bias", True),
        ("plain", "mlp_bias", True),
        ("plain", "layer_types", []),
        ("plain", "layer_types", ["full_attention"] * 1000),
        ("plain", "layer_types", ["full_attention", "full_attention", ["x"]]),
        ("plain", "layer_types", ["sliding_attention"] * 3),
        ("plain", "sliding_window", 8),
        ("plain", "max_position_embeddings", -5),
        ("plain", "max_position_embeddings", 2**31 + 1),
        ("plain", "max_position_embeddings", 1e3),
        ("plain", "tie_word_embeddings", "no"),
        ("plain", "tie_word_embeddings", True),
        ("plain", "hidden_act", "silu"),
        ("plain", "hidden_act_param", 0.5),
        ("plain", "eos_token_id", "abc"),
        ("plain", "eos_token_id", [1, None]),
        ("plain", "bos_token_id", True),
        ("plain", "source_model_type", "qwen2"),
        ("plain", "source_model_type", {}),
        ("plain", "unheard_of", 1),
        ("tied", "hidden_act_param", 0.02),
        ("qwen2", "source_model_type", "llama"),
        ("mistral", "sliding_window", 0),
        ("mistral", "sliding_window", None),
        ("yarn", "rope_theta", 1.0),
        ("opt", "enable_bias", False),
        ("opt", "word_embed_proj_dim", 0),
        ("opt", "word_embed_proj_dim", 128),
        ("opt", "do_layer_norm_before", None),
        ("opt", "layer_norm_elementwise_affine", False),
        ("opt", "_remove_final_layer_norm", 0),
        ("opt", "_remove_final_layer_norm", True),
    ],
)
def test_wrong_configurations(copy: Callable[[str], Path], kind: str, field: str, value: Any) -> None:
    pack = copy(kind)
    edit_config(pack, lambda config: config.update({field: value}))
    refused(pack)


@pytest.mark.parametrize("kind", ["plain", "yarn", "opt"])
def test_every_configuration_field_is_needed(copy: Callable[[str], Path], kind: str) -> None:
    pack = copy(kind)
    text = (pack / "config.json").read_bytes()
    config = json.loads(text)
    for field in config:
        edit_config(pack, partial(without, field))
        refused(pack, "config.json", f"{field}: missing")
        (pack / "config.json").write_bytes(text)
    for field in config["rope_scaling"] if kind == "yarn" else ():
        edit_config(pack, partial(without, field, inside="rope_scaling"))
        refused(pack, f"rope_scaling.{field}: missing")
        (pack / "config.json").write_bytes(text)


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b'{"a": 1, "a": 2}', b"[" * 60000, b'{"rope_theta": 1e999}'])
def test_configurations_that_are_no_document(copy: Callable[[str], Path], text: bytes) -> None:
    pack = copy("plain")
    (pack / "config.json").write_bytes(text)
    sign(pack)
    refused(pack, "config.json")
