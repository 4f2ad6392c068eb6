"""The `predictor` object and file of a pack: golden bytes, what is refused, what verify and info say of them."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flashsparse.cli.info import info as info_command
from flashsparse.errors import DamagedPackError, PackError
from flashsparse.pack.inspect import describe
from flashsparse.pack.layout import record_layout
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.predictor import check_predictor
from flashsparse.pack.safetensors import header_bytes, read_header, storage_order
from flashsparse.pack.verify import verify
from flashsparse.sparsity.spec import LayerSpec, Shape, predictor_tensors
from tests.unit.predictor_specs import COPY, LOW_RANK, TEXT, spec
from tests.unit.test_manifest import GOLDEN, edit, put, refused
from tests.unit.tiny_pack import write_pack

SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 6}


@pytest.fixture
def pack(tmp_path: Path) -> Manifest:
    return write_pack(tmp_path / "pack", predictor=spec(), **SHAPE)


def test_golden_predict_pack(pack: Manifest) -> None:
    assert (pack.path / "pack.json").read_text() == (GOLDEN / "predict.json").read_text()
    data = (pack.path / "predictor.safetensors").read_bytes()
    start = (
        b'{"layers.0.gate.weight":{"dtype":"U32","shape":[6,4],"data_offsets":[0,96]},'
        b'"layers.1.gate.weight":{"dtype":"U32","shape":[6,4],"data_offsets":[96,192]},'
        b'"layers.0.gate.biases":{"dtype":"F16","shape":[6,2],"data_offsets":[192,216]},'
    )
    assert data[:8] == struct.pack("<Q", 16376) and data[8:].startswith(start)
    assert len(data) == 16384 + 2 * (6 * 4 * 4 + 2 * 6 * 2 * 2)


@pytest.mark.parametrize("score", ["gate_copy", "gate_up_copy", "low_rank", "gate"])
def test_round_trip(tmp_path: Path, score: str) -> None:
    pack = write_pack(tmp_path / "pack", predictor=spec(score), **SHAPE)
    loaded = Manifest.load(pack.path)
    assert loaded == pack and loaded.predictor == spec(score)
    assert ("predictor.safetensors" in loaded.files) == (score != "gate")
    assert (loaded.tier, loaded.gate) == ("predict", "full" if score == "gate" else "none")
    assert list(loaded.record.fields) == (["up", "down"] if score == "gate" else ["gate", "up", "down"])
    assert verify(pack.path) == []


def test_numbers_are_written_as_floats(tmp_path: Path) -> None:
    layers = (replace(COPY, threshold=0, density=1), LayerSpec(every=True))
    made = spec(layers=layers, target_value=1)
    assert Manifest.load(write_pack(tmp_path / "pack", predictor=made, **SHAPE).path).predictor == made
    assert made.calibrated_density == 1.0
    assert replace(made, layers=(COPY, replace(COPY, density=None))).calibrated_density is None
    assert replace(made, layers=(COPY, LayerSpec(every=True))).calibrated_density == 0.5625


def test_layouts_of_the_tier() -> None:
    def names(gated: bool, layout: str) -> list[str]:
        return list(record_layout(gated, "predict", 64, "F16", None, True, True, layout).fields)

    assert names(True, "none") == ["gate", "gate_bias", "up", "up_bias", "down"]
    assert names(True, "full") == ["up", "up_bias", "down"]
    assert names(False, "none") == ["up", "up_bias", "down"]
    assert names(False, "full") == ["down"]


def test_tensors_of_every_score() -> None:
    shape = Shape(1, 64, 6, True, gate_bias=True, up_bias=True)
    copy = {"weight": ("U32", (6, 4)), "scales": ("F16", (6, 2)), "biases": ("F16", (6, 2)), "bias": ("F32", (6,))}
    gate = {f"layers.0.gate.{name}": kind for name, kind in copy.items()}
    up = {f"layers.0.up.{name}": kind for name, kind in copy.items()}
    norm = {"layers.0.down_norm": ("F32", (6,))}
    assert predictor_tensors(spec(count=1), shape) == gate
    assert predictor_tensors(spec("gate_up_copy", 1), shape) == gate | up | norm
    opt = replace(shape, gated=False, up_bias=False)
    assert predictor_tensors(spec("gate_up_copy", 1), opt) == gate | norm
    assert predictor_tensors(spec("low_rank", 1), shape) == {
        "layers.0.fc1.weight": ("F16", (3, 64)),
        "layers.0.fc2.weight": ("F16", (6, 3)),
        "layers.0.fc2.bias": ("F32", (6,)),
    }
    assert predictor_tensors(spec("gate", 1), shape) == {}
    assert predictor_tensors(spec(layers=(LayerSpec(every=True),)), shape) == {}


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("predictor", None, "predictor: found None, expected an object in tier 'predict'"),
        ("tier", "exact", "expected null in tier 'exact'"),
        ("gate", "full", "gate: found 'full', expected 'none'"),
        ("predictor/score", "oracle", "predictor.score: found 'oracle', expected one of gate_copy"),
        ("predictor/selection", "random", "predictor.selection"),
        ("predictor/target", "hope", "predictor.target"),
        ("predictor/target_value", None, "predictor.target_value: found None, expected a number > 0"),
        ("predictor/target_value", -0.5, "predictor.target_value: found -0.5"),
        ("predictor/target", "none", "predictor.target_value: found 0.98, expected null"),
        ("predictor/texts", None, "predictor.texts: found None, expected a list of SHA-256 digests"),
        ("predictor/texts", [TEXT, "12"], "predictor.texts: found '12', expected 64 lower-case hexadecimal digits"),
        ("predictor/texts", [TEXT, "AB" * 32], "predictor.texts: found 'ABAB"),
        ("predictor/texts", [TEXT, None], "predictor.texts: found None"),
        ("predictor/texts", [TEXT, TEXT], "in ascending order, each once"),
        ("predictor/texts", ["cd" * 32, TEXT], "in ascending order, each once"),
        ("predictor/text_sha256", TEXT, "unknown field predictor.text_sha256"),
        ("predictor/texts", [], "predictor.tokens: found 4096, expected 0"),
        ("predictor/tokens", 0, "predictor.tokens: found 0"),
        ("predictor/tokens", -1, "predictor.tokens: found -1"),
        ("predictor/seed", 1, "unknown field predictor.seed"),
        ("predictor/layers", [], "predictor.layers: found 0, expected an object for each of 2"),
        ("predictor/layers", {}, "predictor.layers: found {}"),
        ("predictor/layers/1/bits", 8, "predictor.layers[1].bits: found 8, expected one of 1, 2, 3, 4"),
        ("predictor/layers/1/bits", None, "predictor.layers[1].bits"),
        ("predictor/layers/1/group_size", 16, "predictor.layers[1].group_size"),
        ("predictor/layers/1/group_size", 128, "found 128, expected a divisor of hidden_size (64)"),
        ("predictor/layers/1/rank", 4, "predictor.layers[1].rank: found 4, expected null"),
        ("predictor/layers/1/relu", True, "predictor.layers[1].relu"),
        ("predictor/layers/1/relu", 0, "predictor.layers[1].relu: found 0"),
        ("predictor/layers/1/threshold", None, "predictor.layers[1].threshold: found None"),
        ("predictor/layers/1/threshold", 1, "predictor.layers[1].threshold: found 1"),
        ("predictor/layers/1/threshold", 1e39, "predictor.layers[1].threshold: found 1e+39"),
        ("predictor/layers/1/k", 3, "predictor.layers[1].k: found 3, expected null"),
        ("predictor/selection", "topk", "predictor.layers[0].threshold: found -0.25, expected null"),
        ("predictor/density", 0.5, "unknown field predictor.density"),
        ("predictor/layers/0/density", 1.5, "predictor.layers[0].density: found 1.5, expected a number in 0..1"),
        ("predictor/layers/0/value_recall", -0.5, "predictor.layers[0].value_recall"),
        ("predictor/layers/0/recall", "all", "predictor.layers[0].recall"),
        ("predictor/layers/0/every", True, "predictor.layers[0].bits: found 2, expected null"),
        ("predictor/layers/0/every", 1, "predictor.layers[0].every: found 1"),
        ("files/predictor.safetensors/blocks", [], "files.predictor.safetensors"),
        ("files/predictor.safetensors/block_bytes", 4096, "files.predictor.safetensors"),
    ],
)
def test_refuses(pack: Manifest, where: str, value: Any, message: str) -> None:
    edit(pack, lambda body: put(body, where, value))
    refused(pack, message)


def test_refuses_nan_and_missing_fields(pack: Manifest) -> None:
    path = pack.path / "pack.json"
    path.write_text(path.read_text().replace("-0.25", "NaN", 1))
    refused(pack, "predictor.layers[0].threshold: found nan")
    path.write_text((GOLDEN / "predict.json").read_text())
    edit(pack, lambda body: body.pop("predictor"))
    refused(pack, "predictor: missing")


def test_refuses_numbers_without_a_text(pack: Manifest) -> None:
    edit(pack, lambda body: body["predictor"].update(texts=[], tokens=0))
    refused(pack, "predictor.layers[0].density: found 0.125, expected null without a calibration text")


@pytest.mark.parametrize(("selection", "missing"), [("topk", "k"), ("topk_and_threshold", "k")])
def test_top_k_needs_its_number(tmp_path: Path, selection: str, missing: str) -> None:
    threshold = None if selection == "topk" else 0.5
    made = spec(selection=selection, layers=(replace(COPY, threshold=threshold, k=2),) * 2)
    pack = write_pack(tmp_path / "pack", predictor=made, **SHAPE)
    assert Manifest.load(pack.path).predictor == made
    for value in (None, 0, 7, 2.0):
        edit(pack, lambda body, value=value: put(body, f"predictor/layers/1/{missing}", value))
        refused(pack, f"predictor.layers[1].{missing}")


def test_the_file_belongs_to_the_predictor(tmp_path: Path, pack: Manifest) -> None:
    entry = json.loads((pack.path / "pack.json").read_text())["files"]["predictor.safetensors"]
    exact = write_pack(tmp_path / "exact")
    edit(exact, lambda body: body["files"].update({"predictor.safetensors": entry}))
    refused(exact, "predictor.safetensors", "no such file")
    edit(pack, lambda body: body["files"].pop("predictor.safetensors"))
    refused(pack, "no predictor.safetensors")


def test_a_file_named_but_absent(pack: Manifest) -> None:
    pack.predictor_path.unlink()
    with pytest.raises(DamagedPackError, match=r"predictor\.safetensors: missing"):
        Manifest.load(pack.path)
    assert [damage.file for damage in verify(pack.path)] == ["predictor.safetensors"]


def check(pack: Manifest, tensors: dict[str, tuple[str, tuple[int, ...]]], message: str) -> None:
    tensors = {name: tensors[name] for name in storage_order(tensors)}
    size = sum({"U32": 4, "F16": 2, "F32": 4}[kind] * rows * cols for kind, (rows, cols) in tensors.values())
    pack.predictor_path.write_bytes(header_bytes(tensors) + bytes(size))
    with pytest.raises(PackError, match=message):
        check_predictor(pack, read_header(pack.predictor_path, PackError))


def test_tensors_are_checked_by_name_type_and_shape(pack: Manifest) -> None:
    assert pack.predictor is not None
    tensors = predictor_tensors(pack.predictor, pack.shape)
    check_predictor(pack, read_header(pack.predictor_path, PackError))
    name = "layers.1.gate.scales"
    check(pack, tensors | {name: ("F16", (6, 1))}, r"layers\.1\.gate\.scales': found F16 \[6, 1\], expected F16")
    check(pack, tensors | {name: ("F32", (6, 2))}, r"layers\.1\.gate\.scales': found F32")
    check(pack, {n: t for n, t in tensors.items() if n != name}, r"layers\.1\.gate\.scales': missing")
    check(pack, tensors | {"layers.2.gate.scales": ("F16", (6, 2))}, r"layers\.2\.gate\.scales'.*no such tensor")


def test_tensors_lie_in_order_at_a_page(pack: Manifest) -> None:
    assert pack.predictor is not None
    tensors = predictor_tensors(pack.predictor, pack.shape)
    order = storage_order(tensors)
    size = pack.predictor_path.stat().st_size - 16384
    gates = ("layers.1.gate.weight", "layers.0.gate.weight")
    for names, align, message in (
        (order, 64, r"predictor\.safetensors: found data at byte \d+, expected a multiple of 16384"),
        ([*gates, *order[2:]], 16384, r"'layers\.1\.gate\.weight': found where 'layers\.0\.gate\.weight' belongs"),
        ([*order[2:], *order[:2]], 16384, r"'layers\.0\.gate\.biases': found where .* belongs, .*largest first"),
    ):
        pack.predictor_path.write_bytes(header_bytes({name: tensors[name] for name in names}, align) + bytes(size))
        with pytest.raises(PackError, match=message):
            check_predictor(pack, read_header(pack.predictor_path, PackError))


def test_a_low_rank_predictor_may_lack_its_bias(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack", predictor=spec("low_rank"), **SHAPE)
    assert pack.predictor is not None
    tensors = predictor_tensors(pack.predictor, pack.shape)
    kept = {name: tensors[name] for name in storage_order(tensors) if not name.endswith("fc2.bias")}
    size = 2 * 2 * (3 * 64 + 6 * 3)
    pack.predictor_path.write_bytes(header_bytes(kept) + bytes(size))
    check_predictor(pack, read_header(pack.predictor_path, PackError))


def test_verify_names_the_damaged_tensor(pack: Manifest) -> None:
    data = bytearray(pack.predictor_path.read_bytes())
    data[-1] ^= 1
    pack.predictor_path.write_bytes(data)
    (damage,) = verify(pack.path)
    assert (damage.kind, damage.file) == ("bytes", "predictor.safetensors")
    assert "layers.0.gate.weight" in str(damage)


def test_describe_counts_the_predictor(pack: Manifest) -> None:
    facts = json.loads(json.dumps(describe(pack.path)))
    assert facts["parameters"]["predictors"] == 2 * 6 * 64
    assert facts["bytes"]["predictor"] == pack.predictor_path.stat().st_size
    assert facts["bytes"]["total"] == sum(path.stat().st_size for path in pack.path.iterdir())
    predictor = facts["predictor"]
    assert (predictor["bits"], predictor["ranks"], predictor["texts"]) == ([2], [], [TEXT])
    assert predictor["density"] == {"least": 0.125, "mean": 0.125, "most": 0.125}
    activated = facts["activated_per_token"]
    assert activated["active_density"] == 0.125
    (row,) = activated["at_density"]
    counts = facts["parameters"]
    rest = counts["attention"] + counts["other"] + counts["embeddings"] + counts["head"] + counts["predictors"]
    assert row["all"] == round(0.125 * counts["ffn"]) + rest


def test_describe_without_calibration(tmp_path: Path) -> None:
    layer = LayerSpec(bits=2, group_size=64, threshold=0.0)
    made = spec(layers=(layer, layer), target="none", target_value=None, texts=(), tokens=0)
    facts = describe(write_pack(tmp_path / "pack", predictor=made, **SHAPE).path)
    assert facts["predictor"]["density"] is None and facts["predictor"]["calibrated_density"] is None
    assert [row["density"] for row in facts["activated_per_token"]["at_density"]] == [0.05, 0.1, 0.2]


def test_info_shows_the_predictor(tmp_path: Path) -> None:
    layers = (COPY, replace(COPY, density=0.25, value_recall=0.99), LayerSpec(every=True))
    write_pack(tmp_path / "pack", predictor=spec(layers=layers), num_hidden_layers=3, **SHAPE)
    result = CliRunner().invoke(info_command, [str(tmp_path / "pack")])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "tier predict, gate layout none" in text
    assert "predictor gate_copy, 2 bits, threshold, calibrated to: value_recall 0.98" in text
    assert "on 4096 tokens: 18.8 % of a layer's neurons (layers 12.5 to 25.0 %), value recall 98.0 to 99.0 %" in text
    assert "whole layers 2 are computed whole" in text
    assert "(as calibrated, 45.8 % of the neurons are active)" in text
    write_pack(tmp_path / "low", predictor=spec("low_rank", layers=(LOW_RANK,) * 2), **SHAPE)
    assert "low_rank, rank 3" in CliRunner().invoke(info_command, [str(tmp_path / "low")]).output
