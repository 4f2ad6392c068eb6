"""`verify` finds every damaged byte and says where; `info` counts as TurboSparse does. Functions and commands."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flashsparse.cli.info import info as info_command
from flashsparse.cli.verify import verify as verify_command
from flashsparse.errors import PackError
from flashsparse.pack.inspect import Parameters, count_parameters, describe, read_amplification
from flashsparse.pack.layout import Quant, Record, record_layout
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.verify import Damage, verify
from tests.unit.tiny_pack import elements, llama_tensors, write_pack


@pytest.fixture
def pack(tmp_path: Path) -> Manifest:
    return write_pack(tmp_path / "pack")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Several blocks per file: records of 16 KiB (256 a block), 600 of them; 5 MiB of embeddings."""
    path = tmp_path_factory.mktemp("wide") / "pack"
    tensors = {"model.embed_tokens.weight": ("F16", (640, 4096)), "model.norm.weight": ("F16", (4096,))}
    return write_pack(path, tensors, hidden_size=4096, intermediate_size=600, num_hidden_layers=1, vocab_size=640)


class flipped:
    """One bit of a file is another one inside the block."""

    def __init__(self, path: Path, *positions: int) -> None:
        self.path, self.positions = path, positions

    def flip(self) -> None:
        with open(self.path, "r+b") as file:
            for position in self.positions:
                file.seek(position)
                byte = file.read(1)
                file.seek(position)
                file.write(bytes([byte[0] ^ 4]))

    def __enter__(self) -> None:
        self.flip()

    def __exit__(self, *_: object) -> None:
        self.flip()


