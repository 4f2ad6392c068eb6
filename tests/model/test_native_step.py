"""A decode step of all layers in one native call: the bits and counts of the path layer by layer, and its failures."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashsparse
from flashsparse import FlashReadError
from flashsparse.engine import Engine
from flashsparse.models.native_decoder import NativeDecoder
from flashsparse.models.native_step import NativeStep
from flashsparse.native import steps
from flashsparse.sparsity.spec import LayerSpec
from flashsparse.stats import Counters
from tests.checkpoints import write_checkpoint
from tests.model.packs import SHAPE, make_pack
from tests.model.predict_packs import default_layer, make_predict_pack
from tests.vector_files import read

PROMPT = [int(t) for t in np.random.default_rng(7).integers(3, 60, 20)]
STEPS = [int(t) for t in np.random.default_rng(8).integers(3, 60, 10)]
COPY = default_layer("gate_copy")
TIMES = {name for name in asdict(Counters()) if name.endswith("_s") or name == "seconds"}


def in_python(engine: Engine) -> None:
    """Take the path layer by layer from now on."""
    assert isinstance(engine._decoder, NativeDecoder)
    engine._decoder._step = None


def decode(engine: Engine) -> np.ndarray:
    with engine.session() as session:
        return np.concatenate([session.logits(PROMPT)[-1:], *(session.logits([token]) for token in STEPS)])


def counts(engine: Engine) -> dict[str, Any]:
    found = {name: value for name, value in asdict(engine.counters).items() if name not in TIMES}
    return {**found, "decoded": [(ffn.decoded, ffn.decoded_neurons) for ffn in engine._ffns]}


def from_vector(root: Path, name: str) -> Path:
    from converter.convert import convert

    vector = read(name)
    return convert(vector.folder, root / name, activation=vector.record["convert_activation"])


def scaled(root: Path) -> Path:
    """MiniCPM's layers, whose residuals are scaled."""
    from converter.convert import convert

    return convert(write_checkpoint(root / "source", "minicpm", layers=2, heads=8, kv_heads=2), root / "pack")


