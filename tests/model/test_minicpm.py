"""MiniCPM's muP against float64 numpy, where its mathematics is written out: transformers has no MiniCPM."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import flashsparse
from converter.convert import convert
from flashsparse.errors import PackError
from flashsparse.pack.checks import Node
from flashsparse.pack.config import check_config
from flashsparse.pack.manifest import Manifest
from tests import numpy_llama
from tests.checkpoints import write_checkpoint
from tests.vector_files import TOLERANCE, error

TOKENS = np.random.default_rng(3).integers(0, 128, 40)
CASES = [("relu", None, True), ("silu", None, True), ("fatrelu", 0.03, True), ("relu", None, False)]


def checkpoint(path: Path, activation: str, param: float | None, tie: bool) -> Path:
    more = {} if param is None else {"hidden_act_param": param}
    return write_checkpoint(path, "minicpm", activation=activation, tie=tie, layers=3, heads=8, kv_heads=2, **more)


def run(pack: Path) -> np.ndarray:
    with flashsparse.load(pack) as engine, engine.session() as session:
        parts = [session.logits(part) for part in np.split(TOKENS, [20, 21])]
    return np.concatenate(parts)


@pytest.mark.parametrize(("activation", "param", "tie"), CASES, ids=str)
def test_logits(activation: str, param: float | None, tie: bool, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", activation, param, tie)
    found = run(convert(source, tmp_path / "pack"))
    config, weights = numpy_llama.load(source)
    assert error(found, numpy_llama.logits(config, weights, TOKENS, activation, param)) < TOLERANCE
    # Each of the three factors matters to the tolerance above.
    for name in ("scale_emb", "scale_depth", "dim_model_base"):
        other = numpy_llama.logits({**config, name: 2 * config[name]}, weights, TOKENS, activation, param)
        assert error(found, other) > 1e-2


def test_scales_are_checked_when_a_pack_is_read(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "relu", None, True)
    pack = convert(source, tmp_path / "pack")
    manifest = Manifest.load(pack)
    config = json.loads((pack / "config.json").read_text())
    for change, message in (
        ({"residual_multiplier": 0.0}, "residual_multiplier"),
        ({"logits_divisor": "4"}, "logits_divisor"),
        ({"source_model_type": "llama"}, "unknown field embedding_multiplier"),
    ):
        with pytest.raises(PackError, match=message):
            check_config(Node(config | change, pack / "config.json"), manifest)
