"""Whole models with the Metal kernels in the FFN's place: logits and tokens of the vectors and the native kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from tests.metal.engine_kernels import MetalKernels
from tests.model.packs import make_pack
from tests.model.predict_packs import default_layer, make_predict_pack
from tests.vector_files import TOLERANCE, engine_greedy, engine_logits, error, read

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("metal")]
NAMES = ("llama-bias-relu2", "bamboo-drelu", "opt-pre-relu")


def logits(pack: Path, prompt: list[int], **options: Any) -> np.ndarray:
    """Those of a prompt and of one token after it."""
    with flashsparse.load(pack, **options) as engine, engine.session() as session:
        return np.concatenate([session.logits(prompt), session.logits([5])])


def use_metal(monkeypatch: pytest.MonkeyPatch) -> list[MetalKernels]:
    """Every engine opened from here on computes its FFN with the Metal kernels; they are listed here."""
    kernels: list[MetalKernels] = []

    def make(choice: str, manifest: Any, threads: int) -> MetalKernels:
        kernels.append(MetalKernels(manifest))
        return kernels[-1]

    monkeypatch.setattr("flashsparse.kernels.make_kernels", make)
    return kernels


@pytest.mark.parametrize("name", NAMES)
def test_models_match_their_vectors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converter.convert import convert

    vector, made = read(name), use_metal(monkeypatch)
    pack = convert(vector.folder, tmp_path / "pack", activation=vector.record["convert_activation"])
    with flashsparse.load(pack, kernels="reference") as engine:
        assert error(engine_logits(engine, vector), vector.logits) < TOLERANCE
        assert engine_greedy(engine, vector) == vector.greedy.tolist()
    assert made[0].launches > 100


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models_match_the_native_kernels(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(make_pack(tmp_path, bits=bits, hidden=64), monkeypatch)


@pytest.mark.parametrize("selection", ["threshold", "topk_and_threshold"])
def test_predicted_models_match_the_native_kernels(
    selection: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = replace(default_layer("gate_copy"), k=None if selection == "threshold" else 100)
    check(make_predict_pack(tmp_path, selection=selection, layer=layer), monkeypatch)


def check(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernels' logits of a prompt and of the token after it."""
    prompt = list(range(3, 20))
    expected = logits(pack, prompt)
    made = use_metal(monkeypatch)
    assert error(logits(pack, prompt, kernels="reference"), expected) < TOLERANCE
    assert made[0].launches > 10
