"""The bytes of a converted pack, against the source's tensors and mx.quantize on whole matrices."""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import converter.bundles
import converter.resident
from converter.convert import convert
from converter.source import TOKENIZER_FILES
from flashsparse.errors import CheckpointError, UnsupportedModelError
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.safetensors import read_header, read_tensor
from flashsparse.pack.verify import verify
from tests.checkpoints import encode, write_checkpoint, write_safetensors

DATA = 16384
NEURONS = 96
MLX = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def read_source(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint; bfloat16 as uint16."""
    tensors = {}
    for shard in path.glob("*.safetensors"):
        header = read_header(shard)
        tensors |= {name: read_tensor(header, name) for name in header.tensors}
    return tensors


def quantized(matrix: np.ndarray, dtype: str, bits: int, group: int) -> list[np.ndarray]:
    """Words, scales and biases of a whole matrix, each as uint8 [rows, bytes]."""
    values = mx.array(matrix)
    values = values.view(mx.bfloat16) if dtype == "BF16" else values
    return [np.array(part.view(mx.uint8)) for part in mx.quantize(values, group, bits, stream=mx.cpu)]


def raw(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    return array.reshape(len(array), -1).view(np.uint8)


def fields(source: dict[str, np.ndarray], family: str, layer: int, tier: str) -> list[np.ndarray]:
    """The matrices [I, d] and biases [I] of the records, in the record's order."""
    if family == "opt":
        base = f"model.decoder.layers.{layer}"
        names, down = ([], f"{base}.fc2") if tier == "exact" else ([f"{base}.fc1"], f"{base}.fc2")
    else:
        base = f"model.layers.{layer}.mlp"
        names = [f"{base}.up_proj"] if tier == "exact" else [f"{base}.gate_proj", f"{base}.up_proj"]
        down = f"{base}.down_proj"
    parts = [source[key] for name in names for key in (f"{name}.weight", f"{name}.bias") if key in source]
    return [*parts, source[f"{down}.weight"].T]


def expected_records(parts: list[np.ndarray], dtype: str, bits: int, group: int) -> np.ndarray:
    """uint8 [I, stride] as the format page describes it."""
    columns: list[np.ndarray] = []
    for part in parts:
        whole = part.ndim == 1 or bits == 16
        columns += [raw(part)] if whole else quantized(np.ascontiguousarray(part), dtype, bits, group)
        size = sum(column.shape[1] for column in columns)
        columns.append(np.zeros((NEURONS, -size % 4), np.uint8))
    size = sum(column.shape[1] for column in columns)
    return np.concatenate([*columns, np.zeros((NEURONS, -size % 64), np.uint8)], axis=1)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie": True, "norm_dtype": "F32", "shards": 4}),
    ("mistral", {"sliding_window": 16, "shards": 3}),
    ("qwen2", {"head_dim": 32}),
    ("opt", {"tie": True}),
    ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False, "shards": 2}),
]


@pytest.mark.parametrize("tier", ["exact", "dense"])
@pytest.mark.parametrize(("dtype", "bits"), [("F32", 16), ("BF16", 16), ("F16", 8), ("BF16", 4), ("F32", 4)])
@pytest.mark.parametrize(("family", "shape"), CASES)
def test_bytes(tmp_path: Path, family: str, shape: dict[str, Any], dtype: str, bits: int, tier: str) -> None:
    if dtype == "F32":
        shape = shape | {"norm_dtype": None}
    source = write_checkpoint(tmp_path / "source", family, dtype=dtype, **shape)
    pack = Manifest.load(convert(source, tmp_path / "pack", bits=bits, group_size=32, tier=tier))
    assert verify(pack.path) == []
    tensors = read_source(source)
    used = set()
    for layer in range(2):
        parts = fields(tensors, family, layer, tier)
        used |= {name for name, t in tensors.items() for p in parts if t is p or t is p.base}
        data = pack.flash_path(layer).read_bytes()[DATA:]
        records = np.frombuffer(data, np.uint8).reshape(NEURONS, pack.record.stride)
        assert np.array_equal(records, expected_records(parts, dtype, bits, 32))
    check_resident(pack, {name: t for name, t in tensors.items() if name not in used}, dtype, bits)


def check_resident(pack: Manifest, tensors: dict[str, np.ndarray], dtype: str, bits: int) -> None:
    header = read_header(pack.resident_path)
    assert header.data_offset % DATA == 0
    found = {name: read_tensor(header, name) for name in header.tensors}
    for name, tensor in tensors.items():
        if bits == 16 or tensor.ndim == 1 or "embed_positions" in name:
            assert np.array_equal(found.pop(name), tensor), name
            continue
        base = name.removesuffix(".weight")
        wanted = 8 if "embed_tokens" in name or name == "lm_head.weight" else bits
        assert (pack.resident_quant[base].bits, pack.resident_quant[base].group_size) == (wanted, 32)
        parts = quantized(tensor, dtype, wanted, 32)
        for part, kind in zip(parts, ("weight", "scales", "biases"), strict=True):
            assert np.array_equal(raw(found.pop(f"{base}.{kind}")), part), name
    assert not found