@pytest.fixture
def native_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Appends the first layer and the end of everything that is run natively."""
    original, seen = NativeStep.run, []

    def run(step: NativeStep, first: int, end: int, *more: Any) -> None:
        seen.append((first, end))
        original(step, first, end, *more)

    monkeypatch.setattr(NativeStep, "run", run)
    return seen


CASES: dict[str, tuple[Any, int]] = {
    "exact": (lambda root: make_pack(root, tier="exact"), 300),
    "exact-4-bits": (lambda root: make_pack(root, tier="exact", bits=4), 60),
    "compact": (lambda root: make_pack(root, tier="exact", gate="compact"), 60),
    "bias": (lambda root: from_vector(root, "llama-bias-relu2"), 20),
    "post-norm": (lambda root: from_vector(root, "opt-post-proj-relu"), 20),
    "opt": (lambda root: from_vector(root, "opt-pre-relu"), 20),
    "scaled": (scaled, 60),
    "predict": (make_predict_pack, 300),
    "predict-all-slots": (make_predict_pack, 512),
    "predict-one-whole": (lambda root: make_predict_pack(root, layers={1: LayerSpec(every=True)}), 300),
    "predict-top": (
        lambda root: make_predict_pack(root, selection="topk", layer=replace(COPY, threshold=None, k=60)),
        128,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("patience", [1, steps.PATIENCE_NS], ids=["layer by layer", "at once"])
def test_bits_and_counts(
    name: str, patience: int, tmp_path: Path, native_steps: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, slots = CASES[name]
    path = make(tmp_path)
    monkeypatch.setattr(steps, "PATIENCE_NS", patience)
    with flashsparse.load(path, slots=slots, lookahead="off") as engine:
        found, counted = decode(engine), counts(engine)
        layers = len(engine._ffns)
    expected = [(0, 1), (2, 3)] if name == "predict-one-whole" else [(0, layers)]
    assert native_steps == expected * len(STEPS)
    native_steps.clear()
    with flashsparse.load(path, slots=slots, lookahead="off") as engine:
        in_python(engine)
        np.testing.assert_array_equal(found, decode(engine))
        assert counted == counts(engine)
        assert sum(counted[key] for key in ("hits", "misses")) > 0
    assert not native_steps


@pytest.mark.parametrize("kind", ["full", "predict"])
def test_hints_change_no_bits(kind: str, tmp_path: Path, native_steps: list[tuple[int, int]]) -> None:
    path = make_pack(tmp_path, tier="exact") if kind == "full" else make_predict_pack(tmp_path)
    results = []
    for mode in ("off", "on", "auto"):
        with flashsparse.load(path, slots=300, lookahead=mode) as engine:
            results.append(decode(engine))
            assert (engine.counters.prefetch_used > 0) == (mode == "on") or mode == "auto"
            for ffn in engine._ffns:
                assert ffn.table is not None and ffn.table.native.reservation == 0
                ffn.table.check()
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert len(native_steps) == 3 * len(STEPS)


def test_observers_see_every_layer(tmp_path: Path, native_steps: list[tuple[int, int]]) -> None:
    path, seen = make_predict_pack(tmp_path), []
    for native in (True, False):
        told: list[tuple[int, list[int]]] = []
        with flashsparse.load(path, slots=300) as engine:
            if not native:
                in_python(engine)
            engine.observe(lambda layer, ids, told=told: told.append((layer, ids.tolist())))
            decode(engine)
            engine.observe(None)
            decode(engine)
        seen.append(told)
    assert seen[0] == seen[1] and len(seen[0]) >= len(STEPS) * SHAPE["layers"]
    assert len(native_steps) == 2 * len(STEPS)


def test_what_is_changed_runs_layer_by_layer(tmp_path: Path, native_steps: list[tuple[int, int]]) -> None:
    with flashsparse.load(make_predict_pack(tmp_path), slots=300) as engine:
        expected = decode(engine)
        native_steps.clear()
        engine.set_dense(True)
        decode(engine)
        engine.set_dense(False)
        engine.judge(lambda _: None)
        np.testing.assert_array_equal(decode(engine), expected)
        engine.judge(None)
        assert not native_steps
        engine._ffns[1].native = None
        np.testing.assert_array_equal(decode(engine), expected)
        assert native_steps == [(0, 1), (2, 3)] * len(STEPS)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_failed_read_is_that_layers(layer: int, tmp_path: Path, native_steps: list[tuple[int, int]]) -> None:
    path = make_pack(tmp_path, tier="exact")
    with flashsparse.load(path, slots=300, lookahead="off", read_mode="buffered") as engine:
        expected = decode(engine)
        kept = counts(engine)
    for native in (True, False):
        with flashsparse.load(path, slots=300, lookahead="off", read_mode="buffered") as engine:
            if not native:
                in_python(engine)
            with engine.session() as session:
                session.logits(PROMPT[:1])
                file = Path(engine._ffns[layer].flash.file.path)
                whole, held = file.read_bytes(), session.fed
                os.truncate(file, 4096)
                before = engine.counters.copy()
                with pytest.raises(FlashReadError, match=file.name):
                    session.logits(PROMPT[1:2])
                kept = counts(engine) if native else kept
                assert session.fed == held and counts(engine)["hits"] == kept["hits"]
                assert counts(engine)["active"] == kept["active"] > before.active
                file.write_bytes(whole)
                for ffn in engine._ffns:
                    assert ffn.table is not None
                    ffn.table.check()
                rest = session.logits(PROMPT[2:])[-1:]
            np.testing.assert_array_equal(rest, expected[:1])
    assert native_steps


def test_a_state_that_is_no_number_reaches_the_end(tmp_path: Path, native_steps: list[tuple[int, int]]) -> None:
    path = make_pack(tmp_path, tier="exact")
    results = []
    for native in (True, False):
        with flashsparse.load(path, slots=300, lookahead="off") as engine, engine.session() as session:
            if not native:
                in_python(engine)
            session.logits(PROMPT)
            for cache in engine._caches[:1]:
                cache.values.view(np.uint16)[:] = 0x7E00  # NaN
            results.append(session.logits(STEPS[:1]))
            results.append(session.logits(STEPS[1:2]))
    np.testing.assert_array_equal(results[:2], results[2:])
    assert np.isnan(results[0]).all() and len(native_steps) == 2