def test_sound_pack_and_progress(pack: Manifest) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(pack.path, lambda done, total: seen.append((done, total))) == []
    total = sum(entry.bytes for entry in pack.files.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_every_byte_is_covered(pack: Manifest) -> None:
    chosen = random.Random(1)
    for name, entry in pack.files.items():
        positions = {0, 7, entry.bytes - 1, *(chosen.randrange(entry.bytes) for _ in range(20))}
        for position in positions & set(range(entry.bytes)):
            with flipped(pack.path / name, position):
                assert [damage.file for damage in verify(pack.path)] == [name]
    assert verify(pack.path) == []


def test_names_the_records(wide: Manifest) -> None:
    path, stride = wide.flash_path(0), wide.record.stride
    assert (stride, len(wide.files[path.name].blocks)) == (16384, 3)
    with flipped(path, 16384 + 300 * stride):
        assert verify(wide.path) == [
            Damage(path.name, "records", "layer 0: records 256..511 are damaged", 256, 511)
        ]  # fmt: skip
    with flipped(path, 16384, 16384 + 599 * stride):
        assert [(d.first, d.last) for d in verify(wide.path)] == [(0, 255), (512, 599)]
    with flipped(path, 16384 + 255 * stride, 16384 + 256 * stride, 16384 + 512 * stride):
        assert [(d.first, d.last) for d in verify(wide.path)] == [(0, 599)]


def test_tells_header_from_records(wide: Manifest) -> None:
    path = wide.flash_path(0)
    with flipped(path, 9000):
        assert [(d.kind, d.first, d.last) for d in verify(wide.path)] == [("header", 0, 16383)]
    with flipped(path, 9000, 16384):
        assert [d.kind for d in verify(wide.path)] == ["header", "records"]


def test_names_the_resident_tensors(wide: Manifest) -> None:
    path = wide.resident_path
    with flipped(path, wide.files[path.name].bytes - 1):
        (damage,) = verify(wide.path)
    assert (damage.kind, damage.first, damage.last) == ("bytes", 4 << 20, wide.files[path.name].bytes - 1)
    assert "model.embed_tokens.weight, model.norm.weight" in str(damage)
    with flipped(path, 2):
        (damage,) = verify(wide.path)
    assert str(damage) == f"{path.name}: bytes 0..4194303 are damaged"


def test_truncated_and_longer_files(tmp_path: Path, wide: Manifest) -> None:
    copy = write_pack(tmp_path / "copy")
    flash = copy.flash_path(1)
    flash.write_bytes(flash.read_bytes()[:-10])
    assert [d.kind for d in verify(copy.path)] == ["size", "records"]
    assert "found 16758 bytes, expected 16768" in str(verify(copy.path)[0])
    flash.write_bytes(flash.read_bytes() + bytes(99))
    assert verify(copy.path)[0].kind == "size"
    config = copy.path / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    assert [d.kind for d in verify(copy.path) if d.file == "config.json"] == ["size"]


def test_files_that_only_grew(pack: Manifest) -> None:
    with open(pack.flash_path(0), "ab") as file:
        file.write(b"x")
    assert [(d.file, d.kind) for d in verify(pack.path)] == [("flash-000.safetensors", "size")]


def test_missing_and_extra_files(pack: Manifest) -> None:
    (pack.path / "quality.json").write_text("{}")
    assert verify(pack.path) == []
    (pack.path / "tokenizer.json").unlink()
    pack.flash_path(1).unlink()
    assert [(d.file, d.kind) for d in verify(pack.path)] == [
        ("flash-001.safetensors", "missing"),
        ("tokenizer.json", "missing"),
    ]


def test_swapped_layers(pack: Manifest) -> None:
    first, second = pack.flash_path(0), pack.flash_path(1)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    assert [(d.file, d.first, d.last) for d in verify(pack.path)] == [(first.name, 0, 5), (second.name, 0, 5)]


def test_verify_command(pack: Manifest) -> None:
    good = CliRunner().invoke(verify_command, [str(pack.path)])
    assert (good.exit_code, len(good.output.splitlines())) == (0, 1)
    assert "5 files" in good.output
    with flipped(pack.flash_path(1), 16400):
        bad = CliRunner().invoke(verify_command, [str(pack.path)])
    assert bad.exit_code == 1
    assert bad.output == "flash-001.safetensors: layer 1: records 0..5 are damaged\n"
    assert CliRunner().invoke(verify_command, [str(pack.path / "nowhere")]).exit_code == 2


def test_verify_refuses_a_damaged_manifest(pack: Manifest) -> None:
    with flipped(pack.path / "pack.json", 300), pytest.raises(PackError, match=r"pack\.json"):
        verify(pack.path)


# Mistral-7B as algorithms counts it: attention 1.342 B, FFN 5.637 B, embeddings and head 0.263 B.
MISTRAL: dict[str, Any] = {"d": 4096, "inner": 14336, "layers": 32, "vocab": 32000, "kv": 1024}


def mistral(tier: str, quant: Quant | None = None) -> Parameters:
    shapes = {n: s for n, (_, s) in llama_tensors(**MISTRAL, gate=tier == "exact").items()}
    return count_parameters(shapes, {}, record_layout(True, tier, 4096, "BF16", quant), 4096, 14336, 32)


@pytest.mark.parametrize("tier", ["exact", "dense"])
def test_counts_mistral_7b_as_turbosparse(tier: str) -> None:
    counts = mistral(tier)
    assert round(counts.attention / 1e9, 3) == 1.342
    assert round(counts.ffn / 1e9, 3) == 5.637
    assert round(counts.embeddings + counts.head) == 2 * 32000 * 4096
    assert round(counts.total / 1e9, 3) == 7.242
    assert round(counts.activated(0.1) / 1e9, 2) == 2.17
    assert round(counts.activated(0.1, embeddings=False) / 1e9, 2) == 1.91
    assert round((counts.activated(0.1) - counts.embeddings) / 1e9, 2) == 2.04
    assert counts.activated(1.0) == counts.total


def test_counts_predictors_as_turbosparse() -> None:
    counts = mistral("dense")
    predictors = (4096 + 14336) * 1024 * 32
    with_predictors = Parameters(**{**vars(counts), "predictors": predictors})
    assert round(with_predictors.activated(0.1, embeddings=False) / 1e9, 2) == 2.51
    assert with_predictors.activated(0.1, predictors=False) == counts.activated(0.1)
    assert with_predictors.total == counts.total + predictors


def test_quantized_matrices_count_their_weights() -> None:
    shapes = {
        "model.embed_tokens.weight": (10, 16),
        "model.embed_tokens.scales": (10, 1),
        "model.embed_tokens.biases": (10, 1),
        "model.layers.0.self_attn.q_proj.weight": (64, 8),
        "model.layers.0.self_attn.q_proj.bias": (64,),
        "model.layers.0.mlp.gate_proj.weight": (20, 64),
        "model.norm.weight": (64,),
    }
    quant = {"model.embed_tokens": Quant(8, 64), "model.layers.0.self_attn.q_proj": Quant(4, 64)}
    record = record_layout(True, "exact", 64, "F16", Quant(4, 64))
    counts = count_parameters(shapes, quant, record, 64, 20, 1)
    assert (counts.embeddings, counts.attention, counts.ffn, counts.other) == (640, 64 * 64 + 64, 3 * 20 * 64, 64)


def test_opt_parts() -> None:
    base = "model.decoder.layers.0"
    shapes = {
        "model.decoder.embed_tokens.weight": (50, 4),
        "model.decoder.embed_positions.weight": (12, 8),
        "model.decoder.project_in.weight": (8, 4),
        "model.decoder.project_out.weight": (4, 8),
        f"{base}.self_attn.out_proj.weight": (8, 8),
        f"{base}.self_attn.out_proj.bias": (8,),
        f"{base}.self_attn_layer_norm.weight": (8,),
        f"{base}.fc1.weight": (16, 8),
        f"{base}.fc1.bias": (16,),
        f"{base}.fc2.bias": (8,),
    }
    counts = count_parameters(shapes, {}, record_layout(False, "exact", 8, "F16", None, has_up_bias=True), 8, 16, 1)
    assert counts == Parameters(200 + 96 + 32, 32, 72, 16 * 8 + 16 + 16 * 8, 16)


@pytest.mark.parametrize(
    ("stride", "size", "sector"), [(64, 36, 512), (6912, 6912, 4096), (16384, 16384, 4096), (4160, 4100, 512)]
)
def test_read_amplification_is_the_mean_over_records(stride: int, size: int, sector: int) -> None:
    moved = 0
    for i in range(4096):
        begin, end = 16384 + i * stride, 16384 + i * stride + size
        moved += (end + sector - 1) // sector * sector - begin // sector * sector
    assert read_amplification(Record(size, stride, {}), sector) == pytest.approx(moved / (4096 * size))


def test_describe(pack: Manifest) -> None:
    facts = json.loads(json.dumps(describe(pack.path)))
    shapes = llama_tensors(8, 6, 2, 10, 8)
    assert facts["digest"] == pack.digest
    assert facts["shapes"]["intermediate_size"] == 6
    assert facts["record"]["padding_bytes"] == 32
    assert facts["record"]["stride_amplification"] == 2.0
    sizes = facts["bytes"]
    assert sizes["total"] == sum(path.stat().st_size for path in pack.path.iterdir())
    assert sum(size for name, size in sizes.items() if name.startswith("resident_")) == 2 * elements(shapes)
    assert sizes["tokenizer"] == 3
    counts = facts["parameters"]
    assert counts["total"] == elements(shapes) + 2 * 6 * 2 * 8
    assert counts["total"] - counts["total_without_embeddings"] == 2 * 10 * 8
    activated = facts["activated_per_token"]
    assert activated["active_density"] is None
    assert [row["density"] for row in activated["at_density"]] == [0.05, 0.1, 0.2]


def test_info_command(tmp_path: Path) -> None:
    write_pack(tmp_path / "pack", activation="fatrelu:0.25")
    result = CliRunner().invoke(info_command, [str(tmp_path / "pack")])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "activation fatrelu, threshold 0.25 (from --activation, which overrode" in text
    assert "record 32 bytes (up, down), stride 64 (+100.0 % padding)" in text
    assert "layers 2 x 6 neurons" in text
    result = CliRunner().invoke(info_command, [str(tmp_path / "pack"), "--json"])
    assert json.loads(result.output)["activation"] == {"name": "fatrelu", "param": 0.25, "source": "option"}


def test_info_names_the_configurations_activation(pack: Manifest) -> None:
    output = CliRunner().invoke(info_command, [str(pack.path)]).output
    assert "relu (from the checkpoint's configuration)" in output


def test_info_of_what_is_no_pack(tmp_path: Path) -> None:
    result = CliRunner().invoke(info_command, [str(tmp_path)])
    assert isinstance(result.exception, PackError)
