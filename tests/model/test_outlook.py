"""What doctor expects of a checkpoint is what the pack converted from it needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from converter.convert import convert
from converter.expected import expected_manifest
from flashsparse.errors import UnsupportedModelError
from flashsparse.outlook import Shape, checkpoint_shape, pack_shape
from flashsparse.pack.manifest import PREDICTOR, RESIDENT, Manifest
from tests.checkpoints import write_checkpoint
from tests.model.packs import SHAPE

DEMO = Path(__file__).parents[2] / "flashsparse" / "demo_model"


def expected_shape(source: Path, dram: str | None, tier: str, bits: int) -> Shape:
    return checkpoint_shape(source, expected_manifest(source, tier, bits), dram)


def check(source: Path, pack: Path, tier: str, bits: int) -> None:
    """File by file, and in what the memory plan makes of it."""
    found, made = expected_manifest(source, tier, bits), Manifest.load(pack)
    assert (found.record, found.gate, found.resident_quant) == (made.record, made.gate, made.resident_quant)
    for name in (RESIDENT, PREDICTOR):
        assert (name in found.files) == (name in made.files)
        if name in made.files:
            assert found.files[name].bytes == made.files[name].bytes
    smallest = f"{pack_shape(pack, None).floor}"
    for dram in (None, smallest, f"{int(smallest) + 100_000}"):
        found_shape, made_shape = expected_shape(source, dram, tier, bits), pack_shape(pack, dram)
        assert found_shape.needs == pytest.approx(made_shape.needs, rel=0.01)
        assert found_shape == replace(made_shape, name=found_shape.name)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("tier", ["exact", "predict", "dense"])
@pytest.mark.parametrize(
    "checkpoint",
    [
        {"dtype": "F16"},
        {"dtype": "F32", "tie_word_embeddings": True},
        {"dtype": "BF16", "mlp_bias": True, "attention_bias": True},
        {"family": "opt", "dtype": "F16"},
    ],
    ids=["llama", "tied", "biased", "opt"],
)
def test_a_tiny_checkpoint_as_converted(tmp_path: Path, checkpoint: dict[str, Any], tier: str, bits: int) -> None:
    family, options = checkpoint.get("family", "llama"), {k: v for k, v in checkpoint.items() if k != "family"}
    source = write_checkpoint(tmp_path / "source", family, **{**SHAPE, **options})
    check(source, convert(source, tmp_path / "pack", tier=tier, bits=bits), tier, bits)


@pytest.mark.parametrize("tier", ["exact", "predict"])
def test_the_demo_model_as_converted(tmp_path: Path, tier: str) -> None:
    check(DEMO, convert(DEMO, tmp_path / "pack", tier=tier), tier, 16)


def test_what_cannot_be_converted_is_not_expected(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, activation="silu")
    with pytest.raises(UnsupportedModelError, match="tier exact needs an activation with exact zeros"):
        expected_shape(tmp_path, None, "exact", 16)