@pytest.mark.parametrize("bits", [4, 16])
def test_small_blocks_make_the_same_pack(tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models are read in blocks of rows and columns; how large the blocks are must not show."""
    source = write_checkpoint(tmp_path / "source", dtype="BF16", mlp_bias=True)
    convert(source, tmp_path / "whole", bits=bits)
    monkeypatch.setattr(converter.bundles, "COLUMN_BYTES", 1)
    monkeypatch.setattr(converter.bundles, "TILE_ROWS", 5)
    monkeypatch.setattr(converter.bundles, "block_records", lambda stride: 7)
    monkeypatch.setattr(converter.resident, "BLOCK_BYTES", 300)
    convert(source, tmp_path / "blocks", bits=bits)
    assert same_directories(tmp_path / "whole", tmp_path / "blocks")


def same_directories(one: Path, two: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    return filecmp.cmpfiles(one, two, names, shallow=False)[1:] == ([], [])


def test_nothing_but_source_and_options(tmp_path: Path) -> None:
    """The same source elsewhere, in other shards, at another time gives the same bytes."""
    one = write_checkpoint(tmp_path / "here" / "one", dtype="F16")
    two = write_checkpoint(tmp_path / "there", dtype="F16", shards=3)
    packs = convert(one, tmp_path / "a"), convert(two, tmp_path / "deep" / "er" / "b")
    assert same_directories(*packs)
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in packs[0].iterdir())


def test_tokenizer_files_are_copied_verbatim(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    for name in (*TOKENIZER_FILES, "modeling_llama.py", "README.md", "tokenizer.py", "training_args.bin"):
        (source / name).write_bytes(f"contents of {name}\r\n".encode())
    pack = Manifest.load(convert(source, tmp_path / "pack"))
    kept = set(pack.files) - {"config.json", "resident.safetensors", "flash-000.safetensors", "flash-001.safetensors"}
    assert kept == set(TOKENIZER_FILES)
    assert {path.name for path in pack.path.iterdir()} == set(pack.files) | {"pack.json"}
    for name in kept:
        assert (pack.path / name).read_bytes() == f"contents of {name}\r\n".encode()


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_bytes(b"x" * 1000)])
def test_odd_tokenizer_files_are_refused(
    tmp_path: Path, make: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "source")
    make(source / "tokenizer.json")
    monkeypatch.setattr("converter.source.MAX_COPY_BYTES", 999)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a regular file"):
        convert(source, tmp_path / "pack")


def test_activation_override_is_recorded(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", activation="silu")
    plain = Manifest.load(convert(source, tmp_path / "plain"))
    assert (plain.tier, plain.gate, vars(plain.activation)) == (
        "dense", "none", {"name": "silu", "param": None, "source": "config"},
    )  # fmt: skip
    changed = Manifest.load(convert(source, tmp_path / "changed", activation="fatrelu:0.01"))
    assert (changed.tier, changed.gate, vars(changed.activation)) == (
        "exact", "full", {"name": "fatrelu", "param": 0.01, "source": "option"},
    )  # fmt: skip
    assert changed.config["hidden_act"] == "fatrelu"


def test_unknown_activation_lists_the_known(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", activation="gelu_new")
    with pytest.raises(UnsupportedModelError, match=r"gelu_new.*relu.*silu|gelu_new.*silu.*relu"):
        convert(source, tmp_path / "pack")
    assert not (tmp_path / "pack").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_what_is_not_finite_is_not_quantized(tmp_path: Path, dtype: str, name: str) -> None:
    source = write_checkpoint(tmp_path / "source", dtype=dtype)
    tensors = {key: (dtype, value) for key, value in read_source(source).items()}
    tensors[name][1][3, 5] = encode(np.array([np.inf], np.float32), dtype)[0]
    write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"{name}.*infinity.*--bits 16"):
        convert(source, tmp_path / "pack", bits=4)
    assert verify(convert(source, tmp_path / "sixteen")) == []


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """A bit that flips in the source is the source's; one in the pack is found, with its file."""
    pack = convert(write_checkpoint(tmp_path / "source"), tmp_path / "pack")
    rng = np.random.default_rng(0)
    for name in Manifest.load(pack).files:
        sound = (pack / name).read_bytes()
        for position in rng.integers(0, len(sound), 5):
            damaged = bytearray(sound)
            damaged[position] ^= 1 << int(rng.integers(8))
            (pack / name).write_bytes(damaged)
            assert {damage.file for damage in verify(pack)} == {name}
        (pack / name).write_bytes(sound)
    assert verify(pack) == []


def test_manifest_digest_covers_the_manifest(tmp_path: Path) -> None:
    pack = convert(write_checkpoint(tmp_path / "source"), tmp_path / "pack")
    document = json.loads((pack / "pack.json").read_text())
    digest = document.pop("digest")
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == digest == Manifest.load(pack).digest
